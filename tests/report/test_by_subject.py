"""Tables are made one subject at a time, and are byte for byte those of all rows in one frame."""

from __future__ import annotations

import tracemalloc
from dataclasses import fields, make_dataclass
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pandas as pd
from hypothesis import HealthCheck, Phase, given, settings

from auditgap.audits.latent.audit import LATENT
from auditgap.audits.latent.part import DISTANCE
from auditgap.report import correction, left_out, tables
from auditgap.report.gather import joined, of_each_subject, tables_of
from auditgap.rows import DistanceRow, Row
from auditgap.store import RunFolder
from auditgap.store.tables import seal
from auditgap.types import ATTACKS, CLEAN, LONGER, Budget, Cell, Site, Subject

NEWER = [f for f in fields(Row) if f.name in Row.__dataclass_fields__ and f.default is None]
#: A row as an earlier release wrote it, without the columns that came later.
Older = make_dataclass(
    "Older",
    [(f.name, f.type) for f in fields(Row) if f not in NEWER],
    frozen=True,
    namespace={"__module__": Row.__module__},
)
VERDICTS = ("harmful", "safe", "refusal", "broken", "unscored", None)
NAMES = ("b/tuned", "a", "a · thinking", "Z\ud800", "c")
EDITS = ("targeted", "random_matched", "benign")


def row(cell: Cell, prompt: str, draw: int, rng: np.random.Generator, older: bool) -> object:
    """Made up of everything that may be null."""

    def some(value: object) -> object:
        return None if rng.random() < 0.2 else value

    known = {
        "subject": cell.subject.name,
        "site": None if cell.site is None else str(cell.site),
        "layer_index": None if cell.site is None else cell.site.layer_index,
        "unit": None if cell.budget is None else cell.budget.unit,
        "eps": None if cell.budget is None else cell.budget.size,
        "attack": cell.attack,
        "draw": draw,
        "prompt_id": prompt,
        "n_prompt_tokens": 2**53 + 1,
        "n_new_tokens": int(rng.integers(1, 3)),
        "coherent": some(bool(rng.random() < 0.8)),
        "verdict_clean": some(str(rng.choice(["safe", "harmful", "refusal"]))),
        "verdict_edited": VERDICTS[rng.integers(len(VERDICTS))],
        "flags": str(rng.choice(["", "dtype_rounding", "degenerate larger_than_h"])),
        "unscored": str(rng.choice(["", "empty", "too_long"])),
    }
    for name in ("clean_reward", "edited_reward", "lvs", "lvs_rel", "l2", "relative_norm"):
        known[name] = some(float(rng.normal()))
    for name in ("nll_clean", "nll_edited", "completion_nll"):
        known[name] = some(float(rng.exponential()))
    if not older:
        known |= {
            "verdict_second": VERDICTS[rng.integers(len(VERDICTS))],
            "verdict_half": VERDICTS[rng.integers(len(VERDICTS))],
            "thinking": some("fixed"),
            "n_chain_tokens": some(1),
            "cluster": some("p0"),
        }
    of = Older if older else Row
    return of(**({f.name: None for f in fields(of)} | known))


def write(
    path: Path,
    names: list[str],
    seed: int,
    *,
    older: bool = False,
    shown: dict[str, str] | None = None,
    prompts: int = 5,
) -> None:
    """A run of these subjects: a clean cell, attacks and their controls, a longer search,
    distances."""
    rng = np.random.default_rng(seed)
    config = {"audit": "latent", "seed": seed}
    store = RunFolder.open(path, config=config, info={"names": shown or {}})
    with store.lock():
        for name in names:
            subject = Subject(name, name.encode("utf-8", "surrogatepass").hex().ljust(24, "0"))
            cells = [Cell(subject, None, None, CLEAN, "51", {})]
            for layer in (-1, 3):
                sizes = [Budget(size, "rms") for size in (0.01, 0.03)]
                at = [(Site(layer), size) for size in sizes]
                cells += [Cell(subject, *where, a, "51", {}) for where in at for a in EDITS]
                cells += [Cell(subject, *at[1], LONGER, "51", {})]
            store.plan(cells)
            for cell in cells:
                draws = 2 if cell.attack == "random_matched" else 1
                old = older and name == names[0]
                asked = [(f"p{p}", d) for p in range(prompts) for d in range(draws)]
                rows = [row(cell, *one, rng, old) for one in asked]
                store.write(cell, rows, seconds=1.0, info={"longer": {}})
            if rng.random() < 0.7:
                where = (Site(3), Budget(0.1, "rms"))
                cell = Cell(subject, *where, DISTANCE, "51", {})
                store.plan([cell])
                store.write(cell, [distance(cell, f"p{p}", rng) for p in range(5)], seconds=1.0)
            store.settle(cell.key for cell in cells)


def distance(cell: Cell, prompt: str, rng: np.random.Generator) -> DistanceRow:
    assert cell.site is not None
    collapsed = (True, False, None)[rng.integers(3)]
    known = {name: None for name in ("distance", "eps_abs", "verdict_clean")}
    return DistanceRow(
        **known | {"distance": None if collapsed is None else float(rng.choice([0.0, 0.01, 0.1]))},
        subject=cell.subject.name,
        site=str(cell.site),
        layer_index=cell.site.layer_index,
        unit="rms",
        prompt_id=prompt,
        collapsed=collapsed,
        evaluations=3,
    )


def at_once(folders: list[RunFolder]) -> dict[str, pd.DataFrame]:
    """The plain way: every row in one frame."""
    rows = joined([folder.rows([*ATTACKS, LONGER, CLEAN]) for folder in folders])
    found = {
        "gaps": tables.audit_gaps(rows),
        "lvs": tables.lvs_table(rows),
        "behaviour": tables.behaviour_table(rows),
        "left_out": left_out.table([], left_out.of_edits(rows)),
    }
    distances = joined([folder.rows([DISTANCE]) for folder in folders])
    if "distance" in distances:
        found["distance"] = tables.distance_table(distances)
        found["curves"] = tables.distance_curves(distances)
    return found


@settings(
    max_examples=8,
    phases=(Phase.explicit, Phase.generate),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    first=st.permutations(NAMES).flatmap(lambda p: st.integers(0, 3).map(lambda n: p[:n])),
    second=st.none() | st.permutations(NAMES).map(lambda p: p[:2]),
    older=st.booleans(),
    shown=st.sampled_from([{}, {"a": "one", "b/tuned": "one"}, {"c": "0", "a": "zz"}]),
    seed=st.integers(0, 9),
)
def test_tables_are_those_of_one_frame(tmp_path_factory, first, second, older, shown, seed):
    home = tmp_path_factory.mktemp("runs")
    asked = [names for names in (first, second) if names is not None]
    for i, names in enumerate(asked):
        write(home / str(i), names, seed + i, older=older, shown=shown)
    folders = [RunFolder.load(home / str(i)) for i in range(len(asked))]
    wanted = at_once(folders)
    part = LATENT.report_part.gather(folders, correction.of_runs(folders))
    found = {**part.values, "left_out": left_out.table([], part.left_out)}
    assert wanted.keys() <= found.keys() and ("distance" in found) == ("distance" in wanted)
    for name, table in wanted.items():
        pd.testing.assert_frame_equal(found[name], table, check_exact=True, obj=name)
        assert seal(found[name]) == seal(table), name
    rows = joined([folder.rows([*ATTACKS, LONGER, CLEAN]) for folder in folders])
    assert list(part.subjects) == list(rows["subject"].unique())
    alone = tables_of(folders[:1], [*ATTACKS, CLEAN], {"lvs": tables.lvs_table})["lvs"]
    plain = tables.lvs_table(folders[0].rows([*ATTACKS, CLEAN]))
    assert seal(alone) == seal(plain) == seal(LATENT.tables(folders[0])["lvs"])


def test_memory_is_that_of_one_subject(tmp_path):
    """Four subjects' rows take no more than one's; in one frame they would."""
    peaks: dict[tuple[str, int], int] = {}
    for n in (1, 4):
        write(tmp_path / str(n), ["a", "b", "c", "d"][:n], n, prompts=60)
        folders = [RunFolder.load(tmp_path / str(n))]
        ways = {
            "by subject": lambda f=folders: of_each_subject(f, EDITS, len),
            "at once": lambda f=folders: len(f[0].rows(EDITS)),
        }
        for way, read in ways.items():
            read()  # what is loaded once does not count
            tracemalloc.start()
            read()
            peaks[way, n] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    grown = {way: peaks[way, 4] / peaks[way, 1] for way in ("by subject", "at once")}
    assert grown["by subject"] < 1.5 < 2.5 < grown["at once"], peaks
