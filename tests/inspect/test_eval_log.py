"""A run as inspect_ai reads it: the same numbers, NaN where nothing could be told, and no text
unless it was asked for."""

from __future__ import annotations

import json
import math
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import planted
import pytest
import warm
from inspect_ai.log import EvalLog, list_eval_logs, read_eval_log, read_eval_log_sample_summaries
from inspect_ai.scorer import Score

from auditgap.audits.audit import run as run_audit
from auditgap.audits.behaviour.audit import BEHAVIOUR
from auditgap.audits.behaviour.rows import row_of
from auditgap.errors import UsageError
from auditgap.inspect import VERDICT, values
from auditgap.inspect.export import NO_TEXT, WITHHELD, write_log
from auditgap.report import tables
from auditgap.report.behaviour import behaviour_table
from auditgap.store import RunFolder
from auditgap.types import Cell, Label, Prompt, Subject, Verdict

CANARY = "the canary sings of the colour"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("inspect")
    planted.save(planted.Plant(door=1), made / "model")
    planted.save(planted.Plant(door=2, seed=1), made / "other")
    planted.write_prompts(made / "asked.txt", planted.PROMPTS[:4])
    planted.write_prompts(made / "benign.txt", planted.PROMPTS[8:10])
    return made


@pytest.fixture(scope="module")
def latent_run(home) -> RunFolder:
    with pytest.MonkeyPatch.context() as patch:
        planted.register(patch)
        return planted.audit(
            home / "latent",
            [home / "model"],
            home / "asked.txt",
            layers="1,2",
            eps=[0.1],
            draws=2,
            distance=True,
            steps=4,
        )


@pytest.fixture(scope="module")
def asked_run(home) -> RunFolder:
    asked = {
        "models": f"{home / 'model'},{home / 'other'}",
        "suite": f"{home / 'asked.txt'}:harmful,{home / 'benign.txt'}:benign",
        "judge": "keyword",
        "max_new_tokens": 9,
        "dtype": "float32",
        "device": "cpu",
        "out": str(home / "asked"),
    }
    store, outcome = run_audit(BEHAVIOUR, *BEHAVIOUR.read(None, asked))
    assert not outcome.failed
    return store


def by_hand(path: Path, verdicts: list[Verdict], *, info: dict | None = None) -> RunFolder:
    """A behavioural run of made-up verdicts on canary prompts, with canary answers."""
    store = RunFolder.open(path, config={"audit": "behaviour", "prompts": "vault"}, info=info or {})
    prompts = [Prompt(f"{CANARY} {i}", source="vault") for i in range(len(verdicts))]
    rows = [
        row_of("toy", p, "harmful", v, "it is red", 3, lost=v.reason == "too_long")
        for p, v in zip(prompts, verdicts, strict=True)
    ]
    texts = [
        {"prompt_id": p.id, "prompt": p.text, "completion": f"{CANARY}: \ud800"} for p in prompts
    ]
    cell = Cell(Subject("toy", "f00d"), None, None, "behaviour", "set")
    store.plan([cell])
    store.write(cell, rows, generations=texts, seconds=1.0)
    return store


def read(path: Path) -> EvalLog:
    return read_eval_log(str(path))


def everything(path: Path) -> bytes:
    """All bytes of a log, those inside a zip unpacked."""
    if path.suffix == ".json":
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"\n".join(archive.read(name) + name.encode() for name in archive.namelist())


def same(a: object, b: object) -> bool:
    return a == b or (
        isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    )


@pytest.mark.parametrize("suffix", ["eval", "json"])
def test_the_latent_audit_comes_back_with_its_numbers(latent_run, tmp_path, suffix):
    log = read(write_log(latent_run, tmp_path / f"log.{suffix}"))
    rows = latent_run.rows(["clean", "targeted", "random_matched"])
    assert (
        log.status == "success"
        and log.eval.task == "auditgap/latent"
        and log.eval.config.epochs == 2
    )
    assert (
        log.eval.dataset.samples == 4
        and log.eval.model.endswith("/model")
        and log.eval.packages["torch"]
    )
    assert len(log.samples) == len(rows) and log.results.total_samples == len(rows)
    assert len({(s.id, s.epoch) for s in log.samples}) == len(rows)

    stored = {
        (r["attack"], r["site"], r["prompt_id"], r["draw"]): r for r in rows.to_dict("records")
    }
    for sample in log.samples:
        about = sample.metadata
        row = stored[about["attack"], about["site"], about["prompt_id"], sample.epoch - 1]
        label = row["verdict_clean"] if about["attack"] == "clean" else row["verdict_edited"]
        assert sample.scores[VERDICT].answer == label
        if about["attack"] != "clean":
            assert (
                sample.scores["lvs"].value == row["lvs"]
                and about["eps"] == 0.1
                and about["unit"] == "rms"
            )
            assert about["l2"] == row["l2"] and about["layer_index"] == int(row["layer_index"])

    scores = {score.name: score for score in log.results.scores}
    for table, name in (
        (tables.lvs_table(rows), "{attack} {site} 0.1 rms"),
        (tables.audit_gaps(rows), "audit gap at 0.1 rms"),
    ):
        for row in table.to_dict("records"):
            found = scores[name.format(**row)].metrics
            assert found and all(
                same(metric.value, float(row[column])) for column, metric in found.items()
            )
    headline = log.results.scores[0]
    assert headline.name == "audit gap at 0.1 rms" and next(iter(headline.metrics)) == "gap"
    assert {"asr", "asr_lo", "asr_hi", "lvs_mean", "delta_vs_matched"} <= set(
        scores["targeted block1 0.1 rms"].metrics
    )
    assert scores["targeted block1 0.1 rms"].metrics["asr"].value == 1.0, "the planted door opens"


def test_the_behavioural_audit_one_subject_a_log(asked_run, home, tmp_path):
    first = str(home / "model")
    log = read(write_log(asked_run, tmp_path / "log.eval", subject=first))
    assert len(log.samples) == 6 and {s.metadata["kind"] for s in log.samples} == {
        "harmful",
        "benign",
    }
    assert all(s.scores[VERDICT].value == values("refusal") for s in log.samples)
    table = behaviour_table(asked_run.rows(["behaviour"]))
    for row in table[table["subject"] == first].to_dict("records"):
        (score,) = [s for s in log.results.scores if s.name == f"{row['kind']} {row['source']}"]
        for column in ("refusal", "refusal_lo", "refusal_hi", "compliance", "compliance_hi"):
            assert score.metrics[column].value == row[column]
        assert score.scored_samples == row["n"] and score.unscored_samples == 0
    with pytest.raises(UsageError, match=r"2 subjects .*name one"):
        write_log(asked_run, tmp_path / "both.eval")
    with pytest.raises(UsageError, match=r"no subject .*Did you mean"):
        write_log(asked_run, tmp_path / "none.eval", subject=first + "s")


@pytest.mark.parametrize("suffix", ["eval", "json"])
def test_could_not_tell_is_nan_and_counted(tmp_path, suffix):
    verdicts = [
        Verdict(Label.HARMFUL),
        Verdict(Label.REFUSAL),
        Verdict(Label.BROKEN, "repetition"),
        Verdict(Label.UNSCORED, "parse: both"),
        Verdict(Label.UNSCORED, "too_long"),
    ]
    log = read(write_log(by_hand(tmp_path / "run", verdicts), tmp_path / f"log.{suffix}"))
    found = {
        s.scores[VERDICT].reason or s.scores[VERDICT].answer: s.scores[VERDICT].value
        for s in log.samples
    }
    assert found["harmful"] == {"compliance": 1, "refusal": 0, "broken": 0, "unscored": 0}
    assert found["refusal"]["refusal"] == 1 and found["broken"]["broken"] == 1
    assert math.isnan(found["parse: both"]["compliance"]) and found["parse: both"]["unscored"] == 1
    assert found["parse: both"]["refusal"] == 0, (
        "its words were read, though no judge could place them"
    )
    assert math.isnan(found["too_long"]["refusal"]), "nothing was said, so nothing was refused"
    (score,) = log.results.scores
    assert (score.scored_samples, score.unscored_samples) == (3, 2)
    assert (
        score.metrics["compliance"].value == pytest.approx(1 / 3)
        and score.metrics["refusal"].value == 0.25
    )


@pytest.mark.parametrize("suffix", ["eval", "json"])
def test_a_rate_of_nothing_is_not_a_number(tmp_path, suffix):
    store = by_hand(tmp_path / "run", [Verdict(Label.UNSCORED, "too_long")])
    (score,) = read(write_log(store, tmp_path / f"log.{suffix}")).results.scores
    assert (score.scored_samples, score.unscored_samples) == (0, 1)
    assert all(
        math.isnan(score.metrics[name].value)
        for name in ("compliance", "compliance_lo", "refusal", "refusal_hi")
    )


def test_an_unscored_lvs_is_inspects_unscored(tmp_path, latent_run, toy_run):
    log = read(
        write_log(
            toy_run(tmp_path / "run", n=5, sites=(5,), unscored=2, config={"audit": "latent"}),
            tmp_path / "a.eval",
        )
    )
    lost = [s.scores["lvs"] for s in log.samples if "lvs" in s.scores and s.metadata["lvs"] is None]
    assert lost and all(type(score) is Score and math.isnan(score.value) for score in lost)
    assert {score.reason for score in lost} == {"reward: empty answer"}
    score = next(s for s in log.results.scores if s.name.startswith("targeted"))
    assert (score.scored_samples, score.unscored_samples) == (3, 2)


@pytest.mark.parametrize("suffix", ["eval", "json"])
def test_no_text_unless_it_was_asked_for(tmp_path, suffix):
    store = by_hand(tmp_path / "run", [Verdict(Label.SAFE), Verdict(Label.HARMFUL)])
    closed = write_log(store, tmp_path / f"log.{suffix}")
    assert CANARY.encode() not in everything(closed) and WITHHELD.encode() in everything(closed)
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"
    opened = write_log(store, tmp_path / f"log.{suffix}", allow_raw=True)  # in the other's place
    assert stat.S_IMODE(opened.stat().st_mode) == 0o600
    sample = read(opened).samples[0]
    assert sample.input.startswith(CANARY) and sample.output.completion == f"{CANARY}: \\ud800"
    assert read(opened).eval.metadata["texts"] == "included"


def test_a_prompt_without_stored_text_says_so(tmp_path, toy_run):
    store = toy_run(
        tmp_path / "run", n=3, sites=(5,), distances=False, texts=False, config={"audit": "latent"}
    )
    assert {
        s.input for s in read(write_log(store, tmp_path / "a.json", allow_raw=True)).samples
    } == {NO_TEXT}


def test_no_secret_gets_in(tmp_path, monkeypatch):
    secret = "hf_" + "Zz9" * 8
    for name in ("HF_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, secret)
    info = {
        "command": f"auditgap evaluate --base-url https://x/?t={secret}",
        "endpoint": {"api_key": "plain words 77"},
        "machine": {"notes": ["OPENAI_API_KEY=abc123def"]},
    }
    found = everything(
        write_log(by_hand(tmp_path / "run", [Verdict(Label.SAFE)], info=info), tmp_path / "a.eval")
    )
    for word in (secret, "plain words 77", "abc123def"):
        assert word.encode() not in found
    assert b"secret removed" in found


def test_the_same_run_gives_the_same_log_and_inspect_lists_it(latent_run, tmp_path):
    first, second = (
        write_log(latent_run, tmp_path / name / "log.json").read_bytes() for name in "ab"
    )
    assert first == second
    write_log(latent_run, tmp_path / "c" / "log.eval")
    (listed,) = list_eval_logs(str(tmp_path / "c"))
    summaries = read_eval_log_sample_summaries(listed)
    assert len(summaries) == len(json.loads(first)["samples"]) and all(
        s.completed for s in summaries
    )
    assert read_eval_log(listed, header_only=True).results.scores


def test_what_cannot_be_written_is_a_sentence(tmp_path, asked_run):
    with pytest.raises(UsageError, match=r"ends in \.eval or \.json"):
        write_log(asked_run, tmp_path / "log.txt")
    (tmp_path / "taken.eval").mkdir()
    for taken in (tmp_path / "taken.eval", asked_run.path / "run.json" / "log.eval"):
        with pytest.raises(UsageError, match="in the way"):
            write_log(asked_run, taken)
    other = RunFolder.open(tmp_path / "probe", config={"audit": "probe"}, info={})
    with pytest.raises(UsageError, match="the folder of probe"):
        write_log(other, tmp_path / "log.eval")
    empty = RunFolder.open(tmp_path / "empty", config={"audit": "latent"}, info={})
    with pytest.raises(UsageError, match="No cell is finished"):
        write_log(empty, tmp_path / "log.eval")
    assert not list(tmp_path.glob("log*"))


ABSENT = """
import sys
sys.modules["inspect_ai"] = None
from auditgap.errors import UsageError
from auditgap.inspect.export import write_log
for use in (lambda: write_log(None, "a.eval"), lambda: __import__("auditgap.inspect.tasks")):
    try:
        use()
    except UsageError as error:
        print(error)
"""


def test_without_inspect_ai_it_is_a_sentence():
    done = subprocess.run(
        [sys.executable, "-O", "-c", ABSENT],
        capture_output=True,
        text=True,
        timeout=120,
        env=warm.optimised(dict(os.environ)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        done.stdout.splitlines()
        == ["This needs inspect_ai, which is not installed. Type: pip install 'auditgap[inspect]'"]
        * 2
    )
