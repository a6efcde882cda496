"""Killed in the middle of a group, the same command does the rest, nothing twice; its tables are an
unbroken run's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import planted
import pytest
import run_folders

from auditgap.cli import main
from auditgap.store import RunFolder

#: `auditgap`, but it notes each array that it computes, and kills itself after so many calls of a
#: RunFolder's method.
CHILD = """
import os, signal, sys
from auditgap.cli import main
from auditgap.store import RunFolder

log, method, left, *args = sys.argv[1:]
left = int(left)
remember = RunFolder.remember

def noting(self, name, compute):
    def computed():
        arrays = compute()
        with open(log, "a") as file:
            file.write(name + "\\n")
        return arrays
    return remember(self, name, computed)

RunFolder.remember = noting
original = getattr(RunFolder, method)

def counting(self, *args, **named):
    global left
    result = original(self, *args, **named)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(RunFolder, method, counting)
main(args)
"""
ATTACKS = ["targeted", "random_matched"]
EPS = ["0.02", "0.1"]
CELLS = len(ATTACKS) * len(EPS)  #: of one site's group


class Bench:
    """A saved model, its prompts, and the command line that audits it into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = planted.save(planted.Plant(door=1), folder / "model")
        self.prompts = planted.write_prompts(folder / "prompts.txt")

    def command(self, out: str, **changes: str) -> list[str]:
        options = {
            "layers": "embedding,1,2",
            "eps": ",".join(EPS),
            "attacks": ",".join(ATTACKS),
            "prompts": str(self.prompts),
            "target": planted.TARGET,
            "max-new-tokens": "9",
            "reward": "margin",
            "judge": "keyword",
            "steps": "4",
            "dtype": "float32",
            "device": "cpu",
            "batch-tokens": "128",
            "out": str(self.folder / out),
            **changes,
        }
        return ["lvs", str(self.model), *(f"--{name}={value}" for name, value in options.items())]

    def child(self, out: str, method: str = "write", after: int = 0) -> tuple[int, list[str]]:
        """Run it in a process of its own, killed after so many calls (0: not at all); exit code and
        arrays computed."""
        log = self.folder / f"{out}.log"
        log.write_text("")
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(log), method, str(after), *self.command(out)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
        return done.returncode, log.read_text().split()


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def unbroken(bench):
    """The folder of a run that nothing stopped, and the arrays that it computed in order."""
    code, computed = bench.child("unbroken")
    assert code == 0
    return RunFolder.load(bench.folder / "unbroken"), computed


def cells(folder: Path) -> dict[str, str]:
    """Every finished cell: its record, when it was written and all, and its rows."""
    return {key: str(cell) for key, cell in run_folders.contents(folder).items()}


def scratch(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "scratch").glob("*.safetensors")}


@dataclass(frozen=True)
class Sitting:
    """One start of the command: how it ended, what it computed, and what lay in the folder then."""

    code: int
    computed: list[str]
    cells: dict[str, str]
    scratch: set[str]


@pytest.fixture(scope="module")
def sittings(bench, unbroken):
    """One folder, killed three times in its second group: as it computes, as it writes, and before
    it tidies up."""
    _, computed = unbroken
    n_group = (len(computed) - 1) // 3  # one array of the clean pass, then three like groups
    assert len(computed) == 1 + 3 * n_group and n_group > 2
    found, folder = [], bench.folder / "killed"
    for method, after in (
        ("remember", 1 + n_group + n_group // 2),
        ("write", 2),
        ("write", CELLS - 2),
        ("write", 0),
    ):
        code, log = bench.child("killed", method, after)
        found.append(Sitting(code, log, cells(folder), scratch(folder)))
    return found


def test_each_sitting_adds_to_what_the_others_finished(sittings):
    assert [s.code for s in sittings] == [-signal.SIGKILL] * 3 + [0]
    assert [len(s.cells) for s in sittings] == [
        1 + CELLS,
        1 + CELLS + 2,
        1 + 2 * CELLS,
        1 + 3 * CELLS,
    ]
    for before, after in pairwise(sittings):
        assert {key: after.cells[key] for key in before.cells} == before.cells, (
            "a finished cell is not touched"
        )


def test_what_was_computed_is_remembered(unbroken, sittings):
    _, computed = unbroken
    first, second, third, _ = sittings
    group = set(computed[1 + (len(computed) - 1) // 3 : 1 + 2 * (len(computed) - 1) // 3])
    assert (
        first.computed == computed[: len(first.computed)]
        and first.scratch == group & set(first.computed) != group
    )
    assert set(second.computed) == group - first.scratch, "the rest of the group, and no more"
    assert group <= third.scratch | second.scratch, "kept until all cells of the group are written"
    everything = [name for s in sittings for name in s.computed]
    assert len(set(everything)) == len(everything), "nothing is computed twice"
    assert set(computed) <= set(everything)


def test_the_tables_are_those_of_an_unbroken_run(bench, unbroken, sittings):
    whole, _ = unbroken
    for name in ("lvs.csv", "lvs.parquet", "lvs.md"):
        assert (bench.folder / "killed" / name).read_bytes() == (whole.path / name).read_bytes(), (
            name
        )
    rows = {key: values[-1] for key, values in cells(whole.path).items()}
    assert {key: values[-1] for key, values in sittings[-1].cells.items()} == rows, (
        "to the last bit of every row"
    )


def test_nothing_is_left_in_scratch(unbroken, sittings):
    """Its arrays hold token ids, which are text, so they may not outlive the run."""
    assert scratch(unbroken[0].path) == set()
    assert sittings[-1].scratch == set()


@pytest.mark.parametrize(
    ("field", "value"), [("steps", "3"), ("eps", "0.02,0.2"), ("target", "red")]
)
def test_another_config_on_the_folder_is_refused(bench, unbroken, capsys, field, value):
    whole, _ = unbroken
    before = {p: p.read_bytes() for p in whole.path.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as stop:
        main(bench.command("unbroken", **{field: value}))
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert field in said and value.split(",")[-1] in said
    assert {p: p.read_bytes() for p in whole.path.rglob("*") if p.is_file()} == before, (
        "a refusal changes nothing"
    )
