"""Run folders on object storage, on a real S3 server (moto's) on the loopback and, for what needs
no network, in memory."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import run_folders
import s3_server
import toys

from auditgap.errors import UsageError
from auditgap.store import DiskError, RunFolder, cases_of, files, merge, remote
from auditgap.sweep import local
from auditgap.types import Cell

CELLS = [cell for group in toys.groups() for cell in group.cells]


def objects(url: str) -> dict[str, bytes]:
    """All that storage holds, by name."""
    mirror = remote.Mirror(url)
    return {name: mirror.read(name) for name in mirror.names("")}


def swept(url: str, log: Path) -> tuple[RunFolder, object]:
    store = toys.open_folder(url)
    with store.lock():
        store.plan(CELLS)
        return store, local.run(toys.groups(), lambda: toys.Toy(store, log), store)


def whole(tmp_path: Path) -> dict[str, str]:
    """The checksums of an unbroken run on a disk."""
    store = toys.open_folder(tmp_path / "whole")
    local.run(toys.groups(), lambda: toys.Toy(store, tmp_path / "whole.log"), store)
    return toys.digests(store)


# -----------------------------------------------------------------------------------------------------------------
# a run


def test_a_sweep_on_storage_is_a_sweep_on_a_disk(s3, tmp_path, another):
    url = s3.url("run")
    store, outcome = swept(url, tmp_path / "log")
    assert (outcome.done, outcome.failed, outcome.skipped) == (len(CELLS), {}, 0)
    assert toys.digests(store) == whole(tmp_path)
    store.write_table("lvs.parquet", store.rows())

    held = objects(url)
    wanted = {"run.json", "plan.json", "lvs.parquet"}
    made = {f"{p.parent.name}/{p.name}" for p in store.path.glob("*/*.parquet")}
    assert len(made) == 2 * len(toys.groups()), "of each group its rows, and what was said"
    assert set(held) == wanted | made, "the note of the holder is gone, scratch never came"

    another()
    there = RunFolder.load(url)
    assert there.path != store.path
    assert toys.digests(there) == toys.digests(store)
    pd.testing.assert_frame_equal(there.rows(), store.rows())
    assert there.generations(CELLS[0].key)["completion"].tolist() == ["blue"]
    assert run_folders.texts_of(there.path, CELLS[0].key).stat().st_mode & 0o077 == 0
    assert there.planned() == store.planned()
    again, outcome = swept(url, tmp_path / "log")
    assert (outcome.done, outcome.skipped) == (0, len(CELLS))
    assert len(again.run["sessions"]) == 2


def test_a_copy_of_the_prefix_is_a_run_folder(s3, tmp_path):
    url = s3.url("run")
    store, _ = swept(url, tmp_path / "log")
    for name, data in objects(url).items():
        path = tmp_path / "copy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    copied = RunFolder.load(tmp_path / "copy")
    assert toys.digests(copied) == toys.digests(store)
    assert copied.status().finished == len(CELLS)


def test_nothing_counts_before_its_rows_are_in_storage(s3, tmp_path, monkeypatch, another):
    store = toys.open_folder(s3.url("run"))
    cell = CELLS[0]
    write = remote.Mirror.write
    order = []

    def failing(self, name, data):
        order.append(name.split("/")[0])
        if name.startswith("cells/"):
            raise DiskError("cut off")
        write(self, name, data)

    monkeypatch.setattr(remote.Mirror, "write", failing)
    with pytest.raises(DiskError):
        toys.Toy(store, tmp_path / "log").write(cell)
    monkeypatch.setattr(remote.Mirror, "write", write)
    assert order == ["generations", "cells"]
    assert not store.is_finished(cell.key) and store.keys() == []
    another()
    assert not RunFolder.load(store.place).is_finished(cell.key)


def test_a_scan_is_some_listings_and_the_downloads_of_what_is_new(s3, tmp_path, another):
    url = s3.url("run")
    swept(url, tmp_path / "log")
    another()
    there = RunFolder.load(url)
    s3.requests.clear()
    finished, failed = there.scan([c.key for c in CELLS])
    assert finished == {c.key for c in CELLS} and failed == {}
    listings = [line for line in s3.requests if "list-type=2" in line]
    assert len(listings) == 3 and len(s3.requests) == 3 + len(toys.groups())
    s3.requests.clear()
    assert all(there.is_finished(c.key) for c in CELLS)
    assert s3.requests == []


def test_a_worker_gets_the_folder_and_reaches_storage_itself(s3, tmp_path, another):
    store = toys.open_folder(s3.url("run"))
    packed = pickle.dumps(store)
    assert s3_server.SECRET.encode() not in packed and b"caches/another" not in packed
    another()
    there = pickle.loads(packed)
    assert there.path.is_relative_to(tmp_path / "caches" / "another") and there.place == store.place
    toys.Toy(there, tmp_path / "log").write(CELLS[0])
    assert store.is_finished(CELLS[0].key)


def test_failures_travel_and_make_way(s3, tmp_path, another):
    url = s3.url("run")
    store = toys.open_folder(url)
    store.fail(CELLS[0], "no memory left")
    store.fail(CELLS[1], "died once", retry=True)
    another()
    there = RunFolder.load(url)
    assert {key: r["cause"] for key, r in there.failures().items()} == {
        CELLS[0].key: "no memory left"
    }
    toys.Toy(there, tmp_path / "log").write(CELLS[0])
    assert store.failure(CELLS[0].key) is None and store.is_finished(CELLS[0].key)
    store.fail(CELLS[0], "too late")
    assert there.is_finished(CELLS[0].key), "a finished cell stays"


def test_what_is_deleted_in_storage_runs_again(s3, tmp_path):
    url = s3.url("run")
    swept(url, tmp_path / "log")
    mirror = remote.Mirror(url)
    mirror.delete(f"cells/{run_folders.file_of(mirror.path, CELLS[0].key).name}")
    _, outcome = swept(url, tmp_path / "log")  # the working copy still had it
    assert (outcome.done, outcome.skipped) == (3, len(CELLS) - 3)
    mirror.delete(f"generations/{run_folders.texts_of(mirror.path, CELLS[0].key).name}")
    _, outcome = swept(url, tmp_path / "log")
    assert (outcome.done, outcome.skipped) == (3, len(CELLS) - 3)
    for name in objects(url):
        mirror.delete(name)
    _, outcome = swept(url, tmp_path / "log")
    assert (outcome.done, outcome.skipped) == (len(CELLS), 0)


@pytest.mark.parametrize("folder", ["cells", "generations"])
def test_a_torn_object_is_put_aside_and_computed_again(s3, tmp_path, folder, another):
    url = s3.url("run")
    store, _ = swept(url, tmp_path / "log")
    mirror = remote.Mirror(url)
    find = run_folders.file_of if folder == "cells" else run_folders.texts_of
    name = f"{folder}/{find(store.path, CELLS[0].key).name}"
    mirror.write(name, mirror.read(name)[:-7])
    another()
    there = RunFolder.load(url)
    if folder == "generations":  # they come, and are checked, when they are asked for
        assert there.scan([c.key for c in CELLS])[0] == {c.key for c in CELLS}
        with pytest.raises(UsageError, match=r"is damaged.*command that wrote it again"):
            there.generations(CELLS[0].key)
    finished, _ = there.scan([c.key for c in CELLS])
    assert finished == {c.key for c in CELLS[3:]}
    assert not there.is_finished(CELLS[0].key) and there.status().corrupt == 1
    again, outcome = swept(url, tmp_path / "log")
    assert (outcome.done, outcome.skipped) == (3, len(CELLS) - 3)
    assert toys.digests(again) == whole(tmp_path)


def test_a_torn_working_copy_is_fetched_again(s3, tmp_path):
    url = s3.url("run")
    store, _ = swept(url, tmp_path / "log")
    path = run_folders.file_of(store.path, CELLS[0].key)
    texts = run_folders.texts_of(store.path, CELLS[0].key)
    path.write_bytes(path.read_bytes()[:-7])
    texts.write_bytes(b"")
    there = RunFolder.load(url)
    assert there.scan([c.key for c in CELLS])[0] == {c.key for c in CELLS}
    assert len(there.generations(CELLS[0].key)) == 1
    assert toys.digests(there) == whole(tmp_path)
    assert texts.stat().st_mode & 0o077 == 0


def test_a_run_of_an_earlier_release_is_resumed_from_storage(s3, tmp_path, another):
    """A folder a cell, as auditgap 0.1 uploaded it."""
    disk = toys.open_folder(tmp_path / "aged")
    for cell in CELLS[:4]:
        toys.Toy(disk, tmp_path / "log").write(cell)
    disk.plan(CELLS)
    run_folders.age(disk.path)
    url = s3.url("run")
    for path in disk.path.rglob("*.*"):
        if path.is_file() and not path.name.startswith("."):
            remote.Mirror(url).write(path.relative_to(disk.path).as_posix(), path.read_bytes())
    another()
    assert RunFolder.load(url).status().finished == 4
    store, outcome = swept(url, tmp_path / "log")
    assert (outcome.done, outcome.skipped) == (len(CELLS) - 4, 4)
    assert store.generations(CELLS[0].key)["completion"].tolist() == ["blue"]
    assert store.rows().equals(swept(s3.url("new"), tmp_path / "log")[0].rows())


def test_another_config_is_refused_and_changes_nothing(s3, tmp_path, another):
    url = s3.url("run")
    swept(url, tmp_path / "log")
    before = objects(url)
    another()
    with pytest.raises(UsageError, match=r"(?s)s3://.*steps: 1 in the folder, 2 now"):
        RunFolder.open(url, config={"steps": 2}, info={})
    assert objects(url) == before
    with pytest.raises(UsageError, match="no run folder"):
        RunFolder.load(s3.url("nothing"))
    stranger = s3.url("full")
    remote.Mirror(stranger).write("notes.txt", b"mine")
    with pytest.raises(UsageError, match=r"holds other files \(notes.txt"):
        toys.open_folder(stranger)


def test_figures_of_an_earlier_report_go(s3, tmp_path, another):
    url = s3.url("run")
    store = toys.open_folder(url)
    for names, machine in ((("a", "b"), "here"), (("b", "c"), "another")):
        another(machine)
        store = RunFolder.load(url)
        (store.path / "figures").mkdir()
        for name in names:
            files.write_bytes(store.path / "figures" / f"{name}.csv", b"x\n")
        store.write_text("report.html", f"<p>{names}</p>")
    assert {n for n in objects(url) if n.startswith("figures/")} == {
        "figures/b.csv",
        "figures/c.csv",
    }
    assert b"c" in objects(url)["report.html"]


def test_folders_of_machines_are_merged_from_and_to_storage(s3, tmp_path):
    stores = [toys.open_folder(s3.url("run")), toys.open_folder(tmp_path / "disk")]
    for store, some in zip(stores, (CELLS[:8], CELLS[6:]), strict=True):
        store.plan(some)
        for cell in some:
            toys.Toy(store, tmp_path / "log").write(cell)
    out = s3.url("whole")
    joined = merge([store.place for store in stores], out)
    assert toys.digests(joined) == whole(tmp_path)
    assert sum(name.startswith("generations/") for name in objects(out)) == len(CELLS)
    with pytest.raises(UsageError, match="one of the folders"):
        merge([store.place for store in stores], stores[0].place)


def test_a_grid_on_storage_is_found_by_its_cases(s3):
    url = s3.url("grid")
    for name in ("one", "two"):
        toys.open_folder(f"{url}/{name}")
    remote.Mirror(url).write("lvs.csv", b"x\n")
    assert cases_of(url) == {"one": f"{url}/one", "two": f"{url}/two"}
    assert cases_of(f"{url}/one") == {}


# --------------------------------------------------------------------------------------------------------------
# the lock


def test_a_second_writer_is_told_who_holds_it(s3, tmp_path, another):
    url = s3.url("run")
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            (
                "import sys, toys\nwith toys.open_folder(sys.argv[1]).lock(): print('held',"
                " flush=True); input()"
            ),
            url,
        ],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == "held\n"
        another()  # no lock of the operating system's between them
        store = RunFolder.load(url)
        for break_lock in (False, True):
            with pytest.raises(
                UsageError, match=f"{url} is being written by process {child.pid} on "
            ):
                RunFolder.open(url, config={"steps": 1}, info={}, break_lock=break_lock)
        assert store.status().running["pid"] == child.pid
    finally:
        child.communicate("\n", timeout=30)
    assert store.status().running is None
    with store.lock():
        assert store.status().running is not None


def test_the_lock_of_another_host_needs_break_lock(s3):
    url = s3.url("run")
    toys.open_folder(url)
    mirror = remote.Mirror(url)
    note = {
        "pid": 4242,
        "host": "node7",
        "command": "auditgap lvs",
        "since": "2026-01-01T00:00:00+00:00",
    }
    mirror.write("lock.json", files.to_json(note))
    with pytest.raises(UsageError, match=r"process 4242 on node7 .*--break-lock"):
        toys.open_folder(url)
    assert RunFolder.load(url).status().running["host"] == "node7"
    store = RunFolder.open(url, config={"steps": 1}, info={}, break_lock=True)
    with store.lock():
        assert mirror.read_json("lock.json")["host"] == files.HOST
        mirror.write("lock.json", files.to_json(note))  # somebody there breaks it in turn
    assert mirror.read_json("lock.json") == note, "a note is taken back by who left it"


def test_of_many_who_ask_at_once_one_gets_the_note(s3):
    url = s3.url("run")
    mirrors = [remote.Mirror(url) for _ in range(12)]
    with ThreadPoolExecutor(12) as pool:
        got = list(
            pool.map(
                lambda pair: pair[1].create("lock.json", f"{pair[0]}".encode()), enumerate(mirrors)
            )
        )
    assert sum(got) == 1
    assert mirrors[0].read("lock.json") == str(got.index(True)).encode()
    assert mirrors[got.index(True)].create("lock.json", str(got.index(True)).encode()), (
        "asked again, its own is its own"
    )


# -------------------------------------------------------------------------------------------------
# refusals and secrets


@pytest.mark.parametrize(
    "url",
    [
        "s3://user:pa55word@bucket/run",
        "s3://pa55word@bucket/run",
        "https://user:pa55word@host/run",
        "s3://bucket/run?token=pa55word",
        "s3://bucket:pa55word/run",
        "ftp://host/run",
        "file:///tmp/run",
        "s3://bucket",
        "s3:///run",
        "s3://bucket/../run",
        "s3://bucket/a//b",
        "simplecache::s3://bucket/run",
        "s3://bucket/run\x1b[31m",
        "s3://bucket/.hidden",
        "s3://buck\udcffet/run",
    ],
)
def test_a_url_that_is_no_place_for_a_run_is_refused_without_its_secrets(
    url, tmp_path, monkeypatch
):
    monkeypatch.setenv("AUDITGAP_CACHE", str(tmp_path))
    for call in (RunFolder.load, toys.open_folder):
        with pytest.raises(UsageError) as refused:
            call(url)
        assert "pa55word" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_never_answers_is_a_sentence_too(s3, monkeypatch):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(64)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(DiskError, match="Storage does not answer"):
            RunFolder.load(s3.url("run"))
        assert time.monotonic() - started < 30


def cli(args, environment, tmp_path) -> tuple[int, str, float]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "auditgap", *args],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **kept,
            "AUDITGAP_CACHE": str(tmp_path / "cache"),
            "HOME": str(tmp_path),
            "AWS_EC2_METADATA_DISABLED": "true",
            **environment,
        },
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - started


def test_storage_that_cannot_be_had_is_a_sentence_within_seconds(server, tmp_path):
    here = server.environment
    nobody = {**here, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_server.free_port()}"}
    nameless = {name: value for name, value in here.items() if "KEY" not in name}
    cases = [
        (nobody, f"s3://{s3_server.BUCKET}/run", "Storage does not answer"),
        (nameless, f"s3://{s3_server.BUCKET}/run", "no credentials"),
        (here, "s3://no-such-bucket-here/run", "There is no bucket"),
    ]
    for environment, url, words in cases:
        code, said, seconds = cli(["status", url], environment, tmp_path)
        assert (code, "Traceback" in said) == (2, False), said
        assert (
            words in " ".join(said.split())
            and s3_server.SECRET not in said
            and s3_server.KEY_ID not in said
        )
        # ten for storage; the rest is for starting Python while other tests want the cores
        assert seconds < 50


def test_without_s3fs_it_says_what_to_install():
    code = (
        "import sys; sys.modules['s3fs'] = None; from auditgap.cli import main; main(['status',"
        " 's3://bucket/run'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "pip install 'auditgap[s3]'" in " ".join(done.stderr.split()), (
        done.stderr
    )


def test_keys_stand_nowhere(s3, tmp_path, monkeypatch, capfd):
    url = s3.url("run")
    store, _ = swept(url, tmp_path / "log")
    store.fail(replace(CELLS[0], prompts="other"), "a cause")
    held = objects(url)
    here = {str(p): p.read_bytes() for p in (tmp_path / "caches").rglob("*") if p.is_file()}
    out, err = capfd.readouterr()
    for canary in (s3_server.SECRET, s3_server.KEY_ID):
        for name, data in {
            **held,
            **here,
            "terminal": (out + err).encode(),
            "pickle": pickle.dumps(store),
        }.items():
            assert canary.encode() not in data, name
    assert store.path.stat().st_mode & 0o077 == 0


def test_what_storage_holds_runs_nothing_and_leads_nowhere(s3, tmp_path, another):
    url = s3.url("run")
    swept(url, tmp_path / "log")
    mirror = remote.Mirror(url)
    for name in (".hidden/record.json", "a/b/record.json", "x y/record.json", ".x.parquet"):
        mirror.write(f"cells/{name}", b"{}")
    mirror.write("cells/evil.corrupt/record.json", b"{}")
    another()
    there = RunFolder.load(url)
    assert there.keys() == sorted(c.key for c in CELLS)
    assert {p.name for p in (there.path / "cells").iterdir()} == {
        run_folders.file_of(there.path, c.key).name for c in CELLS
    }


# --------------------------------------------------------------------------------------------------------------
# in memory


def test_names_of_places():
    assert remote.within("s3://b/grid/", "case", "x") == "s3://b/grid/case/x"
    assert remote.within("runs/grid", "case") == Path("runs/grid/case")
    assert (
        remote.is_url("gs://b/run")
        and not remote.is_url("runs/x")
        and not remote.is_url(Path("s3://b/run"))
    )
    assert (
        Path(remote.absolute("runs")).is_absolute()
        and remote.absolute("s3://b/run") == "s3://b/run"
    )
    with pytest.raises(UsageError, match="needs a folder on a disk"):
        remote.needs_disk("s3://b/run", "Training")
    remote.needs_disk(None, "Training")


def test_other_storage_does_as_well(tmp_path, monkeypatch):
    monkeypatch.setenv("AUDITGAP_CACHE", str(tmp_path))
    store, outcome = swept("memory://bucket/run", tmp_path / "log")
    assert outcome.done == len(CELLS) and toys.digests(
        RunFolder.load("memory://bucket/run")
    ) == toys.digests(store)
    mirror = remote.Mirror("memory://bucket/run")
    assert mirror.create("x", b"1") and not mirror.create("x", b"2") and mirror.create("x", b"1")
    assert json.loads(mirror.read("run.json"))["config"] == {"steps": 1}
    assert isinstance(CELLS[0], Cell)
