"""What of an audit fits into a time: fewer controls first, then fewer sites, then fewer prompts.

    fit = fitted(cost, seconds_of("2h"), own={"layers"})
    fit.changes          # {"attacks": ["targeted", …], "distance": False, "limit": 41}
    fit.sentence()       # "Within 2 h: 41 of 200 prompts, … the smallest excess gap … is 17 points."

What was asked for by name is never changed. The choice is kept beside the run, so that the same
command resumes the same audit, however fast the machine measures today.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auditgap.errors import UsageError
from auditgap.types import Document

#: What an estimate leaves out, at the least: a model to load, answers to judge.
STARTING = 0.1
#: With fewer prompts than these, sites go first; with fewer than LEAST nothing can be told.
ENOUGH, LEAST = 40, 8
#: An audit that takes longer asks before it begins.
LONG = 4 * 3600.0
#: Cheaper and cheaper; a verdict of the gap needs the attack and both of these controls.
STEPS: tuple[Document, ...] = (
    {},
    {"attacks": ["targeted", "random_matched", "benign"], "distance": False},
    {"layers": "embedding,mid,last"},
    {"layers": "mid", "longer": False},
)
FILE = "time.json"
_UNITS = {"d": 86400, "h": 3600, "m": 60, "min": 60, "s": 1}


@dataclass(frozen=True)
class Fit:
    """Settings that fit, what they take, and how many prompts are left of how many."""

    changes: Document
    seconds: float
    n: int
    full: int

    def sentence(self, budget: float) -> str:
        from auditgap import stats
        from auditgap.sweep.progress import duration

        settings = ", ".join(f"{k} {_shown(v)}" for k, v in self.changes.items() if k != "limit")
        smallest = stats.detectable_excess(self.n)
        power = (
            "no excess gap can be shown"
            if smallest is None
            else f"the smallest excess gap that one site shows with 80 % power is"
            f" {100 * smallest:.0f} points"
        )
        return (
            f"Within {duration(budget)}: {self.n} of {self.full} prompts"
            f"{f'; {settings}' if settings else ''}. With so many at risk, and a control that flips"
            f" none, {power}."
        )


def seconds_of(text: str) -> float:
    """ "2h", "90m", "1h30m" in seconds. Raises UsageError."""
    found = re.findall(r"(\d+(?:\.\d+)?)\s*(min|[dhms])", text.strip().lower())
    if not found or "".join(a + b for a, b in found) != re.sub(r"\s", "", text.lower()):
        raise UsageError(f"--time takes a time such as 45m, 2h or 1h30m; {text[:40]!r} came.")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in found)
    if seconds <= 0:
        raise UsageError(f"--time must be more than nothing; {text[:40]!r} came.")
    return seconds


def fitted(
    cost: Callable[[Document], tuple[float, int]], budget: float, own: Collection[str]
) -> Fit:
    """The first of STEPS that fits with ENOUGH prompts; else the one that keeps most of them.

    `cost` says of changed settings how many seconds they take, and of how many prompts; `own`:
    settings that were asked for. Raises UsageError where nothing fits.
    """
    room = budget * (1 - STARTING)
    changes: Document = {}
    best: Fit | None = None
    full, seconds, n = 0, 0.0, 0
    for step in STEPS:
        added = {key: value for key, value in step.items() if key not in own}
        if step and not added:
            continue
        tried = {**changes, **added}
        now, n = cost(tried)
        full = full or n
        if step and now >= seconds:  # no cheaper: what was there is less already
            continue
        changes, seconds = tried, now
        if seconds <= room:
            return Fit(changes, seconds, n, full)
        fit = None if "limit" in own else _fewer(cost, changes, seconds, n, room, full)
        if fit is not None and fit.n >= min(ENOUGH, full):
            return fit
        if fit is not None and (best is None or fit.n > best.n):
            best = fit
    if best is None:
        from auditgap.sweep.progress import duration

        raise UsageError(
            f"Nothing of this fits into {duration(budget)}: at its smallest it takes about"
            f" {duration(seconds)} for {n} prompts. Give more --time, a smaller model or fewer"
            " tokens: --max-new-tokens 32"
        )
    return best


def _fewer(
    cost: Callable[[Document], tuple[float, int]],
    changes: Document,
    seconds: float,
    n: int,
    room: float,
    full: int,
) -> Fit | None:
    """The same with as many prompts as there is room for; None: fewer than LEAST."""
    for _ in range(4):  # what is paid for a run as a whole does not shrink with its prompts
        n = int(n * room / seconds * 0.98)
        if n < LEAST:
            return None
        limited = {**changes, "limit": n}
        seconds, n = cost(limited)
        if seconds <= room:
            return Fit(limited, seconds, n, full)
    return None


def kept(folder: Path, budget: float) -> Fit | None:
    """What was fitted before for this folder and this time."""
    from auditgap.store import files  # with pandas, which `--help` does without

    told: Any = files.read_document(folder / FILE)
    if not isinstance(told, Mapping) or told.get("budget") != budget:
        return None
    return Fit(told["changes"], told["seconds"], told["n"], told["full"])


def keep(folder: Path, budget: float, fit: Fit) -> None:
    """Remember it. Raises DiskError."""
    from auditgap.store import files

    files.make_folder(folder)
    told = {"changes": fit.changes, "seconds": fit.seconds, "n": fit.n, "full": fit.full}
    files.write_document(folder / FILE, {"budget": budget, **told})


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(value) if isinstance(value, list) else str(value)
