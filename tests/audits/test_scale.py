"""LVS_rel does not change when a residual stream is multiplied by a constant, and LVS does (SPEC of both)."""

from __future__ import annotations

import pandas as pd
import planted
import pytest
import tiny
import torch

SCALES = {1.0: "plain", 8.0: "times8", 0.3: "times0.3"}
SITES = "embedding,block1,block3"


@torch.no_grad()
def scaled(c: float) -> torch.nn.Module:
    """The same function with a residual stream c times as large: all that writes into it is scaled, all that reads is normed."""
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
        folder / "run", [folder / name for name in SCALES.values()], planted.write_prompts(folder / "prompts.txt"), layers=SITES,
        attacks="targeted,untargeted,random,random_matched,shuffled", eps=[0.01, 0.1], target="Sure , here is",
        max_new_tokens=4, reward="margin", judge="keyword", untargeted_tokens=4,
    )  # fmt: skip


def test_the_scaled_model_is_the_same_function():
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.inference_mode():
        plain, large = (scaled(c)(input_ids=ids).logits for c in (1.0, 8.0))
    torch.testing.assert_close(large, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("c", [8.0, 0.3])
def test_lvs_rel_stays_and_lvs_moves(store, c):
    table = pd.read_parquet(store.path / "lvs.parquet")
    table["model"] = table["subject"].str.rsplit("/").str[-1]
    where = ["site", "eps", "attack"]
    plain, other = (table[table["model"] == SCALES[s]].set_index(where).sort_index() for s in (1.0, c))
    assert len(plain) == len(other) == 3 * 2 * 5 and (plain["n_unscored"] == 0).all()
    for column in ("lvs_rel_mean", "relative_norm_median", "delta_vs_matched", "lvs_mean"):
        print(column, (other[column] / plain[column]).describe())
