"""Killed in the middle of a group, the same command does the rest and nothing twice, and its tables are an unbroken run's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import planted
import pytest
import torch

from auditgap.cli import main
from auditgap.store import RunFolder

#: `auditgap`, but it notes each array that it computes, and kills itself after so many calls of a RunFolder's method.
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
            "layers": "embedding,1,2", "eps": ",".join(EPS), "attacks": ",".join(ATTACKS), "prompts": str(self.prompts),
            "target": planted.TARGET, "max-new-tokens": "9", "reward": "margin", "judge": "keyword", "steps": "4", "dtype": "float32",
            "device": "cpu", "batch-tokens": "256", "out": str(self.folder / out), **changes,
        }  # fmt: skip
        return ["lvs", str(self.model), *(f"--{name}={value}" for name, value in options.items())]

    def child(self, out: str, method: str = "write", after: int = 0) -> tuple[int, list[str]]:
        """Run it in a process of its own, killed after so many calls (0: not at all); exit code and arrays computed."""
        log = self.folder / f"{out}.{method}.{after}.log"
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(log), method, str(after), *self.command(out)],
            capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
        return done.returncode, log.read_text().split() if log.exists() else []


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def unbroken(bench):
    """The folder of a run that nothing stopped, and the arrays that it computed in order."""
    code, computed = bench.child("unbroken")
    assert code == 0
    return RunFolder.load(bench.folder / "unbroken"), computed


def cells(folder: Path) -> dict[str, tuple[int, int, bytes, bytes]]:
    """Every finished cell's record and rows: as bytes, and when and where on the disk they were written."""
    found = {}
    for path in sorted((folder / "cells").iterdir()):
        at = (path / "record.json").stat()
        found[path.name] = (at.st_mtime_ns, at.st_ino, (path / "record.json").read_bytes(), (path / "rows.parquet").read_bytes())
    return found


def scratch(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "scratch").glob("*.safetensors")}


def check_the_same(bench: Bench, out: str, unbroken: RunFolder) -> None:
    for name in ("lvs.csv", "lvs.parquet", "lvs.md"):
        assert (bench.folder / out / name).read_bytes() == (unbroken.path / name).read_bytes(), name
    assert cells(bench.folder / out).keys() == cells(unbroken.path).keys()
    rows = {name: values[3] for name, values in cells(bench.folder / out).items()}
    assert rows == {name: values[3] for name, values in cells(unbroken.path).items()}


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_killed_while_it_computes(bench, unbroken, share):
    """Between two arrays of the second group: 1 + 4 cells are written, and some of the group's work is remembered."""
    whole, computed = unbroken
    out, after = f"computing{share}", round(share * len(computed))
    code, first = bench.child(out, "remember", after)
    assert code == -signal.SIGKILL and first == computed[:after]
    before, kept = cells(bench.folder / out), scratch(bench.folder / out)
    assert len(before) == 1 + CELLS and kept and kept < set(first)

    code, second = bench.child(out)
    assert code == 0
    assert second == computed[after:], "what was remembered is not computed again, and nothing else is left out"
    after_all = cells(bench.folder / out)
    assert {key: after_all[key] for key in before} == before, "a finished cell is not touched"
    assert len(after_all) == 1 + 3 * CELLS and scratch(bench.folder / out) == set()
    check_the_same(bench, out, whole)


def test_killed_while_it_writes(bench, unbroken):
    """After two of the second group's four cells."""
    whole, computed = unbroken
    code, first = bench.child("writing", "write", 1 + CELLS + 2)
    assert code == -signal.SIGKILL
    before = cells(bench.folder / "writing")
    assert len(before) == 1 + CELLS + 2
    code, second = bench.child("writing")
    assert code == 0 and not set(first) & set(second)
    after_all = cells(bench.folder / "writing")
    assert {key: after_all[key] for key in before} == before and len(after_all) == 1 + 3 * CELLS
    check_the_same(bench, "writing", whole)
    assert scratch(bench.folder / "writing") == set(), "nothing private is left behind"


@pytest.mark.parametrize(("option", "field", "value"), [("steps", "steps", "3"), ("eps", "eps", "0.02,0.2"), ("target", "target", "red")])
def test_another_config_on_the_folder_is_refused(bench, unbroken, capsys, option, field, value):
    whole, _ = unbroken
    before = {p: p.read_bytes() for p in whole.path.rglob("*") if p.is_file()}
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as stop:
        main(bench.command("unbroken", **{option: value}))
    torch.set_num_threads(threads)
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert field in said and value.split(",")[-1] in said
    assert {p: p.read_bytes() for p in whole.path.rglob("*") if p.is_file()} == before, "a refusal changes nothing"
