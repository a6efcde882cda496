"""Do the audit's intervals and alarms keep their promise? Studies drawn from known truths, by the thousand.

    python benchmarks/coverage.py                     # all parts, some minutes on two cores
    python benchmarks/coverage.py --parts null power --studies 50
    python benchmarks/coverage.py --json coverage.json

Prints the tables of docs/simulations.md. Each study is one audit: prompts at risk, looks at an attack and at the K draws of a
control, an estimate with its interval. `tests/test_simulations.py` runs a seeded sample of the same studies.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from auditgap import stats
from auditgap.stats.excess import gated, permutation_p, simultaneous
from auditgap.stats.gap import GoldCounts, audit_gap
from auditgap.stats.incidence import incidence
from auditgap.stats.intervals import Interval
from auditgap.stats.resampling import Clusters, exact_ends

TAIL = 0.025


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One truth. A prompt at risk flips by chance at each site with `chance` on both sides, and by the attack alone with `door`."""

    n: int = 100
    sites: int = 3
    draws: int = 3
    chance: float = 0.06
    at_risk: float = 1.0
    door: float = 0.0
    everywhere: bool = False  #: the door is at every site, else at the first
    alike: float = 0.0  #: chance that a site's looks are those of all other sites
    cluster: int = 1  #: near-duplicates a prompt, itself among them
    close: float = 0.8  #: chance that a near-duplicate's looks are its cluster's

    @classmethod
    def redrawn(cls, *, rate: float, kept: float, budgets: int, **more) -> World:
        """No door; a judge of false rate `rate` looks again at each budget, and keeps its verdict with `kept`."""
        chance = 1 - (1 - (1 - kept) * rate) ** budgets
        return cls(chance=chance, at_risk=1 - rate, **more)

    @property
    def truth(self) -> float:
        return self.at_risk * self.door * (1 - self.chance)


def study(world: World, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, Clusters]:
    """Flips of the attack [S, N] and of the control [K, S, N]; the clusters."""
    groups = -(-world.n // world.cluster)
    of_prompt = np.repeat(np.arange(groups), world.cluster)[: world.n]

    def uniform(*shape: int) -> np.ndarray:
        own, shared = rng.random((*shape, world.n)), rng.random((*shape, groups))[..., of_prompt]
        close = rng.random((*shape, world.n)) < world.close
        return own if world.cluster == 1 else np.where(close, shared, own)

    runs = uniform(1 + world.draws, world.sites)
    if world.alike:
        common = uniform(1 + world.draws, 1)
        runs = np.where(rng.random(runs.shape) < world.alike, common, runs)
    flips = runs < world.chance
    if world.door:
        opened = uniform() < world.door
        flips[0, slice(None) if world.everywhere else 0] |= opened
    flips &= uniform() < world.at_risk
    return (
        flips[0],
        flips[1:],
        Clusters(world.n, None if world.cluster == 1 else of_prompt.tolist()),
    )


def excess_of(attack: np.ndarray, control: np.ndarray, clusters: Clusters) -> Interval:
    found = simultaneous(attack - control.mean(axis=0), clusters, n_resamples=1000)
    if found.lo is None or found.lo <= 0:  # the permutation test can only lower it
        return found
    return gated(found, permutation_p(attack, control, clusters, n_resamples=1000), TAIL)


@dataclass(frozen=True, slots=True)
class Seen:
    """Of so many studies: shares that covered the truth, alarmed (lower end above 0) and alarmed above 10 points; mean error."""

    covered: float
    alarmed: float
    failed: float
    error: float


def see(world: World, studies: int, seed: int) -> Seen:
    rng = np.random.default_rng([seed, 11])
    found = [excess_of(*study(world, rng)) for _ in range(studies)]
    ends = np.array([[i.estimate, i.lo, i.hi] for i in found], dtype=float)
    covered = (ends[:, 1] <= world.truth + 1e-12) & (world.truth - 1e-12 <= ends[:, 2])
    return Seen(
        float(covered.mean()),
        float((ends[:, 1] > 1e-12).mean()),
        float((ends[:, 1] > 0.1).mean()),
        float(ends[:, 0].mean() - world.truth),
    )


# -- the parts --------------------------------------------------------------------------------------------------------


def null_worlds(cells: int) -> list[World]:
    """No door, over the whole range of judges, sites, budgets and prompts; a third each with plain, correlated and clustered looks."""
    rng, found = np.random.default_rng(1), []
    for i in range(cells):
        world = World.redrawn(
            rate=float(rng.choice([0.05, 0.1, 0.2, 0.3])),
            kept=float(rng.choice([0.0, 0.5, 0.8, 0.9])),
            budgets=int(rng.choice([1, 2, 3, 5])),
            sites=int(rng.choice([1, 3, 9, 33])),
            n=int(rng.choice([12, 24, 50, 100, 200])),
            draws=int(rng.choice([1, 3, 5])),
        )
        kind = i % 3
        found.append(replace(world, alike=0.7 * (kind == 1), cluster=3 if kind == 2 else 1))
    return found


def door_worlds(cells: int) -> list[World]:
    rng, found = np.random.default_rng(2), []
    for i in range(cells):
        world = World(
            n=int(rng.choice([24, 50, 100, 200])),
            sites=int(rng.choice([1, 3, 9, 33])),
            chance=float(rng.choice([0.01, 0.06, 0.27])),
            door=float(rng.choice([0.0, 0.05, 0.1, 0.2, 0.35, 0.5])),
            everywhere=bool(rng.integers(2)),
        )
        kind = i % 3
        found.append(replace(world, alike=0.7 * (kind == 1), cluster=3 if kind == 2 else 1))
    return found


def kind_of(world: World) -> str:
    return (
        "near-duplicates in threes"
        if world.cluster > 1
        else "correlated sites"
        if world.alike
        else "independent"
    )


def null_part(studies: int, cells: int) -> Iterator[dict]:
    by_kind: dict[str, list[float]] = {}
    for i, world in enumerate(null_worlds(cells)):
        by_kind.setdefault(kind_of(world), []).append(see(world, studies, i).alarmed)
    for kind, rates in by_kind.items():
        yield {
            "looks": kind,
            "cells": len(rates),
            "studies a cell": studies,
            "mean": np.mean(rates),
            "worst cell": max(rates),
            "cells above 5 %": int((np.array(rates) > 0.05).sum()),
        }


def door_part(studies: int, cells: int) -> Iterator[dict]:
    by_kind: dict[str, list[Seen]] = {}
    for i, world in enumerate(door_worlds(cells)):
        by_kind.setdefault(kind_of(world), []).append(see(world, studies, 1000 + i))
    for kind, seen in by_kind.items():
        covered = np.array([s.covered for s in seen])
        yield {
            "looks": kind,
            "cells": len(seen),
            "studies a cell": studies,
            "coverage, mean": covered.mean(),
            "worst cell": covered.min(),
            "cells below 93 %": int((covered < 0.93).sum()),
            "mean error": np.mean([s.error for s in seen]),
        }


def power_part(studies: int, cells: int) -> Iterator[dict]:
    del cells
    for chance, n in itertools.product((0.01, 0.06, 0.27), (50, 100, 200)):
        row: dict = {"chance flips": chance, "n": n}
        for sites in (1, 3, 9, 33):
            seen = see(World(n=n, sites=sites, chance=chance, door=0.2), studies, 2000)
            row |= {f"S = {sites}": seen.alarmed}
        yield row


def verdicts_of(
    rng: np.random.Generator, se: float, sp: float, harmful: np.ndarray, shape: tuple[int, ...] = ()
) -> np.ndarray:
    """Codes of a judge with sensitivity `se` and specificity `sp` who looks at `harmful` [N] answers, each look anew."""
    draw = rng.random((*shape, harmful.size))
    return (draw < np.where(harmful, se, 1 - sp)).astype(int)


def judge_part(studies: int, cells: int) -> Iterator[dict]:
    """The excess behind the judge's errors: a door of 20 points of truly safe prompts, one budget or three, gold sets as counted."""
    del cells
    settings = [((0.93, 0.70), (150, 234)), ((0.90, 0.90), (60, 60)), ((0.97, 0.97), (200, 200))]
    for ((se, sp), (n_bad, n_good)), budgets in itertools.product(settings, (1, 3)):
        rng, covered, raw = np.random.default_rng(3), [], []
        n, safe = 150, 0.9
        for _ in range(studies):
            truly_safe = rng.random(n) < safe
            opened = truly_safe & (rng.random(n) < 0.2)
            judged = partial(verdicts_of, rng, se, sp)
            clean = judged(~truly_safe)
            control = judged(~truly_safe, (3, 3, budgets))
            attack = judged(~truly_safe, (3, budgets))
            attack[0, -1] = judged(~truly_safe | opened)
            gold = GoldCounts(rng.binomial(n_bad, se), n_bad, rng.binomial(n_good, sp), n_good)
            found = audit_gap(clean, attack, control, gold=gold, n_resamples=600).excess
            truth = safe * 0.2
            if found is not None:
                for interval, into in ((found.corrected, covered), (found.excess, raw)):
                    into.append(covers(interval, truth))
        yield {
            "Se / Sp": f"{se} / {sp}",
            "gold set": f"{n_bad} + {n_good}",
            "budgets": budgets,
            "raw": np.mean(raw),
            "corrected": np.mean(covered),
        }


def covers(interval: Interval, truth: float) -> bool:
    """An open end holds all."""
    lo = -np.inf if interval.lo is None else interval.lo
    hi = np.inf if interval.hi is None else interval.hi
    return bool(lo - 1e-12 <= truth <= hi + 1e-12)


def lvs_part(studies: int, cells: int) -> Iterator[dict]:
    """The mean LVS: zero for a share of prompts, else gamma of shape 0.7 or log-normal (σ = 0.7)."""
    del cells
    for n in (8, 12, 16, 24, 50, 100):
        row: dict = {"n": n}
        for zeros in (0.0, 0.5, 0.8):
            rng, covered, missing = np.random.default_rng(4), [], []
            for name in ("gamma", "log-normal"):
                shape = (4 * studies, n)
                positive = (
                    rng.gamma(0.7, 1, shape) if name == "gamma" else rng.lognormal(0, 0.7, shape)
                )
                truth = (1 - zeros) * (0.7 if name == "gamma" else np.exp(0.7**2 / 2))
                samples = positive * (rng.random(shape) >= zeros)
                found = [
                    stats.bootstrap(x, seed=i % 7, n_resamples=1000) for i, x in enumerate(samples)
                ]
                covered.append(np.mean([covers(i, truth) for i in found if i.estimate]))
                missing.append(np.mean([i.hi is None for i in found]))
            row |= {f"zeros {zeros:.0%}": min(covered), f"open, {zeros:.0%}": max(missing)}
        yield row


def distance_part(studies: int, cells: int) -> Iterator[dict]:
    """Flips and breaks race over six doubling sizes; some searches are cut short."""
    del cells
    sizes = np.array([1.0, 2, 4, 8, 16, 32])
    for n, breaks in itertools.product((8, 24, 50, 100), (0.0, 0.25, 0.5)):
        rng, covered = np.random.default_rng(5), []
        flip_rate, break_rate = 0.10, 0.10 * breaks / (1 - breaks)
        step = 1 - np.exp(
            -np.diff(np.concatenate([[0.0], np.log2(sizes) + 1])) * (flip_rate + break_rate)
        )
        truth = (1 - np.cumprod(1 - step)) * flip_rate / (flip_rate + break_rate)
        for _ in range(2 * studies):
            ends = np.where(rng.random((n, 6)) < step, np.arange(6), 99).min(axis=1)
            cut = np.where(rng.random(n) < 0.1, rng.integers(0, 6, n), 5)
            is_flip = rng.random(n) < flip_rate / (flip_rate + break_rate)
            seen = ends <= cut
            kinds = np.where(seen, np.where(is_flip, "flipped", "broken"), "withstood")
            found = incidence(sizes[np.where(seen, ends, cut)], kinds.tolist())
            at = {float(d): k for k, d in enumerate(found.distances)}
            for size, share in ((2.0, truth[1]), (32.0, truth[5])):
                if size in at:
                    k = at[size]
                    covered.append(found.lo[k] - 1e-12 <= share <= found.hi[k] + 1e-12)
        yield {"n": n, "broken": breaks, "coverage": np.mean(covered)}


def pass_part(studies: int, cells: int) -> Iterator[dict]:
    """Honest robust models: how often the one-sided end of the raw gap lies at or below 10 points, no judge error, S = 3."""
    del cells
    for n in (29, 50, 75, 100, 150):
        row: dict = {"n at risk": n}
        for chance in (0.0, 0.01, 0.02):
            rng = np.random.default_rng(6)
            hits = rng.binomial(n, chance, (40 * studies, 3)).max(axis=1)
            row |= {f"flips {chance:.0%}": float((exact_ends(hits, n, 0.05)[1] <= 0.1).mean())}
        yield row


PARTS = {
    "null": ("False alarms: no door, lower end of the excess above 0", null_part),
    "doors": ("Coverage of the excess: doors of 0 to 50 points", door_part),
    "power": ("Power: lower end above 0, door of 20 points", power_part),
    "judge": (
        "Coverage of the excess behind a judge's errors, door of 20 points, n = 150",
        judge_part,
    ),
    "lvs": (
        "Coverage of the mean LVS, the worse of two distributions; share with an open upper end",
        lvs_part,
    ),
    "distance": ("Coverage of the share flipped by a distance", distance_part),
    "pass": ("Passing: honest robust models below 10 points", pass_part),
}


def shown(value: object) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--studies", type=int, default=250, help="studies a cell")
    parser.add_argument(
        "--cells", type=int, default=120, help="cells drawn from the grids of null and doors"
    )
    parser.add_argument("--json", help="file for the same figures")
    options = parser.parse_args(arguments)
    figures = {}
    for name in options.parts:
        title, part = PARTS[name]
        start = time.perf_counter()
        rows = [
            {k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()}
            for row in part(options.studies, options.cells)
        ]
        figures[name] = rows
        print(f"\n### {title}\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
        for row in rows:
            print(f"| {' | '.join(shown(v) for v in row.values())} |")
        print(f"\n({time.perf_counter() - start:.0f} s)", flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
