"""auditgap.report.samples, made in a few passes over all rows, against a plain frame a cell."""

from dataclasses import fields

import numpy as np
import pandas as pd
import pytest

from auditgap import stats
from auditgap.report.looks import CELL, Looks, grid
from auditgap.report.samples import MEASURES, Samples
from auditgap.report.tables import MATCHED, _envelopes
from auditgap.rows import Row
from auditgap.stats.kept import picks
from auditgap.store.tables import groups_of, rows_to_table, to_frame
from auditgap.types import CLEAN

LABELS = ("safe", "harmful", "refusal", "broken", "unscored", None)
FLAGS = ("", "dtype_rounding", "larger_than_h degenerate", "odd odd")


def made_rows(seed: int) -> pd.DataFrame:
    """Rows with gaps: prompts, draws, budgets and whole controls that are missing, values that
    are null."""
    rng = np.random.default_rng(seed)
    empty = {field.name: None for field in fields(Row)}

    def maybe(value: float) -> float | None:
        return None if rng.random() < 0.1 else value

    def row(attack: str, prompt: int, **known: object) -> Row:
        said = str(rng.choice(["safe", "refusal", "harmful", "broken"]))
        known = {"verdict_clean": said, "n_new_tokens": 20, "draw": 0, **known}
        common = {"subject": "toy", "attack": attack, "prompt_id": f"p{prompt}", "unscored": ""}
        return Row(**{**empty, "n_prompt_tokens": 4, "flags": "", **common, **known})

    found = [row(CLEAN, p, coherent=bool(rng.random() < 0.9)) for p in range(12)]
    for site in range(3):
        for eps in (0.01, 0.03, 0.1):
            for attack, n_draws in (("targeted", 1), (MATCHED, 2 + site), ("benign", 2)):
                if (attack, site, eps) in ((MATCHED, 2, 0.03), ("benign", 1, 0.1)):
                    continue
                for p in range(12):
                    for draw in range(n_draws if rng.random() < 0.9 else 0):
                        if draw and eps == 0.01:
                            continue
                        found.append(
                            row(
                                attack,
                                p,
                                site=f"block{site}",
                                layer_index=site,
                                unit="rms",
                                eps=eps,
                                draw=draw,
                                clean_reward=1.0,
                                edited_reward=maybe(rng.normal()),
                                lvs=maybe(max(0.0, rng.normal())),
                                lvs_rel=maybe(rng.random()),
                                l2=float(rng.choice([0.0, 1.5])),
                                relative_norm=maybe(rng.random()),
                                nll_clean=maybe(rng.random()),
                                nll_edited=rng.random(),
                                verdict_edited=LABELS[rng.integers(len(LABELS))],
                                coherent=(True, True, False, None)[rng.integers(4)],
                                flags=FLAGS[rng.integers(len(FLAGS))],
                            )
                        )
    return to_frame(rows_to_table(found, Row)).sample(frac=1, random_state=seed)


@pytest.fixture(params=[0, 1])
def looks(request) -> Looks:
    return Looks(made_rows(request.param))


def test_a_sample_is_what_a_frame_of_its_cell_says(looks):
    samples, cells = Samples(looks), dict(groups_of(looks.edited, CELL))
    assert set(samples) == set(cells) and len(samples) == len(cells) == 25
    for key, cell in cells.items():
        sample, by_prompt = samples[key], cell.groupby("prompt_id")[list(MEASURES)].mean()
        assert list(sample.prompts) == list(by_prompt.index)
        for name in MEASURES:
            np.testing.assert_array_equal(sample.means[name], by_prompt[name])
        for name in ("nll_clean", "nll_edited"):
            np.testing.assert_equal(sample.mean(name), cell[name].mean())
        np.testing.assert_equal(sample.median("relative_norm"), cell["relative_norm"].median())
        assert sample.n_broken == cell[cell["verdict_edited"] == "broken"]["prompt_id"].nunique()
        words = cell["flags"].fillna("").str.split().explode().value_counts()
        assert dict(sample.words) == words.to_dict()


def test_controls_are_laid_beside_by_prompt(looks):
    samples, cells = Samples(looks), dict(groups_of(looks.edited, CELL))
    pairs = [(key, (*key[:-1], MATCHED)) for key in cells if (*key[:-1], MATCHED) in cells]
    assert any(list(samples[a].prompts) != list(samples[b].prompts) for a, b in pairs)
    for key, control in pairs:
        wanted = cells[control].groupby("prompt_id")["lvs"].mean().reindex(samples[key].prompts)
        np.testing.assert_array_equal(samples[key].beside(samples[control], "lvs"), wanted)


def test_looks_within_a_budget_are_those_of_a_grid_of_one_cell(looks):
    samples = Samples(looks)
    for key in samples:
        subject, site, _, unit, eps, own = key
        prompts = list(samples[key].prompts)
        sizes = sorted(size for size in set(looks.part(subject, unit, own)["eps"]) if size <= eps)
        for attack in (own, MATCHED):
            part = looks.part(subject, unit, attack)
            wanted = grid(part, [site], sizes, prompts)[:, 0].astype(np.int8)
            np.testing.assert_array_equal(samples.within(key, attack), wanted)
        np.testing.assert_array_equal(samples.clean(key), looks.clean(subject, prompts))


def test_envelopes_are_those_of_a_pivot(looks):
    rows = looks.edited
    found = _envelopes(rows)
    incoherent = rows["coherent"].isin([False]) & rows["harmful"].notna()
    rows = rows.assign(outcome=rows["harmful"].mask(incoherent, 0.0))
    assert set(found) == set(Samples(looks))
    for key, part in groups_of(rows, [name for name in CELL if name != "eps"]):
        table = part.pivot(index=["prompt_id", "draw"], columns="eps", values="outcome")
        table = table.sort_index(axis=1)
        reached = pd.DataFrame(stats.asr_envelope(table), index=table.index, columns=table.columns)
        for (eps,), some in groups_of(part, ["eps"]):
            wanted = reached.groupby("prompt_id").mean()[eps].loc[sorted(set(some["prompt_id"]))]
            mine = found[(*key[:4], eps, key[4])]
            assert list(mine.index) == list(wanted.index)
            np.testing.assert_array_equal(mine, wanted)


def test_draws_that_are_kept_are_those_of_a_generator():
    wanted = np.random.default_rng(7).integers(0, 5, (30, 5))
    assert (picks(5, 30, 7) == wanted).all() and (picks(5, 30, 7) == wanted).all()
    assert picks(3, 10, None).shape == (10, 3)
