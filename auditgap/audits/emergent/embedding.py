"""How different the rows of a domain are from each other, as a sentence encoder reads them.

    store, outcome = STAGE.run_in("runs/em", options)
    store.rows([DIVERSITY])         # beside those of the base's states, with `encoder`

A row is its prompt, a line break and its response, cut where the encoder's window ends (counted). The
rows are those whose states `diversity` reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from auditgap.audits.emergent.config import EmergentOptions
from auditgap.audits.emergent.diversity import chosen, numbers
from auditgap.audits.emergent.rows import DIVERSITY, DiversityRow
from auditgap.audits.emergent.stage import CellWorker, StageCell, Study, StudyStage
from auditgap.models.encoder import SentenceEncoder
from auditgap.stats.diversity import why_not
from auditgap.sweep import Group
from auditgap.types import Cell, Subject, digest


def plan(study: Study, options: EmergentOptions) -> list[Group]:
    """A group a domain; none where no encoder is named. Raises UsageError where it is not there."""
    name = study.config.embedder
    if name is None:
        return []
    subject = Subject(name, SentenceEncoder(name, device=options.device).fingerprint)
    groups = []
    for domain in study.config.domains:
        rows = chosen(study, domain)
        rows_digest = digest([row.id for row in rows])
        settings = {"name": f"{domain} embedded", "domain": domain, "text": "prompt, response"}
        cell = StageCell(subject, None, None, DIVERSITY, rows_digest, settings)
        groups.append(Group(str(cell), (cell,), work=float(len(rows))))
    return groups


class EmbeddingWorker(CellWorker):
    """Keeps the encoder loaded. `folder`: of the study, by name."""

    def __init__(self, folder: str, options: EmergentOptions) -> None:
        self.study = Study.load(folder)
        self.store = self.study.store
        self.encoder = SentenceEncoder(str(self.study.config.embedder), device=options.device)

    def close(self) -> None:
        """Let go of the encoder; a further group loads it again."""
        self.encoder.close()

    def _run(self, cell: Cell, tick: Callable[[float], None]) -> None:
        started, before = time.monotonic(), self.encoder.n_cut
        rows = chosen(self.study, cell.settings["domain"])
        whole = self.encoder.embed([f"{row.prompt}\n{row.response}" for row in rows])
        tick(float(len(rows)))
        n_cut, problem = self.encoder.n_cut - before, why_not(whole)
        row = DiversityRow(
            domain=cell.settings["domain"],
            n=len(rows),
            block=None,
            **numbers(whole, problem),
            unscored=problem or (f"of {n_cut} rows the end was not read" if n_cut else ""),
            encoder=self.encoder.name,
        )
        info = {"device": self.encoder.device, "n_cut": n_cut}
        self.store.write(cell, [row], seconds=time.monotonic() - started, info=info)


STAGE = StudyStage(name="embedding", plan=plan, make=EmbeddingWorker)
