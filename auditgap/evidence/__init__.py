"""Evidence for somebody who does not trust the auditor: a plan that is signed before the run, a
result that is signed after it, and whatever is needed to check both.

    plan = dsse.sign(attest.planned(LATENT, prepared, options, Criteria()), key)
    result = dsse.sign(attest.found(store, cells.of(store), plan), key)
    verify(store, public).findings                      # empty: what was signed is what is there
    disclose(store, cell)                               # one cell, the others withheld

A room for each idea: `keys` and `dsse` (Ed25519, in-toto Statements in DSSE envelopes), `manifest`
(a model's files, as OpenSSF model signing has them), `cells` and `merkle` (a run's cells as a tree),
`attest`, `checking`, `disclosure`.
"""

from auditgap.evidence.checking import Finding, Seen, verify
from auditgap.evidence.disclosure import disclose

__all__ = ["Finding", "Seen", "disclose", "verify"]
