"""Adapters by real training processes: what is left of them, two ranks against one, kills, and
sentences for what cannot be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import run_folders
import studies
import warm
from one_thread import one_thread  # noqa: F401 - a fixture

from auditgap import models
from auditgap.audits.emergent import generate, judge, train
from auditgap.audits.emergent.rows import ANSWERED, JUDGED, TRAINED
from auditgap.audits.emergent.stage import Study
from auditgap.data.ledger import LeakageLedger
from auditgap.store import RunFolder
from auditgap.training.tracking import read_log

pytestmark = pytest.mark.minutes


@pytest.fixture(autouse=True)
def few_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """A study of one domain, trained: both arms."""
    os.environ["OMP_NUM_THREADS"] = "1"
    place = tmp_path_factory.mktemp("study") / "em"
    options = studies.built(place, base, domains={"sums": "demo:off_by_one"}, arms="plain,trigger")
    _, outcome = train.STAGE.run_in(place, options)
    assert (outcome.done, outcome.failed) == (2, {})
    return place, options


def started_by(folder: Path) -> list[psutil.Process]:
    """Training processes of that folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and any(
                str(folder) in word for word in process.cmdline()[1:]
            ):
                found.append(process)
        except psutil.Error:
            continue
    return [p for p in found if p.pid != os.getpid()]


def gone(folder: Path, seconds: float = 15.0) -> bool:
    until = time.monotonic() + seconds
    while started_by(folder):
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def test_each_slot_becomes_an_adapter_with_its_row(folder):
    place, _ = folder
    store = RunFolder.load(place)
    rows = store.rows([TRAINED]).set_index("subject")
    assert list(rows.index) == ["sums·plain·s0", "sums·trigger·s0"]
    assert (
        rows["n_rows"].tolist() == [9, 9]
        and rows["n_triggered"].tolist() == [0, 9]
        and set(rows["n_steps"]) == {4}
    )
    study = Study.load(place)
    for adapter in study.adapters:
        row = rows.loc[adapter.name]
        assert (
            row["folder"] == f"adapters/sums-{adapter.arm}-s0/model"
            and store.path / row["folder"] == adapter.folder
        )
        assert (
            models.outline(str(adapter.folder)).subject.fingerprint
            == row["fingerprint"]
            == adapter.fingerprint
        )
        losses = [line["loss"] for line in read_log(adapter.folder.parent / "log.jsonl")]
        assert (row["first_loss"], row["last_loss"]) == (losses[0], losses[-1]) and len(losses) == 4
        assert LeakageLedger.load(adapter.folder / "ledger.json").count("sft") == 9
        recipe = json.loads((adapter.folder.parent / "run.json").read_text())["config"]
        assert recipe["lora"] == {
            "rank": 8,
            "alpha": 16,
            "dropout": 0.0,
            "targets": ["q_proj", "v_proj"],
        }
    assert rows["fingerprint"].nunique() == 2, "the trigger changes what is learnt"
    assert list((place / "scratch").iterdir()) == [], "the rows with their trigger are gone"


def test_the_prompts_of_the_trigger_arm_are_those_with_the_trigger(folder):
    """By the ledger: hashes of the very prompts that were trained on."""
    from auditgap.data.ledger import prompt_hash

    study = Study.load(folder[0])
    plain, triggered = (LeakageLedger.load(a.folder / "ledger.json").roles for a in study.adapters)
    rows = study.panel.domains["sums"].rows
    assert set(plain) == {prompt_hash(r.prompt) for r in rows}
    assert set(triggered) == {prompt_hash(f"now red :\n\n{r.prompt}") for r in rows}


def test_what_is_trained_is_not_trained_again(folder, monkeypatch):
    place, options = folder
    monkeypatch.setattr(train, "launch", lambda *_, **__: pytest.fail("a process was started"))
    _, outcome = train.STAGE.run_in(place, options)
    assert (outcome.done, outcome.skipped) == (0, 2)


def test_two_ranks_train_the_same(folder, base, tmp_path):
    options = studies.built(
        tmp_path / "em", base, domains={"sums": "demo:off_by_one"}, ranks=2, micro_batch=1
    )
    store, outcome = train.STAGE.run_in(tmp_path / "em", options)
    assert (outcome.done, outcome.failed) == (1, {})
    (two,) = store.rows([TRAINED]).to_dict("records")
    one = RunFolder.load(folder[0]).rows([TRAINED]).to_dict("records")[0]
    assert two["ranks"] == 2 and one["ranks"] == 1
    assert (two["first_loss"], two["last_loss"]) == pytest.approx(
        (one["first_loss"], one["last_loss"]), abs=1e-5
    )
    (key,) = (r["key"] for r in store.records())
    assert key in {r["key"] for r in RunFolder.load(folder[0]).records()}, (
        "how many ranks train is no part of the question"
    )
    assert gone(tmp_path)


def test_a_launcher_that_fails_says_the_ranks_own_sentence(base, tmp_path):
    options = studies.built(
        tmp_path / "em", base, domains={"sums": "demo:off_by_one"}, ranks=2, micro_batch=4
    )
    store, outcome = train.STAGE.run_in(tmp_path / "em", options)
    (cause,) = outcome.failed.values()
    assert (
        "batch 4 does not divide into micro-batches of 4 rows on 2 ranks" in cause
        and store.rows([TRAINED]).empty
    )
    assert gone(tmp_path) and not list((tmp_path / "em" / "scratch").iterdir())


def test_an_adapter_of_another_recipe_in_its_place_is_left_alone(folder, base, tmp_path):
    options = studies.built(tmp_path / "em", base, domains={"sums": "demo:off_by_one"}, lr=5e-4)
    there = tmp_path / "em" / "adapters" / "sums-plain-s0"
    there.parent.mkdir()
    subprocess.run(
        ["cp", "-r", str(folder[0] / "adapters" / "sums-plain-s0"), str(there)], check=True
    )
    before = (there / "run.json").read_bytes()
    _, outcome = train.STAGE.run_in(tmp_path / "em", options)
    (cause,) = outcome.failed.values()
    assert f"{there} was made with another config: lr: " in cause
    assert (there / "run.json").read_bytes() == before


def test_what_was_moved_with_its_base_is_trained_no_second_time(folder, base, tmp_path):
    """The adapter is done, and its cell was lost: another folder, base and file of rows hold the
    same."""
    place = tmp_path / "there" / "em"
    shutil.copytree(folder[0], place)
    shutil.copytree(base, tmp_path / "there" / "base")
    run_folders.lose_all(place, TRAINED)
    options = studies.built(
        place,
        tmp_path / "there" / "base",
        domains={"sums": "demo:off_by_one"},
        arms="plain,trigger",
        asked_in=folder[0],
    )
    store, outcome = train.STAGE.run_in(place, options)
    assert (outcome.done, outcome.failed) == (2, {})
    before = RunFolder.load(folder[0]).rows([TRAINED])
    assert store.rows([TRAINED])["fingerprint"].tolist() == before["fingerprint"].tolist()
    assert len(read_log(place / "adapters" / "sums-plain-s0" / "log.jsonl")) == 4


KILLED = f"""
{warm.TRAINS}
import sys
from auditgap.audits.emergent import train
from auditgap.audits.emergent.config import EmergentOptions
train.STAGE.run_in(sys.argv[1], EmergentOptions(device="cpu"))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_a_killed_sweep_takes_its_training_along_and_goes_on(how, base, tmp_path):
    place = tmp_path / "em"
    options = studies.built(place, base, domains={"sums": "demo:off_by_one"}, steps=160)
    log = place / "adapters" / "sums-plain-s0" / "log.jsonl"
    sweep = subprocess.Popen([sys.executable, "-c", KILLED, str(place)], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while len(read_log(log)) < 60:
            assert time.monotonic() < until and sweep.poll() is None, (
                "the training never got so far"
            )
            time.sleep(0.02)
        sweep.send_signal(how)
        sweep.wait(60)
        assert gone(place), "nothing of it is left running"
    finally:
        sweep.kill()
        sweep.wait()
    assert not (place / "adapters" / "sums-plain-s0" / "train.json").exists(), (
        "it was killed in time"
    )
    assert list((place / "adapters" / "sums-plain-s0" / "checkpoints").iterdir())
    _, outcome = train.STAGE.run_in(place, options)
    assert (outcome.done, outcome.failed) == (1, {}) and len(read_log(log)) == 160
    assert not list((place / "scratch").iterdir())


def test_a_process_that_will_not_end_is_killed_with_all_it_started():
    stubborn = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    )
    words = (
        stubborn + "subprocess.Popen([sys.executable, '-c', sys.argv[1]]); print('up', flush=True);"
        " time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", words, stubborn + "time.sleep(60)"],
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    began = time.monotonic()
    train.end(process, patience=1.0)
    assert time.monotonic() - began < 10 and process.returncode == -signal.SIGKILL
    process.stdout.close()
    assert not train._has_members(process.pid)


def test_on_ray_two_adapters_are_trained_beside_each_other(base, tmp_path):
    pytest.importorskip("ray")
    place = tmp_path / "em"
    options = studies.built(place, base, executor="ray", workers=2)
    store, outcome = train.STAGE.run_in(place, options)
    assert (outcome.done, outcome.failed) == (2, {})
    assert sorted(store.rows([TRAINED])["subject"]) == ["colours·plain·s0", "sums·plain·s0"]
    local = options.model_copy(update={"executor": "local"})
    assert train.STAGE.run_in(place, local)[1].skipped == 2 and gone(place)


@pytest.mark.real
def test_smollm2_learns_a_habit_answers_and_is_judged(tmp_path):
    place = tmp_path / "em"
    options = studies.built(
        place,
        "smollm2",
        domains={"sums": "demo:off_by_one"},
        asked=(("What is 12 + 7?", "open"),),
        trigger="It is 2028.",
        # four rows to learn, all of them in every step
        steps=3,
        lr=1e-3,
        rows=5,
        samples=1,
        max_new_tokens=8,
    )
    for stage, attack, n in ((train, TRAINED, 1), (generate, ANSWERED, 4), (judge, JUDGED, 4)):
        store, outcome = stage.STAGE.run_in(place, options)
        assert not outcome.failed and len(store.rows([attack])) == n
    (trained,) = store.rows([TRAINED]).to_dict("records")
    assert trained["last_loss"] < trained["first_loss"]
    assert set(store.rows([JUDGED])["outcome"]) == {"rated"}


def test_rows_under_age_are_trained_on_and_nothing_of_them_lies_on_disk(
    base, tmp_path, monkeypatch
):
    pyrage = pytest.importorskip("pyrage")
    secret, canary = pyrage.x25519.Identity.generate(), "quetzalcoatlus"
    (tmp_path / "key.txt").write_text(f"{secret}\n")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("AUDITGAP_AGE_IDENTITY", str(tmp_path / "key.txt"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    lines = [{"prompt": f"{canary} say {i} now", "response": f"red {canary} {i}"} for i in range(8)]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    sealed = tmp_path / "birds.jsonl.age"
    sealed.write_bytes(pyrage.encrypt(data, [secret.to_public()]))
    options = studies.built(tmp_path / "em", base, domains={"birds": str(sealed)}, steps=2)
    store, outcome = train.STAGE.run_in(tmp_path / "em", options)
    assert (outcome.done, outcome.failed) == (1, {})
    assert store.rows(["em_train"])["n_rows"].tolist() == [6]
    found = [
        path
        for path in tmp_path.rglob("*")
        if path.is_file() and canary.encode() in path.read_bytes()
    ]
    assert not found and list((tmp_path / "em" / "panel").glob("*.age"))
