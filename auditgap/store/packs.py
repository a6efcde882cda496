"""Packs: the rows of many finished cells in one file, so that the next reduction does not parse
100,000 small files again.

    # rows of cells whose keys begin with 9c; named by a hash of its own bytes
    DIR/index/9c-51f04a….parquet

    index = Index(Path("out/index"))
    # a parquet file's rows, from a pack or from `data`, which is packed for next time
    index.read({"9c1e…": (sha256, data)})

A cache and never the truth: whoever reads has looked at each cell, and gets from a pack only rows
of a file with the very checksum that it found. What is torn, stale or gone is parsed from the cells
again. The folder may be deleted at any time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import compress, groupby
from pathlib import Path

import numpy as np
import pyarrow as pa

from auditgap.store import files, tables

#: fewer new cells than this are parsed every time; so a run of less than some thousand cells has no
#: packs
SMALL = 16
_PREFIX = 2  # hex digits: 256 buckets, as keys are hashes
_CELLS = b"cells"


@dataclass(frozen=True)
class Pack:
    """`cells`: key, checksum and number of rows of each; `rows`: theirs, below each other in that
    order."""

    cells: tuple[tuple[str, str, int], ...]
    rows: pa.Table

    def only(self, wanted: Sequence[bool]) -> Pack:
        if all(wanted):
            return self
        mask = np.repeat(wanted, [n for _, _, n in self.cells])
        return Pack(tuple(compress(self.cells, wanted)), self.rows.filter(pa.array(mask)))


def buckets(keys: Sequence[str]) -> Iterator[list[str]]:
    """Sorted keys, those together that a pack may hold together."""
    for _, some in groupby(keys, key=lambda key: key[:_PREFIX]):
        yield list(some)


class Index:
    """The packs of one run folder, listed once; threads may read different buckets at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: dict[str, list[str]] = {}
        with suppress(OSError):
            for name in sorted(os.listdir(folder)):
                if name.endswith(".parquet") and not name.startswith("."):
                    self._names.setdefault(name.rpartition("-")[0], []).append(name)

    def read(self, cells: Mapping[str, tuple[str, bytes]]) -> list[Pack]:
        """The rows of `cells` of one bucket: key → (SHA-256, bytes) of its rows.parquet. All of a
        pack have one schema."""
        if not cells:
            return []
        bucket = next(iter(cells))[:_PREFIX]
        left = dict(cells)
        found = []
        for name in self._names.get(bucket, ()):
            pack = self._load(name)
            if pack is not None:
                wanted = [left.get(key, ("",))[0] == checksum for key, checksum, _ in pack.cells]
                found.append(pack.only(wanted))
                for key, _, _ in found[-1].cells:
                    del left[key]
        fresh = _parsed(left)
        for pack in fresh:
            if len(pack.cells) >= SMALL:
                self._save(bucket, pack)
        return [pack for pack in [*found, *fresh] if pack.cells]

    def _load(self, name: str) -> Pack | None:
        """The pack of that name; None, and it is deleted, when it is not whole."""
        path = self.folder / name
        with suppress(OSError, ValueError, KeyError, TypeError):  # ArrowInvalid is a ValueError
            data = path.read_bytes()
            if _name(name.rpartition("-")[0], data) == name:
                rows = tables.from_bytes(data)
                cells = tuple(
                    (str(key), str(sum_), int(n))
                    for key, sum_, n in json.loads(rows.schema.metadata[_CELLS])
                )
                if sum(n for _, _, n in cells) == len(rows):
                    return Pack(cells, rows.replace_schema_metadata(None))
        with suppress(OSError):
            path.unlink()
        return None

    def _save(self, bucket: str, pack: Pack) -> None:
        """A disk that is full or not ours to write costs the next reader some time, and nothing
        else."""
        data = tables.to_bytes(
            pack.rows.replace_schema_metadata({_CELLS: json.dumps(pack.cells).encode("ascii")})
        )
        with suppress(OSError, files.DiskError):
            self.folder.mkdir(exist_ok=True)
            files.write_bytes(self.folder / _name(bucket, data), data)


def _name(bucket: str, data: bytes) -> str:
    return f"{bucket}-{files.sha256(data)[:32]}.parquet"


def _parsed(cells: Mapping[str, tuple[str, bytes]]) -> list[Pack]:
    """One pack a schema: most cells have the same, but a text column with a lone surrogate is one
    of bytes."""
    by_schema: dict[bytes, list[tuple[tuple[str, str, int], pa.Table]]] = {}
    for key, (checksum, data) in cells.items():
        rows = tables.from_bytes(data)
        by_schema.setdefault(rows.schema.serialize().to_pybytes(), []).append(
            ((key, checksum, len(rows)), rows)
        )
    return [
        # in one piece: 100,000 small tables of thirty columns would take gigabytes
        Pack(
            tuple(cell for cell, _ in some),
            pa.concat_tables([rows for _, rows in some]).combine_chunks(),
        )
        for some in by_schema.values()
    ]
