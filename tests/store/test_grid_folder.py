"""A grid's folder: its cases found, counted together beside a running writer, and joined with those
of another machine."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import run_folders
import toys

from auditgap.cli import main
from auditgap.errors import UsageError
from auditgap.store import RunFolder, cases_of, grid_status, merge_grids
from auditgap.types import Cell

ONE, TWO = "harmbench-rms-float32-0a", "harmbench-max-float32-0b"


def case(grid: Path, name: str, done: tuple[Cell, ...], planned: tuple[Cell, ...]) -> RunFolder:
    store = RunFolder.open(grid / name, config={"audit": "latent", "steps": 1}, info={})
    store.plan(planned)
    for cell in done:
        toys.Toy(store, grid / "log").write(cell)
    return store


@pytest.fixture
def grid(tmp_path):
    """Two cases that share block 0's cells: 3 + 2 of 9 finished, one failed."""
    out = tmp_path / "grid"
    case(out, ONE, toys.cells(0), toys.cells(0) + toys.cells(1))
    two = case(out, TWO, toys.cells(0) + toys.cells(2)[:2], toys.cells(0) + toys.cells(2))
    two.fail(toys.cells(2)[2], "no memory left")
    (out / "scratch").mkdir()
    return out


def stores(grid: Path) -> dict[str, RunFolder]:
    return {name: RunFolder.load(place) for name, place in cases_of(grid).items()}


def test_a_grids_folder_is_told_from_a_runs(grid, tmp_path):
    assert list(cases_of(grid)) == sorted([ONE, TWO])
    assert (
        not cases_of(grid / ONE)
        and not cases_of(tmp_path / "nowhere")
        and not cases_of(grid / "scratch")
    )


def test_a_cell_that_cases_share_counts_once(grid):
    each, total = grid_status(stores(grid))
    assert (each[ONE].finished, each[ONE].planned, each[TWO].finished, each[TWO].failed) == (
        3,
        6,
        5,
        1,
    )
    assert (total.finished, total.planned, total.failed, total.corrupt, total.running) == (
        5,
        9,
        1,
        0,
        None,
    )
    assert total.seconds == pytest.approx(0.05) and total.eta_seconds == pytest.approx(3 * 0.01)


def test_torn_cells_and_what_was_set_aside_are_counted_and_left_alone(grid):
    path = run_folders.file_of(grid / ONE, toys.cells(0)[0].key)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    each, total = grid_status(stores(grid))
    assert each[ONE].corrupt == total.corrupt == 1 and path.read_bytes() == data[:-1]
    assert total.finished == 5, "the other case has it whole"
    RunFolder.load(grid / ONE).scan([toys.cells(0)[0].key])
    each, total = grid_status(stores(grid))
    assert each[ONE].corrupt == total.corrupt == 1 and total.finished == 5


def test_the_time_left_is_the_running_writers_pace_also_seen_from_another_machine(grid):
    since = datetime.now(UTC) - timedelta(seconds=100)
    note = {
        "pid": 7,
        "host": "node-elsewhere",
        "command": "auditgap grid",
        "since": since.isoformat(timespec="seconds"),
    }
    (grid / ONE / "lock.json").write_text(json.dumps(note))
    _, total = grid_status(stores(grid))
    assert total.running["host"] == "node-elsewhere"
    assert total.eta_seconds == pytest.approx(3 * 100 / 5, rel=0.1), (
        "five cells in 100 seconds, three to go"
    )


def told(arguments: list[str], capsys: pytest.CaptureFixture) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(stop.value.code or 0), capsys.readouterr().out


def test_status_shows_the_cases_and_the_total(grid, capsys):
    code, said = told(["status", str(grid)], capsys)
    lines = [line.split() for line in said.splitlines()]
    assert code == 0 and lines[0] == ["case", "cells", "done", "failed", "damaged"]
    assert [TWO, "6", "5", "1", "0"] in lines and [ONE, "6", "3", "0", "0"] in lines
    assert (
        "5 of 9 cells done, 1 failed, not running" in " ".join(said.split())
        and "no memory left" in said
    )
    code, said = told(["status", str(grid), "--json"], capsys)
    shown = json.loads(said)
    assert (shown["finished"], shown["planned"]) == (5, 9) and shown["cases"][ONE]["finished"] == 3
    assert list(shown["cases"][TWO]["failures"].values()) == ["no memory left"]
    code, said = told(["status", str(grid / ONE)], capsys)
    assert "3 of 6 cells done" in " ".join(said.split())


# ------------------------------------------------------------------------- joining


@pytest.fixture
def other(tmp_path):
    """Another machine's grid: one case of the same name with more of its cells, and a case of its
    own."""
    out = tmp_path / "other"
    case(out, ONE, toys.cells(1), toys.cells(1))
    case(out, "own-rms-float32-0c", toys.cells(3), toys.cells(3))
    return out


def test_cases_of_one_name_are_merged_and_the_others_taken_over(grid, other, tmp_path):
    joined = merge_grids([grid, other], tmp_path / "joined")
    assert list(joined) == sorted([ONE, TWO, "own-rms-float32-0c"])
    assert toys.digests(joined[ONE]) == toys.digests(RunFolder.load(grid / ONE)) | toys.digests(
        RunFolder.load(other / ONE)
    )
    assert toys.digests(joined[TWO]) == toys.digests(RunFolder.load(grid / TWO))
    assert [r["cause"] for r in joined[TWO].failures().values()] == ["no memory left"]
    assert list(cases_of(tmp_path / "joined")) == list(joined)
    before = {p: p.read_bytes() for p in (tmp_path / "joined").rglob("*.parquet")}
    merge_grids([grid, other], tmp_path / "joined")
    assert {p: p.read_bytes() for p in before} == before


def test_the_same_rows_in_other_bytes_are_the_same_numbers(grid, other, tmp_path):
    """Another time, another release of parquet's writer, and the folders of auditgap 0.1."""
    toys.Toy(RunFolder.load(grid / ONE), tmp_path / "log").write(toys.cells(1)[0])
    key = toys.cells(1)[0].key
    mine, theirs = (run_folders.file_of(folder / ONE, key) for folder in (grid, other))
    assert mine.read_bytes() != theirs.read_bytes()
    joined = merge_grids([grid, other], tmp_path / "joined")
    assert joined[ONE].status().finished == 6 and len(joined[ONE].rows()) == 12
    run_folders.age(other / ONE)
    again = merge_grids([grid, other], tmp_path / "again")
    assert again[ONE].rows().equals(joined[ONE].rows())
    run_folders.age(grid / ONE)
    again = merge_grids([grid, other], tmp_path / "aged")
    assert again[ONE].rows().equals(joined[ONE].rows())


def test_a_merge_takes_files_over_as_they_are(grid, other, tmp_path):
    joined = merge_grids([grid, other], tmp_path / "joined")
    taken = {p.name: p.read_bytes() for p in (joined[ONE].path / "cells").iterdir()}
    given = {p.name: p.read_bytes() for f in (grid, other) for p in (f / ONE / "cells").iterdir()}
    assert taken == given


def test_what_contradicts_is_refused_before_anything_is_written(grid, other, tmp_path):
    first, donor = toys.cells(1)[:2]
    toys.Toy(RunFolder.load(grid / ONE), tmp_path / "log").write(first)
    rows = run_folders.known(other / ONE).cell(donor.key)
    record = {"sha256": rows.record["sha256"]}
    run_folders.remake(
        other / ONE,
        first.key,
        lambda cell: replace(cell, record={**cell.record, **record}, rows=rows.rows),
    )
    with pytest.raises(UsageError, match=f"other numbers.*{first.key}"):
        merge_grids([grid, other], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()
    with pytest.raises(UsageError, match=f"other numbers.*{first.key}"):
        RunFolder.load(grid / ONE).adopt(RunFolder.load(other / ONE), first.key)


def test_what_is_no_grid_is_a_sentence(grid, tmp_path, capsys):
    for wrong in ([grid, grid / ONE], [grid, tmp_path / "nowhere"]):
        with pytest.raises(UsageError, match="no grid's folder"):
            merge_grids(wrong, tmp_path / "joined")
    with pytest.raises(UsageError, match="two run folders"):
        merge_grids([grid, grid], tmp_path / "joined")
    with pytest.raises(UsageError, match="folder of its own"):
        merge_grids([grid, tmp_path], grid)
    assert (
        told(["merge", str(grid), str(grid / ONE), "--out", str(tmp_path / "joined")], capsys)[0]
        == 2
    )
    assert not (tmp_path / "joined").exists()
