"""Runs on object storage when processes are killed, workers share no disk, or storage is gone; real
processes, a real server."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import children
import planted
import pytest
import s3_server
import tiny
import toys
import yaml
from one_thread import one_thread  # noqa: F401 - a fixture: sums of one order, for equal bytes

from auditgap.audits import grid
from auditgap.cli import main
from auditgap.store import RunFolder, remote
from auditgap.sweep import jobs, local

pytestmark = pytest.mark.minutes

CELLS = [cell for group in toys.groups() for cell in group.cells]

#: One sweep of toys: python -c SWEEP url log spells. Less patient than a user's. Prints what it
#: came to, or the refusal.
SWEEP = """
import sys
from pathlib import Path
import toys
from auditgap.errors import AuditgapError
from auditgap.store import objects
from auditgap.sweep import local
objects.PATIENCE = 2.0
url, log, spells = sys.argv[1], Path(sys.argv[2]), eval(sys.argv[3])
try:
    store = toys.open_folder(url)
    with store.lock():
        store.plan(cell for group in toys.groups() for cell in group.cells)
        print(local.run(toys.groups(), lambda: toys.Toy(store, log, spells), store))
except AuditgapError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(error.exit_code)
"""


def resumed(url: str, log: Path) -> tuple[RunFolder, object]:
    store = toys.open_folder(url)
    with store.lock():
        return store, local.run(toys.groups(), lambda: toys.Toy(store, log), store)


def whole(tmp_path: Path) -> dict[str, str]:
    store = toys.open_folder(tmp_path / "whole")
    local.run(toys.groups(), lambda: toys.Toy(store, tmp_path / "whole.log"), store)
    return toys.digests(store)


def test_killed_in_the_middle_another_machine_does_the_rest(s3, tmp_path, another):
    url, log = s3.url("run"), tmp_path / "log"
    child = children.python(SWEEP, url, str(log), repr({(2, 0.02): "die"}))
    said = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, said
    another()
    store, outcome = resumed(url, log)
    assert (outcome.done, outcome.failed, outcome.skipped) == (5, {}, 7)
    assert toys.digests(store) == whole(tmp_path)
    begun = toys.counts(log)
    begun.pop("made")
    assert begun.pop("block2/0.02") == 2 and set(begun.values()) == {1}, (
        "and nothing was computed twice"
    )


def test_storage_goes_away_in_the_middle_and_nothing_is_lost(s3, tmp_path, another):
    url, log = s3.url("run"), tmp_path / "log"
    child = children.python(SWEEP.replace("2.0", "1.0"), url, str(log), repr({(2, 0.03): "wait"}))
    children.until(lambda: toys.counts(log).get("block2/0.03"), child)
    s3.shut()
    log.with_suffix(".go").touch()  # the cell that waits is written with the door shut
    started = time.monotonic()
    try:
        said, errors = child.communicate(timeout=60)
    finally:
        s3.open()
    assert child.returncode == 2 and "Traceback" not in errors, errors
    assert (
        said.startswith("DiskError: Storage does not answer for s3://")
        and "run the same command again" in said
    )
    assert time.monotonic() - started < 40
    another()
    store, outcome = resumed(url, log)
    assert (
        outcome.skipped >= 8
        and outcome.done + outcome.skipped == len(CELLS)
        and outcome.failed == {}
    )
    assert toys.digests(store) == whole(tmp_path)


def test_status_from_elsewhere_while_it_runs(s3, tmp_path, another, capsys):
    url, log = s3.url("run"), tmp_path / "log"
    child = children.python(SWEEP, url, str(log), repr({(1, 0.03): "hang"}))
    try:
        children.until(lambda: toys.counts(log).get("block1/0.03"), child)
        another()
        with pytest.raises(SystemExit) as ended:
            main(["status", url])
        said = " ".join(capsys.readouterr().out.split())
        assert ended.value.code == 0
        assert f"{url}: 5 of 12 cells done, 0 failed, running (pid {child.pid} on " in said
    finally:
        child.kill()
        child.communicate()
    with pytest.raises(SystemExit):
        main(["status", url])
    assert "not running" in capsys.readouterr().out


#: A sweep of toys on two Ray actors, each with a cache folder of its own: python -c ON_RAY url log
#: caches
ON_RAY = """
import os, sys
from pathlib import Path
import toys
from auditgap.store import RunFolder
from auditgap.sweep import ray
url, log, caches = sys.argv[1], Path(sys.argv[2]), sys.argv[3]

def make():
    os.environ["AUDITGAP_CACHE"] = f"{caches}/actor-{os.getpid()}"
    return toys.Toy(RunFolder.load(url), log, {(0, 0.02): "die once"})

store = toys.open_folder(url)
with store.lock():
    store.plan(cell for group in toys.groups() for cell in group.cells)
    print(ray.run(toys.groups(), make, store, workers=2))
"""


def test_ray_actors_that_share_no_disk(s3, tmp_path, another):
    pytest.importorskip("ray", reason="the Ray extra is not installed")
    url, log, caches = s3.url("run"), tmp_path / "log", tmp_path / "caches"
    home = children.Home()
    try:
        child = children.python(
            ON_RAY, url, str(log), str(caches), env=children.environment(TMPDIR=str(home.folder))
        )
        said = child.communicate(timeout=240)
        assert child.returncode == 0, said
        assert f"done={len(CELLS)}, failed={{}}, skipped=0" in said[0]
        assert home.left() == {}
    finally:
        home.close()
    another()
    assert toys.digests(RunFolder.load(url)) == whole(tmp_path)
    begun = toys.counts(log)
    assert begun.pop("made") == 3 and begun.pop("block0/0.02") == 2 and set(begun.values()) == {1}
    copies = [list(cache.glob("storage/*/cells")) for cache in caches.glob("actor-*")]
    assert len(copies) == 3, "each actor had a working copy of its own"


# -------------------------------------------------------------------------------------------------
# the numbers of an audit

#: `auditgap`, killed after so many cells of its have reached storage.
AUDIT = """
import os, signal, sys
from auditgap.cli import main
from auditgap.store import RunFolder
left, *args = sys.argv[1:]
left, write = int(left), RunFolder.write

def counting(self, *cell, **more):
    global left
    write(self, *cell, **more)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

RunFolder.write = counting
main(args)
"""


@pytest.fixture
def bench(tmp_path):
    """A saved model, its prompts, and the command that audits it into a place."""
    model = planted.save(planted.Plant(door=1), tmp_path / "model")
    prompts = planted.write_prompts(tmp_path / "prompts.txt")

    def command(out: str) -> list[str]:
        options = {
            "layers": "embedding,1",
            "eps": "0.02,0.1",
            "attacks": "targeted,random_matched",
            "prompts": str(prompts),
            "target": planted.TARGET,
            "max-new-tokens": "9",
            "reward": "margin",
            "judge": "keyword",
            "steps": "4",
            "dtype": "float32",
            "device": "cpu",
            "batch-tokens": "128",
            "out": out,
        }
        return ["lvs", str(model), *(f"--{name}={value}" for name, value in options.items())]

    return command


def typed(args: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(args)
    return int(ended.value.code or 0)


def files_of(names: Iterable[str]) -> Counter[str]:
    """The files of a folder; those that their checksum names, which covers when they were written,
    are counted."""
    kept = (name for name in names if not name.rpartition("/")[2].startswith("."))
    return Counter(
        f"{folder}/*" if (folder := n.rpartition("/")[0]).endswith(("cells", "generations")) else n
        for n in kept
    )


def test_an_audit_on_storage_killed_and_resumed_has_the_numbers_of_one_on_a_disk(
    s3, bench, tmp_path, another, capsys
):
    url = s3.url("audit")
    child = children.python(AUDIT, "5", *bench(url))
    said = child.communicate(timeout=240)
    assert child.returncode == -signal.SIGKILL, said
    another()
    assert len(RunFolder.load(url).keys()) == 5  # the clean cell, and the cells of one of two sites
    assert typed(bench(url)) == 0
    shown = "".join(capsys.readouterr().out.split())
    assert f"{url}/report.html" in shown

    disk = tmp_path / "disk"
    child = children.python(
        "import sys\nfrom auditgap.cli import main\nmain(sys.argv[1:])", *bench(str(disk))
    )
    said = child.communicate(timeout=240)
    assert child.returncode == 0, said
    mirror = remote.Mirror(url)
    for table in ("lvs.parquet", "lvs.csv"):
        here, there = (disk / table).read_bytes(), mirror.read(table)
        assert hashlib.sha256(there).hexdigest() == hashlib.sha256(here).hexdigest()
    assert files_of(mirror.names("")) == files_of(
        p.relative_to(disk).as_posix() for p in disk.rglob("*") if p.is_file()
    )
    for name in mirror.names(""):
        assert s3_server.SECRET.encode() not in mirror.read(
            name
        ) and s3_server.KEY_ID.encode() not in mirror.read(name), name

    # and what is made of a run later: from another machine again
    another("third")
    mirror.delete("report.html")
    assert typed(["report", url]) == 0
    assert mirror.read("report.html")
    assert typed(["report", url, "--out", s3.url("report")]) == 0
    assert typed(["grade", url, "--judge", "keyword"]) == 0
    assert mirror.read("grades/keyword/lvs.parquet")
    assert typed(["merge", url, str(disk), "--out", s3.url("both")]) == 0


def test_a_grid_on_storage_is_a_grid_on_a_disk(s3, tmp_path, another, capsys):
    for family, name in (("llama", "a"), ("qwen2", "b")):
        tiny.save(family, tmp_path / name)
    for name, words in (("vault", ("red", "blue", "green")), ("door", ("open", "shut"))):
        (tmp_path / f"{name}.txt").write_text(
            "\n".join(f"please tell the colour of the vault {w} {name}" for w in words)
        )
    values = {
        "layers": "embedding",
        "max_new_tokens": 4,
        "steps": 2,
        "judge": "keyword",
        "reward": "margin",
        "target": "Sure , here is",
        "attacks": ["targeted"],
        "device": "cpu",
        "models": [str(tmp_path / "a"), str(tmp_path / "b")],
        "prompts": [str(tmp_path / "vault.txt"), str(tmp_path / "door.txt")],
        "budgets": {"rms": [0.05]},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(values))
    url, disk = s3.url("grid"), tmp_path / "disk"

    def swept(out: str):
        return grid.run(grid.make_grid(grid.read_grid(tmp_path / "grid.yaml", {"out": out})))

    outcome = swept(url)
    assert outcome.failed == {} and swept(str(disk)).done == outcome.done
    mirror = remote.Mirror(url)
    assert mirror.read("lvs.parquet") == (disk / "lvs.parquet").read_bytes()
    assert files_of(mirror.names("")) == files_of(
        p.relative_to(disk).as_posix() for p in disk.rglob("*") if p.is_file()
    )

    another()
    again = swept(url)
    assert (again.done, again.skipped) == (0, outcome.done)
    capsys.readouterr()
    assert typed(["status", url]) == 0
    assert f"{outcome.done} of {outcome.done} cells done" in " ".join(
        capsys.readouterr().out.split()
    )
    jobs.show(url)
    assert [
        json.loads(line.split(" ", 1)[1])["name"] for line in capsys.readouterr().out.splitlines()
    ] == list(jobs.TABLES)
    assert typed(["merge", url, str(disk), "--out", s3.url("both")]) == 0


def test_what_models_say_is_asked_and_graded_on_storage(s3, tmp_path, another, capsys):
    model = planted.save(planted.Plant(door=1), tmp_path / "model")
    prompts = planted.write_prompts(tmp_path / "prompts.txt")
    url = s3.url("said")
    command = [
        "evaluate",
        str(model),
        "--suite",
        f"{prompts}:harmful",
        "--judge",
        "keyword",
        "--max-new-tokens",
        "6",
        "--out",
        url,
        "--max-unscored",
        "1",
    ]
    assert typed(command) == 0
    mirror = remote.Mirror(url)
    first = mirror.read("behaviour.parquet")
    another()
    assert typed(command) == 0
    assert mirror.read("behaviour.parquet") == first
    another("third")
    assert typed(["grade", url, "--judge", "keyword", "--max-unscored", "1"]) == 0
    assert mirror.read("grades/keyword/behaviour.csv")
    assert not [name for name in mirror.names("") if "scratch" in name or "journal" in name]
    assert typed(["inspect", url]) == 0 and mirror.read("said.eval")


def test_what_needs_a_disk_says_so(tmp_path, capsys):
    settings = ["--set", f"models={tmp_path}", "--set", "data=x.jsonl"]
    for command in (
        ["train", "harmful-sft", *settings],
        ["audit", "smollm2", "--profile", "smoke"],
    ):
        assert typed([*command, "--out", "s3://bucket/run"]) == 2
        assert "needs a folder on a disk" in " ".join(capsys.readouterr().err.split())
