"""Comparing what audits have really left: two tiny models, a third that is spoken to otherwise,
latent and behavioural runs."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import planted
import pytest
import tiny
from one_thread import one_thread  # noqa: F401 - a fixture

from auditgap.audits.audit import run as run_audit
from auditgap.audits.behaviour.audit import BEHAVIOUR
from auditgap.audits.comparing import compare
from auditgap.audits.latent.audit import LATENT
from auditgap.cli import main
from auditgap.errors import UsageError
from auditgap.store import RunFolder

OTHER = tiny.TEMPLATE.replace("' : '", "' . '")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """base and twin (other weights) audited alike, `spoken` with another template; latent and
    asked."""
    folder = tmp_path_factory.mktemp("bench")
    prompts = folder / "prompts.txt"
    planted.write_prompts(prompts, planted.PROMPTS[:4])
    for name, seed, template in (
        ("base", 0, tiny.TEMPLATE),
        ("twin", 1, tiny.TEMPLATE),
        ("spoken", 2, OTHER),
    ):
        tiny.save("llama", folder / name, seed=seed, chat_template=template)
        values = {
            "models": str(folder / name),
            "prompts": str(prompts),
            "layers": "embedding,mid",
            "eps": [0.1, 0.3],
            "judge": "keyword",
            "reward": "margin",
            "attacks": "targeted,random_matched",
            "target": "the door",
            "max_new_tokens": 4,
            "steps": 2,
            "dtype": "float32",
            "device": "cpu",
            "out": str(folder / f"{name}-lvs"),
        }
        _, outcome = run_audit(LATENT, *LATENT.read(None, values))
        assert not outcome.failed
    for name in ("base", "twin"):
        asked, options = BEHAVIOUR.read(
            None,
            {
                "models": str(folder / name),
                "suite": f"{prompts}:harmful",
                "judge": "keyword",
                "max_new_tokens": 4,
                "dtype": "float32",
                "device": "cpu",
                "out": str(folder / f"{name}-asked"),
            },
        )
        _, outcome = run_audit(BEHAVIOUR, asked, options)
        assert not outcome.failed
    return folder


def test_runs_record_tokenizer_and_template(bench):
    told = {
        n: RunFolder.load(bench / f"{n}-lvs").run["info"]["subjects"][0]
        for n in ("base", "twin", "spoken")
    }
    assert told["base"]["tokenizer"] == told["twin"]["tokenizer"] == told["spoken"]["tokenizer"]
    assert (
        told["base"]["chat_template"]
        == told["twin"]["chat_template"]
        != told["spoken"]["chat_template"]
    )


def test_a_mix_of_audits_is_one_comparison(bench, capsys):
    out = bench / "out"
    folders = [str(bench / f"{n}-{kind}") for kind in ("lvs", "asked") for n in ("base", "twin")]
    with pytest.raises(SystemExit) as done:
        main(
            [
                "compare",
                *folders,
                "--as",
                f"base={bench / 'base-lvs'}",
                "--as",
                f"twin={bench / 'twin-lvs'}",
                "--out",
                str(out),
            ]
        )
    shown = capsys.readouterr()
    assert done.value.code == 0 and "could not be told" not in shown.err, shown.err
    table = pd.read_parquet(out / "compare.parquet")
    assert set(table["audit"]) == {"latent", "behaviour"} and set(table["model"]) == {
        "base",
        "twin",
    }
    rows = [RunFolder.load(bench / f"{n}-lvs").rows(["targeted"]) for n in ("base", "twin")]
    base, twin = (
        r[(r["layer_index"] == 2) & (r["eps"] == 0.3)].set_index("prompt_id")["lvs"] for r in rows
    )
    mid = table[
        (table["measure"] == "lvs")
        & (table["role"] == "mid")
        & (table["eps"] == 0.3)
        & (table["model"] == "twin")
    ].iloc[0]
    assert mid["n_pairs"] == 4 and mid["difference"] == pytest.approx((twin - base).mean())
    last = table[(table["measure"] == "lvs") & (table["role"] == "last")]
    assert (
        len(last) == 4
        and set(last["reason"]) == {"this site was not asked for"}
        and last["value"].isna().all()
    )
    assert json.loads((out / "compare.json").read_text("utf-8"))["warnings"] == []


def test_another_template_is_refused_or_left_out(bench):
    stores = [RunFolder.load(bench / f"{n}-lvs") for n in ("base", "twin", "spoken")]
    with pytest.raises(
        UsageError, match=r"chat template: \w+ of .*base, \w+ of .*spoken in spoken-lvs"
    ):
        compare(stores)
    found = compare(stores, only_compatible=True)
    assert (
        len(found.sides.models) == 2
        and "spoken-lvs is left out: chat template" in found.sides.left_out[0]
    )


def test_a_copy_of_a_run_adds_nothing(bench, tmp_path):
    shutil.copytree(bench / "base-lvs", tmp_path / "copy")
    one, copy = RunFolder.load(bench / "base-lvs"), RunFolder.load(tmp_path / "copy")
    alone, twice = compare([one]), compare([one, copy])
    pd.testing.assert_frame_equal(alone.table, twice.table)
    assert any("stand in several of the folders" in note for note in twice.notes)
