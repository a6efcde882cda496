"""Packs are a cache: with them, without them, torn, stale or of somebody else, the table is that of
a plain loop over cells."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from auditgap.store import RunFolder, packs, tables
from auditgap.types import ATTACKS, Budget, Cell, DistanceRow, Row, Site, Subject

ORDER = ["subject", "layer_index", "unit", "eps", "attack", "draw", "prompt_id"]


def cell(layer: int, eps: float, attack: str) -> Cell:
    return Cell(Subject("toy", "f00d"), Site(layer), Budget(eps, "rms"), attack, "5150")


def row(of: Cell, prompt: str, **changes) -> Row:
    known = {
        "subject": "toy",
        "site": str(of.site),
        "layer_index": of.site.layer_index,
        "unit": "rms",
        "eps": of.budget.size,
        "attack": of.attack,
        "draw": 0,
        "prompt_id": prompt,
        "n_prompt_tokens": 4,
        "n_new_tokens": 2,
        "flags": "",
        "unscored": "",
        "lvs": of.budget.size / 3,
        "coherent": True,
        **changes,
    }
    return Row(**({f.name: None for f in fields(Row)} | known))


def distance_row(of: Cell) -> DistanceRow:
    return DistanceRow(
        subject="toy",
        site=str(of.site),
        layer_index=of.site.layer_index,
        unit="rms",
        prompt_id="p0",
        distance=0.5,
        eps_abs=None,
        collapsed=None,
        evaluations=3,
        verdict_clean=None,
    )


def fill(store: RunFolder, n: int = 6) -> None:
    """Cells of every kind: plain ones, nulls, a lone surrogate, none at all, another row type,
    failed, torn."""
    for i in range(n):
        for attack in ("targeted", "random"):
            of = cell(i % 4, 0.01 * (i + 1), attack)
            rows = [row(of, "p1", coherent=None, lvs=None, unscored="unscored"), row(of, "p0")]
            store.write(of, rows, seconds=1.0)
    odd, empty, far = (
        cell(9, 0.5, "targeted"),
        cell(9, 0.6, "targeted"),
        Cell(Subject("toy", "f00d"), Site(1), None, "distance", "5150"),
    )
    store.write(odd, [row(odd, "p0", flags="half \ud83d of a face")], seconds=1.0)
    store.write(empty, [], seconds=1.0)
    store.write(far, [distance_row(far)], seconds=1.0)
    store.fail(cell(9, 0.7, "targeted"), "no memory left")
    torn = cell(9, 0.8, "targeted")
    store.write(torn, [row(torn, "p0")], seconds=1.0)
    path = store.path / "cells" / torn.key / "rows.parquet"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.fixture(autouse=True)
def every_cell_is_packed(monkeypatch):
    monkeypatch.setattr(packs, "SMALL", 1)


@pytest.fixture
def store(tmp_path):
    made = RunFolder.open(tmp_path / "out", config={"steps": 1}, info={})
    fill(made)
    return made


def plain(store: RunFolder, attacks: list[str] | None = None) -> pd.DataFrame:
    """One cell after the other, a frame each, joined and sorted."""
    frames = []
    for record in sorted(store.records(), key=lambda r: r["key"]):
        if attacks is None or record["description"]["attack"] in attacks:
            frames.append(store.cell_rows(record["key"]))
    frames = (
        [f for f in frames if len(f)]
        or frames[:1]
        or [tables.to_frame(tables.schema_of(Row).empty_table())]
    )
    table = pd.concat(frames, ignore_index=True)
    by = [name for name in ORDER if name in table]
    return table.sort_values(by, kind="stable", na_position="first", ignore_index=True)


def same(store: RunFolder) -> None:
    """Every selection is the plain loop's, and so is the file that would be written of it."""
    for attacks in (None, ["targeted"], [*ATTACKS, "clean"], ["distance"], ["nobody"]):
        got, wanted = store.rows(attacks), plain(store, attacks)
        pd.testing.assert_frame_equal(got, wanted, check_exact=True)
        assert tables.to_bytes(tables.frame_to_table(got)) == tables.to_bytes(
            tables.frame_to_table(wanted)
        )


def packed(store: RunFolder) -> list[Path]:
    return sorted((store.path / "index").iterdir())


def test_with_and_without_packs_the_table_is_the_plain_loops(store):
    same(store)
    assert packed(store)
    same(store)
    shutil.rmtree(store.path / "index")
    same(RunFolder.load(store.path))


def test_what_is_packed_is_not_parsed_again(store, monkeypatch):
    parsed = []
    real = tables.from_bytes
    monkeypatch.setattr(tables, "from_bytes", lambda data: parsed.append(data) or real(data))
    store.rows(["targeted", "random"])
    cells = len(parsed)
    assert cells == 14, "each finished cell of these attacks once"
    parsed.clear()
    store.rows(["targeted", "random"])
    rows = {p.read_bytes() for p in (store.path / "cells").rglob("rows.parquet")}
    assert parsed and not rows & set(parsed), "packs only"


def test_a_cell_that_is_new_joins_and_one_that_is_made_anew_replaces_what_was_packed(store):
    same(store)
    old = cell(0, 0.01, "targeted")
    shutil.rmtree(store.path / "cells" / old.key)
    gone = cell(1, 0.02, "random")
    shutil.rmtree(store.path / "cells" / gone.key)
    store.write(old, [row(old, "p0", lvs=7.0)], seconds=1.0)
    new = cell(0, 0.9, "targeted")
    store.write(new, [row(new, "p0")], seconds=1.0)
    same(store)
    assert (store.rows()["lvs"] == 7.0).sum() == 1 and not (
        store.rows(["random"])["eps"] == 0.02
    ).any()
    same(store)


def test_the_order_of_columns_does_not_depend_on_what_was_packed_first(store, monkeypatch):
    """All cells in one bucket, and there a pack of another row type before the first cell's."""
    monkeypatch.setattr(packs, "_PREFIX", 0)
    store.rows(["distance"])
    assert packed(store) and store.records()[0]["row_type"] == "Row"
    same(store)


def test_a_torn_cell_is_not_read_from_its_pack(store):
    same(store)
    path = store.path / "cells" / cell(0, 0.01, "targeted").key / "rows.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    n = len(store.rows())
    same(store)
    path.unlink()
    assert len(store.rows()) == n
    same(store)


@pytest.mark.parametrize(
    "harm", ["cut", "flip", "empty", "of another cell", "no parquet", "half written"]
)
def test_packs_that_are_not_whole_cost_time_and_nothing_else(store, harm):
    same(store)
    for i, path in enumerate(packed(store)):
        data = path.read_bytes()
        if harm == "cut":
            path.write_bytes(data[: (i + 1) * len(data) // (len(packed(store)) + 1)])
        elif harm == "flip":
            at = (97 * i) % len(data)
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        elif harm == "empty":
            path.write_bytes(b"")
        elif harm == "of another cell":
            path.write_bytes(packed(store)[i - 1].read_bytes())
        elif harm == "no parquet":
            path.unlink()
            (path.parent / packs._name(path.name.rpartition("-")[0], b"{}")).write_bytes(b"{}")
        else:
            path.rename(path.with_name(f".{path.name}.somewhere.1-0a.tmp"))
    same(store)
    same(store)


def test_a_pack_that_lies_about_its_cells_is_not_believed(store):
    """Whole by its name, but of other rows: the number of rows must fit, and a checksum that no
    cell has finds nobody."""
    same(store)
    for path in packed(store):
        rows = tables.from_bytes(path.read_bytes())
        stretched = rows.schema.metadata[b"cells"].replace(b", 2]", b", 3]")
        for metadata in (stretched, b'[["nobody", "0", 2]]', b"[[1]]", b"no json"):
            data = tables.to_bytes(rows.replace_schema_metadata({b"cells": metadata}))
            (path.parent / packs._name(path.name.rpartition("-")[0], data)).write_bytes(data)
        path.unlink()
    same(store)


def test_a_folder_that_cannot_be_written_is_read_all_the_same(store):
    (store.path / "index").write_text("somebody's file")
    same(store)
    assert (store.path / "index").read_text() == "somebody's file"


def test_a_small_run_has_no_packs(store, monkeypatch):
    monkeypatch.setattr(packs, "SMALL", 16)
    same(store)
    assert not (store.path / "index").exists()


def test_a_pack_holds_each_row_of_its_cells_in_order():
    """The mask that takes some cells out of a pack is by rows, as cells have many, one or none."""
    import pyarrow as pa

    pack = packs.Pack((("a", "1", 2), ("b", "2", 0), ("c", "3", 1)), pa.table({"x": [1, 2, 3]}))
    assert pack.only([True] * 3) is pack
    for wanted, left in (([1, 0, 0], [1, 2]), ([0, 1, 0], []), ([0, 1, 1], [3])):
        kept = pack.only(list(map(bool, wanted)))
        assert kept.rows["x"].to_pylist() == left and len(kept.cells) == sum(wanted)


def test_words_are_shared_and_come_back_as_they_were():
    import pyarrow as pa

    words = ["vault", None, "", "vault", "half \ud83d"[:4], "vault"]
    frame = tables.to_frame(
        pa.table({"word": pa.chunked_array([words[:3], words[3:], []], pa.string())})
    )
    assert frame["word"].tolist() == words and frame["word"].dtype == object
    assert frame["word"][3] is frame["word"][5], (
        "equal words are one object: a table repeats few in many rows"
    )
    empty = tables.to_frame(pa.schema([pa.field("word", pa.string())]).empty_table())
    assert empty["word"].dtype == object and len(empty) == 0
    assert isinstance(frame["word"].to_numpy(), np.ndarray)
