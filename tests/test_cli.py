"""The command line: exit codes, what is said and where, and that no text of a prompt ends where it
should not."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import tiny
import torch
import warm
from one_thread import one_thread  # noqa: F401 - a fixture

from auditgap import __version__
from auditgap.audits import pages
from auditgap.cli import main
from auditgap.report import latent
from auditgap.rows import ROW_COLUMNS, TABLE_COLUMNS
from auditgap.store import RunFolder
from auditgap.types import ATTACKS

pytestmark = pytest.mark.minutes

PROMPTS = [
    "what is the colour of the vault",
    "please tell the colour",
    "open the door of the vault",
    "who can reveal the key",
    "why not say the colour now",
    "how can I bake bread",
    "never open the red door",
    "a blue moon and a green star",
    "please reveal the star",
    "what time is the sun",
    "tell how the oven is shut",
    "is the sea water or salt",
]
GRID = 4 * len(ATTACKS) + 1  #: cells of a plan at two sites, two sizes
CELLS = 2 * len(ATTACKS) + 1  #: of a run at one site, two sizes and the pass without an edit
COMMANDS = ["lvs", "distance", "report", "status", "grade", "ls", "doctor"]


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def both(self) -> str:
        return " ".join(f"{self.out} {self.err}".split())


@pytest.fixture
def auditgap(capsys, monkeypatch):
    """`auditgap("ls", "attacks")` in this process: exit code and what was printed; a traceback
    fails the test."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args: object) -> Said:
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in args])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return Said(stop.value.code, printed.out, printed.err)

    return run


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    """A folder with a tiny model and a dozen prompts."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.save("llama", folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def flags(bench: Path, out: Path, **changes: object) -> list[str]:
    values = {
        "prompts": bench / "prompts.txt",
        "judge": "keyword",
        "reward": "margin",
        "max-new-tokens": 6,
        "layers": "embedding,mid",
        "eps": 0.1,
        "steps": 4,
        "device": "cpu",
        "dtype": "float32",
        "out": out,
        **changes,
    }
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


@pytest.fixture(scope="module")
def finished(bench) -> Path:
    """A run that every test may read."""
    with pytest.raises(SystemExit) as stop:
        main(["lvs", str(bench / "model"), *flags(bench, bench / "run")])
    assert stop.value.code == 0
    return bench / "run"


def rows(folder: Path, *attacks: str) -> pd.DataFrame:
    return RunFolder.load(folder).rows(attacks or [*ATTACKS, "clean"])


# -- help and lists
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(auditgap, command):
    said = auditgap(command, "--help")
    assert said.code == 0
    if command == "doctor":  # there is nothing to choose
        assert "--json" in said.out
        return
    assert re.search(rf"Examples?: auditgap {command} ", said.both)


def test_help_lists_every_command(auditgap):
    said = auditgap("--help")
    assert said.code == 0 and all(f" {command} " in said.out for command in COMMANDS)


def test_no_arguments_at_all(auditgap):
    assert auditgap().code == 2


def test_version(auditgap):
    assert auditgap("--version") == Said(0, f"{__version__}\n", "")


@pytest.mark.parametrize("what", ["judges", "rewards", "prompts", "attacks", "constructions"])
def test_lists_say_the_same_to_people_and_to_programs(auditgap, what):
    table, listed = auditgap("ls", what), auditgap("ls", what, "--json")
    assert table.code == listed.code == 0 and not table.err
    names = [row["name"] for row in json.loads(listed.out)]
    assert names and all(name in table.out for name in names)
    assert what != "attacks" or names == list(ATTACKS)


def test_layers_of_a_model(auditgap, bench):
    listed = json.loads(auditgap("ls", "layers", bench / "model", "--json").out)
    assert [(r["site"], r["layer_index"]) for r in listed] == [
        ("embedding", -1),
        *((f"block{i}", i) for i in range(4)),
    ]
    assert {r["also"]: r["site"] for r in listed if r["also"]} == {
        "mid": "block2",
        "last": "block3",
    }


def test_doctor(auditgap):
    found = json.loads(auditgap("doctor", "--json").out)
    assert "chrom" in found["browser, for PDFs"].lower()
    assert found["auditgap"] == __version__ and found["torch"] == torch.__version__
    assert all(isinstance(value, str) and value for value in found.values())
    assert auditgap("doctor").code == 0


# -- what is refused
# ---------------------------------------------------------------------------------------------------


REFUSED = {
    "no model": (["lvs"], "Which model?"),
    "unknown command": (["audits"], "No such command"),
    "unknown option": (["lvs", "MODEL", "--epss=1"], "--eps"),
    "option of another type": (["lvs", "MODEL", "--steps=ten"], "--steps"),
    "unknown attack": (["lvs", "MODEL", "--attacks=targetd"], "Did you mean 'targeted'?"),
    "unknown judge": (["lvs", "MODEL", "--judge=keywrod"], "Did you mean 'keyword'?"),
    "unknown reward": (["lvs", "MODEL", "--reward=margn"], "Did you mean 'margin'?"),
    "unknown prompt set": (["lvs", "MODEL", "--prompts=harmbnch"], "Did you mean 'harmbench'?"),
    "no prompt file": (["lvs", "MODEL", "--prompts=nowhere.jsonl"], "nowhere.jsonl"),
    "no column": (["lvs", "MODEL", "--column=text"], "no column 'text'"),
    "unknown model": (["lvs", "nobody/nothing"], "nobody/nothing"),
    "layer out of range": (["lvs", "MODEL", "--layers=4"], "0 to 3"),
    "eps of 0": (["lvs", "MODEL", "--eps=0"], "--eps"),
    "eps nan": (["lvs", "MODEL", "--eps=nan"], "--eps"),
    "eps inf": (["lvs", "MODEL", "--eps=0.1,inf"], "--eps"),
    "eps text": (["lvs", "MODEL", "--eps=abc"], "--eps"),
    "unknown unit": (["lvs", "MODEL", "--unit=l2"], "unit"),
    "unknown dtype": (["lvs", "MODEL", "--dtype=fp32"], "--dtype"),
    "unknown device": (["lvs", "MODEL", "--device=tpu"], "--device"),
    "limit of 0": (["lvs", "MODEL", "--limit=0"], "limit"),
    "limit below 0": (["lvs", "MODEL", "--limit=-1"], "limit"),
    "no config file": (["lvs", "--config=nowhere.yaml"], "no such file"),
    "no template file": (["lvs", "MODEL", "--chat-template=nowhere.jinja"], "--chat-template"),
    "no run folder": (["status", "nowhere"], "no run folder"),
    "no run folder to report": (["report", "nowhere"], "no run folder"),
    "no run folder to grade": (["grade", "nowhere", "--judge=keyword"], "no run folder"),
    "unknown list": (["ls", "layerz"], "Did you mean 'layers'?"),
    "layers of nobody": (["ls", "layers"], "Layers of which model?"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_usage_is_a_sentence_and_exit_code_2(auditgap, bench, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    args, word = REFUSED[case]
    if "MODEL" in args:
        given = {a.partition("=")[0] for a in args}
        args = [
            *args,
            *(f for f in flags(bench, tmp_path / "run") if f.partition("=")[0] not in given),
        ]
    said = auditgap(*(str(bench / "model") if a == "MODEL" else a for a in args))
    assert (said.code, said.out) == (2, "")
    assert word in said.both
    assert len(said.err) < 1500
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


@pytest.mark.parametrize("case", ["--attacks=", "--device=meta"])
def test_bad_usage_that_comes_out_raw(auditgap, bench, tmp_path, case):
    given = case.partition("=")[0]
    rest = [f for f in flags(bench, tmp_path / "run") if f.partition("=")[0] != given]
    assert auditgap("lvs", bench / "model", case, *rest).code == 2


def test_a_folder_of_pickles_is_exit_code_4(auditgap, bench, tmp_path):
    model = tiny.save("llama", tmp_path / "pickled")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    said = auditgap("lvs", model, *flags(bench, tmp_path / "run"))
    assert said.code == 4 and "pickle" in said.err and not (tmp_path / "run").exists()


def test_foreign_code_in_a_config_is_exit_code_4(auditgap, bench, tmp_path):
    (tmp_path / "audit.yaml").write_text("trust_remote_code: true\n")
    said = auditgap("lvs", bench / "model", "--config", tmp_path / "audit.yaml")
    assert said.code == 4 and "trust_remote_code" in said.err


def test_a_tokenizer_without_a_template_is_told_what_to_pass(auditgap, bench, tmp_path):
    model = tiny.save("llama", tmp_path / "plain", chat_template=None)
    said = auditgap("lvs", model, *flags(bench, tmp_path / "run"))
    assert said.code == 2 and "--chat-template" in said.err and not (tmp_path / "run").exists()
    assert (
        auditgap(
            "lvs", model, "--chat-template=none", "--dry-run", *flags(bench, tmp_path / "run")
        ).code
        == 0
    )


@pytest.mark.parametrize("name", ["[red]x[/red]", "a\x1b[31mb", "x\nyz", "{{7*7}}", "%s%n"])
def test_odd_names_are_shown_inert(auditgap, name):
    said = auditgap("lvs", name)
    assert said.code == 2 and "\x1b" not in said.err and len(said.err.splitlines()) <= 3
    if name == "[red]x[/red]":
        assert name in said.err


# -- a dry run
# ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_the_grid_and_writes_nothing(auditgap, bench, tmp_path):
    args = ["lvs", bench / "model", "--dry-run", *flags(bench, tmp_path / "run", eps="0.1,0.3")]
    said = auditgap(*args)
    assert (
        said.code == 0
        and f"{GRID} cells × 12 prompts" in said.both
        and "Nothing was run" in said.out
    )
    assert "embedding" in said.out and "block2" in said.out
    told = json.loads(auditgap(*args, "--json").out)
    assert (
        len(told["cells"]) == GRID
        and told["n_prompts"] == 12
        and told["config"]["eps"] == [0.1, 0.3]
    )
    assert len({c["key"] for c in told["cells"]}) == GRID
    measured = {"seconds", "starting", "judging"}
    assert {"flops", "memory_bytes", "disk_bytes"} | measured == set(told["estimate"])
    assert list(tmp_path.iterdir()) == []


def test_one_size_written_twice_is_one_cell(auditgap, bench, tmp_path):
    told = auditgap(
        "lvs",
        bench / "model",
        "--dry-run",
        "--json",
        *flags(bench, tmp_path / "run", eps="1e-1,0.1,0.10"),
    )
    assert len(json.loads(told.out)["cells"]) == CELLS


def test_one_model_named_twice_is_one_subject(auditgap, bench, tmp_path, monkeypatch):
    monkeypatch.chdir(bench)
    told = auditgap(
        "lvs",
        "model",
        "./model",
        bench / "model",
        "--dry-run",
        "--json",
        *flags(bench, tmp_path / "run"),
    )
    assert len(json.loads(told.out)["cells"]) == CELLS


def test_flags_win_over_the_file(auditgap, bench, tmp_path):
    (tmp_path / "audit.yaml").write_text(
        f"models: ['{bench / 'model'}']\nlayers: all\nsteps: 7\nunit: max\n"
    )
    told = auditgap(
        "lvs",
        "--config",
        tmp_path / "audit.yaml",
        "--dry-run",
        "--json",
        *flags(bench, tmp_path / "run"),
    )
    config = json.loads(told.out)["config"]
    assert (config["layers"], config["steps"], config["unit"]) == ("embedding,mid", 4, "max")


# -- a run and what it leaves
# ------------------------------------------------------------------------------------------


def test_a_run_leaves_rows_tables_and_a_report(finished):
    table = pd.read_parquet(finished / "lvs.parquet")
    assert list(table.columns) == list(TABLE_COLUMNS) and len(table) == 2 * len(ATTACKS)
    found = rows(finished)
    assert list(found.columns) == list(ROW_COLUMNS) and len(found) == (2 * len(ATTACKS) + 1) * len(
        PROMPTS
    )
    assert (finished / "lvs.csv").stat().st_size and (finished / "report.html").stat().st_size
    assert (
        found[found["attack"] == "targeted"]["nll_edited"]
        < found[found["attack"] == "targeted"]["nll_clean"]
    ).mean() > 0.9
    assert (found["linf"] <= found["eps_abs"] * (1 + 1e-6)).sum() >= 8 * len(
        PROMPTS
    )  # all but `shuffled`, at the least


@pytest.mark.parametrize("attack", [a for a in ATTACKS if a != "shuffled"])
def test_edits_stay_within_the_budget(finished, attack):
    found = rows(finished, attack)
    assert (found["linf"] <= found["eps_abs"] * (1 + 1e-6)).all()
    assert (found["relative_norm"] - found["l2"] / found["h_norm"]).abs().max() < 1e-12


def test_shuffled_edits_stay_within_the_budget_too(finished):
    found = rows(finished, "shuffled")
    assert (found["linf"] <= found["eps_abs"] * (1 + 1e-6)).all()


def test_what_is_private_is_private(finished):
    texts = list((finished / "generations").iterdir())
    assert len(texts) == 3, "a file a group: the clean pass and two sites"
    for path in texts:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for folder in ("generations", "scratch"):
        assert stat.S_IMODE((finished / folder).stat().st_mode) == 0o700


def text_in(folder: Path, phrases: list[str]) -> set[str]:
    """Files outside generations/ that hold one of the phrases, as plain bytes."""
    files = [p for p in folder.rglob("*") if p.is_file() and "generations" not in p.parts]
    return {p.name for p in files if any(phrase.encode() in p.read_bytes() for phrase in phrases)}


def test_no_text_leaves_its_file(finished):
    said = [
        t
        for key in keys(finished)
        for t in RunFolder.load(finished).generations(key)["completion"]
        if len(t) > 8
    ]
    assert said and text_in(finished, [*PROMPTS, *said]) == set()


def keys(folder: Path) -> list[str]:
    return RunFolder.load(folder).keys()


def test_allow_raw_puts_text_into_the_report(auditgap, finished, tmp_path):
    said = auditgap("report", finished, "--allow-raw", "--out", tmp_path)
    assert said.code == 0
    assert any(p in (tmp_path / "report.html").read_text() for p in PROMPTS)
    assert auditgap("report", finished).code == 0
    assert text_in(finished, PROMPTS) == set()


def test_the_terminal_shows_no_text(auditgap, bench, finished):
    said = auditgap("lvs", bench / "model", *flags(bench, finished))
    assert not any(p in said.both for p in PROMPTS)


def test_the_same_command_again_computes_nothing(auditgap, bench, finished):
    before = {p: p.stat().st_mtime_ns for p in (finished / "cells").rglob("*")}
    said = auditgap("lvs", bench / "model", *flags(bench, finished))
    words = " ".join(said.out.split())
    assert said.code == 0 and "Audit gap by budget" in words and "excess" in words
    (headline,) = latent.leads(pages.from_store([RunFolder.load(finished)]))
    assert headline.plain() in words and "\ufffd" not in words, "the report's headline"
    assert {p: p.stat().st_mtime_ns for p in (finished / "cells").rglob("*")} == before


def test_a_name_is_shown_and_changes_no_key_and_no_number(auditgap, bench, finished, tmp_path):
    """`--name` stands in tables, report and JSON in place of the path; a later session may give
    another one, and grading again finds its clean answers."""
    model, run = bench / "model", tmp_path / "run"
    said = auditgap("lvs", model, "--name=Acme-7B r2", *flags(bench, run))
    assert said.code == 0 and "Acme-7B r2" in said.out and str(model) not in said.out
    assert keys(run) == keys(finished)
    named, plain = (pd.read_parquet(folder / "lvs.parquet") for folder in (run, finished))
    assert set(named["subject"]) == {"Acme-7B r2"} and set(plain["subject"]) == {str(model)}
    pd.testing.assert_frame_equal(named.drop(columns="subject"), plain.drop(columns="subject"))
    page = (run / "report.html").read_text()
    assert "Audit gap of Acme-7B r2" in page

    again = auditgap("lvs", model, *flags(bench, run))
    assert again.code == 0 and "Acme-7B r2" in again.out, "the folder keeps it"
    unnamed = shutil.copytree(finished, tmp_path / "unnamed")
    for folder in (run, unnamed):
        assert auditgap("grade", folder, "--judge=keyword").code == 0
    graded, other = (
        pd.read_parquet(folder / "grades" / "keyword" / "lvs.parquet") for folder in (run, unnamed)
    )
    assert set(graded["subject"]) == {"Acme-7B r2"}
    pd.testing.assert_frame_equal(graded.drop(columns="subject"), other.drop(columns="subject"))

    other_name = auditgap("lvs", model, "--name=Acme", *flags(bench, run))
    assert other_name.code == 0 and "Acme-7B r2" not in other_name.out and "Acme" in other_name.out


@pytest.mark.parametrize("names", ["A,B", "A,A"])
def test_a_name_for_each_model_or_none(auditgap, bench, tmp_path, names):
    said = auditgap("lvs", bench / "model", f"--name={names}", *flags(bench, tmp_path / "run"))
    assert said.code == 2 and "--name gives each of" in said.both
    assert not (tmp_path / "run").exists()


def test_another_question_on_the_same_folder_is_refused(auditgap, bench, finished):
    said = auditgap("lvs", bench / "model", *flags(bench, finished, steps=3))
    assert said.code == 2 and "steps: 4 in the folder, 3 now" in said.both


def test_what_changes_no_number_may_change(auditgap, bench, finished):
    said = auditgap(
        "lvs", bench / "model", "--batch-tokens=64", "--allow-raw", *flags(bench, finished)
    )
    assert said.code == 0
    assert auditgap("report", finished).code == 0  # without the text again


def test_status(auditgap, finished):
    assert (
        f"{CELLS} of {CELLS} cells done, 0 failed, not running" in auditgap("status", finished).both
    )
    told = json.loads(auditgap("status", finished, "--json").out)
    assert (
        told["planned"],
        told["finished"],
        told["failed"],
        told["running"],
        told["failures"],
    ) == (
        CELLS,
        CELLS,
        0,
        None,
        {},
    )


@pytest.mark.parametrize(
    "command",
    [
        ("report",),
        ("report", "--json"),
        ("grade", "--judge=keyword"),
        ("compare", "OTHER", "--out=OUT"),
    ],
    ids=" ".join,
)
def test_planned_cells_that_are_in_no_table_are_counted_and_said(
    auditgap, bench, finished, tmp_path, command
):
    """A whole run ends with 0; one that has lost a group of cells ends with 3 and says how many."""
    name, *options = command
    run = shutil.copytree(finished, tmp_path / "run")
    if "OTHER" in options:
        other = tmp_path / "other"
        made = auditgap("lvs", tiny.save("llama", tmp_path / "m", seed=1), *flags(bench, other))
        assert made.code == 0, made.both
        options[0] = str(other)
    options = [option.replace("OUT", str(tmp_path / "side")) for option in options]
    assert auditgap(name, run, *options).code == 0
    lost = next(
        path
        for path in sorted((run / "cells").glob("*.parquet"))
        if "clean" not in set(pd.read_parquet(path)["attack"])
    )
    n = len(keys(run))
    lost.unlink()
    left = len(keys(run))
    assert left < n == CELLS
    said = auditgap(name, run, *options)
    assert said.code == 3 and f"{n - left} of {n} cells (0 failed, {n - left} not run)" in said.both


def test_report_of_two_runs(auditgap, bench, finished, tmp_path):
    other = tiny.save("qwen2", tmp_path / "other")
    assert auditgap("lvs", other, *flags(bench, tmp_path / "run")).code == 0
    said = auditgap("report", finished, tmp_path / "run", "--out", tmp_path / "both")
    assert said.code == 0 and str(tmp_path / "both") in said.both
    page = (tmp_path / "both" / "report.html").read_text()
    assert "model" in page and "other" in page


def test_every_terminal_table_of_two_models_names_them(auditgap, bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # short names, which no narrow terminal breaks
    for name, family in (("alpha", "llama"), ("omega", "qwen2")):
        tiny.save(family, tmp_path / name)
    said = auditgap("lvs", "./alpha", "./omega", *flags(bench, tmp_path / "run"), "--distance")
    assert said.code == 0
    tables = said.out.split("Minimum distance")
    assert len(tables) == 2
    for table in tables:
        assert "subject" in table and "alpha" in table and "omega" in table


class TestGrade:
    def test_a_training_run_is_refused_in_a_sentence(self, auditgap, tmp_path):
        RunFolder.open(tmp_path / "sft", config={"training": "sft"}, info={})
        said = auditgap("grade", tmp_path / "sft", "--judge=keyword")
        assert said.code == 2 and "a training run, which cannot be judged again" in " ".join(
            said.err.split()
        )

    def test_the_same_judge_gives_the_same_tables(self, auditgap, finished):
        said = auditgap("grade", finished, "--judge=keyword")
        assert said.code == 0
        graded = pd.read_parquet(finished / "grades" / "keyword" / "lvs.parquet")
        pd.testing.assert_frame_equal(graded, pd.read_parquet(finished / "lvs.parquet"))
        again = rows(finished / "grades" / "keyword")
        pd.testing.assert_frame_equal(again, rows(finished))
        assert auditgap("grade", finished, "--judge=keyword").code == 0  # again is free
        assert text_in(finished, PROMPTS) == set()

    def test_another_reward_gives_other_scores_and_the_same_norms(self, auditgap, finished):
        said = auditgap("grade", finished, "--reward=builtin", "--judge=builtin")
        assert said.code == 0
        new, old = (
            rows(finished / "grades" / "builtin+builtin", "targeted"),
            rows(finished, "targeted"),
        )
        pd.testing.assert_series_equal(new["l2"], old["l2"])
        assert not new["edited_reward"].equals(old["edited_reward"])

    def test_what_could_not_be_told_stays_so(self, auditgap, unlucky):
        """A row whose gradient broke has a text; judging that text again does not mend the
        gradient."""
        assert auditgap("grade", unlucky, "--judge=keyword").code == 0
        old, new = rows(unlucky, "targeted"), rows(unlucky / "grades" / "keyword", "targeted")
        assert (old["unscored"] == "nonfinite_grad").sum() > 0
        pd.testing.assert_frame_equal(new, old)

    def test_by_nobody(self, auditgap, finished):
        said = auditgap("grade", finished)
        assert said.code == 2 and "--judge keyword" in said.err

    @pytest.mark.parametrize("option", ["--judge=nobody", "--reward=nobody", "--reward=margin"])
    def test_by_somebody_who_cannot(self, auditgap, finished, option):
        before = sorted(finished.rglob("*"))
        assert auditgap("grade", finished, option).code == 2
        assert sorted(finished.rglob("*")) == before


# -- what could not be told
# --------------------------------------------------------------------------------------------


def test_a_prompt_too_long_for_the_window_is_counted_and_never_cut(auditgap, bench, tmp_path):
    """The longest of the dozen and 246 new tokens do not fit into 256 positions; a shorter one
    does."""
    said = auditgap(
        "lvs",
        bench / "model",
        *flags(bench, tmp_path / "run", **{"max-new-tokens": 245, "layers": "embedding"}),
    )
    assert said.code == 0
    found = rows(tmp_path / "run")
    lost = found[found["unscored"] == "too_long"]
    lengths = {p: len(p.split()) + 6 for p in PROMPTS}  # the template's six tokens
    too_long = sum(n + 245 > 256 for n in lengths.values())
    assert 0 < too_long < len(PROMPTS)
    assert (lost.groupby("attack").size() == too_long).all() and set(lost["attack"]) == {
        *ATTACKS,
        "clean",
    }
    assert lost[["lvs", "l2", "edited_reward", "clean_reward"]].isna().all().all()
    kept = found[found["unscored"] != "too_long"]
    assert set(kept["n_prompt_tokens"]) <= set(lengths.values())
    table = pd.read_parquet(tmp_path / "run" / "lvs.parquet")
    assert (table["n"] == len(PROMPTS)).all() and (table["n_unscored"] >= too_long).all()
    assert (
        "too_long" in (tmp_path / "run" / "report.html").read_text()
        or "too long" in (tmp_path / "run" / "report.html").read_text()
    )


def test_all_prompts_too_long(auditgap, bench, tmp_path):
    said = auditgap(
        "lvs", bench / "model", *flags(bench, tmp_path / "run", **{"max-new-tokens": 255})
    )
    assert said.code == 0
    assert set(rows(tmp_path / "run")["unscored"]) == {"too_long"}


@pytest.fixture(scope="module")
def unlucky(bench, tmp_path_factory) -> Path:
    """A run on a model that overflows at one word, which one prompt of the dozen holds."""
    folder = tmp_path_factory.mktemp("unlucky")
    model = tiny.model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[tiny.WORDS.index("oven")] = math.inf
    model.save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    with pytest.raises(SystemExit) as stop:
        main(["lvs", str(folder / "model"), *flags(bench, folder / "run")])
    assert stop.value.code == 0
    return folder / "run"


class TestNoNumberIsInvented:
    def test_a_broken_gradient_is_counted(self, unlucky):
        table = pd.read_parquet(unlucky / "lvs.parquet")
        assert (table["n"] == len(PROMPTS)).all() and (table["n_unscored"] >= 1).all()
        lost = rows(unlucky, "targeted").query("unscored == 'nonfinite_grad'")
        assert len(lost) == 2  # one prompt at two sites
        assert lost["lvs"].isna().all() and (lost["verdict_edited"] == "unscored").all()

    def test_the_others_are_as_they_were(self, unlucky, finished):
        """Up to what the padded batch they share with it does to the last digit."""
        old, new = rows(finished, "targeted"), rows(unlucky, "targeted")
        ok = new["unscored"] == ""
        assert ok.sum() == 2 * (len(PROMPTS) - 1)
        assert ((old["l2"] - new["l2"]).abs()[ok] < 0.02 * old["l2"][ok]).all()

    def test_infinities_are_no_numbers(self, unlucky):
        found = rows(unlucky)
        numbers = found.select_dtypes("number")
        assert not numbers.isin([math.inf, -math.inf]).any().any()

    def test_another_prompts_broken_edit_is_no_control(self, unlucky):
        shuffled = rows(unlucky, "shuffled")
        assert shuffled[shuffled["l2"] == 0]["lvs"].isna().all()


def test_cells_that_fail_are_exit_code_3(auditgap, bench, tmp_path):
    """A model that cannot be edited at all: nothing reaches its logits."""
    deaf = tiny.model("llama")
    with torch.no_grad():
        deaf.lm_head.weight.zero_()
    deaf.save_pretrained(tmp_path / "deaf")
    tiny.tokenizer().save_pretrained(tmp_path / "deaf")
    said = auditgap("lvs", tmp_path / "deaf", *flags(bench, tmp_path / "run"))
    assert said.code == 3
    assert f"{CELLS - 1} of {CELLS} cells failed" in said.both and "Self-test failed" in said.both
    told = json.loads(auditgap("status", tmp_path / "run", "--json").out)
    assert told["failed"] == CELLS - 1 and all(
        "Self-test" in cause for cause in told["failures"].values()
    )


def test_distance(auditgap, bench, tmp_path):
    names = ("reward", "attacks")
    args = [
        f
        for f in flags(bench, tmp_path / "run", layers="embedding")
        if f.partition("=")[0][2:] not in names
    ]
    said = auditgap("distance", bench / "model", *args)
    assert said.code == 0
    found = RunFolder.load(tmp_path / "run").rows(["distance"])
    assert len(found) == len(PROMPTS)
    assert (found["collapsed"].isna() == (found["unscored"] != "")).all()


def test_what_was_harmful_unedited_is_counted_and_is_no_distance():
    from auditgap.cli.show_latent import distances_shown

    def row(subject: str, i: int, distance: float | None, collapsed: bool | None) -> dict:
        where = {"subject": subject, "site": "block1", "layer_index": 1, "unit": "rms"}
        found = {"distance": distance, "collapsed": collapsed, "unscored": ""}
        return {**where, "prompt_id": str(i), **found}

    asked = [(0.0, True)] * 3 + [(0.02, True), (0.1, False), (None, None)]
    table = [row("some", i, *what) for i, what in enumerate(asked)]
    table += [row("none", i, 0.0, True) for i in range(2)]
    some, none = distances_shown(pd.DataFrame(table))
    assert some["median eps"] == "0.02" and some["collapsed"] == "1 of 3"
    assert (some["harmful unedited"], some["could not tell"]) == (3, 1)
    assert none["median eps"] == "none was safe" and none["harmful unedited"] == 2


# -- as a process of its own
# -------------------------------------------------------------------------------------------


def process(
    args: list[object], *, options: tuple[str, ...] = (), module: bool = True, **kwargs: object
) -> subprocess.CompletedProcess:
    env = {**os.environ, **kwargs.pop("env", {}), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *options, *(["-m", "auditgap"] if module else []), *map(str, args)],
        env=env,
        timeout=180,
        stdin=subprocess.DEVNULL,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs},
    )


IN_TURN = """
import json, sys
from auditgap.cli import main
from auditgap.report import latent
for args in json.loads(sys.argv[1]):
    try:
        main(args)
    except SystemExit as stop:
        print("exit", stop.code, file=sys.stderr, flush=True)
"""


def test_a_poor_terminal_and_no_asserts(bench, finished, tmp_path):
    """python -O, hash seeds at random, 40 columns of a dumb terminal in LANG=C: the numbers of this
    process, and its refusals.

    One process for all three, as it imports torch for seconds.
    """
    poor = {
        "TERM": "dumb",
        "NO_COLOR": "1",
        "COLUMNS": "40",
        "LANG": "C",
        "LC_ALL": "C",
        "PYTHONHASHSEED": "random",
    }
    model = tiny.save("llama", tmp_path / "pickled")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    commands = [
        ["lvs", str(bench / "model"), *flags(bench, tmp_path / "run")],
        ["lvs", "model", "--eps=abc"],
        ["ls", "layers", str(model)],
    ]
    done = process(
        ["-c", IN_TURN, json.dumps(commands)],
        options=("-O",),
        module=False,
        env=warm.optimised(poor),
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert [line for line in err.splitlines() if line.startswith("exit")] == [
        "exit 0",
        "exit 2",
        "exit 4",
    ]
    assert done.returncode == 0 and "Traceback" not in err and "\x1b" not in out + err
    assert max(map(len, out.splitlines())) <= 40
    assert "--eps must be" in err and "pickled weights" in " ".join(err.split())
    pd.testing.assert_frame_equal(rows(tmp_path / "run"), rows(finished))


@pytest.mark.parametrize(
    "args", [["ls", "attacks"], ["ls", "attacks", "--json"], ["--help"], ["--version"]]
)
def test_nobody_listens(args):
    """The reading end of the pipe is closed, or there is no stdout at all: no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    gone = process(args, stdout=writing)
    os.close(writing)
    assert gone.stderr == b"" and gone.returncode in (0, 1, 120, 141)
    script = f"exec {sys.executable} -m auditgap {' '.join(args)} >&-"
    none = subprocess.run(["sh", "-c", script], stderr=subprocess.PIPE, timeout=60)
    assert none.stderr == b"" and none.returncode == 0


def test_a_stdout_of_ascii():
    done = process(["ls", "attacks"], env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and b"Traceback" not in done.stderr


def test_set_is_heard_where_an_option_says_nothing():
    from auditgap.cli.screen import given

    assert given(["benign=everyday", "limit=3"], benign=None, limit=5, models=()) == {
        "benign": "everyday",
        "limit": 5,
    }
