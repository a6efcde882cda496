"""One cell shown with the proof that it is of the signed run, while all others stay withheld.

    document = disclose(store, "9c1e…")                     # its record, its rows, its proof
    findings = verify(document, keys.read(Path("auditor.pem.pub")))

What its model said is left out unless it is asked for; its hash is there all the same. Of the other
cells a disclosure holds hashes of pairs alone, and their number.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from auditgap.errors import UsageError
from auditgap.evidence import attest, cells, dsse, merkle
from auditgap.evidence.cells import Leaf
from auditgap.evidence.checking import Finding
from auditgap.store import RunFolder, files
from auditgap.store.cellfile import StoredCell
from auditgap.store.tables import from_base64, to_base64
from auditgap.types import Document, digest

KIND = "auditgap disclosure"
#: Levels of a tree that is climbed: somebody else says how many cells there are.
_DEEPEST = 63


def disclose(store: RunFolder, name: str, *, completions: bool = False) -> Document:
    """The document that shows a cell, by its key or by what reports call it. `completions`: with
    what its model said.

    Raises UsageError where nothing is signed, or the cell is not of the signed run.
    """
    signed = dsse.read(store.path / attest.RESULT_FILE)
    known = sorted(cells.of(store).values(), key=lambda leaf: leaf.key)
    if cells.tree(known) != signed.statement["predicate"]["cells"]["root"]:
        raise UsageError(
            f"The cells of {store.place} are not those that were signed; `auditgap verify` says"
            " which differ."
        )
    called = {record["key"]: record["cell"] for record in store.iter_records()}
    keys = [key for key in called if name in (key, called[key])]
    cell = store.stored(keys[0]) if len(keys) == 1 else None
    if cell is None:
        raise UsageError(
            f"{store.place} has {len(keys)} finished cells called {name}. One of:"
            f" {'; '.join(sorted(called.values())[:8])}. Its key does as well."
        )
    at = [leaf.key for leaf in known].index(keys[0])
    hashes = [leaf.hash for leaf in known]
    return {
        "kind": KIND,
        "leaf": asdict(known[at]),
        "proof": {
            "index": at,
            "n": len(known),
            "path": [one.hex() for one in merkle.proof(hashes, at)],
        },
        "record": cell.record,
        "rows": to_base64(cell.rows),
        "completions": to_base64(cell.texts) if completions else None,
        "result": signed.to_json(),
    }


def read(path: Path) -> Document:
    """The disclosure in a file. Raises UsageError for something else, Damaged."""
    found = files.read_document(path, "Ask for it again.")
    if found is None or found.get("kind") != KIND:
        raise UsageError(f"{path} is no disclosure. Make one: auditgap disclose DIR CELL")
    return found


def verify(document: Mapping[str, Any], key: Ed25519PublicKey) -> list[Finding]:
    """What of a disclosure does not hold. Raises UsageError for something else."""
    try:
        signed = dsse.from_json(document["result"], "the disclosure's result")
        leaf, proof = Leaf(**document["leaf"]), document["proof"]
        root = signed.statement["predicate"]["cells"]["root"]
        path = [bytes.fromhex(one) for one in proof["path"]]
        index, n = operator.index(proof["index"]), operator.index(proof["n"])
        if n.bit_length() > _DEEPEST:
            raise ValueError("a tree that no disk holds")
        if not isinstance(document["record"], dict) or not all(
            isinstance(part, str) for part in asdict(leaf).values()
        ):
            raise TypeError("a cell in another form")
        cell = StoredCell(
            document["record"], from_base64(document["rows"]), from_base64(document["completions"])
        )
    except (KeyError, TypeError, ValueError, pa.ArrowException):
        raise UsageError("This is no disclosure as `auditgap disclose` writes it.") from None
    found = []
    if not signed.signed_by(key):
        found.append(Finding("signature", "result", "this key's signature", "none of it"))
    try:
        reached = merkle.root_through(leaf.hash, index, n, path).hex()
    except ValueError as error:
        reached = str(error)
    if reached != root:
        found.append(Finding("proof", f"cell {leaf.key}", root, reached))
    told = cells.leaf_of(cell, leaf.edits)
    if document["completions"] is None:
        told = replace(told, completions=leaf.completions)
    for what, before, now in leaf.differences(told):
        found.append(Finding(what, f"cell {leaf.key}", before, now))
    if digest(cell.record.get("description")) != leaf.key:
        found.append(Finding("record", f"cell {leaf.key}", leaf.key, "another description"))
    return found
