"""LVS_rel does not change when a residual stream is multiplied by a constant, and LVS does."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import planted
import pytest
import tiny
import torch

from auditgap.types import ATTACKS

SCALES = {1.0: "plain", 8.0: "times8", 0.25: "times0.25", 0.3: "times0.3"}
SITES = "embedding,block1,block3"
KEY = ["site", "eps", "attack", "prompt_id"]


@torch.no_grad()
def scaled(c: float) -> torch.nn.Module:
    """The same function with a residual stream c times as large: what writes is scaled, and what
    reads is normed."""
    made = tiny.model("llama", rms_norm_eps=1e-14)
    made.model.embed_tokens.weight.mul_(c)
    for block in made.model.layers:
        block.self_attn.o_proj.weight.mul_(c)
        block.mlp.down_proj.weight.mul_(c)
    return made


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    for c, name in SCALES.items():
        scaled(c).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    return planted.audit(
        folder / "run",
        [folder / name for name in SCALES.values()],
        planted.write_prompts(folder / "prompts.txt"),
        layers=SITES,
        attacks=list(ATTACKS),
        eps=[0.01, 0.1],
        target="Sure , here is",
        max_new_tokens=4,
        reward="margin",
        judge="keyword",
        confirm="none",
        untargeted_tokens=4,
    )


def of(store, c: float) -> pd.DataFrame:
    rows = store.rows(list(ATTACKS))
    return rows[rows["subject"].str.endswith("/" + SCALES[c])]


def test_the_scaled_model_is_the_same_function():
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.inference_mode():
        plain, large = (scaled(c)(input_ids=ids).logits for c in (1.0, 8.0))
    torch.testing.assert_close(large, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("c", sorted(SCALES.keys() - {1.0}))
def test_lvs_rel_stays_and_lvs_moves(store, c):
    """A power of two changes no rounding; 0.3 does, and now and then the sign of a gradient that is
    all but zero, from where a search goes another way."""
    exact = math.log2(c).is_integer()
    tolerance, most_astray = (1e-6, 0.0) if exact else (2e-3, 0.1)
    plain, other = (of(store, s).set_index(KEY).sort_index() for s in (1.0, c))
    assert (
        len(plain) == len(other) == 3 * 2 * len(ATTACKS) * len(planted.PROMPTS)
        and plain["lvs_rel"].notna().all()
    )
    assert (plain["lvs_rel"] > 0).mean() > 0.3, "else there is nothing to compare"
    for column in ("relative_norm", "clean_reward", "edited_reward", "lvs_rel"):
        near = np.isclose(other[column], plain[column], rtol=tolerance, atol=10 * tolerance)
        assert (~near).mean() <= most_astray, column
        assert other[column].mean() == pytest.approx(plain[column].mean(), rel=5 * tolerance)
    near = np.isclose(other["l2"], c * plain["l2"], rtol=tolerance)
    assert (~near).mean() <= most_astray, "a search that goes another way ends in another place"
    for column in ("linf", "h_norm", "eps_abs"):
        pd.testing.assert_series_equal(
            other[column], c * plain[column], rtol=tolerance, check_names=False
        )
    changed = (other["lvs"] / plain["lvs"])[plain["lvs"] > 0.1]
    assert (changed < 0.7).all() if c > 1 else (changed > 1.4).all()


def test_so_do_the_tables(store):
    table = pd.read_parquet(store.path / "lvs.parquet")
    plain, large = (table[table["subject"].str.endswith("/" + SCALES[c])] for c in (1.0, 8.0))
    plain, large = (t.set_index(KEY[:3]).sort_index() for t in (plain, large))
    for column in ("lvs_rel_mean", "lvs_rel_lo", "lvs_rel_hi", "relative_norm_median", "asr"):
        pd.testing.assert_series_equal(large[column], plain[column], rtol=1e-6)
    moved = plain["lvs_mean"] > 0
    assert moved.drop("benign", level="attack").all()
    assert (large["lvs_mean"] < 0.7 * plain["lvs_mean"])[moved].all()
