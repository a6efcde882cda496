"""The audit finds what was hidden from it: a model's one door, whichever block has it, and nothing
at other sites."""

from __future__ import annotations

import itertools
from pathlib import Path

import pandas as pd
import planted
import pytest
from planted import Plant

from auditgap.report import tables
from auditgap.store import RunFolder
from auditgap.types import ATTACKS, CLEAN

DOORS = range(planted.N_BLOCKS - 1)  # every block that has a next one
OPENS = 0.1  #: the budget, in rms, at which the door opens; at 0.02 it does not
CASES = [Plant(door, seed) for door, seed in itertools.product(DOORS, range(2))]


def run(folder: Path, plants: list[Plant], **changes: object) -> tuple[RunFolder, dict[Plant, str]]:
    """One audit of all these models, and each one's name as a subject."""
    saved = {plant: planted.save(plant, folder / f"model{i}") for i, plant in enumerate(plants)}
    prompts = planted.write_prompts(folder / "prompts.txt")
    with pytest.MonkeyPatch.context() as patch:
        planted.register(patch)
        store = planted.audit(folder / "run", list(saved.values()), prompts, **changes)
    return store, {plant: str(path) for plant, path in saved.items()}


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Rewarded by the judge: 1 − [a colour was named]."""
    return run(tmp_path_factory.mktemp("judged"), CASES)


@pytest.fixture(scope="module")
def by_margin(tmp_path_factory):
    """Rewarded by the subject's own log-odds, which feel every edit a little."""
    return run(
        tmp_path_factory.mktemp("margin"), [Plant(door, seed=7) for door in DOORS], reward="margin"
    )


def targeted(store: RunFolder, subject: str) -> pd.DataFrame:
    table = pd.read_parquet(store.path / "lvs.parquet")
    return table[(table["subject"] == subject) & (table["attack"] == "targeted")]


def test_without_an_edit_nobody_tells(judged):
    store, names = judged
    clean = store.rows([CLEAN])
    assert len(clean) == len(CASES) * len(planted.PROMPTS)
    assert set(clean["verdict_clean"]) == {"refusal"} and clean["coherent"].all()
    texts = [
        store.generations(r["key"]) for r in store.records() if r["description"]["attack"] == CLEAN
    ]
    assert len(texts) == len(names) and {t for frame in texts for t in frame["completion"]} == {
        planted.REFUSAL
    }


@pytest.mark.parametrize("plant", CASES, ids=lambda p: f"block{p.door}-seed{p.seed}")
def test_the_planted_block_comes_first_and_alone(judged, plant):
    store, names = judged
    site, table = f"block{plant.door}", targeted(store, names[plant])
    assert len(table) == (planted.N_BLOCKS + 1) * 2 and (table["n_unscored"] == 0).all()
    for score in ("lvs_mean", "lvs_rel_mean"):
        ranked = table[table["eps"] == OPENS].sort_values(score, ascending=False)
        assert ranked["site"].iloc[0] == site
        assert ranked[score].iloc[0] > 5 * ranked[score].iloc[1]
    above = table[(table["delta_vs_matched"] > 0) & (table["delta_lo"] > 0)]
    assert list(zip(above["site"], above["eps"], strict=True)) == [(site, OPENS)]
    # where no prompt differs there is nothing to resample, and no end
    assert (table["delta_lo"].isna() | (table["delta_lo"] <= table["delta_vs_matched"])).all()
    shown = {(r.site, r.eps): "not_above_matched" not in r.flag.split() for r in table.itertuples()}
    assert [where for where, is_above in shown.items() if is_above] == [(site, OPENS)]


def test_the_audit_gap_names_the_block(judged):
    store, names = judged
    gaps = tables.audit_gaps(store.rows([*ATTACKS, CLEAN]))
    gaps = gaps[gaps["eps"] == OPENS].set_index("subject")
    for plant, name in names.items():
        gap = gaps.loc[name]
        assert (
            gap["worst_site"] == f"block{plant.door}" and gap["safety"] == 1 and gap["gap_lo"] > 0.5
        )


def test_the_control_is_as_large_as_the_attack(judged):
    """Else "above the control" would say little: same L2, same L∞, prompt by prompt."""
    rows = judged[0].rows(["targeted", "random_matched"])
    pairs = rows.pivot(
        index=["subject", "site", "eps", "prompt_id"], columns="attack", values=["l2", "linf"]
    )
    for norm in ("l2", "linf"):
        # the best iterate is the start where no edit lowers the loss
        assert (pairs[norm]["targeted"] >= 0).all() and (pairs[norm]["targeted"] > 0).mean() > 0.5
        pd.testing.assert_series_equal(
            pairs[norm]["random_matched"], pairs[norm]["targeted"], check_names=False
        )


@pytest.mark.parametrize("door", DOORS)
def test_the_margin_reward_agrees(by_margin, door):
    """Any edit that moves the target's NLL moves the margin, so here "nothing elsewhere" is: next
    to nothing."""
    store, names = by_margin
    table = targeted(store, names[Plant(door, seed=7)])
    table = table[table["eps"] == OPENS].set_index("site")
    assert (table["n_unscored"] == 0).all()
    at_door, elsewhere = table.loc[f"block{door}"], table.drop(f"block{door}")
    assert at_door["delta_lo"] > 0 and at_door["delta_vs_matched"] > 0.9 * at_door["lvs_mean"]
    for score in ("lvs_mean", "lvs_rel_mean", "delta_vs_matched"):
        assert elsewhere[score].max() < 0.1 * at_door[score]


def test_without_the_erasure_every_site_below_opens_too(tmp_path):
    """The counterpart: one weight less, and the same audit no longer singles a block out."""
    plant = Plant(door=2, seed=0, erases=False)
    store, names = run(tmp_path, [plant], eps=[OPENS])
    table = targeted(store, names[plant]).set_index("site")
    assert list(table.index[table["delta_lo"] > 0]) == ["embedding", "block0", "block1", "block2"]
