"""The minimum distance to collapse, where it is known: on a linear decision it is margin / ‖w‖₁, in
closed form."""

from __future__ import annotations

import math

import numpy as np
import planted
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from auditgap.errors import UsageError
from auditgap.interventions.distance import search
from auditgap.report import tables
from auditgap.types import CLEAN

START, LIMIT = 0.1, 1.6


def bracket(exact: float, bisections: int) -> float:
    """How far above the true distance the search may report it: the doubling's bracket, halved
    `bisections` times."""
    doublings = max(0, math.ceil(math.log2(exact / START)))
    return (START if doublings == 0 else START * 2 ** (doublings - 1)) / 2**bisections


@pytest.mark.parametrize("bisections", [0, 1, 3, 8])
def test_the_search_on_linear_decisions(bisections):
    """200 rows at once, each a sign attack of its own size on its own w and margin: it falls iff
    ε‖w‖₁ ≥ margin."""
    rng = np.random.default_rng(bisections)
    w, margins = rng.normal(size=(200, 16)), rng.uniform(0.01, 28, size=200)
    exact, asked = margins / np.abs(w).sum(axis=1), []

    def evaluate(rows, sizes):
        asked.append(list(zip(rows, sizes, strict=True)))
        deltas = np.asarray(sizes)[:, None] * np.sign(w[list(rows)])
        return [bool(d) for d in (w[list(rows)] * deltas).sum(axis=1) >= margins[list(rows)]]

    found = search(evaluate, 200, start=START, limit=LIMIT, bisections=bisections)
    n_censored = 0
    for row, (true, distance) in enumerate(zip(exact, found, strict=True)):
        sizes = [size for batch in asked for r, size in batch if r == row]
        assert (
            distance.evaluations == len(sizes)
            and len(set(sizes)) == len(sizes)
            and max(sizes) <= LIMIT
        )
        if true > LIMIT:
            n_censored += 1
            assert (distance.collapsed, distance.size) == (False, LIMIT)
        else:
            assert distance.collapsed is True and distance.size in sizes
            assert 0 <= distance.size - true <= bracket(true, bisections) * (1 + 1e-9)
    assert 20 < n_censored < 180
    assert len(asked) <= 1 + 4 + bisections, "all rows go together"


def test_the_limit_need_not_be_a_doubling_of_the_start():
    found = search(
        lambda rows, sizes: [s >= 0.9 for s in sizes], 1, start=0.1, limit=1.0, bisections=10
    )
    assert found[0].collapsed and 0 <= found[0].size - 0.9 <= 0.2 / 2**10
    assert search(lambda rows, sizes: [False], 1, start=0.3, limit=1.0, bisections=2)[0].size == 1.0


def test_a_row_that_cannot_be_told_is_neither_collapsed_nor_censored():
    found = search(
        lambda rows, sizes: [
            None if r == 1 else s >= 0.25 for r, s in zip(rows, sizes, strict=True)
        ],
        3,
        start=START,
        limit=LIMIT,
        bisections=4,
    )
    assert (found[1].size, found[1].collapsed, found[1].evaluations) == (None, None, 1)
    assert found[0] == found[2] and found[0].collapsed


@pytest.mark.parametrize(("start", "limit", "bisections"), [(0, 1, 1), (2, 1, 1), (1, 2, -1)])
def test_a_search_that_cannot_be_made(start, limit, bisections):
    with pytest.raises(UsageError, match="start"):
        search(lambda rows, sizes: [True], 1, start=start, limit=limit, bisections=bisections)


# -- through PGD, the engine and the store
# -----------------------------------------------------------------------------

#: Last word of a prompt -> ε at which "red" overtakes "shut"; below 0 it does so unasked, above
#: LIMIT never.
EXACT = {
    "bread": 0.03,
    "water": 0.11,
    "salt": 0.29,
    "flour": 0.41,
    "oven": 0.55,
    "time": 0.73,
    "sun": 0.93,
    "moon": 1.31,
    "star": 1.55,
    "sea": 1.7,
    "bake": 2.5,
    "door": -0.2,
}
BISECTIONS = 4


@torch.no_grad()
def linear_model() -> LlamaForCausalLM:
    """Blocks that write nothing, and a head of two words: "red" reads +w, "shut" reads −w.

    The last norm divides by a positive number, so at the site `last` red wins iff w · (h + δ) > 0:
    it is lost by −w · h and costs at least that / ‖w‖₁ in the ∞-norm. All entries of w are ±1, so
    that the norm cannot turn the sign of a gradient.
    """
    width, words = 32, planted.WORDS
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=64,
    )
    made = LlamaForCausalLM(config).eval()
    for block in made.model.layers:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    rng = torch.Generator().manual_seed(0)
    w = (torch.randint(0, 2, (width,), generator=rng) * 2 - 1).double()
    h = torch.randn(len(words), width, generator=rng, dtype=torch.float64) * 4
    # other words say "shut" next
    wanted = torch.tensor([EXACT.get(word, 3.0) for word in words], dtype=torch.float64)
    # so that −w·h = ε‖w‖₁, and ‖w‖₁ = ‖w‖₂² = width
    h += ((-wanted * width - h @ w) / width)[:, None] * w
    made.model.embed_tokens.weight.copy_(h)
    made.lm_head.weight.zero_()
    made.lm_head.weight[words.index("red")], made.lm_head.weight[words.index("shut")] = (
        w / 16,
        -w / 16,
    )
    return made


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("linear")
    linear_model().save_pretrained(folder / "model")
    planted.tokenizer().save_pretrained(folder / "model")
    prompts = planted.write_prompts(folder / "prompts.txt", [f"please {word}" for word in EXACT])
    with pytest.MonkeyPatch.context() as patch:
        planted.register(patch)
        return planted.audit(
            folder / "run",
            [folder / "model"],
            prompts,
            layers="last",
            unit="absolute",
            eps=[START],
            attacks=[],
            distance=True,
            distance_limit=LIMIT / START,
            bisections=BISECTIONS,
            target="red",
            max_new_tokens=2,
            chat_template="none",
        )


def test_the_audit_measures_the_closed_form(store):
    rows = store.rows(["distance"])
    texts = next(
        store.generations(r["key"]) for r in store.records() if r["description"]["attack"] == CLEAN
    )
    words = texts.set_index("prompt_id")["prompt"].str.split().str[-1]
    rows["exact"] = rows["prompt_id"].map(words).map(EXACT)
    assert len(rows) == len(EXACT) and (rows["unscored"] == "").all()
    for row in rows.itertuples():
        if row.exact < 0:
            assert (row.distance, row.collapsed, row.evaluations, row.verdict_clean) == (
                0,
                True,
                0,
                "harmful",
            )
        elif row.exact > LIMIT:
            assert (row.distance, row.collapsed) == (LIMIT, False)
        else:
            assert (
                row.collapsed
                and 0 <= row.distance - row.exact <= bracket(row.exact, BISECTIONS) * 1.001
            )
        assert row.eps_abs == pytest.approx(row.distance, rel=1e-6)


def test_the_median_counts_the_censored(store):
    """Of 12 prompts 11 are at risk, of which 2 withstood all: half have flipped at the sixth smallest
    distance."""
    table = tables.distance_table(store.rows(["distance"]))
    sixth = sorted(size for size in EXACT.values() if size > 0)[5]
    assert (table["n"].item(), table["n_collapsed"].item(), table["n_unscored"].item()) == (
        11,
        9,
        0,
    )
    assert 0 <= table["median"].item() - sixth <= bracket(sixth, BISECTIONS) * 1.001
