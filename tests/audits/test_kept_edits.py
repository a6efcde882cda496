"""Edits that a latent audit keeps: those of its rows, exported as safetensors, carried by a merge,
and kept only where asked."""

from __future__ import annotations

import planted
import pytest
import safetensors
import safetensors.torch
import torch

from auditgap.audits import edits
from auditgap.audits.audit import run as run_audit
from auditgap.audits.latent.audit import LATENT
from auditgap.cli import main
from auditgap.errors import UsageError
from auditgap.store.merge import merge
from auditgap.types import Prompt


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Two attacks and two controls at two sites, with their edits."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        planted.register(patch)
        yield audited(folder, "run", keep_edits=True), folder


def audited(folder, name, **changes):
    if not (folder / "model").exists():
        planted.save(planted.Plant(door=1), folder / "model")
        planted.write_prompts(folder / "prompts.txt", planted.PROMPTS[:3])
    asked = {
        "models": str(folder / "model"),
        "prompts": str(folder / "prompts.txt"),
        "layers": "embedding,1",
        "eps": "0.02,0.1",
        "attacks": "targeted,untargeted,random_matched,shuffled",
        "target": planted.TARGET,
        "max_new_tokens": 4,
        "steps": 2,
        "judge": "keyword",
        "reward": "margin",
        "dtype": "float32",
        "device": "cpu",
        "out": str(folder / name),
        **changes,
    }
    store, outcome = run_audit(LATENT, *LATENT.read(None, asked))
    assert not outcome.failed
    return store


def test_they_are_the_edits_of_the_rows(kept, tmp_path):
    store, _ = kept
    names = edits.export_edits(store, tmp_path / "edits.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "edits.safetensors")
    rows = store.rows(["targeted", "untargeted"])
    assert len(names) == len(rows) == 2 * 2 * 2 * 3, (
        "attacks × sites × budgets × prompts; controls are made again from these"
    )
    for row in rows.itertuples():
        site = "embedding" if row.layer_index < 0 else f"block_{row.layer_index:.0f}"
        delta = tensors[f"{row.attack}.{row.eps:g}_{row.unit}.{row.prompt_id}.{site}"]
        assert delta.dtype == torch.float32 and len(delta) == row.n_prompt_tokens
        assert delta.norm().item() == pytest.approx(
            row.l2, rel=1e-5
        ) and delta.abs().max().item() == pytest.approx(row.linf)
    with safetensors.safe_open(tmp_path / "edits.safetensors", "pt") as file:
        told = file.metadata()
    assert (
        told["fingerprint"] == next(iter(store.run["config"]["subjects"].values()))
        and told["sites"] == "block_1,embedding"
    )


def test_the_numbers_are_those_of_a_run_that_keeps_none(kept, tmp_path):
    store, folder = kept
    plain = audited(folder, "plain")
    assert {r["key"]: r["sha256"] for r in plain.records()} == {
        r["key"]: r["sha256"] for r in store.records()
    }
    assert not (plain.path / "edits").exists()
    with pytest.raises(UsageError, match="--keep-edits"):
        edits.export_edits(plain, tmp_path / "edits.safetensors")


def test_a_merge_carries_them(kept, tmp_path):
    store, folder = kept
    plain = audited(folder, "plain")
    joined = merge([store.path, plain.path], tmp_path / "joined")
    assert edits.export_edits(joined, tmp_path / "a.safetensors") == edits.export_edits(
        store, tmp_path / "b.safetensors"
    )
    one, other = (safetensors.torch.load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_one_that_is_torn_is_a_sentence(kept, tmp_path):
    store, _ = kept
    path = next(store.path.glob("edits/*.safetensors"))
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-7])
        with pytest.raises(UsageError, match="missing or torn"):
            edits.export_edits(store, tmp_path / "edits.safetensors")
    finally:
        path.write_bytes(whole)


def test_the_command_writes_them(kept, tmp_path, capsys):
    store, _ = kept
    with pytest.raises(SystemExit) as ended:
        main(["export-edits", str(store.path), "--out", str(tmp_path / "edits.safetensors")])
    assert ended.value.code == 0 and "24 tensors" in capsys.readouterr().out
    names = safetensors.torch.load_file(tmp_path / "edits.safetensors")
    assert {name.split(".")[-2] for name in names} == {
        Prompt(text).id for text in planted.PROMPTS[:3]
    }


def test_object_storage_cannot_keep_them(kept):
    _, folder = kept
    with pytest.raises(UsageError, match="needs a folder on a disk"):
        audited(folder, "never", keep_edits=True, out="s3://bucket/run")
