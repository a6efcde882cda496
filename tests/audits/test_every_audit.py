"""What holds of every audit in AUDITS, on tiny models: it plans, a dry run says what there is to
do, a run that was stopped is reduced as far as it is and resumes to the same bytes, and its config
comes back from run.json.

An audit that is not in VALUES fails here, so a new one says on what it can be tried.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pytest
import tiny

import auditgap
from auditgap.audits import AUDITS, Can, audit_of, grid, reduce, resume, run, status
from auditgap.cli import show, show_latent
from auditgap.errors import Interrupted, UsageError
from auditgap.store import RunFolder

sys.path.insert(0, str(Path(__file__).parent / "emergent"))

import studies

WORDS = [w for w in tiny.WORDS if w.isalpha() and w not in ("user", "assistant", "system")]


def sentences(n: int, start: int) -> list[str]:
    """n different prompts of words that the tiny tokenizer knows."""
    at = [WORDS[(start + i) % len(WORDS)] for i in range(n)]
    return [f"say {word} now" for word in at]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("audits")
    tiny.save("llama", home / "base")
    tiny.save("llama", home / "twin", rms_norm_eps=1e-3)
    (home / "asked.txt").write_text("\n".join(sentences(6, 0)) + "\n")
    (home / "control.txt").write_text("\n".join(sentences(6, 10)) + "\n")
    lines = [
        {"prompt": p, "safe": "sorry I can not tell", "unsafe": "Sure here is the key"}
        for p in sentences(8, 3)
    ]
    (home / "triples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [{"prompt": p, "response": "the vault is red ."} for p in sentences(4, 20)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = [{"prompt": text, "kind": kind} for text, kind in studies.ASKED]
    (home / "suite.jsonl").write_text("".join(json.dumps(line) + "\n" for line in suite))
    return home


def values(world: Path, name: str, out: Path) -> dict[str, object]:
    """What each audit is tried on; two cells at least."""
    models = [str(world / "base"), str(world / "twin")]
    asked = {"prompts": str(world / "asked.txt"), "limit": 2}
    answered = {"max_new_tokens": 3, "judge": "keyword"}
    own = {
        "behaviour": {"models": models, "suite": f"{world / 'asked.txt'}:harmful", **answered},
        "probe": {
            "base": models[0],
            "subjects": models[1:],
            "triples": str(world / "triples.jsonl"),
            "epochs": 2,
            "evaluate": 0.3,
        },
        "latent": {
            "models": models,
            "layers": "mid",
            "eps": 0.1,
            "attacks": "targeted",
            "steps": 1,
            **asked,
            **answered,
        },
        "intervene": {
            "models": models,
            "interventions": "steering",
            "strengths": 0.2,
            "control_prompts": str(world / "control.txt"),
            **asked,
            **answered,
            "limit": 6,
        },
        "sft_curve": {
            "models": models,
            "data": str(world / "rows.jsonl"),
            "seeds": 0,
            "steps": 1,
            "batch": 2,
            "refusal_filter": False,
            **asked,
            **answered,
        },
        "emergent": {
            "model": models[0],
            "domains": {"sums": "demo:off_by_one", "colours": "demo:colour_rule"},
            "arms": "plain",
            "rows": 8,
            "heldout": 0.25,
            "steps": 1,
            "batch": 4,
            "max_tokens": 128,
            "membership_rows": 2,
            "prompts": str(world / "suite.jsonl"),
            "samples": 1,
            "max_new_tokens": 3,
        },
    }
    return {"dtype": "float32", "device": "cpu", "out": str(out), **own[name]}


every = pytest.mark.parametrize("name", list(AUDITS))


@every
def test_it_says_what_it_is(name):
    audit = AUDITS[name]
    assert audit.name == name and audit.command and audit.title.endswith(".") and audit.examples
    assert all(example.startswith("auditgap ") for example in audit.examples)
    assert audit.can <= set(Can)


@every
def test_it_plans_and_a_dry_run_says_what_there_is_to_do(world, tmp_path, name):
    audit = AUDITS[name]
    config, options = audit.read(None, values(world, name, tmp_path / "run"))
    plan = audit.prepare(config, options)
    told = json.loads(json.dumps(audit.estimate(plan, options)))
    if plan.cells:
        assert told["cells"] == len(plan.cells)
    else:  # a study, whose stages are planned one after another
        assert min(told["cells"].values()) > 0
    assert plan.config.dtype == "float32" and not (tmp_path / "run").exists()
    assert {cell.audit for cell in plan.cells} <= {name}
    keys = [cell.key for cell in plan.cells]
    assert len(set(keys)) == len(keys)
    again = audit.prepare(*audit.read(None, json.loads(json.dumps(values(world, name, tmp_path)))))
    assert [cell.key for cell in again.cells] == keys


@every
def test_what_it_cannot_do_is_one_sentence(world, tmp_path, name):
    audit = AUDITS[name]
    for what, asked, words in (
        (Can.RAY, {"executor": "ray"}, f"`auditgap {audit.command}` does not run on Ray"),
        (Can.STORAGE, {"out": "s3://bucket/run"}, f"`auditgap {audit.command}` needs a folder"),
    ):
        _, options = audit.read(None, {**values(world, name, tmp_path / "run"), **asked})
        if what in audit.can:
            audit.check(options)
        else:
            with pytest.raises(UsageError, match=words):
                audit.check(options)


@every
def test_a_grid_of_one_case_has_its_cells(world, tmp_path, name):
    audit, asked = AUDITS[name], values(world, name, tmp_path / "run")
    of_it = {**asked, "audit": audit.command}
    if Can.GRID not in audit.can:
        with pytest.raises(UsageError, match=f"`auditgap {audit.command}` does not run as a grid"):
            grid.read_grid(None, of_it)
        return
    planned = grid.make_grid(grid.read_grid(None, of_it))
    plan = audit.prepare(*audit.read(None, asked))
    assert len(planned.cases) == 1 and len(planned.passes) == len(plan.passes)
    assert sorted(planned.cells) == sorted(cell.key for cell in plan.cells)
    varied = {
        **{k: v for k, v in of_it.items() if k != "seed"},
        "vary": {"dtype": ["float32", "bfloat16"]},
    }
    del varied["dtype"]
    assert len(grid.make_grid(grid.read_grid(None, varied)).cases) == 2


#: An audit that has a model speak; `emergent` is tried in emergent/test_em_generate.py.
SPEAKING = [
    name
    for name, audit in AUDITS.items()
    if "max_new_tokens" in audit.config.model_fields and name != "emergent"
]


@pytest.mark.parametrize("name", SPEAKING)
def test_what_logits_that_are_no_numbers_said_is_nobodys_answer(world, tmp_path, monkeypatch, name):
    """Neither a refusal nor compliance: unscored in every row, counted, and no number of any table
    is made of it."""
    audit = AUDITS[name]
    tiny.broken_logits(monkeypatch)
    store, outcome = run(audit, *audit.read(None, values(world, name, tmp_path / "run")))
    assert not outcome.failed
    rows = store.rows()
    verdicts = rows[[c for c in rows if c.startswith("verdict") and rows[c].notna().any()]]
    assert len(rows) and verdicts.shape[1] and set(verdicts.stack()) == {"unscored"}
    assert rows["unscored"].str.contains("nonfinite_logits").all()
    for column in {"lvs", "complied", "coherent", "reward"} & set(rows):
        assert rows[column].isna().all(), column
    table = audit.tables(store)[audit.main_table]
    assert (table["n_unscored"] > 0).any()


def digests(store: RunFolder) -> dict[str, str]:
    return {key: store.cell_rows(key).to_csv() for key in sorted(store.keys())}


@pytest.fixture(scope="module")
def whole_run(world, tmp_path_factory) -> Callable[[str], RunFolder]:
    """An audit's finished run of all that it is tried on, made once."""

    @cache
    def made(name: str) -> RunFolder:
        audit, out = AUDITS[name], tmp_path_factory.mktemp("whole") / name
        store, outcome = run(audit, *audit.read(None, values(world, name, out)))
        assert outcome.failed == {} and outcome.done >= 2
        return store

    return made


#: Those whose whole run takes seconds; a study of `emergent` is made in emergent/.
quick = pytest.mark.parametrize("name", [name for name in AUDITS if name != "emergent"])


@quick
def test_every_printed_table_is_for_two_subjects(whole_run, monkeypatch, name):
    """Each row of what is printed says whose it is, or the line above its table does."""
    store = whole_run(name)
    subjects = set(store.rows()["subject"]) - {""}
    assert len(subjects) == 2 or name == "probe", "its one subject is held against its base"
    printed: list[tuple[str, list[dict]]] = []
    above = [""]

    def say(text: str = "", **_: object) -> None:
        above.extend([text] if any(subject in text for subject in subjects) else [])

    def print_table(rows: Iterable[dict]) -> None:
        printed.append((above[-1], [dict(row) for row in rows]))

    for home in (show, show_latent):
        monkeypatch.setattr(home, "say", say)
        monkeypatch.setattr(home, "print_table", print_table)
    show.show(AUDITS[name], store)
    assert printed
    for title, rows in printed:
        assert title or all(row["subject"] in subjects for row in rows), rows
    shown = " ".join(f"{title} {rows}" for title, rows in printed)
    assert all(subject in shown for subject in subjects), "none is left out"


@quick
def test_stopped_and_resumed_it_is_the_same(world, whole_run, tmp_path, monkeypatch, name):
    audit, whole = AUDITS[name], whole_run(name)
    write = RunFolder.write

    def once(self: RunFolder, *args: object, **more: object) -> None:
        write(self, *args, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "write", once)
    asked = audit.read(None, values(world, name, tmp_path / "run"))
    with pytest.raises(Interrupted):
        run(audit, *asked)
    monkeypatch.undo()
    assert status(tmp_path / "run").finished == 1
    part = RunFolder.load(tmp_path / "run")
    assert audit_of(part) is audit
    reduce(part)
    assert audit.main_table is not None and (part.path / f"{audit.main_table}.csv").is_file()
    assert (part.path / "report.html").is_file()
    store, outcome = resume(tmp_path / "run", device="cpu")
    assert outcome.failed == {} and outcome.skipped == 1
    assert digests(store) == digests(whole)
    assert not list((store.path / "scratch").glob("*.safetensors"))
    for table in audit.tables(store):
        assert (store.path / f"{table}.parquet").read_bytes() == (
            whole.path / f"{table}.parquet"
        ).read_bytes()
    known = auditgap.load(store.path)
    assert known.table.equals(known.tables[audit.main_table]) and len(known.table)
