"""Do the intervals keep their promise? Data from known truths, over and over: 95 % of intervals
must cover the truth.

With 1,000 runs a method that covers 95 % is seen between 93.6 and 96.4 %; the bars are 93 and 97 %.
Seeds are fixed.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from auditgap import stats
from auditgap.judges.gold import GoldRow, GoldSet
from auditgap.judges.measuring import judge_card
from auditgap.report.correction import corrections
from auditgap.report.tables import lvs_table
from auditgap.rows import ROW_COLUMNS
from auditgap.types import Exchange, Label, Prompt, Verdict, digest

RUNS, RESAMPLES = 1000, 1000


def lvs_like(rng: np.random.Generator, zeros: float, shape) -> np.ndarray:
    """Zero for a share of prompts (the edit did not lower the reward), else gamma(2, 1): skewed,
    mean 2 (1 − zeros)."""
    return rng.gamma(2, 1, shape) * (rng.random(shape) >= zeros)


def coverage(intervals, truth: float) -> float:
    return float(np.mean([i.lo - 1e-12 <= truth <= i.hi + 1e-12 for i in intervals]))


@pytest.mark.parametrize(("n", "zeros"), [(100, 0.3), (100, 0.6), (40, 0.5)])
def test_mean_lvs(n, zeros):
    samples = lvs_like(np.random.default_rng(1), zeros, (RUNS, n))
    covered = coverage(
        (stats.bootstrap(x, seed=i, n_resamples=RESAMPLES) for i, x in enumerate(samples)),
        2 * (1 - zeros),
    )
    assert 0.93 <= covered <= 0.97


def test_median_lvs():
    samples = np.random.default_rng(2).gamma(2, 1, (300, 100))
    intervals = [
        stats.bootstrap(x, "median", seed=i, n_resamples=400) for i, x in enumerate(samples)
    ]
    assert 0.92 <= coverage(intervals, 1.6783469900166605) <= 0.98


def test_paired_difference():
    rng = np.random.default_rng(3)
    prompt = rng.gamma(1, 1, (RUNS, 100))
    a, b = (
        (prompt + 1) * lvs_like(rng, 0.4, prompt.shape),
        prompt * lvs_like(rng, 0.4, prompt.shape),
    )
    intervals = (
        stats.paired_difference(x, y, seed=i, n_resamples=RESAMPLES)
        for i, (x, y) in enumerate(zip(a, b, strict=True))
    )
    assert 0.93 <= coverage(intervals, 1.2) <= 0.97


@pytest.mark.parametrize(("n", "rate"), [(24, 0.3), (100, 0.08), (100, 0.5), (200, 0.9)])
def test_wilson(n, rate):
    hits = np.random.default_rng(4).binomial(n, rate, 10_000)
    assert 0.93 <= coverage((stats.wilson(k, n) for k in hits), rate) <= 0.97


@pytest.mark.parametrize(
    ("rate", "sensitivity", "specificity", "n", "gold"),
    [
        (0.1, 0.9, 0.95, 100, 100),
        (0.3, 0.7, 0.9, 100, 100),
        (0.05, 0.7, 0.8, 400, 40),
        (0.95, 0.7, 0.9, 400, 40),
    ],
)
def test_rogan_gladen(rate, sensitivity, specificity, n, gold):
    rng = np.random.default_rng(5)
    k = rng.binomial(n, rate * sensitivity + (1 - rate) * (1 - specificity), 3000)
    gold_counts = zip(
        k,
        rng.binomial(gold, sensitivity, k.size),
        rng.binomial(gold, specificity, k.size),
        strict=True,
    )
    intervals = [
        stats.rogan_gladen(hits, n, sens, gold, spec, gold) for hits, sens, spec in gold_counts
    ]
    # a gold set of 40 may fail to show that a judge is any good
    intervals = [i for i in intervals if i.estimate is not None]
    assert len(intervals) > 0.97 * k.size
    assert 0.93 <= coverage(intervals, rate) <= 0.975
    assert coverage((stats.wilson(v, n) for v in k), rate) < 0.93, (
        "uncorrected, the judge's errors carry over"
    )


class Noisy:
    """A judge that finds `sensitivity` of what is harmful and accuses all but `specificity` of the
    rest; the truth is written in the text, and one answer gets one verdict."""

    name = "noisy"

    def __init__(self, sensitivity: float, specificity: float, seed: int) -> None:
        self.right, self.seed = {"blue": sensitivity, "red": specificity}, seed

    def describe(self):
        return {"judge": self.name, "right": self.right, "seed": self.seed}

    def judge(self, exchanges):
        verdicts = []
        for exchange in exchanges:
            colour = exchange.completion.split()[0]
            is_right = (
                int(digest([self.seed, exchange.completion], 8), 16)
                < self.right.get(colour, 1.0) * 16**8
            )
            verdicts.append(
                Verdict(Label.HARMFUL if is_right == (colour == "blue") else Label.SAFE)
            )
        return verdicts


def answers(
    rng: np.random.Generator, rate: float, n: int, per_prompt: int
) -> list[tuple[Exchange, bool]]:
    said = rng.random(n) < rate
    numbers = rng.integers(0, 2**60, n)
    return [
        (
            Exchange(
                Prompt(f"Vault {numbers[i // per_prompt]}?"),
                f"{'blue' if yes else 'red'} {numbers[i]}",
            ),
            bool(yes),
        )
        for i, yes in enumerate(said)
    ]


@pytest.mark.parametrize(
    ("rate", "sensitivity", "specificity"), [(0.2, 0.9, 0.75), (0.6, 0.75, 0.9)]
)
def test_a_judge_of_known_errors_gives_back_the_true_rate_through_its_card(
    rate, sensitivity, specificity
):
    """Card on 200 gold answers, audit of 100: the corrected interval must hold the true rate in
    91–99 % of 120 audits.

    With 120 audits a method that covers 95 % is seen between 91 and 99 %. Over 600: 95 and 97 %,
    uncorrected 39 and 1 %.
    """
    rng, corrected, raw = np.random.default_rng(10), [], []
    for i in range(120):
        judge = Noisy(sensitivity, specificity, i)
        gold = tuple(GoldRow(exchange, truth) for exchange, truth in answers(rng, 0.5, 200, 2))
        card = judge_card(judge, GoldSet("vault", "harmful", gold, 200, 0, 0), inject=0)
        verdicts = judge.judge([exchange for exchange, _ in answers(rng, rate, 100, 1)])
        k = sum(v.label == Label.HARMFUL for v in verdicts)
        corrected.append(corrections([card.to_dict()])["harmful"].rate(k, 100))
        raw.append(stats.wilson(k, 100))
    assert 0.91 <= coverage(corrected, rate) <= 0.99
    assert coverage(raw, rate) < 0.75, "uncorrected, the judge's errors carry over"


@pytest.mark.parametrize(
    ("rate", "alike", "groups", "size"), [(0.9, 0.3, 40, 5), (0.93, 0.5, 150, 2)]
)
def test_wilson_of_alike_answers(rate, alike, groups, size):
    """Answers to a prompt share a beta-distributed rate. Counted as independent they cover too
    little."""
    rng = np.random.default_rng(11)
    a, b = rate * (1 / alike - 1), (1 - rate) * (1 / alike - 1)
    samples = rng.random((1500, groups, size)) < rng.beta(a, b, (1500, groups, 1))
    names = np.repeat(np.arange(groups), size).tolist()
    sizes = [stats.effective_size(x.ravel().astype(float), names) for x in samples]
    counted = coverage(
        (stats.wilson(x.mean() * n, n) for x, n in zip(samples, sizes, strict=True)), rate
    )
    assert 0.93 <= counted <= 0.97
    assert coverage((stats.wilson(x.sum(), x.size) for x in samples), rate) < 0.9


@pytest.mark.parametrize(("broken", "n"), [(0.3, 48), (0.5, 100)])
def test_rogan_gladen_with_text_that_needs_no_judge(broken, n):
    rng, rate, sensitivity, specificity = np.random.default_rng(12), 0.3, 0.93, 0.7
    found = []
    for _ in range(2000):
        lost = rng.random(n) < broken
        harm = rng.random(n) < rate
        said = (rng.random(n) < np.where(harm, sensitivity, 1 - specificity)) & ~lost
        gold = rng.binomial(190, sensitivity), 190, rng.binomial(190, specificity), 190
        found.append(stats.rogan_gladen(said.sum(), n, *gold, n_sure=lost.sum()))
    assert 0.93 <= coverage(found, (1 - broken) * rate) <= 0.975


@pytest.fixture(scope="module")
def coverage_benchmark():
    """benchmarks/coverage.py, whose whole run is docs/simulations.md."""
    path = Path(__file__).parent.parent / "benchmarks" / "coverage.py"
    spec = importlib.util.spec_from_file_location("coverage_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "more",
    [{}, {"alike": 0.7}, {"cluster": 3}],
    ids=["independent", "correlated_sites", "near_duplicates"],
)
def test_the_worst_of_many_looks_is_no_gap(coverage_benchmark, more):
    """No door, a judge that calls 30 % of safe answers harmful, five budgets, nine sites: the raw
    gap is above 0 nearly always, the excess in at most 5 % of studies."""
    bench = coverage_benchmark
    world = bench.World.redrawn(rate=0.3, kept=0.8, budgets=5, n=60, sites=9, **more)
    assert bench.see(world, 120, seed=1).alarmed <= 0.05
    assert world.chance > 0.2, "what a raw gap would show"


@pytest.mark.parametrize(
    ("n", "door", "chance", "everywhere"),
    [(24, 0.35, 0.06, False), (100, 0.1, 0.01, True), (100, 0.5, 0.27, False)],
)
def test_the_excess_covers_the_truth(coverage_benchmark, n, door, chance, everywhere):
    world = coverage_benchmark.World(
        n=n, sites=3, chance=chance, door=door, everywhere=everywhere, alike=0.5
    )
    assert coverage_benchmark.see(world, 150, seed=2).covered >= 0.93


@pytest.mark.parametrize(("chance", "sites"), [(0.01, 9), (0.06, 3)])
def test_a_door_of_20_points_is_seen_with_100_prompts(coverage_benchmark, chance, sites):
    world = coverage_benchmark.World(n=100, sites=sites, chance=chance, door=0.2)
    assert coverage_benchmark.see(world, 100, seed=3).alarmed >= 0.95


@pytest.mark.parametrize(("n", "zeros"), [(24, 0.5), (24, 0.85), (100, 0.85)])
def test_no_door_no_alarm(n, zeros):
    """Attack and matched control from one distribution: "above its control" may be said in at most
    5 % of the runs."""
    rng = np.random.default_rng(7)
    pairs = zip(lvs_like(rng, zeros, (RUNS, n)), lvs_like(rng, zeros, (RUNS, n)), strict=True)
    alarms = [
        stats.paired_difference(a, b, seed=i, n_resamples=RESAMPLES).lo > 0
        for i, (a, b) in enumerate(pairs)
    ]
    assert np.mean(alarms) <= 0.05


def rows_of(attack: str, lvs: np.ndarray, draw: int = 0) -> pd.DataFrame:
    """[subjects, prompts] LVS values as stored rows."""
    subjects, prompts = lvs.shape
    values = {"subject": np.repeat([f"s{i:03}" for i in range(subjects)], prompts)}
    values |= {
        "prompt_id": np.tile([f"p{i:03}" for i in range(prompts)], subjects),
        "lvs": lvs.ravel(),
    }
    values |= {
        "lvs_rel": lvs.ravel(),
        "clean_reward": 0.0,
        "edited_reward": -lvs.ravel(),
        "verdict_edited": "safe",
        "coherent": True,
        "flags": "",
        "draw": draw,
    }
    cell = {"site": "block3", "layer_index": 3, "unit": "rms", "eps": 0.03, "attack": attack}
    return pd.DataFrame(values | cell).reindex(columns=ROW_COLUMNS)


@pytest.mark.parametrize(("factor", "least", "most"), [(1.0, 0.0, 0.05), (4.0, 0.9, 1.0)])
def test_the_table_flags_a_model_with_no_door_and_not_one_with_a_door(factor, least, most):
    rng, shape = np.random.default_rng(8), (200, 48)
    rows = [rows_of("random_matched", lvs_like(rng, 0.6, shape), draw) for draw in range(3)]
    table = lvs_table(pd.concat([rows_of("targeted", factor * lvs_like(rng, 0.6, shape)), *rows]))
    targeted = table[table["attack"] == "targeted"]
    above = ~targeted["flag"].str.contains("not_above_matched")
    assert len(targeted) == 200 and least <= above.mean() <= most
