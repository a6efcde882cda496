"""The rows of many files of cells as one frame, the same whatever file each row came from."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import pyarrow as pa

from auditgap.store import tables
from auditgap.store.cellfile import KEY
from auditgap.types import Row

_SORT = ("subject", "layer_index", "unit", "eps", "attack", "draw", "prompt_id")


def below_each_other(parts: Iterable[tuple[list[str], pa.Table]]) -> pd.DataFrame:
    """The rows of (cells, their table), by subject, layer, unit, eps, attack, draw, prompt, and
    where these are equal by cell. A frame a file would take most of the time: it is one a schema,
    and the columns are those of the first cell's schema first."""
    by_schema: dict[bytes, list[tuple[list[str], pa.Table]]] = {}
    for keys, table in parts:
        schema = table.schema.serialize().to_pybytes()
        by_schema.setdefault(schema, []).append((keys, table))
    places = pd.Index(
        sorted(key for some in by_schema.values() for keys, _ in some for key in keys)
    )
    found = []
    for some in by_schema.values():
        # in one piece: 10,000 small tables of thirty columns would take gigabytes
        table = pa.concat_tables([table for _, table in some]).combine_chunks()
        frame = tables.to_frame(table.drop_columns([KEY]))
        frame.index = pd.Index(places.get_indexer(table[KEY].to_pandas()))
        found.append((min(min(keys) for keys, _ in some), frame))
    ordered = [frame for _, frame in sorted(found, key=lambda pair: pair[0])]
    filled = [frame for frame in ordered if len(frame)] or ordered[:1]
    if not filled:
        return tables.to_frame(tables.schema_of(Row).empty_table())
    table = pd.concat(filled).sort_index(kind="stable").reset_index(drop=True)
    by = [name for name in _SORT if name in table.columns]
    if not by:
        return table
    return table.sort_values(by, kind="stable", na_position="first", ignore_index=True)
