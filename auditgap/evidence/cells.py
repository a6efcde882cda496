"""The finished cells of a run as leaves of a Merkle tree: what each is, said in five hashes, so that
one that has changed can be named and one can be shown while the others stay withheld.

    leaves = of(store)                     # by key, sorted
    tree(leaves)                           # the root, as hex

A leaf says nothing of how a cell is stored: joined, merged, moved or copied it stays the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from auditgap.evidence import merkle
from auditgap.store import RunFolder, files
from auditgap.store.cellfile import StoredCell
from auditgap.store.files import Damaged
from auditgap.store.tables import content_sha256
from auditgap.types import Document, canonical, digest

#: The list of a run's leaves, below its folder.
LEAVES = Path("evidence/cells.json")
#: Of a record: what is said by a hash of its own.
_HASHED = ("sha256", "generations", "edits")


@dataclass(frozen=True, slots=True)
class Leaf:
    """A finished cell: its key, and the SHA-256 of its record, its rows, what its model said and
    its edits ("" where it has none)."""

    key: str
    record: str
    rows: str
    completions: str
    edits: str

    @property
    def hash(self) -> bytes:
        """In the tree."""
        return merkle.leaf(canonical(asdict(self)).encode("ascii"))

    def differences(self, other: Leaf) -> list[tuple[str, str, str]]:
        """(what, here, there) of each part that is not the same."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return [("row" if what == "rows" else what, a, b) for what, a, b in pairs if a != b]


def leaf_of(cell: StoredCell, edits: str) -> Leaf:
    """A cell's leaf, of what its files hold now; `edits`: the SHA-256 of its edits' file."""
    record = {k: v for k, v in cell.record.items() if k not in _HASHED}
    return Leaf(
        cell.record["key"],
        digest(record, 64),
        "" if cell.rows is None else content_sha256(cell.rows),
        "" if cell.texts is None else content_sha256(cell.texts),
        edits,
    )


def of(store: RunFolder) -> dict[str, Leaf]:
    """The leaves of all finished cells, sorted by key."""
    found = {}
    for cell in store.contents():
        key = cell.record["key"]
        path = store.edits(key)
        try:
            edits = files.sha256(files.read(path)) if cell.record.get("edits") else ""
        except FileNotFoundError:
            raise Damaged(path, "it is missing") from None
        found[key] = leaf_of(cell, edits)
    return dict(sorted(found.items()))


def tree(leaves: Iterable[Leaf]) -> str:
    """The root of the tree, as hex."""
    return merkle.root([leaf.hash for leaf in leaves]).hex()


def write(store: RunFolder, leaves: Mapping[str, Leaf]) -> None:
    """Write the list beside the statement: so that `verify` can say which cell is another one.
    Raises DiskError."""
    listed: Document = {"leaves": [asdict(leaf) for leaf in leaves.values()]}
    path = store.path / LEAVES
    with files.disk_errors(path.parent):
        path.parent.mkdir(exist_ok=True)
    files.write_document(path, listed)


def read(store: RunFolder) -> list[Leaf]:
    """The list in its order; empty where there is none. Raises Damaged."""
    found = files.read_document(
        store.path / LEAVES, "Write it again: auditgap attest DIR --key KEY."
    )
    try:
        return [Leaf(**{k: str(v) for k, v in one.items()}) for one in (found or {})["leaves"]]
    except KeyError:
        return []
    except (TypeError, AttributeError):
        raise Damaged(store.path / LEAVES, "it is no list of cells") from None
