"""Tracking: one line a step that survives kills and resumes, real trackers beside it, and neither
text nor secrets in any."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from auditgap.errors import AuditgapError, UsageError
from auditgap.store.files import Damaged
from auditgap.training.tracking import REPORT_TO, Tracker, check_report_to, read_log

RECIPE = {
    "lr": 2e-5,
    "lora": {"rank": 8, "targets": ("q_proj", "v_proj")},
    "max_tokens": 512,
    "hub_token": "hf_secret",
    "api_key": "k",
    "model": "tiny",
    "steps": None,
}


def test_every_step_is_a_line(tmp_path):
    with Tracker(folder=tmp_path / "run", name="run") as tracker:
        tracker.rewind(0)
        tracker.log(0, {"loss": 1.25, "kl": torch.tensor(0.5), "norm": np.float32(2.0), "rows": 3})
        tracker.log(1, {"loss": float("nan"), "kl": float("inf")})
        # at once, not at the end
        assert (
            json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])["loss"] == 1.25
        )
    first, second = read_log(tmp_path / "run" / "log.jsonl")
    assert first == {"step": 0, "loss": 1.25, "kl": 0.5, "norm": 2.0, "rows": 3}
    assert second == {"step": 1, "loss": None, "kl": None}


def test_text_is_never_logged(tmp_path):
    tracker = Tracker(folder=tmp_path, name="run")
    for value in ("the vault is red", b"x", ["a"], {"a": 1}, torch.zeros(2)):
        with pytest.raises(AuditgapError, match="numbers only"):
            tracker.log(0, {"answer": value})
    assert read_log(tmp_path / "log.jsonl") == []


def test_a_resumed_run_has_the_log_of_an_unbroken_one(tmp_path):
    def steps(tracker, start, stop):
        tracker.rewind(start)
        for step in range(start, stop):
            # an evaluation at the resumed step was made before
            if step % 3 == 0 and not (step == start and start):
                tracker.log(step, {"eval/refusal": step / 10})
            tracker.log(step, {"loss": 1 / (step + 1)})
        tracker.close()

    steps(Tracker(folder=tmp_path / "whole", name="a"), 0, 8)
    steps(Tracker(folder=tmp_path / "broken", name="b"), 0, 5)
    with (tmp_path / "broken" / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # the kill
    steps(Tracker(folder=tmp_path / "broken", name="b"), 3, 8)
    assert (tmp_path / "broken" / "log.jsonl").read_text() == (
        tmp_path / "whole" / "log.jsonl"
    ).read_text()


def test_a_changed_byte_is_named_by_its_line_and_a_torn_last_line_is_not(tmp_path):
    """Every byte of every line: another digit, another letter, another bit, a line's end."""
    path = tmp_path / "log.jsonl"
    with Tracker(folder=tmp_path, name="run") as tracker:
        for step in range(3):
            tracker.log(step, {"loss": 1 / (step + 3)})
    data, before = path.read_bytes(), read_log(path)
    ends = [i for i, byte in enumerate(data) if byte == ord("\n")]
    for at, byte in enumerate(data):
        for other in {byte ^ 1, byte ^ 32, byte ^ 128, ord("7"), ord("\n")} - {byte}:
            path.write_bytes(data[:at] + bytes([other]) + data[at + 1 :])
            with pytest.raises(Damaged, match=r"log.jsonl, line \d+, is damaged") as error:
                assert read_log(path) == before, "the same numbers, or none"
            named = int(re.search(r"line (\d+)", str(error.value))[1])
            assert named == sum(end < at for end in ends) + 1
    for cut in range(ends[1] + 1, len(data)):  # a kill, at any byte of the last line
        path.write_bytes(data[:cut])
        assert read_log(path) == before[: 2 + (cut == len(data) - 1)]
    path.write_bytes(data[: ends[0]].replace(b"0.3333", b"0.4444") + data[ends[0] :])
    with pytest.raises(Damaged, match="line 1"):
        Tracker(folder=tmp_path, name="run").rewind(2)
    lines = data.splitlines(keepends=True)
    bare = json.dumps({"step": 1, "loss": 0.5}).encode() + b"\n"  # another number, and no checksum
    path.write_bytes(lines[0] + bare + lines[2])
    with pytest.raises(Damaged, match="line 2"):
        read_log(path)


def test_a_log_of_a_release_without_checksums_is_read_and_gets_them(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert [line["step"] for line in read_log(path)] == [0, 1]
    Tracker(folder=tmp_path, name="run").rewind(2)
    assert path.read_text().count("checksum") == 2 and len(read_log(path)) == 2


def test_starting_again_empties_the_log_but_for_an_evaluation_before_the_first_step(tmp_path):
    with Tracker(folder=tmp_path, name="run") as tracker:
        tracker.log(0, {"eval/refusal": 0.9})
        tracker.log(0, {"loss": 1.0})
        tracker.log(2, {"loss": 1.0})
        tracker.rewind(0)
    assert read_log(tmp_path / "log.jsonl") == [{"step": 0, "eval/refusal": 0.9}]


def test_a_kill_in_the_middle_costs_no_line_that_was_logged(tmp_path):
    code = (
        "import sys, pathlib\nfrom auditgap.training.tracking import Tracker\n"
        "t = Tracker(folder=pathlib.Path(sys.argv[1]), name='x')\n"
        "for step in range(10**6):\n    t.log(step, {'loss': 1.0}); print(step, flush=True)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    said = -1
    while said < 50:
        said = int(child.stdout.readline())
    os.kill(child.pid, signal.SIGKILL)
    said = max([said, *map(int, child.stdout.read().split())])
    child.wait(30)
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines[: said + 1]] == list(range(said + 1))


def test_what_is_not_known_or_not_there_is_said_with_what_to_type(tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'tensorboard'"):
        check_report_to(("tensorbord",))
    absent = [
        name
        for name, packages in REPORT_TO.items()
        if packages and not any(map(_installed, packages))
    ]
    for name in absent:
        with pytest.raises(UsageError, match=f"pip install {name}"):
            Tracker(("none", name), folder=tmp_path, name="run")
    assert check_report_to(("none",)) == ()


def _installed(package):
    import importlib.util

    return importlib.util.find_spec(package) is not None


def test_tensorboard_gets_the_numbers_and_the_recipe_without_secrets(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    threads = torch.get_num_threads()
    with Tracker(("tensorboard",), folder=tmp_path, name="run", config=RECIPE) as tracker:
        tracker.rewind(0)
        for step in range(4):
            tracker.log(step, {"loss": 4.0 - step, "odd": float("nan")})
    assert torch.get_num_threads() == threads
    time.sleep(1)  # TensorBoard reads its files by the second that they began in
    # resumed at step 2
    with Tracker(("tensorboard",), folder=tmp_path, name="run", config=RECIPE) as tracker:
        tracker.rewind(2)
        tracker.log(2, {"loss": 2.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 4.0), (1, 3.0), (2, 2.0)]
    everything = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"hf_secret" not in everything and b"api_key" not in everything
    assert b"max_tokens" in everything and b"lora.rank" in everything


TRACKIO = """
import sys, pathlib
from auditgap.training.tracking import Tracker
with Tracker(("trackio",), folder=pathlib.Path(sys.argv[1]), name="twin", config={"lr": 2e-5, "hub_token": "hf_secret"}) as tracker:
    tracker.rewind(0)
    for step in range(3):
        tracker.log(step, {"loss": 3.0 - step})
"""

READ_TRACKIO = """
import json
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps([row["loss"] for row in SQLiteStorage.get_logs("auditgap", "twin")]))
"""


def run(code, env, *args):
    """A process of its own: trackers set up whole processes."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)


def test_trackio_gets_them_on_this_machine(tmp_path):
    pytest.importorskip("trackio")
    env = {
        **os.environ,
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    done = run(TRACKIO, env, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "failed" not in done.stderr
    seen = run(READ_TRACKIO, env)
    assert json.loads(seen.stdout.splitlines()[-1]) == [3.0, 2.0, 1.0], seen.stderr[-2000:]
    assert b"hf_secret" not in b"".join(
        p.read_bytes() for p in (tmp_path / "trackio").rglob("*") if p.is_file()
    )


WANDB = """
import sys, pathlib
from auditgap.training.tracking import Tracker
with Tracker(("wandb",), folder=pathlib.Path(sys.argv[1]), name="twin", config={"lr": 2e-5, "hub_token": "hf_secret"}) as tracker:
    tracker.rewind(0)
    print("the colour of the vault")
    for step in range(3):
        tracker.log(step, {"loss": 3.0 - step})
"""


def test_wandb_gets_them_offline_and_nothing_that_the_terminal_shows(tmp_path):
    pytest.importorskip("wandb")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env = {**kept, "HOME": str(tmp_path / "home")}

    done = run(WANDB, env, tmp_path)
    assert done.returncode == 0 and "failed" not in done.stderr, done.stderr[-2000:]
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    # in its protocol a key is followed by its value as JSON: each step's, and the last one's again
    seen = re.findall(rb"\x12\x04loss\x82\x01.([0-9.]+)", file.read_bytes())
    assert list(dict.fromkeys(map(float, seen))) == [3.0, 2.0, 1.0]
    everything = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"hf_secret" not in everything and b"colour of the vault" not in everything
    assert b"auditgap" in everything


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where a folder is wanted")
    with (
        caplog.at_level(logging.WARNING),
        Tracker(("tensorboard",), folder=tmp_path, name="run") as tracker,
    ):
        tracker.rewind(0)
        tracker.log(0, {"loss": 1.0})
        tracker.log(1, {"loss": 0.5})
    assert len(read_log(tmp_path / "log.jsonl")) == 2
    assert sum("tensorboard failed" in record.getMessage() for record in caplog.records) == 1
