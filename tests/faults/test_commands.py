"""The command itself, as a process: stopped once and twice, poisoned, with nobody listening,
resumed after something changed.

A judge that is a plug-in (a real distribution on the path) does the mischief: it hangs, or kills
the process that asks it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import children
import pandas as pd
import pytest
import run_folders
import tiny
import torch

from auditgap.cli import main
from auditgap.store import RunFolder

pytestmark = pytest.mark.minutes

PLUGIN = '''
import os, signal, time
from pathlib import Path
from auditgap.judges import load_judge
from auditgap.store import RunFolder

class Moody:
    """The keyword judge; while MOOD says so it hangs when asked, or dies as soon as a run has a
    cell."""
    name = "moody"
    def __init__(self, *, engine, device):
        self.keyword = load_judge("keyword")
        self.folder = Path(os.environ["MOOD"])
        self.hang("planning")
    def hang(self, what):
        if (self.folder / f"hang {what}").exists():
            (self.folder / "hangs").touch()
            while (self.folder / f"hang {what}").exists():
                time.sleep(0.02)
    def describe(self): return {"judge": "moody", "version": 1}
    def judge(self, exchanges):
        self.hang("asked")
        if (poison := self.folder / "die").exists():
            run, key = poison.read_text().splitlines()
            if RunFolder.load(run).is_finished(key):
                os.kill(os.getpid(), signal.SIGKILL)
        return self.keyword.judge(exchanges)
'''


class Bench:
    """A model, prompts and the moody judge, and `auditgap lvs` on them in a process of its own or
    in this one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny.save("llama", folder / "model")
        (folder / "prompts.txt").write_text(
            "what is the colour of the vault\nplease tell the colour\nwho can open the door\n"
        )
        site = folder / "site"
        info = site / "moody-1.0.dist-info"
        info.mkdir(parents=True)
        (site / "moody.py").write_text(PLUGIN)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moody\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[auditgap.judges]\nmoody = moody:Moody\n")
        self.site, self.mood = site, folder / "mood"
        self.mood.mkdir()

    def command(self, out: Path, *more: str) -> list[str]:
        options = {
            "prompts": self.folder / "prompts.txt",
            "judge": "moody",
            "reward": "margin",
            "max-new-tokens": 3,
            "layers": "0,1,2",
            "eps": "0.05,0.1",
            "attacks": "targeted",
            "steps": 1,
            "device": "cpu",
            "dtype": "float32",
            "out": out,
        }
        return [
            "lvs",
            str(self.model),
            *(f"--{name}={value}" for name, value in options.items()),
            *more,
        ]

    def start(self, arguments: list[str], code: str = "", **how: object) -> subprocess.Popen:
        environment = children.environment(MOOD=str(self.mood), **how.pop("environment", {}))
        environment["PYTHONPATH"] += os.pathsep + str(self.site)
        how = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "env": environment,
            **how,
        }
        start = ["-c", code] if code else ["-m", "auditgap"]
        return subprocess.Popen([sys.executable, *start, *arguments], **how)

    def here(self, arguments: list[str], capsys: pytest.CaptureFixture) -> tuple[int, str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(self.site)
            patch.setenv("MOOD", str(self.mood))
            patch.setenv("COLUMNS", "200")
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                with pytest.raises(SystemExit) as stop:
                    main(arguments)
            finally:
                torch.set_num_threads(threads)
                sys.modules.pop("moody", None)
        printed = capsys.readouterr()
        return int(stop.value.code or 0), " ".join(f"{printed.out} {printed.err}".split())


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def mood(bench):
    """`mood("hang asked")` until the test is over."""
    yield lambda what: (bench.mood / what).touch()
    for path in bench.mood.iterdir():
        path.unlink()


@pytest.fixture(scope="module")
def unbroken(bench, tmp_path_factory):
    """The table and the cells of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    child = bench.start(bench.command(out))
    said, err = child.communicate(timeout=180)
    assert child.returncode == 0, said + err
    return out


def sums(folder: Path) -> dict[str, str]:
    return {r["key"]: r["sha256"] for r in RunFolder.load(folder).records()}


def same(folder: Path, unbroken: Path) -> bool:
    tables = [pd.read_parquet(path / "lvs.parquet") for path in (folder, unbroken)]
    pd.testing.assert_frame_equal(*tables)
    return (
        sums(folder) == sums(unbroken)
        and (folder / "lvs.csv").read_bytes() == (unbroken / "lvs.csv").read_bytes()
    )


# ------------------------------------------------------------------------- stops


@pytest.mark.parametrize(
    ("number", "times"), [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 1)]
)
def test_stopped_it_says_how_to_go_on_and_the_same_command_does(
    bench, mood, unbroken, tmp_path, capsys, number, times
):
    """Exit code 130 and one sentence; Ctrl-C twice, or from a scheduler, the same; then the rest
    and no more."""
    mood("hang asked")
    out = tmp_path / "run"
    child = bench.start(bench.command(out))
    children.until((bench.mood / "hangs").exists, child)
    asked = time.monotonic()
    for _ in range(times):
        child.send_signal(number)
    said, err = child.communicate(timeout=60)
    assert time.monotonic() - asked < 30
    assert child.returncode == 130 and "Traceback" not in err and "same command" in err, said + err
    assert len(sums(out)) < 7, "the judge was asked, and no more"
    before = run_folders.contents(out)
    assert RunFolder.load(out).failures() == {} and RunFolder.load(out).status().running is None
    (bench.mood / "hang asked").unlink()
    assert bench.here(bench.command(out), capsys)[0] == 0
    after = run_folders.contents(out)
    assert str({key: after[key] for key in before}) == str(before), "a finished cell is not touched"
    assert same(out, unbroken)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_stopped_before_there_is_a_cell(bench, mood, tmp_path, number):
    """While models are hashed and judges opened: the same answer as in the sweep."""
    mood("hang planning")
    out = tmp_path / "run"
    child = bench.start(bench.command(out))
    children.until((bench.mood / "hangs").exists, child)
    child.send_signal(number)
    said, err = child.communicate(timeout=180)
    assert child.returncode == 130 and "Traceback" not in err and "same command" in err, said + err
    assert not out.exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_stopped_after_the_last_cell(bench, mood, unbroken, tmp_path, capsys, number):
    """While tables and the report are made of them."""
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    for path in (*out.glob("lvs.*"), out / "report.html"):
        path.unlink()
    child = bench.start(bench.command(out))
    children.until((out / "lvs.parquet").exists, child)
    child.send_signal(number)
    said, err = child.communicate(timeout=180)
    assert child.returncode == 130 and "Traceback" not in err and "same command" in err, said + err
    assert not (out / "report.html").exists()
    assert bench.here(bench.command(out), capsys)[0] == 0
    assert same(out, unbroken) and (out / "report.html").exists()


@pytest.mark.parametrize("lost", ["renamed", "a file in its place"])
def test_the_folder_goes_away_under_the_run(bench, mood, unbroken, tmp_path, capsys, lost):
    """A sentence; and from its new place the same command goes on to the same tables."""
    mood("hang asked")
    out, moved = tmp_path / "run", tmp_path / "moved"
    child = bench.start(bench.command(out))
    children.until((bench.mood / "hangs").exists, child)
    out.rename(moved)
    if lost != "renamed":
        out.write_text("mine")
    (bench.mood / "hang asked").unlink()
    said, err = child.communicate(timeout=180)
    shown = " ".join(err.split())
    assert child.returncode == 2 and "Traceback" not in err, said + err
    assert str(out) in shown.replace(" ", "") and "name its new place" in shown
    assert bench.here(bench.command(moved), capsys)[0] == 0
    assert same(moved, unbroken)


# ------------------------------------------------------------------------- deaths on Ray


def test_poison_is_given_up_with_its_cause_and_the_rest_finishes(
    bench, mood, unbroken, tmp_path, capsys
):
    """On Ray: one group always kills its worker. Exit 3; --retry-failed when the poison is gone,
    and only then.

    Everything but the poisoned cell is there already, as each worker that dies costs the start of
    another.
    """
    pytest.importorskip("ray", reason="the Ray extra is not installed")
    out, home = tmp_path / "run", children.Home()
    shutil.copytree(unbroken, out)
    sites = {r["key"]: r["description"]["site"] for r in RunFolder.load(out).records()}
    lost = [next(key for key in sorted(sites) if sites[key] == site) for site in (1, 2)]
    run_folders.lose(out, *lost)
    (bench.mood / "die").write_text(f"{out}\n{lost[0]}")
    try:
        child = bench.start(
            bench.command(out, "--executor=ray", "--workers=1"),
            environment={"TMPDIR": str(home.folder)},
        )
        said, err = child.communicate(timeout=300)
        assert child.returncode == 3, said + err
        assert (
            "1 of 7 cells failed" in err
            and "worker died" in " ".join(err.split())
            and "Traceback" not in err
        )
        assert not home.left()
    finally:
        home.close()
    run = RunFolder.load(out)
    (poisoned,) = run.failures().values()
    assert poisoned["key"] == lost[1] and len(sums(out)) == 6, "block 1's is there again"
    assert poisoned["attempts"] == 3 and "died 3 time(s)" in poisoned["cause"]

    for path in bench.mood.iterdir():
        path.unlink()
    code, said = bench.here(bench.command(out), capsys)
    assert code == 3 and "died" in said
    assert RunFolder.load(out).failures() == run.failures(), "not tried again unasked"
    assert bench.here(bench.command(out, "--retry-failed"), capsys)[0] == 0
    assert same(out, unbroken)


# ------------------------------------------------------------------------- nobody listens


def test_with_both_streams_closed_the_run_is_as_good(bench, mood, unbroken, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "auditgap", *bench.command(out)]
    environment = children.environment(MOOD=str(bench.mood), TERM="dumb")
    environment["PYTHONPATH"] += os.pathsep + str(bench.site)
    script = " ".join(f"'{word}'" for word in command) + " >&- 2>&- <&-"
    assert subprocess.run(["sh", "-c", script], env=environment, timeout=180).returncode == 0
    assert same(out, unbroken)


def test_a_reader_that_leaves_costs_no_result(bench, mood, unbroken, tmp_path):
    """`auditgap lvs … | head -c 1`: stdout and stderr break while it runs; no traceback, and all
    cells are there."""
    out = tmp_path / "run"
    reading, writing = os.pipe()
    child = bench.start(bench.command(out), stdout=writing, stderr=writing)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    assert child.wait(180) in (0, 141)
    assert len(sums(out)) == 7 and sums(out) == sums(unbroken)


POOR = {
    "TERM": "dumb",
    "NO_COLOR": "1",
    "COLUMNS": "40",
    "LANG": "C",
    "LC_ALL": "C",
    "PYTHONIOENCODING": "",
}


def test_a_narrow_dumb_terminal_without_colours_or_unicode(bench, mood, unbroken, tmp_path):
    """`status`, `report` and `lvs`, one after the other in one process, as starting three takes
    three times as long."""
    folder = tmp_path / "rün ε 日本"
    shutil.copytree(unbroken, folder)
    child = bench.start(
        [],
        code=THREE,
        environment={**POOR, "FOLDER": str(folder), "LVS": json.dumps(bench.command(folder))},
    )
    said, err = child.communicate(timeout=120)
    assert child.returncode == 0, said + err
    assert "\x1b" not in said + err and "Traceback" not in err
    parts = said.split("===\n")
    assert len(parts) == 4 and all(part.strip() for part in parts[:3]) and not parts[3]
    assert max(map(len, said.splitlines())) <= 40


THREE = """
import json, os, sys
from auditgap.cli import main
for arguments in (["status", os.environ["FOLDER"]], ["report", os.environ["FOLDER"]], json.loads(os.environ["LVS"])):
    try:
        main(arguments)
    except SystemExit as stop:
        if stop.code:
            raise
    print("===", flush=True)
"""


# ------------------------------------------------------------------------- something changed under
# a resume


def test_another_model_of_the_same_name_is_refused_by_its_fingerprint(
    bench, mood, unbroken, tmp_path, capsys
):
    """The weights under a path change between two sittings: no row of the one is mixed with rows of
    the other."""
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    kept = tmp_path / "kept"
    shutil.copytree(bench.model, kept)
    try:
        tiny.model("llama", seed=1).save_pretrained(bench.model)
        code, said = bench.here(bench.command(out), capsys)
    finally:
        shutil.rmtree(bench.model)
        shutil.copytree(kept, bench.model)
    assert code == 2 and "subjects" in said and "in the folder" in said
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert bench.here(bench.command(out), capsys)[0] == 0


def test_other_versions_are_said_in_terminal_and_report_and_stand_with_the_cells(
    bench, mood, unbroken, tmp_path, capsys
):
    """A folder last written under another torch: allowed, never silent, and every cell names its
    session's versions."""
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    run = RunFolder.load(out).run
    now = run["sessions"][0]["versions"]["torch"]
    run["sessions"][0]["versions"]["torch"] = "1.0.0"
    run_folders.edit_json(out / "run.json", lambda _: run)
    lost = next(
        key
        for key, r in ((r["key"], r) for r in RunFolder.load(out).records())
        if r["description"]["site"] == 2
    )
    run_folders.lose(out, lost)
    code, said = bench.here(bench.command(out), capsys)
    assert (
        code == 0 and f"torch was 1.0.0 when this folder was last written and is {now} now" in said
    )
    assert "torch was 1.0.0" in (out / "report.html").read_text()
    sessions = RunFolder.load(out).run["sessions"]
    assert [s["versions"]["torch"] for s in sessions] == ["1.0.0", now]
    found = {r["key"]: r["session"] for r in RunFolder.load(out).records()}
    assert found.pop(lost) == 1 and set(found.values()) == {0}
