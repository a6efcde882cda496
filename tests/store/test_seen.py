"""A resume does not read again what it found whole, notices whatever has changed since, and never
trusts it for a number."""

import json
import os
import pickle
import shutil

import pytest

from auditgap.store import RunFolder, files, seen
from auditgap.types import Budget, Cell, Row, Site, Subject

N = 12


def cell(i):
    return Cell(
        Subject("toy", "f" * 24), Site(i), Budget(0.1, "rms"), "targeted", "prompts", {"steps": 10}
    )


def row(i):
    known = {
        "subject": "toy",
        "site": f"block{i}",
        "layer_index": i,
        "unit": "rms",
        "eps": 0.1,
        "attack": "targeted",
        "draw": 0,
        "prompt_id": "p",
        "n_prompt_tokens": 3,
        "n_new_tokens": 2,
        "flags": "",
        "unscored": "",
    }
    return Row(**{name: known.get(name) for name in Row.__dataclass_fields__})


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(seen, "SMALL", 3)
    made = RunFolder.open(tmp_path / "out", config={"a": 1}, info={})
    for i in range(N):
        made.write(cell(i), [row(i)], seconds=1.0)
    made.fail(cell(N), "it broke")
    return made


KEYS = [cell(i).key for i in range(N + 2)]


def fresh(store):
    """As another process opens it."""
    return RunFolder.load(store.path)


def reads(monkeypatch):
    """The cells' files that are read from now on."""
    read, plain = [], files.read
    monkeypatch.setattr(
        files,
        "read",
        lambda path: (read.append(str(path)) if "/cells/" in str(path) else None, plain(path))[1],
    )
    return read


def plainly(store):
    """The plain twin: one cell at a time, every byte."""
    finished = {key for key in KEYS if fresh(store)._read(str(store._cell(key)))[0] == "done"}
    return finished, {
        key: record for key in KEYS if (record := fresh(store).failure(key)) is not None
    }


def test_the_second_scan_reads_only_what_is_not_finished(store, monkeypatch):
    first = fresh(store).scan(KEYS)
    assert first == plainly(store) and len(first[0]) == N and set(first[1]) == {KEYS[N]}
    read = reads(monkeypatch)
    assert fresh(store).scan(KEYS) == first
    assert {path.split("/")[-2] for path in read} == {KEYS[N]}


def truncated(folder):
    data = (folder / "rows.parquet").read_bytes()
    (folder / "rows.parquet").write_bytes(data[:-1])


def flipped(folder):
    data = bytearray((folder / "rows.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "rows.parquet").write_bytes(data)


def no_record(folder):
    (folder / "record.json").unlink()


def no_rows(folder):
    (folder / "rows.parquet").unlink()


def failed(folder):
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(record | {"status": "failed", "cause": "x"}))


def gone(folder):
    shutil.rmtree(folder)


@pytest.mark.parametrize("damage", [truncated, flipped, no_record, no_rows, failed, gone])
def test_what_changed_since_is_noticed(store, damage):
    fresh(store).scan(KEYS)
    damage(store.path / "cells" / KEYS[4])
    assert KEYS[4] not in plainly(store)[0]
    finished, _ = fresh(store).scan(KEYS)
    assert finished == set(KEYS[:N]) - {KEYS[4]}
    store.write(cell(4), [row(4)], seconds=1.0)
    assert fresh(store).scan(KEYS)[0] == set(KEYS[:N])


def test_a_bit_that_flips_unseen_costs_no_number_and_is_computed_again(store):
    """Same size, time and inode: the scan takes the cell for whole, no reader does, and the next
    scan knows."""
    fresh(store).scan(KEYS)
    path = store.path / "cells" / KEYS[4] / "rows.parquet"
    was = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert KEYS[4] in fresh(store).scan(KEYS)[0]
    assert len(fresh(store).rows()) == N - 1 and fresh(store).status().finished == N - 1
    assert KEYS[4] not in fresh(store).scan(KEYS)[0], "whoever found it torn has said so"
    assert list(store.path.glob("cells/*.corrupt"))


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'{"x": 3}', b"\xff\xfe"])
def test_a_torn_or_foreign_hint_is_no_hint(store, content):
    wanted = fresh(store).scan(KEYS)
    (store.path / "index" / seen.NAME).write_bytes(content)
    assert fresh(store).scan(KEYS) == wanted
    shutil.rmtree(store.path / "index")
    assert fresh(store).scan(KEYS) == wanted


def test_another_runs_hint_says_nothing_of_this_one(store, tmp_path):
    fresh(store).scan(KEYS)
    other = RunFolder.open(tmp_path / "other", config={"a": 1}, info={})
    other.write(cell(0), [row(0)], seconds=1.0)
    (other.path / "index").mkdir(exist_ok=True)
    shutil.copy(store.path / "index" / seen.NAME, other.path / "index" / seen.NAME)
    truncated(other.path / "cells" / KEYS[0])
    assert fresh(other).scan(KEYS)[0] == set()


def test_small_runs_write_none_and_workers_carry_none(store, monkeypatch):
    fresh(store).scan(KEYS)
    there = fresh(store)
    there.scan(KEYS)
    assert pickle.loads(pickle.dumps(there))._seen._marks is None
    monkeypatch.setattr(seen, "SMALL", 1000)
    shutil.rmtree(store.path / "index")
    fresh(store).scan(KEYS)
    assert not (store.path / "index" / seen.NAME).exists()


def test_a_folder_that_cannot_be_written_is_scanned_all_the_same(store, monkeypatch):
    def full(*_args, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_bytes", full)
    assert fresh(store).scan(KEYS)[0] == set(KEYS[:N])
