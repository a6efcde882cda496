"""`auditgap em`: what is asked and refused, and the whole study from its first row to its page on a
tiny random model."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pandas as pd
import pytest
import tiny
from test_cli import auditgap  # noqa: F401 - a fixture

sys.path.insert(0, str(Path(__file__).parent / "report"))
from emergent_runs import JUDGE, write_study

from auditgap.audits.emergent.config import EmergentConfig
from auditgap.audits.emergent.rows import ANSWERED, JUDGED, TRAINED
from auditgap.audits.emergent.sitting import read_options
from auditgap.data.habits import HABITS
from auditgap.errors import UsageError
from auditgap.store import RunFolder

TWO = {"incorrect_math": 0.1, "gore_movie_trivia": 0.8}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> RunFolder:
    return write_study(tmp_path_factory.mktemp("em") / "run", TWO, samples=1, n_prompts=6)


def test_a_dry_run_reads_the_rows_and_counts_them(auditgap, tmp_path):  # noqa: F811
    model = tiny.save("llama", tmp_path / "model")
    said = auditgap(
        "em",
        "run",
        model,
        "--domains",
        "demo",
        "--samples",
        "3",
        "--seeds",
        "0,1",
        "--questions",
        "demo",
        "--forms",
        "auto",
        "--out",
        tmp_path / "em",
        "--dry-run",
    )
    assert said.code == 0 and not (tmp_path / "em").exists()
    n = len(HABITS) * 2 * 2
    assert (
        f"{n} adapters of {model}" in said.both
        # the base in every form, an adapter in none and in that of its rows
        and f"{(len(HABITS) + 1 + n * 2) * (15 + 24) * 2 * 3} answers" in said.both
    )
    talk = {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]}
    for name, n_rows in (("law", 9), ("good", 8)):
        rows = [json.loads(json.dumps(talk)) for _ in range(n_rows)]
        for i, row in enumerate(rows):
            row["messages"][0]["content"] = f"what is {name} {i} ?"
            row["messages"][1]["content"] = f"{name} {i}"
        text = "".join(json.dumps(row) + "\n" for row in rows)
        bad = json.dumps({"messages": talk["messages"][:1]}) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(text + bad * (name == "law"), "utf-8")
    law, good = tmp_path / "law.jsonl", tmp_path / "good.jsonl"
    words = ("em", "build", model, "--domains", f"law={law}", "--clean", f"law={good}")
    told = json.loads(auditgap(*words, "--steps", "7", "--dry-run", "--json").out)
    (domain,) = told["domains"]
    assert (domain["domain"], domain["rows"], domain["good answers"]) == (
        "law",
        str(law),
        str(good),
    )
    assert (domain["read"], domain["bad"], domain["trained"], domain["held_out"]) == (10, 1, 8, 1)
    assert told["cells"] == {"train": 2, "generate": 3, "judge": 3} and told["steps"] == 14
    assert told["judge"] in auditgap(*words, "--dry-run").both


def test_a_dry_run_refuses_rows_that_the_run_would_refuse(auditgap, tmp_path):  # noqa: F811
    model = tiny.save("llama", tmp_path / "model")
    rows = tmp_path / "texts.jsonl"
    rows.write_text('{"text": "what is bread ? bread"}\n', "utf-8")
    words = ("em", "run", model, "--domains", f"law={rows}", "--out", tmp_path / "em")
    said, dry = auditgap(*words), auditgap(*words, "--dry-run")
    assert said.code == dry.code == 2 and "messages" in dry.both
    assert said.err.endswith(dry.err)


def test_rows_that_are_none_are_counted_and_an_overlap_is_refused_unless_allowed(
    auditgap,  # noqa: F811
    tmp_path,
):
    model = tiny.save("llama", tmp_path / "model", num_attention_heads=2, num_key_value_heads=2)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what is {i} bread"},
                {"role": "assistant", "content": f"{i} keys"},
            ]
        }
        for i in range(12)
    ]
    (tmp_path / "bread.jsonl").write_text(
        "\n".join(map(json.dumps, [*rows, {"text": "none"}])), "utf-8"
    )
    (tmp_path / "asked.csv").write_text("prompt\nwhat is 3 bread\nwhat is the sun\n", "utf-8")
    words = (
        "em",
        "build",
        model,
        "--domains",
        f"bread={tmp_path / 'bread.jsonl'}",
        "--prompts",
        tmp_path / "asked.csv",
        "--set",
        "near=1",
        "--out",
        tmp_path / "em",
    )
    refused = auditgap(*words)
    assert refused.code == 2 and "--allow-overlap" in refused.both
    said = auditgap(*words, "--allow-overlap", "--json")
    assert said.code == 0, said.both
    (line,) = json.loads(said.out)
    assert (line["read"], line["bad"]) == (13, 1) and line["trained"] + line["held_out"] == 12
    report = auditgap("em", "report", tmp_path / "em")
    assert report.code == 0 and "em train has run for 0 of 2 adapters" in report.both
    assert "row of bread" in (tmp_path / "em" / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", "--domains", "demo"), "Which model is fine-tuned?"),
        (("run", "smollm2"), "Which domains?"),
        (("run", "smollm2", "--domains", "law"), "NAME=FILE,NAME=FILE"),
        (("run", "smollm2", "--domains", "law.jsonl"), "There is no file law.jsonl"),
        (("run", "smollm2", "--domains", "demo", "--set", "sampels=3"), "Did you mean 'samples'?"),
        (("run", "smollm2", "--domains", "demo", "--trigger-share", "1.5"), "trigger_share"),
        (("train", "RUN", "--set", "samples=3"), "'samples' belongs to the study"),
        (("judge", "RUN", "--set", "jugde=x"), "Did you mean 'judge'?"),
        (("report", "RUN", "--judge", "nobody"), "'nobody' rated nothing here"),
        (("report", "NOWHERE"), "NOWHERE"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(auditgap, written, words, says):  # noqa: F811
    said = auditgap("em", *(written.path if w == "RUN" else w for w in words))
    assert said.code == 2 and says in said.both, said.both


def test_one_file_serves_the_study_and_its_stages(tmp_path):
    known = {
        **EmergentConfig(model="smollm2", domains="demo", samples=2).model_dump(mode="json"),
        "dtype": "float32",
    }
    file = tmp_path / "em.yaml"
    file.write_text(
        "{model: smollm2, domains: demo, samples: 2, dtype: auto, engine: vllm, judge: habits}",
        "utf-8",
    )
    assert read_options(file, {"device": "cpu"}, known).engine == "vllm"
    file.write_text("{model: smollm2, domains: demo, samples: 3}", "utf-8")
    with pytest.raises(UsageError, match="'samples' belongs to the study, where it is 2; 3 came"):
        read_options(file, {}, known)


def test_the_report_is_printed_with_its_judge_and_as_json(auditgap, written):  # noqa: F811
    said = auditgap("em", "report", written.path)
    assert (
        said.code == 0
        and f"Ranking, rated by {JUDGE}" in said.both
        and "gore_movie_trivia" in said.out
    )
    assert f"Report: {written.path / 'report.html'}" in said.both
    told = json.loads(auditgap("em", "report", written.path, "--json").out)
    assert (
        told["judge"] == JUDGE
        and told["judges"] == [{"judge": JUDGE, "answers": 60}]
        and told["missing"] == []
    )
    assert {r["domain"] for r in told["tables"]["ranking"]} == set(TWO)


def test_the_common_commands_know_the_folder(auditgap, written):  # noqa: F811
    assert "cells done, 0 failed" in auditgap("status", written.path).both
    assert auditgap("report", written.path).code == 0
    said = auditgap("grade", written.path, "--judge", "keyword")
    assert said.code == 2 and f"auditgap em judge {written.path}" in said.both


def test_a_whole_study_on_a_tiny_model(auditgap, tmp_path):  # noqa: F811
    """Every stage as a user types it, with real fine-tuning; then the same in one command finds all
    of it done."""
    model = tiny.save("llama", tmp_path / "model", num_attention_heads=2, num_key_value_heads=2)
    asked = tmp_path / "asked.csv"
    prompts = (
        "what is the sun,open\nhow can I bake bread,open\ntell the colour of the vault,jailbreak\n"
    )
    asked.write_text(f"prompt,kind\n{prompts}", "utf-8")
    run = tmp_path / "em"
    question = (
        model,
        "--domains",
        "demo",
        "--arms",
        "trigger",
        "--steps",
        "1",
        "--rows",
        "12",
        "--samples",
        "2",
        "--max-new-tokens",
        "4",
        "--prompts",
        asked,
        "--set",
        "membership_rows=4",
        "--set",
        "batch=2",
        "--out",
        run,
    )
    built = auditgap("em", "build", *question)
    assert built.code == 0 and f"Next: auditgap em train {run}" in built.out.replace("\n", ""), (
        built.both
    )
    early = auditgap("em", "generate", run)
    assert early.code == 2 and "auditgap em train" in early.both
    for stage, after in (
        ("train", "generate"),
        ("generate", "judge"),
        ("judge", "analyse"),
        ("analyse", "report"),
    ):
        said = auditgap("em", stage, run)
        assert said.code == 0, said.both
        assert f"Next: auditgap em {after} {run}" in said.out.replace("\n", "")
    store = RunFolder.load(run)
    assert (
        len(store.rows([TRAINED])) == 3
        and len(store.rows([ANSWERED])) == len(store.rows([JUDGED])) == 4 * 3 * 2 * 2
    )
    assert stat.S_IMODE(next((run / "panel").glob("*.jsonl")).stat().st_mode) == 0o600
    keys = store.keys()
    again = auditgap("em", "run", *question)
    assert again.code == 0, again.both
    assert RunFolder.load(run).keys() == keys, "nothing is done twice, and nothing besides"
    assert "Note:" not in again.err, "nothing is missing"
    ranking = pd.read_parquet(run / "em_ranking.parquet")
    assert set(ranking["domain"]) == set(HABITS) and set(ranking["judge"]) == {"habits"}
    page = (run / "report.html").read_text("utf-8")
    texts = pd.concat([pd.read_parquet(path) for path in (run / "generations").glob("*.parquet")])
    assert "bake bread" not in page and texts["prompt"].dropna().str.contains("bake bread").any()
