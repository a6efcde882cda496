"""Models whose names are alike, or alike once cleaned: each its own subject, and no file is named
after one."""

from __future__ import annotations

from pathlib import Path

import planted
import pytest
import tiny
from one_thread import one_thread  # noqa: F401 - a fixture

from auditgap.audits.audit import run as run_audit
from auditgap.audits.latent.audit import LATENT
from auditgap.errors import AuditgapError
from auditgap.store import RunFolder

#: Below the models' folder: what careless cleaning would make one, by separator, by normal form, by
#: case.
NAMES = ["a/b", "a__b", "a_b", "other/b", "caf\u00e9", "cafe\u0301", "A_B", "..a_b"]


def audit(models: list[str], out: Path, prompts: Path) -> RunFolder:
    asked = {
        "models": models,
        "prompts": str(prompts),
        "layers": "1",
        "eps": [0.1],
        "attacks": "targeted",
        "max_new_tokens": 2,
        "steps": 1,
        "reward": "margin",
        "judge": "keyword",
        "dtype": "float32",
        "device": "cpu",
        "out": str(out),
    }
    store, outcome = run_audit(LATENT, *LATENT.read(None, asked))
    assert not outcome.failed
    return store


def files(folder: Path) -> set[str]:
    return {str(p) for p in folder.rglob("*")}


def test_alike_names_are_subjects_of_their_own(tmp_path):
    models = tmp_path / "models"
    for i, name in enumerate(NAMES):
        tiny.save("llama", models / name, seed=i)
    prompts = planted.write_prompts(tmp_path / "prompts.txt", ["what is the colour of the vault"])
    before = files(tmp_path)
    store = audit([str(models / name) for name in NAMES], tmp_path / "out", prompts)
    rows = store.rows()
    assert set(rows["subject"]) == {str(models / name) for name in NAMES}, (
        "as they were typed, none taken for another"
    )
    keys = [r["key"] for r in store.records()]
    assert len(set(keys)) == len(keys) == 2 * len(NAMES)
    made = files(tmp_path) - before
    assert all(p.startswith(str(tmp_path / "out")) for p in made), "nothing is written elsewhere"
    assert all(Path(p).name.isascii() and len(Path(p).name) < 200 for p in made), (
        "and no file is named after a model"
    )


def test_two_models_of_one_basename_do_not_share_a_folder(tmp_path, monkeypatch):
    """Without --out both would go to runs/model: the second is told so, field by field, and the
    first one's stays."""
    monkeypatch.chdir(tmp_path)
    prompts = planted.write_prompts(tmp_path / "prompts.txt", ["what is the colour of the vault"])
    for i, name in enumerate(("one", "two")):
        tiny.save("llama", tmp_path / name / "model", seed=i)
    first = audit([f"{tmp_path}/one/model"], Path("runs/model"), prompts)
    before = {p: p.read_bytes() for p in first.path.rglob("*") if p.is_file()}
    with pytest.raises(AuditgapError, match=r"models.*one/model.*two/model"):
        audit([f"{tmp_path}/two/model"], Path("runs/model"), prompts)
    assert {p: p.read_bytes() for p in first.path.rglob("*") if p.is_file()} == before
