"""The rows of many files of cells as one frame, the same whatever file each row came from."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import pyarrow as pa

from auditgap.rows import Row
from auditgap.store import tables
from auditgap.store.cellfile import KEY

_TOGETHER = 128  # small tables that are joined at a time
_SORT = ("subject", "layer_index", "unit", "eps", "attack", "draw", "prompt_id")


def below_each_other(parts: Iterable[tuple[list[str], pa.Table]]) -> pd.DataFrame:
    """The rows of (cells, their table), by subject, layer, unit, eps, attack, draw, prompt, and
    where these are equal by cell. A frame a file would take most of the time: it is one a schema,
    and the columns are those of the first cell's schema first."""
    by_schema: dict[bytes, _Pile] = {}
    for keys, table in parts:
        schema = table.schema.serialize().to_pybytes()
        by_schema.setdefault(schema, _Pile()).add(keys, table)
    places = pd.Index(sorted(key for pile in by_schema.values() for key in pile.keys))
    found = []
    for pile in by_schema.values():
        table = pile.joined()
        frame = tables.to_frame(table.drop_columns([KEY]))
        frame.index = pd.Index(places.get_indexer(table[KEY].to_pandas()))
        found.append((min(pile.keys), frame))
    ordered = [frame for _, frame in sorted(found, key=lambda pair: pair[0])]
    filled = [frame for frame in ordered if len(frame)] or ordered[:1]
    if not filled:
        return tables.to_frame(tables.schema_of(Row).empty_table())
    table = pd.concat(filled).sort_index(kind="stable").reset_index(drop=True)
    by = [name for name in _SORT if name in table.columns]
    if not by:
        return table
    return table.sort_values(by, kind="stable", na_position="first", ignore_index=True)


class _Pile:
    """Tables of one schema, joined every so often: 10,000 small ones of thirty columns would take
    gigabytes."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self._tables: list[pa.Table] = []
        self._small = 0  # at the end of the tables, not joined yet

    def add(self, keys: list[str], table: pa.Table) -> None:
        self.keys += keys
        self._tables.append(table)
        self._small += 1
        if self._small == _TOGETHER:
            some = self._tables[-_TOGETHER:]
            self._tables[-_TOGETHER:] = [pa.concat_tables(some).combine_chunks()]
            self._small = 0

    def joined(self) -> pa.Table:
        """All of them in one piece."""
        return pa.concat_tables(self._tables).combine_chunks()
