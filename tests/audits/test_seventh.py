"""A seventh audit: a package of its own with one entry point, and what it gets for it.

The package is `examples/audit`, put where pip would put it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import jsonschema
import pandas as pd
import pytest
import tiny

import auditgap
from auditgap import cli
from auditgap.audits import (
    AUDITS,
    Can,
    Grading,
    audit_of,
    bundle,
    grid,
    pages,
    reduce,
    regrade,
    resume,
    run,
    status,
)
from auditgap.audits.comparing import compare
from auditgap.audits.report_part import ReportPart
from auditgap.errors import UsageError
from auditgap.report.charts import Figure
from auditgap.report.columns import of_table
from auditgap.report.compare import Comparable
from auditgap.report.compare_measures import Measure, Place, Reading, by_prompt
from auditgap.report.compare_models import Sides
from auditgap.report.gather import ReportData
from auditgap.report.section import Findings, Section, Table
from auditgap.report.verdict_lines import PASS, Criteria, Line
from auditgap.store import RunFolder

EXAMPLE = Path(__file__).parents[2] / "examples" / "audit"
PROMPTS = ("how bread bake ?", "what is the colour of the vault ?", "say the colour now")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("seventh")
    tiny.save("llama", home / "base")
    tiny.save("llama", home / "twin", rms_norm_eps=1e-3)
    (home / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    site = home / "site"
    site.mkdir()
    shutil.copy(EXAMPLE / "auditgap_lengths.py", site)
    about = site / "auditgap_lengths-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: auditgap-lengths\nVersion: 0.1.0\n"
    )
    (about / "entry_points.txt").write_text(
        "[auditgap.audits]\nlengths = auditgap_lengths:LENGTHS\n"
    )
    return home


@pytest.fixture(autouse=True)
def _installed(world, monkeypatch):
    monkeypatch.syspath_prepend(str(world / "site"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(world / "site"), *sys.path]))


def values(world: Path, out: Path | str, **more: object) -> dict[str, object]:
    return {
        "models": [str(world / "base"), str(world / "twin")],
        "prompts": str(world / "prompts.txt"),
        "max_new_tokens": 4,
        "judge": "keyword",
        "dtype": "float32",
        "device": "cpu",
        "out": str(out),
        **more,
    }


@pytest.fixture(scope="module")
def whole(world) -> RunFolder:
    """An unbroken run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(world / "site"))
        lengths = AUDITS["lengths"]
        store, outcome = run(lengths, *lengths.read(None, values(world, world / "whole")))
    assert (outcome.done, outcome.failed) == (2, {})
    return store


def rows_of(store: RunFolder) -> dict[str, str]:
    return {key: store.cell_rows(key).to_csv() for key in sorted(store.keys())}


def test_it_is_under_150_lines():
    files = [p for p in EXAMPLE.iterdir() if p.suffix in (".py", ".toml")]
    assert sum(len(p.read_text().splitlines()) for p in files) < 150


def test_it_is_listed_beside_ours():
    assert list(AUDITS)[-1] == "lengths" and len(AUDITS) == 7
    assert audit_of(RunFolder("x", {"config": {"audit": "lengths"}})) is AUDITS["lengths"]


def test_it_plans_without_running(world, tmp_path):
    lengths = AUDITS["lengths"]
    config, options = lengths.read(None, values(world, tmp_path / "run"))
    plan = lengths.prepare(config, options)
    assert lengths.estimate(plan, options) == {"cells": 2} and not (tmp_path / "run").exists()
    assert {cell.audit for cell in plan.cells} == {"lengths"}


def test_it_has_its_table_from_python_and_as_json(world, whole):
    found = auditgap.load(whole.path)
    assert found.table.equals(found.tables["lengths"])
    told = {row["subject"]: row for row in json.loads(found.table.to_json(orient="records"))}
    for subject in ("base", "twin"):
        mine = found.rows[found.rows["subject"] == str(world / subject)]
        assert told[str(world / subject)]["n"] == len(PROMPTS)
        assert told[str(world / subject)]["mean_tokens"] == mine["n_new_tokens"].mean()
    for form in ("csv", "md"):
        assert (whole.path / f"lengths.{form}").is_file()
    assert found.report.is_file()


def typed(world: Path, *words: str) -> str:
    """What the command line, which finds the package as it starts, says to these words."""
    line = [sys.executable, "-m", "auditgap", *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_has_a_command_a_config_file_and_a_schema(world, whole, tmp_path):
    file = tmp_path / "lengths.yaml"
    asked = values(world, tmp_path / "run")
    file.write_text(json.dumps({**asked, "max_new_tokens": 2}))
    schema = json.loads(typed(world, "schema", "lengths"))
    assert schema["title"] == "auditgap lengths" and set(asked) <= set(schema["properties"])
    words = ("lengths", "--config", str(file), "--max-new-tokens", "4", "--json")
    planned = json.loads(typed(world, *words, "--dry-run"))
    assert len(planned["cells"]) == 2 and planned["config"]["max_new_tokens"] == 4
    assert not (tmp_path / "run").exists()
    typed(world, *words)
    assert rows_of(RunFolder.load(tmp_path / "run")) == rows_of(whole)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page")])
    assert (tmp_path / "page" / "tables" / "lengths.csv").is_file()


def test_it_has_a_section_of_the_report(world, whole, tmp_path):
    bundle.write([whole], out=tmp_path, criteria=Criteria(), title="t", public=True)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert '<section id="lengths"' in page and '<a href="#lengths">' in page
    assert "Mean tokens" in page and unescape(AUDITS["lengths"].title) in page
    assert "No audit gap was measured in this run" in page, "and no section of another audit"
    told = json.loads((tmp_path / "report.json").read_text("utf-8"))
    jsonschema.validate(told, bundle.schema())
    table = auditgap.load(whole.path).table
    assert told["tables"]["lengths"] == json.loads(table.to_json(orient="records"))
    assert pd.read_csv(tmp_path / "tables" / "lengths.csv")["n"].tolist() == table["n"].tolist()
    assert pages.from_store([whole]).title.startswith("Lengths of ")
    public = "".join(p.read_text("utf-8") for p in (tmp_path / "public").rglob("*") if p.is_file())
    assert str(world) not in public and '<section id="lengths"' in public


class Drawn(ReportPart):
    """What an audit may say besides: a figure, lines of the verdict table, limits."""

    def sections(self, report: ReportData) -> list[Section]:
        table = self.tables(report).get("lengths")
        if table is None:
            return []
        figure = Figure("mean_lengths", "Mean length", data=table)
        blocks = (figure, Findings(), Table("lengths", "By subject", table, of_table(table)))
        says = [("", ["Answers are short."])]
        no = ["It does not say what is in them."]
        return [
            Section(id="drawn", title="D", contents="D", blocks=blocks, findings=says, limits=no)
        ]

    def lines(self, report, subject, criteria, missing) -> list[Line]:
        return [Line(subject, "Is brief", PASS, "4", "it is", "brief")]

    def limits(self, report: ReportData) -> list[tuple[str, str]]:
        return [("few_prompts", "Three prompts are few.")]


def test_it_may_draw_figures_and_lines_of_the_verdict_table(whole, tmp_path, monkeypatch):
    lengths = AUDITS["lengths"]
    monkeypatch.setitem(vars(lengths), "report_part", Drawn(lengths))
    bundle.write([whole], out=tmp_path, criteria=Criteria(), title="t")
    told = json.loads((tmp_path / "report.json").read_text("utf-8"))
    brief = [line for line in told["verdicts"] if line["id"] == "brief"]
    assert [line["subject"] for line in brief] == list(whole.rows(["lengths"])["subject"].unique())
    assert {"word": "few_prompts", "sentence": "Three prompts are few."} in told["limits"]
    page = (tmp_path / "report.html").read_text("utf-8")
    for said in ("Answers are short.", "It does not say what is in them.", "Is brief"):
        assert said in page
    assert (tmp_path / "figures" / "mean_lengths.csv").is_file()


KILLED = """
import os, signal, sys
from auditgap.audits import AUDITS, run
from auditgap.store import RunFolder
write = RunFolder.write
def once(self, *args, **more):
    write(self, *args, **more)
    os.kill(os.getpid(), signal.SIGKILL)
RunFolder.write = once
import json
run(AUDITS["lengths"], *AUDITS["lengths"].read(None, json.loads(sys.argv[1])))
"""


def test_killed_and_resumed_it_is_the_same(world, whole, tmp_path):
    asked = values(world, tmp_path / "run")
    done = subprocess.run([sys.executable, "-c", KILLED, json.dumps(asked)], timeout=500)
    assert done.returncode == -signal.SIGKILL
    now = status(tmp_path / "run")
    assert (now.planned, now.finished) == (2, 1)
    reduce(RunFolder.load(tmp_path / "run"))
    assert len(auditgap.load(tmp_path / "run").table) == 1
    store, outcome = resume(tmp_path / "run", device="cpu")
    assert (outcome.done, outcome.skipped, outcome.failed) == (1, 1, {})
    assert rows_of(store) == rows_of(whole)
    assert (store.path / "lengths.parquet").read_bytes() == (
        whole.path / "lengths.parquet"
    ).read_bytes()


def test_on_ray_it_is_the_same(world, whole, tmp_path):
    lengths = AUDITS["lengths"]
    asked = values(world, tmp_path / "run", executor="ray", workers=1)
    store, outcome = run(lengths, *lengths.read(None, asked))
    assert (outcome.done, outcome.failed) == (2, {})
    assert rows_of(store) == rows_of(whole)


def test_its_folder_may_be_on_object_storage(world, whole):
    lengths = AUDITS["lengths"]
    place = "memory://bucket/runs/lengths"
    store, outcome = run(lengths, *lengths.read(None, values(world, place)))
    assert (outcome.done, outcome.failed) == (2, {}) and store.mirror is not None
    assert store.mirror.read("lengths.parquet") == (whole.path / "lengths.parquet").read_bytes()


def test_it_may_be_compared(world, whole, monkeypatch):
    lengths, tokens = AUDITS["lengths"], Measure("mean_tokens", "Mean tokens")

    def readings(rows: pd.DataFrame, sides: Sides, seed: int) -> Iterator[Reading]:
        values = {
            name: part.set_index("prompt_id")["n_new_tokens"].astype(float)
            for name, part in rows.groupby("subject")
        }
        yield from by_prompt(tokens, values, sides.models, Place("answers"), seed=seed)

    told = Comparable(
        attacks=("lengths",),
        identity=("subject", "prompt_id"),
        settings=("dtype", "prompt_set", "max_new_tokens"),
        measures=(tokens,),
        readings=readings,
    )
    with pytest.raises(UsageError):
        compare([whole])
    monkeypatch.setattr(type(lengths), "can", lengths.can | {Can.COMPARE})
    monkeypatch.setattr(type(lengths), "comparable", lambda self: told)
    table = compare([whole]).table
    assert set(table["measure"]) == {"mean_tokens"} and len(table) == 2
    means = whole.rows(["lengths"]).groupby("subject")["n_new_tokens"].mean()
    assert sorted(table["value"]) == sorted(means)


def test_it_runs_as_a_grid(world, whole, tmp_path, capsys):
    out = tmp_path / "grid"
    asked = {**values(world, out), "audit": "lengths", "vary": {"max_new_tokens": [2, 4]}}
    del asked["max_new_tokens"]
    planned = grid.make_grid(grid.read_grid(None, asked))
    assert len(planned.cases) == 2 and len(planned.cells) == 4
    outcome = grid.run(planned)
    assert (outcome.done, outcome.failed) == (4, {})
    stores = {case.config.max_new_tokens: RunFolder.load(out / case.name) for case in planned.cases}
    assert rows_of(stores[4]) == rows_of(whole)
    table = pd.read_csv(out / "lengths.csv")
    assert table.groupby("case")["n"].agg(list).to_dict() == {
        case.name: [len(PROMPTS)] * 2 for case in planned.cases
    }
    for store in stores.values():
        assert audit_of(store).name == "lengths" and (store.path / "report.html").is_file()
    assert grid.run(planned).skipped == 4
    file = tmp_path / "grid.yaml"
    file.write_text(json.dumps({k: v for k, v in asked.items() if k != "audit"}))
    with pytest.raises(SystemExit, match="0"):
        cli.main(["grid", "--audit", "lengths", "--config", str(file), "--dry-run", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["cells"] == 4 and [one["models"] for one in shown["cases"]] == [2, 2]
    with pytest.raises(UsageError, match="either once or under `vary`"):
        grid.read_grid(None, {**asked, "max_new_tokens": 2})
    with pytest.raises(UsageError, match="Did you mean 'lengths'"):
        grid.read_grid(None, {**asked, "audit": "length"})


def test_it_is_judged_again_without_being_asked(world, whole, monkeypatch):
    from auditgap import models

    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    new = regrade(whole.path, Grading(judge="builtin"))
    assert new.path == whole.path / "grades" / "builtin"
    before, after = whole.rows(["lengths"]), new.rows(["lengths"])
    pd.testing.assert_series_equal(before["n_new_tokens"], after["n_new_tokens"])
    assert new.run["config"]["judge"] == "builtin" and (new.path / "lengths.csv").is_file()
    assert not set(new.keys()) & set(whole.keys())


def test_what_it_cannot_do_is_refused_in_one_place(world, tmp_path, monkeypatch):
    lengths = AUDITS["lengths"]
    monkeypatch.setattr(type(lengths), "can", frozenset())
    for asked, words in (
        ({"executor": "ray"}, "`auditgap lengths` does not run on Ray"),
        ({"out": "s3://bucket/run"}, "`auditgap lengths` needs a folder on a disk"),
    ):
        with pytest.raises(UsageError, match=words):
            run(lengths, *lengths.read(None, {**values(world, tmp_path / "run"), **asked}))
    RunFolder.open(tmp_path / "other", config={"audit": "lengths"}, info={})
    with pytest.raises(UsageError, match=f"lengths, which cannot {Can.REGRADE}"):
        regrade(tmp_path / "other", Grading(judge="keyword"))


@pytest.mark.parametrize(
    ("name", "place", "said"),
    [
        ("nothing", "auditgap_lengths:time", "which is no audit: a value of .*Audit is wanted"),
        (
            "absent",
            "not_there:AUDIT",
            r"a plug-in that fails: ModuleNotFoundError.*not_there:AUDIT",
        ),
        ("widths", "auditgap_lengths:LENGTHS", "brings the audit 'lengths'; an entry point has"),
    ],
)
def test_an_entry_point_that_gives_no_audit_is_a_sentence(name, place, said, tmp_path, monkeypatch):
    about = tmp_path / "broken-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 0.1.0\n")
    (about / "entry_points.txt").write_text(f"[auditgap.audits]\n{name} = {place}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert list(AUDITS)[-1] == "lengths", "the command line goes on without it"
    with pytest.raises(UsageError, match=said):
        AUDITS[name]
