"""The run folder under everything that happens to it: kills, torn files, second writers, full
disks, odd text."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import run_folders
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from auditgap.errors import UsageError
from auditgap.rows import ROW_COLUMNS, Row
from auditgap.store import DiskError, RunFolder, schema_of
from auditgap.types import Budget, Cell, Label, Site, Subject

CONFIG = {"steps": 10, "attack": {"eps": [0.01, 0.03], "unit": "rms"}}
INFO = {
    "versions": {"torch": "2.13.0", "transformers": "5.17.0"},
    "command": "auditgap latent",
    "warnings": ["slow"],
}


def cell(i: int = 0, attack: str = "targeted") -> Cell:
    return Cell(Subject("toy", "f00d"), Site(i), Budget(0.03, "rms"), attack, "5150", {"seed": 0})


def row(prompt: str = "p0", **changes) -> Row:
    values = {f.name: None for f in fields(Row)} | {
        "subject": "toy",
        "site": "block3",
        "layer_index": 3,
        "unit": "rms",
        "eps": 0.03,
        "attack": "targeted",
        "draw": 0,
        "prompt_id": prompt,
        "n_prompt_tokens": 7,
        "n_new_tokens": 5,
        "clean_reward": 1.25,
        "l2": 0.1 + 0.2,
        "flags": "",
        "unscored": "",
    }
    return Row(**(values | changes))


def open_folder(path: Path | str, **changes) -> RunFolder:
    return RunFolder.open(path, **({"config": CONFIG, "info": INFO} | changes))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def python(code: str, *args: str, **options) -> subprocess.Popen:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n" + textwrap.dedent(
        code
    )
    return subprocess.Popen([sys.executable, "-c", code, *args], text=True, **options)


# ------------------------------------------------------------------------- what goes in comes out


def test_rows_keep_every_value_and_every_null(tmp_path):
    store = open_folder(tmp_path / "out")
    store.write(
        cell(),
        [row("b", coherent=True, verdict_edited=Label.SAFE), row("a", lvs=float("nan"))],
        seconds=1.5,
    )
    store.write(
        cell(attack="clean"),
        [row("a", attack="clean", site=None, layer_index=None, unit=None, eps=None)],
        seconds=1,
    )
    frame = store.rows()
    assert tuple(frame.columns) == ROW_COLUMNS
    assert frame[["attack", "prompt_id"]].values.tolist() == [
        ["clean", "a"],
        ["targeted", "a"],
        ["targeted", "b"],
    ]
    assert frame["l2"].tolist() == [0.1 + 0.2] * 3  # the very float, not a rounded one
    assert frame["coherent"].tolist() == [None, None, True]
    assert frame["verdict_edited"].tolist() == [None, None, "safe"]
    assert np.isnan(frame["layer_index"][0]) and frame["layer_index"].tolist()[1:] == [3, 3]
    assert frame[["lvs", "edited_reward"]].isna().all(axis=None)
    raw = pq.read_table(run_folders.file_of(tmp_path / "out", cell().key))
    assert raw["lvs"].null_count == 2, "NaN must be null on disk, not a number"
    assert raw["cell_key"].to_pylist() == [cell().key] * 2
    assert list(store.rows(attacks=["clean"])["attack"]) == ["clean"]


def test_the_schema_follows_the_annotations():
    schema = schema_of(Row)
    assert schema.names == list(ROW_COLUMNS)
    assert schema.field("layer_index") == pa.field("layer_index", pa.int64(), nullable=True)
    assert schema.field("prompt_id") == pa.field("prompt_id", pa.string(), nullable=False)
    assert schema.field("coherent").type == pa.bool_()

    @dataclass
    class Bad:
        x: "list[int]"  # noqa: UP037

    with pytest.raises(TypeError, match=r"Bad\.x"):
        schema_of(Bad)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"prompt_id": None}, ValueError),
        ({"draw": 1.5}, TypeError),
        ({"coherent": "yes"}, pa.ArrowException),
    ],
)
def test_a_value_that_does_not_fit_is_refused_not_bent(tmp_path, changes, error):
    store = open_folder(tmp_path / "out")
    with pytest.raises(error):
        store.write(cell(), [row(**changes)], seconds=1)
    assert not store.is_finished(cell().key) and not list((tmp_path / "out" / "cells").iterdir())


ODD = [
    "",
    "\x00nul\x00",
    "\ud83d lone \udc00",
    "\u202ertl\u202c\u2066",
    "e\u0301 é",
    "👩‍👩‍👧",
    "a\r\nb\rc\n",
    "漢字",
    "x" * 1_000_000,
]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(
        st.text(st.characters(codec=None), max_size=40) | st.sampled_from(ODD) | st.none(),
        min_size=1,
        max_size=5,
    )
)
def test_any_text_comes_back_code_point_for_code_point(tmp_path, texts):
    store = open_folder(tmp_path / "out")
    some = replace(cell(), settings={"texts": texts})
    store.write(
        some,
        [row(subject=texts[0] or "s")],
        generations=[{"completion": t, "n": 1} for t in texts],
        seconds=1,
    )
    assert store.generations(some.key)["completion"].tolist() == texts
    assert (texts[0] or "s") in store.rows()["subject"].tolist()


def test_rows_are_the_same_whatever_the_order_of_writing(tmp_path):
    parts = [
        (cell(i, a), [row(p, layer_index=i, attack=a) for p in "ba"])
        for i in (2, 0, 1)
        for a in ("targeted", "random")
    ]
    one, two = open_folder(tmp_path / "1"), open_folder(tmp_path / "2")
    for c, rows in parts:
        one.write(c, rows, seconds=1)
    for c, rows in reversed(parts):
        two.write(c, rows, seconds=2)
    pd.testing.assert_frame_equal(one.rows(), two.rows())
    assert {r["key"]: r["sha256"] for r in one.records()} == {
        r["key"]: r["sha256"] for r in two.records()
    }


# ------------------------------------------------------------------------- finished means finished


def test_a_finished_cell_is_never_written_again_nor_failed(tmp_path):
    store = open_folder(tmp_path / "out")
    store.write(cell(), [row(l2=1.0)], seconds=1)
    before = snapshot(tmp_path / "out")
    store.write(cell(), [row(l2=2.0)], seconds=9)
    store.fail(cell(), "too late")
    assert snapshot(tmp_path / "out") == before
    assert store.rows()["l2"].tolist() == [1.0]


def test_failures_count_attempts_and_give_way_to_a_result(tmp_path):
    store = open_folder(tmp_path / "out")
    store.fail(cell(), "worker died", retry=True)
    assert store.failures() == {}
    store.fail(cell(), "RuntimeError: first\x1b[31m line\nsecond line with text of a prompt")
    record = store.failures()[cell().key]
    assert (record["attempts"], record["cause"]) == (2, "RuntimeError: first?[31m line")
    assert not store.is_finished(cell().key) and store.rows().empty
    store.write(cell(), [row()], seconds=1)
    assert (
        store.is_finished(cell().key)
        and store.failures() == {}
        and store.records()[0]["attempts"] == 3
    )


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.booleans(),
    where=st.floats(0, 1, exclude_max=True),
    flip=st.booleans(),
)
def test_a_torn_cell_is_set_aside_and_done_again(tmp_path, texts, where, flip):
    """A flipped bit is as torn as a cut, in the rows, the records and what the model said."""
    store = open_folder(tmp_path / "out")
    sibling, torn = cell(1), cell(2)
    said = [{"completion": "blue"}]
    store.write(sibling, [row(layer_index=1)], generations=said, seconds=1)
    store.write(torn, [row(layer_index=2)], generations=said, seconds=1)
    whole = store.rows()
    find = run_folders.texts_of if texts else run_folders.file_of
    file = find(tmp_path / "out", torn.key)
    data = file.read_bytes()
    at = int(where * len(data))
    file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if flip else data[:at])
    beside = run_folders.file_of(tmp_path / "out", sibling.key).read_bytes()
    asides = len(list(file.parent.glob("*.corrupt")))

    seen = store.rows()["layer_index"].tolist()
    assert seen == ([1.0, 2.0] if texts else [1.0]), "a reader must not see torn rows"
    status = store.status()
    assert status.finished == 1 and status.corrupt > asides
    assert store.is_finished(sibling.key) and not store.is_finished(torn.key)
    assert len(list(file.parent.glob("*.corrupt"))) == asides + 1
    assert store.scan([sibling.key, torn.key]) == ({sibling.key}, {})
    store.write(torn, [row(layer_index=2)], generations=said, seconds=1)
    assert store.is_finished(torn.key)
    pd.testing.assert_frame_equal(store.rows(), whole)
    assert run_folders.file_of(tmp_path / "out", sibling.key).read_bytes() == beside


def test_a_cell_without_one_of_its_files_is_done_again(tmp_path):
    store = open_folder(tmp_path / "out")
    for lost in (run_folders.file_of, run_folders.texts_of, lambda *_: store.edits(cell().key)):
        store.edits(cell().key).parent.mkdir(exist_ok=True)
        store.edits(cell().key).write_bytes(b"what was put in")
        store.write(cell(), [row()], generations=[{"completion": "blue"}], seconds=1)
        assert store.is_finished(cell().key)
        lost(store.path, cell().key).unlink()
        assert not store.is_finished(cell().key)
        assert store.scan([cell().key]) == (set(), {})
    assert len(store.rows()) == 1


def test_a_cell_whose_edits_have_changed_is_done_again(tmp_path):
    store = open_folder(tmp_path / "out")
    path = store.edits(cell().key)
    path.parent.mkdir()
    path.write_bytes(b"what was put in")
    store.write(cell(), [row()], seconds=1)
    assert store.is_finished(cell().key)
    path.write_bytes(b"what was put In")
    assert not store.is_finished(cell().key) and store.scan([cell().key]) == (set(), {})
    path.write_bytes(b"what was put in again")
    store.write(cell(), [row()], seconds=1)
    assert store.is_finished(cell().key) and len(store.rows()) == 1


def test_directions_of_an_earlier_release_are_found(tmp_path):
    store = open_folder(tmp_path / "out")
    old = store.path / "directions" / f"{cell().key}.safetensors"
    old.parent.mkdir()
    safetensors.numpy.save_file({"direction": np.ones((2, 3))}, old)
    assert store.tensors(cell().key)["direction"].shape == (2, 3)
    old.write_bytes(old.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"directions.*missing or torn. Do this"):
        store.tensors(cell().key, "Do this.")


def test_torn_generations_are_named_not_read(tmp_path):
    store = open_folder(tmp_path / "out")
    store.write(cell(), [row()], generations=[{"completion": "blue"}], seconds=1)
    path = run_folders.texts_of(tmp_path / "out", cell().key)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UsageError, match=rf"{path.name} is damaged.*command that wrote it again"):
        store.generations(cell().key)
    with pytest.raises(UsageError, match="no stored generations"):
        store.generations(cell(9).key)
    with pytest.raises(UsageError, match="cell key"):
        store.generations("../../etc/passwd")


KILLED = """
    import os, signal, time
    from pathlib import Path
    from auditgap.store import RunFolder, files
    import test_store as t
    out, step = Path(sys.argv[1]), int(sys.argv[2])
    store = t.open_folder(out)
    with store.lock():
        store.plan([t.cell(0), t.cell(1)])
        store.write(t.cell(0), [t.row(layer_index=0)], generations=[{"completion": "blue"}], seconds=1)
        calls = 0
        for name in ("write_new", "replace", "sync_folder", "rename"):   # the step-th touch of the disk is the last
            home = os if name in ("replace", "rename") else files
            def deadly(*args, name=name, real=getattr(home, name), **kw):
                global calls
                calls += 1
                if calls == step:
                    if name == "write_new":
                        real(args[0], args[1][: len(args[1]) // 2], *args[2:])   # half a file
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kw)
            setattr(home, name, deadly)
        store.write(t.cell(1), [t.row(layer_index=1)], generations=[{"completion": "red"}], seconds=1)
    print("survived", calls)
"""


@pytest.mark.parametrize("step", range(1, 7))
def test_sigkill_in_the_middle_of_a_write_loses_nothing_finished(tmp_path, step):
    """Every touch of the disk that a write makes is once the last one; the same command again
    finishes the run."""
    out = tmp_path / "out"
    process = python(KILLED, str(out), str(step), stdout=subprocess.PIPE)
    assert process.wait(60) == -signal.SIGKILL, process.stdout.read()
    first = run_folders.file_of(out, cell(0).key)
    before = first.read_bytes()
    assert bool(list(out.rglob(".*.tmp"))) == (step not in (3, 6)), (
        "the kill came in the middle of a file or a rename"
    )

    store = open_folder(out)  # the dead process' lock is no obstacle on its own host
    assert not list(out.rglob(".*.tmp")), "leavings of a dead process go"
    with store.lock():
        assert store.is_finished(cell(0).key)
        assert store.is_finished(cell(1).key) == (step == 6), (
            "only the last touch comes after the rename"
        )
        store.write(cell(1), [row(layer_index=1)], generations=[{"completion": "red"}], seconds=1)
    assert store.rows()["layer_index"].tolist() == [0, 1]
    assert store.generations(cell(1).key)["completion"].tolist() == ["red"]
    assert first.read_bytes() == before
    assert store.status().corrupt == 0
    with store.lock():
        store.scan([])
    assert len(list((out / "generations").iterdir())) == 2, "texts of no cell are gone"


def test_a_write_touches_the_disk_six_times(tmp_path):
    """Keeps the list of kill points above honest."""
    process = python(KILLED, str(tmp_path / "out"), "0", stdout=subprocess.PIPE)
    assert process.communicate(timeout=60)[0].split() == ["survived", "6"]


def test_leavings_of_the_living_and_of_other_hosts_stay(tmp_path):
    open_folder(tmp_path / "out")
    cells = tmp_path / "out" / "cells"
    here = "".join(c if c.isalnum() or c == "-" else "_" for c in socket.gethostname())
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (
        f".abc.{here}.{os.getpid()}-0a.tmp",
        f".abc.other.{dead.pid}-0a.tmp",
        f".abc.{here}.{dead.pid}-0a.tmp",
    ):
        (cells / name).write_bytes(b"x")
    open_folder(tmp_path / "out")
    assert sorted(p.name for p in cells.iterdir()) == sorted(
        [f".abc.{here}.{os.getpid()}-0a.tmp", f".abc.other.{dead.pid}-0a.tmp"]
    )
    assert RunFolder.load(tmp_path / "out").rows().empty


# ------------------------------------------------------------------------- one config, one writer


def test_another_config_is_refused_field_by_field_and_touches_nothing(tmp_path):
    out = tmp_path / "out"
    open_folder(out)
    before = snapshot(out)
    with pytest.raises(UsageError) as refusal:
        open_folder(
            out, config={"steps": 20, "attack": {"eps": [0.01], "unit": "rms"}, "extra": None}
        )
    text = str(refusal.value)
    assert "steps: 10 in the folder, 20 now" in text
    assert "attack.eps: [0.01, 0.03] in the folder, [0.01] now" in text
    assert "extra" not in text and "unit" not in text
    assert snapshot(out) == before
    # the same, typed otherwise, and with a setting that an earlier version did not know, not set
    same = {"attack": {"unit": "rms", "eps": (0.010, 3e-2)}, "steps": 10}
    open_folder(out, config={**same, "extra": None})
    with pytest.raises(UsageError, match="extra: absent in the folder, 1 now"):
        open_folder(out, config={**same, "extra": 1})
    with pytest.raises(UsageError, match="finite"):
        open_folder(out, config={"steps": float("nan")})


def test_versions_that_drift_are_warned_of_and_recorded(tmp_path):
    assert open_folder(tmp_path / "out").warnings == []
    again = open_folder(
        tmp_path / "out",
        info={"versions": {"torch": "2.14.0", "transformers": "5.17.0"}, "warnings": ["hot"]},
    )
    assert (
        len(again.warnings) == 1
        and "torch was 2.13.0" in again.warnings[0]
        and "2.14.0" in again.warnings[0]
    )
    run = RunFolder.load(tmp_path / "out").run
    assert [s["versions"]["torch"] for s in run["sessions"]] == ["2.13.0", "2.14.0"]
    assert run["sessions"][1]["drift"] == again.warnings
    assert (
        run["info"]["warnings"] == ["slow", "hot"] and run["info"]["command"] == "auditgap latent"
    )
    again.write(cell(), [row()], seconds=1)
    assert again.records()[0]["session"] == 1, "a cell says under which versions it was made"


HOLDER = """
    import test_store as t, time
    store = t.open_folder(sys.argv[1])
    with store.lock():
        print("held", flush=True)
        time.sleep(60)
"""


def test_a_second_writer_is_refused_by_the_name_of_the_first(tmp_path):
    out = tmp_path / "out"
    process = python(HOLDER, str(out), stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == "held\n"
        before = snapshot(out)
        for break_lock in (False, True):  # a living holder on this host is never overruled
            with pytest.raises(
                UsageError, match=f"process {process.pid} on {socket.gethostname()}"
            ) as refusal:
                open_folder(out, break_lock=break_lock)
            assert refusal.value.exit_code == 2
        assert snapshot(out) == before
        assert RunFolder.load(out).status().running["pid"] == process.pid
    finally:
        process.kill()
        process.wait()
    assert RunFolder.load(out).status().running is None
    with open_folder(out).lock():
        assert RunFolder.load(out).status().running["pid"] == os.getpid()
    assert not (out / "lock.json").exists()


def test_a_lock_of_another_host_needs_break_lock(tmp_path):
    out = tmp_path / "out"
    open_folder(out)
    note = {
        "pid": 4242,
        "host": "node-that-is-gone",
        "command": "auditgap latent",
        "since": "2026-01-01T00:00:00+00:00",
    }
    (out / "lock.json").write_text(json.dumps(note))
    with pytest.raises(UsageError, match=r"process 4242 on node-that-is-gone.*--break-lock"):
        open_folder(out)
    assert json.loads((out / "lock.json").read_text()) == note
    with open_folder(out, break_lock=True).lock():
        pass


def test_folders_that_are_not_ours_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        open_folder(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        open_folder(tmp_path / "thesis.tex")
    with pytest.raises(UsageError, match="no run folder"):
        RunFolder.load(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UsageError, match="nothing is there, or not yet"):
        RunFolder.load(tmp_path / "later")
    open_folder(tmp_path / "run")
    with pytest.raises(UsageError, match=f"Give one of them: {tmp_path / 'run'}"):
        RunFolder.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"schema": 3, "config": {}}', "newer auditgap"),
        ('{"schema": 2, "config": {}}', r"run\.json is damaged.*checksum"),
        ('{"sch', "cannot be read"),
        ("[]", "no run's description"),
    ],
)
def test_a_newer_or_broken_run_file_is_refused(tmp_path, text, match):
    open_folder(tmp_path / "out")
    (tmp_path / "out" / "run.json").write_text(text)
    with pytest.raises(UsageError, match=match):
        RunFolder.load(tmp_path / "out")
    with pytest.raises(UsageError, match=match):
        open_folder(tmp_path / "out")
    assert (tmp_path / "out" / "run.json").read_text() == text


# ------------------------------------------------------------------------- plan and status


def test_the_plan_grows_and_counts_a_cell_once(tmp_path):
    store = open_folder(tmp_path / "out")
    store.plan(
        [cell(0), cell(1), replace(cell(0), subject=Subject("same model, other name", "f00d"))]
    )
    store.plan([cell(1), cell(2)])
    assert [e["key"] for e in store.planned()] == [cell(i).key for i in range(3)]
    assert store.planned()[0]["cell"] == "toy · block0 · 0.03 rms · targeted"
    assert store.planned()[0]["description"] == cell(0).describe()
    (tmp_path / "out" / "plan.json").write_text('[{"key')
    store.plan([cell(0)])
    assert [e["key"] for e in store.planned()] == [cell(0).key] and (
        tmp_path / "out" / "plan.json.1.corrupt"
    ).exists()


def test_status_counts_cells_and_foresees_the_end(tmp_path):
    store = open_folder(tmp_path / "out")
    store.plan([cell(i) for i in range(5)])
    assert store.status().eta_seconds is None and store.status().last_write is None
    store.write(cell(0), [row()], seconds=4)
    store.write(cell(1), [row()], seconds=6)
    store.fail(cell(2), "oom")
    status = store.status()
    assert (status.planned, status.finished, status.failed, status.corrupt, status.running) == (
        5,
        2,
        1,
        0,
        None,
    )
    # two cells left at five seconds each
    assert status.seconds == 10 and status.eta_seconds == 10.0
    assert abs(status.last_write.timestamp() - time.time()) < 60


# ------------------------------------------------------------------------- scratch


def test_scratch_survives_and_is_computed_once(tmp_path):
    store = open_folder(tmp_path / "out")
    calls = []

    def compute():
        calls.append(1)
        return {
            "delta": np.arange(6, dtype=np.float32).reshape(2, 3).T,
            "none": np.zeros((0, 4)),
            "one": np.float64(2.5),
        }

    first, again = (
        store.remember("abc123", compute),
        RunFolder.load(tmp_path / "out").remember("abc123", compute),
    )
    assert calls == [1]
    for name, value in compute().items():
        for arrays in (first, again):
            assert (
                np.array_equal(arrays[name], value)
                and arrays[name].dtype == value.dtype
                and arrays[name].flags.writeable
            )
    store.forget(["abc123", "never-was"])
    store.remember("abc123", compute)
    # the first time, the oracle in the loop above, and once more after forgetting
    assert len(calls) == 3
    with pytest.raises(UsageError, match="scratch name"):
        store.remember("../run", compute)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(where=st.floats(0, 1, exclude_max=True), flip=st.booleans())
def test_torn_scratch_is_set_aside_and_computed_again(tmp_path, where, flip):
    store = open_folder(tmp_path / "out")
    wanted = {"delta": np.linspace(0, 1, 64, dtype=np.float32)}
    store.forget(["abc"])
    store.remember("abc", lambda: wanted)
    file = tmp_path / "out" / "scratch" / "abc.safetensors"
    data = file.read_bytes()
    at = int(where * len(data))
    file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if flip else data[:at])
    calls = []
    got = store.remember("abc", lambda: calls.append(1) or wanted)
    assert np.array_equal(got["delta"], wanted["delta"])
    if not flip:
        assert calls == [1]
    assert np.array_equal(store.remember("abc", dict)["delta"], wanted["delta"])


def test_torch_tensors_are_remembered_too(tmp_path):
    torch = pytest.importorskip("torch")
    store = open_folder(tmp_path / "out")
    assert store.remember("t", lambda: {"x": torch.ones(2, 3)})["x"].tolist() == [[1.0] * 3] * 2


# ------------------------------------------------------------------------- outputs, permissions,
# disks


def test_text_and_scratch_are_for_the_owner_only(tmp_path):
    before = os.umask(0o000)
    try:
        store = open_folder(tmp_path / "out")
        store.write(cell(), [row()], generations=[{"completion": "blue"}], seconds=1)
        store.remember("abc", lambda: {"x": np.ones(2)})
    finally:
        os.umask(before)
    modes = {
        str(p.relative_to(tmp_path / "out")): stat.S_IMODE(p.stat().st_mode)
        for p in (tmp_path / "out").rglob("*")
    }
    assert modes["generations"] == modes["scratch"] == 0o700
    texts, rows = (
        find(tmp_path / "out", cell().key).relative_to(tmp_path / "out").as_posix()
        for find in (run_folders.texts_of, run_folders.file_of)
    )
    assert modes[texts] == modes["scratch/abc.safetensors"] == 0o600
    assert modes[rows] == 0o666  # numbers only: as the umask says


def test_tables_are_inert_whole_and_unrounded(tmp_path):
    store = open_folder(tmp_path / "out")
    frame = pd.DataFrame(
        {"subject": ["=1+1", "@x", "ok|ay", None, "\ud800"], "x": [-1.5, 0.1 + 0.2, np.nan, 4, 5]}
    )
    lines = store.write_table("lvs.csv", frame).read_text().splitlines()
    assert lines == [
        "subject,x",
        "'=1+1,-1.5",
        "'@x,0.30000000000000004",
        "ok|ay,",
        ",4.0",
        "\\ud800,5.0",
    ]
    assert "| ok\\|ay |  |" in store.write_table("lvs.md", frame).read_text()
    table = pq.read_table(store.write_table("lvs.parquet", frame))
    assert table["x"].null_count == 1 and table["subject"].null_count == 1
    store.write_text("report.html", "<p>é\n")
    assert (tmp_path / "out" / "report.html").read_bytes() == "<p>é\n".encode()
    for bad in ("../x.csv", "a/b.csv", "run.json", "lvs.pkl"):
        with pytest.raises(UsageError):
            store.write_table(bad, frame)


@pytest.fixture
def small_disk(mounted):
    """A 512 KiB file system of our own."""
    return mounted("512k")


def test_a_full_disk_is_a_sentence_and_costs_nothing_that_was_there(small_disk):
    store = open_folder(small_disk / "out")
    store.write(cell(0), [row()], seconds=1)
    (small_disk / "ballast").write_bytes(b"x" * 330_000)
    before = snapshot(small_disk / "out")
    noise = np.random.default_rng(0).bytes(300_000).hex()
    for attempt in (
        lambda: store.write(cell(1), [row()], generations=[{"completion": noise}], seconds=1),
        lambda: store.write(cell(1), [row(flags=noise)], seconds=1),
        lambda: store.write_text("report.html", noise),
        lambda: store.remember("abc", lambda: {"x": np.ones(100_000)}),
    ):
        with pytest.raises(DiskError, match=r"disk.*bytes needed.*free some space") as error:
            attempt()
        assert error.value.exit_code == 2 and noise[:50] not in str(error.value)
        assert snapshot(small_disk / "out") == before, "neither a loss nor a leaving"
    (small_disk / "ballast").unlink()
    store.write(cell(1), [row(flags=noise[:1000])], seconds=1)
    assert store.is_finished(cell(0).key) and store.is_finished(cell(1).key)


def test_a_read_only_disk_is_a_sentence_and_can_be_read(small_disk):
    store = open_folder(small_disk / "out")
    store.write(cell(0), [row()], seconds=1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(DiskError, match="writable"):
        store.write(cell(1), [row()], seconds=1)
    with pytest.raises(DiskError, match="writable"):
        open_folder(small_disk / "out")
    assert len(RunFolder.load(small_disk / "out").rows()) == 1


def test_a_folder_named_from_here_is_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = open_folder("out")
    monkeypatch.chdir("/")
    store.write(cell(), [row()], seconds=1)
    assert len(RunFolder.load(tmp_path / "out").rows()) == 1
