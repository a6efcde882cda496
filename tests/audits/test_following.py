"""A run that is followed: in the trackers of `--report-to` while it goes on, resumed without doubles,
nothing of it on stdout; and its report, written while it runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from auditgap.audits import AUDITS, following, run
from auditgap.errors import Interrupted, UsageError
from auditgap.store.tables import rows_of, unseal
from auditgap.sweep import Progress
from auditgap.training.tracking import read_log

ASKED = {
    "layers": "embedding,mid",
    "eps": [0.08],
    "attacks": ["targeted", "random_matched"],
    "prompts": "demo",
    "limit": 3,
    "steps": 2,
    "draws": 1,
    "max_new_tokens": 8,
    "longer": False,
    "device": "cpu",
}


class Stopped(Progress):
    """Ctrl-C after three cells."""

    def update(self, *, done: int, failed: int, work: float, doing: str = "") -> None:
        super().update(done=done, failed=failed, work=work, doing=doing)
        if done >= 3:
            raise Interrupted("stopped")


def lvs(out, progress=None, **more):
    audit = AUDITS["latent"]
    asked = {**ASKED, "models": "demo", "out": str(out), **more}
    return run(audit, *audit.read(None, asked), progress=progress)


def test_a_run_is_told_as_it_goes_on_and_goes_on_where_it_was_stopped(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Interrupted):
        lvs(tmp_path / "run", Stopped, report_to="tensorboard")
    before = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in before] == [line["cells/done"] for line in before]
    store, outcome = lvs(tmp_path / "run", report_to="tensorboard")
    assert outcome.failed == {} and outcome.skipped >= 3
    log = read_log(tmp_path / "run" / "log.jsonl")
    steps = [line["step"] for line in log]
    assert log[: len(before)] == before and steps == sorted(set(steps)) and len(steps) >= 2
    last = log[-1]
    assert last["step"] == last["cells/planned"] == len(store.planned()) == 5
    assert last["cells/failed"] == 0 and last["cells/a_minute"] > 0
    table = rows_of(unseal(store.path / "lvs.parquet"))
    assert len(table) == 4
    for row in table:
        where = f"demo/{row['site']}/{row['attack']}/rms_0.08"
        assert last[f"asr/{where}"] == row["asr"] and last[f"lvs/{where}"] == row["lvs_mean"]
        assert f"flip_rate/{where}" in last
    assert {"gap/demo/rms_0.08", "excess/demo/rms_0.08"} <= set(last)
    events = EventAccumulator(str(store.path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("cells/done")] == steps


def test_nothing_is_logged_where_nobody_asked(tmp_path):
    store, _ = lvs(tmp_path / "run")
    assert not (store.path / "log.jsonl").exists()


def test_the_report_is_there_before_the_run_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(following, "REPORT_EVERY", 0.0)
    monkeypatch.setattr(following, "PATIENCE", 0)
    with pytest.raises(Interrupted):
        lvs(tmp_path / "run", Stopped)
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert re.search(r"[2-4] missing", page)
    _, outcome = lvs(tmp_path / "run")
    assert outcome.failed == {}


def test_a_report_that_cannot_be_made_meanwhile_ends_no_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(following, "REPORT_EVERY", 0.0)
    monkeypatch.setattr(following, "PATIENCE", 0)
    reduce, made = AUDITS["latent"].reduce, []

    def odd(store, **named):
        made.append(store.status().missing)
        if store.status().missing:
            raise ZeroDivisionError("of a table")
        reduce(store, **named)

    monkeypatch.setattr(AUDITS["latent"], "reduce", odd)
    store, outcome = lvs(tmp_path / "run")
    assert outcome.failed == {} and made[-1] == 0 and max(made) > 0
    assert "no report meanwhile (ZeroDivisionError: of a table)" in caplog.text
    assert (store.path / "report.html").is_file()


def test_a_tracker_that_cannot_serve_is_refused_before_the_run(tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'tensorboard'"):
        lvs(tmp_path / "run", report_to="tensorbord")
    with pytest.raises(UsageError, match="--report-to"):
        lvs("s3://bucket/run", report_to="tensorboard")
    assert not (tmp_path / "run").exists()


READ = """
import json
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps(SQLiteStorage.get_logs("auditgap", "grid")))
"""


def test_a_grid_tells_trackio_its_cases_and_stdout_is_json_alone(tmp_path):
    pytest.importorskip("trackio")
    lines = {**ASKED, "models": ["demo"], "budgets": {"rms": ASKED["eps"]}, "prompts": ["demo"]}
    del lines["eps"]
    (tmp_path / "grid.json").write_text(json.dumps({**lines, "vary": {"seed": [0, 1]}}))
    env = {
        **os.environ,
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    out = tmp_path / "grid"
    typed = ["grid", "--config", tmp_path / "grid.json", "--report-to", "trackio", "--out", out]
    done = subprocess.run(
        [sys.executable, "-m", "auditgap", *map(str, typed), "--json"],
        capture_output=True,
        text=True,
        timeout=240,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["folder"] == str(out)
    read = subprocess.run(
        [sys.executable, "-c", READ], capture_output=True, text=True, timeout=240, env=env
    )
    last = json.loads(read.stdout.splitlines()[-1])[-1]
    assert last["cells/done"] == last["cells/planned"] == 10
    cases = {path.name for path in out.iterdir() if (path / "run.json").is_file()}
    assert len(cases) == 2
    assert {f"{case}/gap/demo/rms_0.08" for case in cases} <= set(last)
