"""The sweep in one process: what fails, what goes on, and what a second run still has to do."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toys
from rich.console import Console

from auditgap.errors import Interrupted, Refused, UsageError
from auditgap.store import DiskError
from auditgap.sweep import Group, Progress, local
from auditgap.sweep.progress import duration


@pytest.fixture
def store(tmp_path):
    return toys.open_folder(tmp_path / "out")


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def test_every_cell_once_and_nothing_the_second_time(store, log):
    outcome = local.run(toys.groups(), lambda: toys.Toy(store, log), store)
    assert (outcome.done, outcome.failed, outcome.skipped) == (12, {}, 0)
    before = toys.counts(log)
    assert before == {"made": 1} | {
        f"block{i}/{e}": 1 for i in range(4) for e in ("0.01", "0.02", "0.03")
    }
    assert len(store.rows()) == 24
    outcome = local.run(toys.groups(), lambda: toys.Toy(store, log), store)
    assert (outcome.done, outcome.failed, outcome.skipped) == (0, {}, 12)
    assert toys.counts(log) == before, "no worker is made when nothing is left"


def test_a_cell_in_two_groups_counts_once(store, log):
    twice = [*toys.groups(1), Group("again", toys.cells(0) + toys.cells(1))]
    outcome = local.run(twice, lambda: toys.Toy(store, log), store)
    assert outcome.done == 6 and toys.counts(log)["block0/0.01"] == 1


def test_an_exception_fails_what_is_left_of_its_group_and_the_others_go_on(store, log):
    spells = {(1, 0.02): "raise"}
    outcome = local.run(toys.groups(), lambda: toys.Toy(store, log, spells), store)
    _, bad, never_reached = (c.key for c in toys.cells(1))
    assert outcome.failed == dict.fromkeys((bad, never_reached), "RuntimeError: no memory left")
    assert (outcome.done, outcome.skipped) == (10, 0)
    assert {key: r["cause"] for key, r in store.failures().items()} == outcome.failed

    again = local.run(toys.groups(), lambda: toys.Toy(store, log), store)
    assert (again.done, again.skipped, again.failed) == (0, 10, outcome.failed), (
        "not tried again unasked"
    )
    mended = local.run(toys.groups(), lambda: toys.Toy(store, log), store, retry_failed=True)
    assert (mended.done, mended.skipped, mended.failed) == (2, 10, {})
    assert toys.counts(log)["block1/0.01"] == 1
    assert {r["key"]: r["attempts"] for r in store.records()}[bad] == 2


def test_attempts_are_bounded_and_counted(store, log):
    outcome = local.run(
        toys.groups(1), lambda: toys.Toy(store, log, {(0, 0.03): "raise"}), store, max_attempts=3
    )
    assert outcome.done == 2 and toys.counts(log)["block0/0.03"] == 3
    assert store.failures()[toys.cells(0)[2].key]["attempts"] == 3


def test_a_worker_may_fail_a_cell_itself_or_forget_one(store, log):
    outcome = local.run(
        toys.groups(2),
        lambda: toys.Toy(store, log, {(0, 0.02): "fail", (1, 0.03): "forget"}),
        store,
    )
    own, forgotten = toys.cells(0)[1].key, toys.cells(1)[2].key
    assert outcome.failed == {
        own: "its own cause",
        forgotten: "the worker came back without this cell",
    }
    assert outcome.done == 4 and store.failures()[own]["attempts"] == 1


@pytest.mark.parametrize(
    "error", [UsageError("no such model"), Refused("a pickle"), DiskError("full")]
)
def test_what_making_a_worker_says_goes_through(store, error):
    def make():
        raise error

    with pytest.raises(type(error), match=str(error)):
        local.run(toys.groups(), make, store)
    assert store.failures() == {}


def test_a_full_disk_ends_the_sweep_and_fails_no_cell(store, log):
    class Full(toys.Toy):
        def write(self, cell):
            raise DiskError("Could not write: no space")

    with pytest.raises(DiskError):
        local.run(toys.groups(), lambda: Full(store, log), store)
    assert store.failures() == {} and toys.counts(log)["made"] == 1


CHILD = """
import sys; sys.path[:0] = [{here!r}]
from pathlib import Path
import toys
from auditgap.errors import Interrupted
from auditgap.sweep import local
out, log = Path(sys.argv[1]), Path(sys.argv[2])
store = toys.open_folder(out)
with store.lock():
    try:
        local.run(toys.groups(), lambda: toys.Toy(store, log, {{(2, 0.02): "hang"}}), store)
    except Interrupted as error:
        print(error)
        sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_stopped_in_the_middle_the_same_run_does_the_rest(tmp_path, log, number, code):
    child = [
        sys.executable,
        "-c",
        CHILD.format(here=str(Path(__file__).parent)),
        str(tmp_path / "out"),
        str(log),
    ]
    process = subprocess.Popen(child, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while "block2/0.02" not in toys.counts(log) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    if code == 130:
        assert "same command" in out and "Traceback" not in err

    store = toys.open_folder(tmp_path / "out")
    assert store.failures() == {}, "an interruption is nobody's failure"
    with store.lock():
        outcome = local.run(toys.groups(), lambda: toys.Toy(store, log), store)
    assert (outcome.done, outcome.skipped, outcome.failed) == (5, 7, {})
    begun = toys.counts(log)
    assert begun.pop("made") == 2 and begun.pop("block2/0.02") == 2 and set(begun.values()) == {1}

    whole = toys.open_folder(tmp_path / "whole")
    local.run(toys.groups(), lambda: toys.Toy(whole, tmp_path / "other"), whole)
    assert toys.digests(store) == toys.digests(whole)


def test_the_old_sigterm_handler_comes_back(store, log):
    before = signal.getsignal(signal.SIGTERM)
    local.run(toys.groups(1), lambda: toys.Toy(store, log), store)
    assert signal.getsignal(signal.SIGTERM) is before

    class Stopped(toys.Toy):
        def write(self, cell):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(Interrupted):
        local.run(toys.groups(2), lambda: Stopped(store, log), store)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_the_process_was_told_to_ignore_stays_ignored(store, log):
    """`nohup auditgap …`: the terminal closes, and the run goes on."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:

        class Hung(toys.Toy):
            def write(self, cell):
                os.kill(os.getpid(), signal.SIGHUP)
                super().write(cell)

        assert local.run(toys.groups(1), lambda: Hung(store, log), store).failed == {}
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ------------------------------------------------------------------------- progress


def test_without_a_terminal_progress_is_plain_lines(store, log):
    stream = io.StringIO()
    progress = Progress(console=Console(file=stream, width=40), every=0.0)
    local.run(
        toys.groups(2), lambda: toys.Toy(store, log, {(1, 0.03): "raise"}), store, progress=progress
    )
    lines = stream.getvalue().splitlines()
    assert lines[0] == "0 of 6 cells done, 0 % of the work, time left not known yet"
    assert any(re.search(r"17 % of the work, about \d s left \(block0\)", line) for line in lines)
    assert re.fullmatch(r"5 of 6 cells done, 1 failed, took \d s", lines[-1])
    assert "\x1b" not in stream.getvalue()


def test_cells_and_work_never_contradict_each_other(monkeypatch):
    """Work is an estimate: a run that does less than that is over all the same, and one that does
    more is not."""
    now = [0.0]
    monkeypatch.setattr("auditgap.sweep.progress.time.monotonic", lambda: now[0])
    progress = Progress(console=Console(file=io.StringIO()))
    progress.begin(cells=2, done=0, failed=0, work=10.0)
    now[0] = 20.0
    progress.update(done=1, failed=0, work=9.97)
    assert progress.line() == "1 of 2 cells done, 99 % of the work, time left not known yet"
    progress.update(done=1, failed=0, work=25.0)
    assert progress.line() == "1 of 2 cells done, 99 % of the work, time left not known yet"
    assert progress.share is not None and progress.share < 1 and progress.eta_seconds is None
    progress.update(done=2, failed=0, work=6.5)
    assert progress.line() == "2 of 2 cells done, took 20 s"
    assert progress.share == 1 and progress.eta_seconds == 0


def test_plain_lines_come_at_sensible_intervals(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("auditgap.sweep.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(console=Console(file=stream, width=200), every=40.0) as progress:
        progress.begin(cells=10, done=4, failed=0, work=100.0)
        seen = []
        for second in range(1, 161):
            now[0] = float(second)
            count = len(stream.getvalue().splitlines())
            progress.update(done=4, failed=0, work=second / 4, doing="block3")
            if len(stream.getvalue().splitlines()) > count:
                seen.append(second)
        assert seen == [10, 30, 70, 110, 150]
        assert progress.eta_seconds == pytest.approx(240.0)  # 40 % took 160 s
        progress.update(done=10, failed=0, work=100.0)
        assert progress.eta_seconds == 0.0


def test_time_left_counts_only_what_this_run_did(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("auditgap.sweep.progress.time.monotonic", lambda: now[0])
    progress = Progress(console=Console(file=io.StringIO()))
    progress.begin(cells=100, done=90, failed=0)
    assert progress.eta_seconds is None
    now[0] = 30.0
    progress.update(done=95, failed=0, work=0.0)
    assert progress.eta_seconds == pytest.approx(30.0)
    assert [duration(s) for s in (0.4, 75, 60, 3700, 90000)] == [
        "0 s",
        "1 min 15 s",
        "1 min",
        "1 h 1 min",
        "1 d 1 h",
    ]


@pytest.mark.parametrize("width", [40, 120])
def test_a_terminal_gets_a_bar_even_a_narrow_one(store, log, width):
    stream = io.StringIO()
    progress = Progress(console=Console(file=stream, force_terminal=True, width=width))
    local.run(
        [Group("[red]odd[/name", toys.cells(0), 3.0)],
        lambda: toys.Toy(store, log),
        store,
        progress=progress,
    )
    last = stream.getvalue().split("\r")[-1]
    assert re.search(r"3/3 cells, took \d+ s", last) and "━" in last
    assert ("[red]odd[/name" in last) == (width == 120)


def test_a_closed_stream_does_not_stop_a_sweep(store, log):
    stream = io.StringIO()
    progress = Progress(console=Console(file=stream), every=0.0)
    stream.close()
    assert (
        local.run(toys.groups(1), lambda: toys.Toy(store, log), store, progress=progress).done == 3
    )
