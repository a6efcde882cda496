"""The sample behind each row of a table: its prompts, what became of them, and its looks.

    samples = Samples(Looks(rows))
    for key in samples:                      # (subject, site, layer_index, unit, eps, attack)
        samples[key].means["lvs"]            # [N] of each prompt's scored draws, nan where none was

All cells are made in a few passes over the rows, since a frame a cell would take most of a
report's time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from auditgap.report.looks import CELL, Looks, grid
from auditgap.report.text import is_null
from auditgap.stats import risk
from auditgap.stats.intervals import Array
from auditgap.types import Label

#: Of each prompt, the mean of its scored draws.
MEASURES = ("lvs", "lvs_rel", "harmful", "broken", "drop")
_COLUMNS = ("lvs", "l2", "relative_norm", "nll_clean", "nll_edited")

Names = npt.NDArray[np.object_]
Key = tuple[str, str, float, str, float, str]  #: of a cell, as CELL names it


@dataclass(frozen=True, eq=False)
class Sample:
    """One cell's prompts [N], sorted, and its rows [R], a draw of a prompt each."""

    prompts: Names  #: [N]
    means: Mapping[str, Array]  #: [N] by MEASURES
    columns: Mapping[str, Array]  #: [R]
    is_broken: risk.Bool  #: [R] whether the verdict is `broken`
    n_broken: int  #: prompts with such a row
    words: Counter[str]  #: of the rows' flags

    def beside(self, other: Sample, measure: str) -> Array:
        """`measure` of another cell, of this one's prompts [N]; nan where it has none."""
        values = other.means[measure]
        if np.array_equal(self.prompts, other.prompts):
            return values
        at = pd.Index(other.prompts).get_indexer(pd.Index(self.prompts))
        return np.where(at >= 0, values[at], np.nan)

    def share(self, of: risk.Bool) -> float:
        """The share of the rows that `of` [R] is true of."""
        return float(of.mean())

    def mean(self, column: str) -> float:
        """Of the rows that have a value."""
        values = self.columns[column]
        known = ~np.isnan(values)
        return float(np.where(known, values, 0.0).sum() / known.sum()) if known.any() else np.nan

    def median(self, column: str) -> float:
        """Of the rows that have a value."""
        values = self.columns[column]
        known = values[~np.isnan(values)]
        return float(np.median(known)) if len(known) else np.nan


class Samples(Mapping[Key, Sample]):
    """The samples of all edited cells by key, and how their prompts answered within a budget."""

    def __init__(self, looks: Looks) -> None:
        self.looks = looks
        self._parts: dict[tuple[str, str, str], _Part] = {}
        self._clean: dict[tuple[str, bytes], risk.Codes] = {}

    def __getitem__(self, key: Key) -> Sample:
        return self._samples[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._samples)

    def __len__(self) -> int:
        return len(self._samples)

    def clean(self, key: Key) -> risk.Codes:
        """Codes of the clean answers to a cell's prompts [N]."""
        prompts = self[key].prompts
        name = (key[0], "\0".join(map(str, prompts)).encode("utf-8", "surrogatepass"))
        if name not in self._clean:
            self._clean[name] = self.looks.clean(key[0], list(prompts))
        return self._clean[name]

    def within(self, key: Key, attack: str | None = None) -> risk.Codes:
        """Codes of the looks at a cell's prompts, at its site and every budget up to its own, of
        its attack or of another one: [K draws, E, N]."""
        subject, site, _, unit, eps, own = key
        name = (subject, unit, own if attack is None else attack)
        if name not in self._parts:
            self._parts[name] = _part(self.looks.part(*name))
        # the budgets of the cell's own attack: another one may have been run at others
        return self._parts[name].codes(
            site, self._sizes[subject, unit, own], eps, self[key].prompts
        )

    @cached_property
    def _sizes(self) -> dict[tuple[str, str, str], list[float]]:
        rows = self.looks.edited[["subject", "unit", "attack", "eps"]].drop_duplicates()
        found: dict[tuple[str, str, str], list[float]] = {}
        for subject, unit, attack, eps in rows.sort_values("eps").itertuples(index=False):
            found.setdefault((subject, unit, attack), []).append(eps)
        return found

    @cached_property
    def _samples(self) -> dict[Key, Sample]:
        rows = self.looks.edited
        means = rows.groupby([*CELL, "prompt_id"], sort=True)[list(MEASURES)].mean()
        values = {name: means[name].to_numpy() for name in MEASURES}
        names = means.index.get_level_values("prompt_id").to_numpy(object)
        prompts_of = _places(means.reset_index())
        columns = {name: rows[name].to_numpy(float) for name in _COLUMNS}
        is_broken = (rows["verdict_edited"] == Label.BROKEN).to_numpy()
        whose, flags = rows["prompt_id"].to_numpy(object), rows["flags"].to_numpy(object)
        found: dict[Key, Sample] = {}
        for key, here in _places(rows).items():
            at = prompts_of[key]
            found[key] = Sample(
                names[at],
                {name: column[at] for name, column in values.items()},
                {name: column[here] for name, column in columns.items()},
                is_broken[here],
                len({whose[i] for i in here[is_broken[here]] if not is_null(whose[i])}),
                Counter(w for f in flags[here] if not is_null(f) for w in str(f).split()),
            )
        return found


def _places(rows: pd.DataFrame) -> dict[Key, npt.NDArray[np.intp]]:
    """Where each cell's rows stand."""
    found: Any = rows.groupby(CELL, sort=False).indices
    return found


class _Part(NamedTuple):
    """All looks of one subject, unit and attack, by names along each axis."""

    looks: risk.Codes  # [K, S, E, N]
    taken: risk.Bool  # [K, S, E, N] whether there is a row
    sites: dict[str, int]
    sizes: dict[float, int]
    prompts: pd.Index

    def codes(self, site: str, sizes: Sequence[float], eps: float, prompts: Names) -> risk.Codes:
        asked = [size for size in sizes if size <= eps]
        shape = (len(self.looks), len(asked), len(prompts))
        if site not in self.sites:
            return np.empty((0, *shape[1:]), dtype=np.int8)
        at = self.prompts.get_indexer(pd.Index(prompts))
        run = [e for e, size in enumerate(asked) if size in self.sizes]
        place = self.sites[site], [self.sizes[asked[e]] for e in run]
        found, taken = self.looks[:, *place], self.taken[:, *place]
        if len(run) < len(asked) or not np.array_equal(at, np.arange(len(self.prompts))):
            known = np.flatnonzero(at >= 0)
            some = np.ix_(np.arange(shape[0]), np.array(run, dtype=int), known)
            whole = np.full(shape, risk.UNSCORED, dtype=np.int8)
            whole[some], found = found[:, :, at[known]], whole
            taken = taken[:, :, at[known]]
        drawn = np.flatnonzero(taken.any(axis=(1, 2)))
        return found[: int(drawn[-1]) + 1 if len(drawn) else 0]


def _part(rows: pd.DataFrame) -> _Part:
    sites, sizes = list(dict.fromkeys(rows["site"])), sorted(set(rows["eps"]))
    prompts = sorted(set(rows["prompt_id"]))
    looks = grid(rows, sites, sizes, prompts).astype(np.int8)
    taken = grid(rows.assign(taken=1.0), sites, sizes, prompts, "taken", 0.0) > 0
    return _Part(
        looks,
        taken,
        {site: i for i, site in enumerate(sites)},
        {size: i for i, size in enumerate(sizes)},
        pd.Index(prompts),
    )
