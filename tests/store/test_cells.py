"""Files of cells: written one by one, joined a group, read as their union, and never believed when
a byte of them has changed."""

from __future__ import annotations

import pickle
from dataclasses import fields
from pathlib import Path

import children
import pandas as pd
import pytest
import run_folders
import toys

from auditgap.errors import UsageError
from auditgap.rows import DistanceRow, Row
from auditgap.store import RunFolder, cellfile, cells, files, tables
from auditgap.sweep import Group, local
from auditgap.sweep.state import SweepState
from auditgap.types import ATTACKS, Budget, Cell, Site, Subject

ORDER = ["subject", "layer_index", "unit", "eps", "attack", "draw", "prompt_id"]
CELLS = [cell for group in toys.groups() for cell in group.cells]


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


def fill(store: RunFolder) -> list[Cell]:
    """A group of cells of every kind: plain ones, nulls, a lone surrogate, none at all, another row
    type, with texts of two shapes and without, failed."""
    made = []
    for i in range(4):
        for attack in ("targeted", "random"):
            of = cell(i % 2, 0.01 * (i + 1), attack)
            rows = [row(of, "p1", coherent=None, lvs=None, unscored="unscored"), row(of, "p0")]
            said = [{"prompt_id": r.prompt_id, "completion": f"{of} {r.prompt_id}"} for r in rows]
            store.write(of, rows, generations=said, seconds=1.0)
            made.append(of)
    odd, empty, far, lost = (
        cell(9, 0.5, "targeted"),
        cell(9, 0.6, "targeted"),
        Cell(Subject("toy", "f00d"), Site(1), None, "distance", "5150"),
        cell(9, 0.7, "targeted"),
    )
    odd_text = "half \ud83d of a face"
    store.write(
        odd, [row(odd, "p0", flags=odd_text)], generations=[{"completion": odd_text}], seconds=1.0
    )
    store.write(empty, [], seconds=1.0)
    store.write(far, [distance_row(far)], generations=[{"completion": None}], seconds=1.0)
    store.fail(lost, "no memory left")
    return [*made, odd, empty, far, lost]


@pytest.fixture
def store(tmp_path):
    return RunFolder.open(tmp_path / "out", config={"steps": 1}, info={})


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


def everything(store: RunFolder) -> dict:
    """All that a folder gives back, in forms that compare byte for byte."""
    found: dict = {"records": store.records(), "failures": store.failures()}
    for attacks in (None, ["targeted"], [*ATTACKS, "clean"], ["distance"], ["nobody"]):
        got, wanted = store.rows(attacks), plain(store, attacks)
        pd.testing.assert_frame_equal(got, wanted, check_exact=True)
        found[str(attacks)] = tables.to_bytes(tables.frame_to_table(got))
    for record in store.records():
        found[record["key"]] = str(store.cell_rows(record["key"]).to_dict("list"))
        if record["generations"]:
            found[record["key"], "said"] = str(store.generations(record["key"]).to_dict("list"))
    return found


def listed(store: RunFolder) -> list[Path]:
    return sorted((store.path / "cells").iterdir())


# ------------------------------------------------------------------------- joining


def test_a_joined_group_gives_back_what_its_cells_were(store):
    made = fill(store)
    alone = everything(store)
    assert len(listed(store)) == len(made)
    store.settle(c.key for c in made)
    # eight of one kind; the odd one, the empty one, the distance and the failed one are of their own
    assert len(listed(store)) == 5 and len(list((store.path / "generations").iterdir())) == 3
    assert everything(store) == everything(RunFolder.load(store.path)) == alone
    before = listed(store)
    store.settle(c.key for c in made)
    assert listed(store) == before, "once is enough"


def test_a_retry_appends_a_file_of_the_group_and_counts(tmp_path):
    store, log = toys.open_folder(tmp_path / "out"), tmp_path / "log"
    group = toys.groups(1)
    with store.lock():
        spells = {(0, 0.01): "fail", (0, 0.03): "fail"}
        outcome = local.run(group, lambda: toys.Toy(store, log, spells), store)
        assert (outcome.done, len(outcome.failed)) == (1, 2) and len(listed(store)) == 2
        again = local.run(group, lambda: toys.Toy(store, log), store)
        assert again.skipped == 1 and set(again.failed) == set(outcome.failed)
        retried = local.run(group, lambda: toys.Toy(store, log), store, retry_failed=True)
        assert (retried.done, retried.failed) == (2, {})
    assert len(listed(store)) == 1, "the file of failures says nothing any more, and is gone"
    assert [r["attempts"] for r in store.records()].count(2) == 2 and store.failures() == {}


def test_a_group_that_was_killed_before_it_was_joined_is_joined_by_the_next_run(tmp_path):
    store, log = toys.open_folder(tmp_path / "out"), tmp_path / "log"
    for c in toys.cells(0):
        toys.Toy(store, log).write(c)
    assert len(listed(store)) == 3
    with store.lock():
        assert SweepState(toys.groups(1), toys.open_folder(tmp_path / "out2")).groups
        assert local.run(toys.groups(1), lambda: toys.Toy(store, log), store).skipped == 3
    assert len(listed(store)) == 1


JOINING = """
    import os, shutil, signal, sys
    from pathlib import Path
    import toys
    from auditgap.store import RunFolder, files
    out = Path(sys.argv[1])
    for step in range(1, 100):
        again = out.with_name(f"out{step}")
        shutil.copytree(out, again)
        pid = os.fork()
        if not pid:
            store = RunFolder.load(again)
            store.keys()
            calls = 0
            for name in ("write_new", "replace", "sync_folder", "unlink", "remove"):
                home = os if name == "replace" else files
                if name == "unlink":
                    home = Path
                def deadly(*args, name=name, real=getattr(home, name), **kw):
                    global calls
                    calls += 1
                    if calls == step:
                        if name == "write_new":
                            real(args[0], args[1][: len(args[1]) // 2], *args[2:])
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kw)
                setattr(home, name, deadly)
            store.settle(cell.key for cell in toys.cells(0))
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        seen = RunFolder.load(again)
        print(step, killed, seen.status().finished, len(seen.rows()), len(seen.records()),
              len(seen.generations(toys.cells(0)[1].key)))
        if not killed:
            break
"""


def test_a_kill_at_any_touch_of_the_disk_while_joining_loses_and_doubles_nothing(tmp_path):
    store = toys.open_folder(tmp_path / "out")
    for c in toys.cells(0):
        toys.Toy(store, tmp_path / "log").write(c)
    whole = store.rows()
    child = children.python(JOINING, str(tmp_path / "out"))
    said, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    lines = [line.split() for line in said.splitlines()]
    assert len(lines) >= 10, "six to write, and a deletion a file"
    assert {tuple(line[2:]) for line in lines} == {("3", "6", "3", "1")}
    for step in range(1, len(lines) + 1):
        again = toys.open_folder(tmp_path / f"out{step}")
        pd.testing.assert_frame_equal(again.rows(), whole)
        with again.lock():
            assert SweepState(toys.groups(1), again).skipped == 3
        assert len(listed(again)) == len(list((again.path / "generations").iterdir())) == 1


def test_a_reader_beside_a_writer_sees_every_cell_at_every_moment(tmp_path, monkeypatch):
    """A listing that misses both the joined file and what it was joined from."""
    store = toys.open_folder(tmp_path / "out")
    for c in toys.cells(0):
        toys.Toy(store, tmp_path / "log").write(c)
    reader = RunFolder.load(store.path)
    plain_list, joined = cells.listdir, []

    def listing(folder: Path) -> list[str]:
        names = plain_list(folder)
        if not joined and Path(folder).name == "cells" and names:
            joined.append(1)
            store.settle(c.key for c in toys.cells(0))
            return []  # what a readdir may give that was overtaken
        return names

    monkeypatch.setattr(cells, "listdir", listing)
    reader._cells.refresh()
    monkeypatch.setattr(cells, "listdir", plain_list)
    assert reader.keys() == store.keys() and len(reader.rows()) == 6
    # and files that go between the listing and the reading
    for c in toys.cells(1):
        toys.Toy(store, tmp_path / "log").write(c)
    reader = RunFolder.load(store.path)
    assert len(reader.keys()) == 6
    store.settle(c.key for c in toys.cells(1))
    assert len(list(reader._cells.each(lambda file, keys: keys, "done"))) == 2
    reader = RunFolder.load(store.path)
    assert len(reader.cell_rows(toys.cells(1)[0].key)) == 2 and len(reader.records()) == 6


def test_two_who_write_one_cell_are_one_cell(tmp_path):
    """An actor that was thought dead, and the one in its place."""
    one, two = toys.open_folder(tmp_path / "out"), RunFolder.load(tmp_path / "out")
    assert not two.is_finished(CELLS[0].key)
    two.is_finished = lambda key: False
    for store in (one, two):
        toys.Toy(store, tmp_path / "log").write(CELLS[0])
    assert one.status().finished == 1 and len(one.rows()) == 2 and len(one.records()) == 1
    with one.lock():
        assert one.scan([CELLS[0].key]) == ({CELLS[0].key}, {})
    assert len(listed(one)) == 1


def test_what_a_worker_carries_is_the_place_alone(tmp_path):
    store = toys.open_folder(tmp_path / "out")
    toys.Toy(store, tmp_path / "log").write(CELLS[0])
    with store.lock():
        there = pickle.loads(pickle.dumps(store))
    assert there._cells._files == {} and not there._locked and there.is_finished(CELLS[0].key)


# ------------------------------------------------------------------------- damage


@pytest.mark.parametrize("harm", ["renamed", "swapped", "another's text", "no footer", "described"])
def test_a_file_that_is_not_what_its_name_says_is_not_believed(store, harm):
    """Whole parquet each time; and of the last two even the name is right."""
    fill(store)
    one, two = (
        run_folders.file_of(store.path, cell(0, 0.01, a).key) for a in ("targeted", "random")
    )
    data = one.read_bytes()
    if harm == "renamed":
        one.rename(one.with_name("0" * 32 + ".parquet"))
    elif harm == "swapped":
        one.write_bytes(two.read_bytes())
    elif harm == "another's text":
        texts = [
            run_folders.texts_of(store.path, cell(0, 0.01, a).key) for a in ("targeted", "random")
        ]
        texts[0].write_bytes(texts[1].read_bytes())
    elif harm == "no footer":
        one.unlink()
        data = tables.to_bytes(tables.from_bytes(data).replace_schema_metadata(None))
        (store.path / "cells" / cellfile.name_of(data)).write_bytes(data)
    else:  # "targeted" to "tbrgeted": the run of 11 cells of which the worst vanished
        one.unlink()
        data = data.replace(b'"attack":"targeted"', b'"attack":"tbrgeted"')
        assert b"tbrgeted" in data
        (store.path / "cells" / cellfile.name_of(data)).write_bytes(data)
    reader = RunFolder.load(store.path)
    status = reader.status()
    assert status.corrupt == 1 and status.finished == 10, "of eleven"
    assert cell(0, 0.01, "targeted").key not in {
        key for key, state in reader.cell_states().items() if state.state == "done"
    }
    if harm != "another's text":
        assert "tbrgeted" not in set(reader.rows()["attack"]) and len(reader.records()) == 10
    assert not store.is_finished(cell(0, 0.01, "targeted").key)
    assert RunFolder.load(store.path).status().corrupt == 1, "set aside, and still said"


def test_every_byte_of_a_file_of_cells_is_held(store):
    """One bit flipped at every place of a joined file: no reader gives a row of it."""
    made = [cell(0, 0.01 * (i + 1), "targeted") for i in range(2)]
    for of in made:
        store.write(of, [row(of, "p0")], seconds=1.0)
    store.settle(of.key for of in made)
    (file,) = listed(store)
    data = file.read_bytes()
    reader = RunFolder.load(store.path)
    for at in range(0, len(data), 7):
        file.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        assert reader.rows().empty and not reader.records()
        if at % 10 == 0:
            with pytest.raises(UsageError, match=f"{file.name} is damaged"):
                reader.cell_rows(made[0].key)
            assert reader.status().finished == 0 and reader.status().corrupt == 1
    file.write_bytes(data)
    assert RunFolder.load(store.path).status().finished == 2


def test_a_footer_is_what_pyarrow_reads(store):
    import pyarrow.parquet as pq

    for length in (0, 1, 200, 40_000):
        text = files.to_json({"texts": None, "cells": [{"x": "y" * length}]}, indent=None).decode()
        data = tables.to_bytes(tables.schema_of(Row).empty_table(), footer={"auditgap.cells": text})
        assert cellfile._footer(data).decode() == text
        path = store.path / "x.parquet"
        path.write_bytes(data)
        assert pq.read_metadata(path).metadata[b"auditgap.cells"].decode() == text


# ------------------------------------------------------------------------- folders of auditgap 0.1


def test_a_folder_of_an_earlier_release_reads_and_goes_on_as_it_was(tmp_path, monkeypatch):
    old = RunFolder.open(tmp_path / "old", config={"steps": 1}, info={})
    made = fill(old)
    old.plan(made)
    wanted = everything(old)
    run_folders.age(old.path)
    assert not list(old.path.rglob("cells/*.parquet"))
    aged = RunFolder.load(old.path)
    found = everything(aged)
    for changed in ("records", "failures"):
        found.pop(changed), wanted.pop(changed)
    assert found == wanted
    assert aged.run["schema"] == 1 and len(aged.planned()) == len(made)
    assert aged.status().finished == 11 and aged.status().failed == 1

    before = {p: p.read_bytes() for p in (old.path / "cells").rglob("*") if p.is_file()}
    resumed = RunFolder.open(tmp_path / "old", config={"steps": 1}, info={})
    with resumed.lock():
        state = SweepState([Group("all", tuple(made))], resumed, retry_failed=True)
        assert state.skipped == 11 and [c.key for c in state.open_cells(state.groups[0])] == [
            made[-1].key
        ]
        resumed.write(made[-1], [row(made[-1], "p0")], seconds=1.0)
        state.close(state.groups[0], "")
    assert RunFolder.load(old.path).run["schema"] == 2
    assert resumed.status().finished == 12 and resumed.failures() == {}
    assert resumed.record(made[-1].key)["attempts"] == 2
    assert (
        before.items()
        <= {p: p.read_bytes() for p in (old.path / "cells").rglob("*") if p.is_file()}.items()
    ), "what it had finished stays as it was"
    for name in ("run.json", "plan.json"):
        assert files.unseal(old.path / name)


@pytest.mark.parametrize("harm", ["rows", "rows gone", "record", "word", "swapped", "texts"])
def test_damage_in_a_folder_of_an_earlier_release_is_seen(tmp_path, harm):
    old = toys.open_folder(tmp_path / "old")
    old.plan(CELLS[:3])
    for c in CELLS[:3]:
        toys.Toy(old, tmp_path / "log").write(c)
    run_folders.age(old.path)
    one, two = (old.path / "cells" / c.key for c in CELLS[:2])
    rows, record = one / "rows.parquet", one / "record.json"
    data = rows.read_bytes()
    if harm == "rows":
        rows.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    elif harm == "rows gone":
        rows.unlink()
    elif harm == "record":
        record.write_bytes(record.read_bytes()[:-9])
    elif harm == "word":
        record.write_bytes(record.read_bytes().replace(b'"targeted"', b'"tbrgeted"'))
    elif harm == "swapped":
        one.rename(tmp_path / "x")
        two.rename(one)
        (tmp_path / "x").rename(two)
    else:
        (old.path / "generations" / f"{one.name}.parquet").unlink()
    reader, lost = RunFolder.load(old.path), 2 if harm == "swapped" else 1
    assert reader.status().finished == 3 - lost and reader.status().corrupt == lost
    again = toys.open_folder(tmp_path / "old")
    with again.lock():
        outcome = local.run(
            [Group("x", tuple(CELLS[:3]))], lambda: toys.Toy(again, tmp_path / "log"), again
        )
    assert (outcome.done, outcome.skipped, outcome.failed) == (lost, 3 - lost, {})
    assert len(again.rows()) == 6 and set(toys.digests(again)) == {c.key for c in CELLS[:3]}
