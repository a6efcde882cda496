"""Disks that are full, over quota or bounded, clocks that are wrong, folders of other versions: on
real file systems."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import subprocess
from dataclasses import replace
from pathlib import Path

import children
import numpy as np
import pytest
import run_folders
import toys

from auditgap.errors import UsageError
from auditgap.store import DiskError, RunFolder
from auditgap.sweep import local


@pytest.fixture
def small_disk(mounted):
    """A file system of 256 KiB."""
    return mounted("256k")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_a_sweep_on_a_disk_that_fills_up_stops_in_a_sentence_and_goes_on_when_there_is_room(
    small_disk, tmp_path
):
    """Exit code 2, the path, the bytes; what was finished stays; freeing space and the same command
    is the recovery."""
    out, log = small_disk / "out", tmp_path / "log"
    (small_disk / "ballast").write_bytes(b"x" * 190_000)
    child = children.python(children.SWEEP, str(out), str(log), "{}")
    said, err = child.communicate(timeout=240)
    assert child.returncode == 2 and "Traceback" not in err, said + err
    assert re.search(
        r"Could not write \S+/disk-256k/out/\S+ \([\d,]+ bytes needed\): No space left.*free some space",
        said,
    ), said
    finished = {r["key"]: r["sha256"] for r in RunFolder.load(out).records()}
    assert 0 < len(finished) < 12, "some cells were finished before"
    assert RunFolder.load(out).failures() == {} and not list(out.rglob("*.corrupt"))
    before = RunFolder.load(out).records()

    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    child = children.python(children.SWEEP, str(out), str(log), "{}")
    said, err = child.communicate(timeout=240)
    assert f"Outcome(done={12 - len(finished)}, failed={{}}, skipped={len(finished)})" in said, (
        said + err
    )
    kept = {record["key"]: record for record in RunFolder.load(out).records()}
    assert [kept[record["key"]] for record in before] == before, "as they were first written"
    begun = toys.counts(log)
    assert begun.pop("made") == 2 and sorted(begun.values()) in ([1] * 11 + [2], [1] * 12), (
        "one cell at most was begun twice: the one that failed, unless it was the joining"
    )


BOUNDED = """
    import resource, sys
    import numpy as np
    import toys
    from auditgap.store import DiskError
    store = toys.open_folder(sys.argv[1])
    store.write(toys.cells(0)[0], [], seconds=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        store.remember("abc", lambda: {"x": np.ones(100_000)})
    except DiskError as error:
        print(error)
        sys.exit(error.exit_code)
"""


def test_a_limit_on_file_sizes_is_a_sentence(tmp_path):
    child = children.python(BOUNDED, str(tmp_path / "out"))
    said, err = child.communicate(timeout=240)
    assert child.returncode == 2 and "ulimit -f" in said and "800," in said, said + err
    store = toys.open_folder(tmp_path / "out")
    assert store.is_finished(toys.cells(0)[0].key) and not list((tmp_path / "out").rglob("*.tmp"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000, (
        "the child's limit is the child's alone"
    )


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.EDQUOT, "quota"), (errno.EROFS, "writable"), (errno.EIO, "check the disk")],
)
def test_other_refusals_of_the_system_are_sentences_too(tmp_path, monkeypatch, number, advice):
    """Neither a quota nor a broken disk can be had here, so the system call is made to say what it
    would say."""
    store = toys.open_folder(tmp_path / "out")

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(DiskError, match=rf"{os.strerror(number)}.*{advice}.*same command"):
            store.remember("abc", lambda: {"x": np.ones(3)})
    assert (
        not list((tmp_path / "out").rglob("*.tmp"))
        and store.remember("abc", lambda: {"x": np.ones(3)})["x"].sum() == 3
    )


def test_a_folder_that_can_never_be_made_is_said_to_be_so(tmp_path):
    """Nothing was moved: nothing was there."""
    (tmp_path / "file").write_text("mine")
    for out, told in {
        tmp_path / "file" / "run": "file is a file; a run needs a folder of its own",
        Path("/proc/auditgap/run"): "/proc/auditgap/run cannot be made.*--out runs/mine",
    }.items():
        with pytest.raises(UsageError, match=told) as said:
            toys.open_folder(out)
        assert "moved" not in str(said.value)


# ------------------------------------------------------------------------- clocks


@pytest.mark.parametrize("when", [0, 2**31 + 86400], ids=["1970", "2038"])
def test_clocks_decide_nothing(tmp_path, when):
    """Times of files and of records may lie decades off, or run backwards: content and checksum say
    what is finished."""
    store, log = toys.open_folder(tmp_path / "out"), tmp_path / "log"
    local.run(toys.groups(2), lambda: toys.Toy(store, log), store)
    for i, path in enumerate(sorted((tmp_path / "out").rglob("*"))):
        os.utime(path, (when - i, when - i))
    written = "1970-01-01T00:00:00.000+00:00" if not when else "2038-01-20T00:00:00.000+00:00"
    for key in store.keys():  # noqa: SIM118 (no mapping)
        run_folders.remake(
            tmp_path / "out", key, lambda c: replace(c, record={**c.record, "written": written})
        )
    store = toys.open_folder(tmp_path / "out")
    with store.lock():
        outcome = local.run(toys.groups(3), lambda: toys.Toy(store, log), store)
        note = json.loads((tmp_path / "out" / "lock.json").read_text())
        (tmp_path / "out" / "lock.json").write_text(
            json.dumps({**note, "since": "2038-01-19T00:00:00+00:00"})
        )
        store.plan(c for g in toys.groups(4) for c in g.cells)
        now = store.status()
    assert (outcome.done, outcome.skipped, outcome.failed) == (3, 6, {})
    assert now.finished == 9 and (now.eta_seconds is None or now.eta_seconds >= 0)
    begun = toys.counts(log)
    assert begun.pop("made") == 2 and set(begun.values()) == {1}


def test_a_newer_file_that_is_torn_does_not_beat_an_older_one_that_is_whole(tmp_path):
    store = toys.open_folder(tmp_path / "out")
    old, torn = toys.cells(0, 2)
    toys.Toy(store, tmp_path / "log").write(old)
    toys.Toy(store, tmp_path / "log").write(torn)
    rows = run_folders.file_of(tmp_path / "out", torn.key)
    os.utime(run_folders.file_of(tmp_path / "out", old.key), (0, 0))
    rows.write_bytes(rows.read_bytes()[:-1])
    os.utime(rows, (2**31, 2**31))
    assert store.is_finished(old.key) and not store.is_finished(torn.key)


# ------------------------------------------------------------------------- other versions


@pytest.mark.parametrize(
    ("schema", "said"),
    [(0, "older auditgap"), (-3, "older auditgap"), (3, "newer"), (10**30, "newer")],
)
def test_a_folder_of_another_schema_is_refused_with_its_version(tmp_path, schema, said):
    out = tmp_path / "out"
    toys.open_folder(out)
    run_folders.edit_json(out / "run.json", lambda run: {**run, "schema": schema})
    before = contents(out)
    for opened in (lambda: toys.open_folder(out), lambda: RunFolder.load(out)):
        with pytest.raises(UsageError, match=rf"{said}.*schema {schema}"):
            opened()
    assert contents(out) == before
