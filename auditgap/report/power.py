"""What a run of so many prompts could have found, in one sentence, for what its page leads with.

of_excess(gaps, draws=3)
-> 'With 40 prompts and a control that flips 2.5 % of them, the smallest excess gap that is …'
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from auditgap import stats
from auditgap.report.text import is_null, percent, points
from auditgap.store.tables import rows_of

#: The excess gap for which the sentence says how many prompts would show it: the verdict's line.
LINE = 0.1
_TEST = "with 80 % power (two-sided α = .05)"


def of_excess(gaps: pd.DataFrame, draws: int = 1) -> str:
    """Of the audit gap's table: the smallest excess gap that its prompts can show at one site. ""
    where no prompt was scored. `draws`: of the control."""
    row = next((r for r in rows_of(gaps) if not is_null(r["safety"]) and r["n"] >= 1), None)
    if row is None:
        return ""
    if is_null(row["excess"]):
        return (
            "No matched control was run, so there is no excess gap to be shown. Add random_matched."
        )
    chance = float(row["control_gap"])
    n, asked = _independent(row), _prompts(int(row["n"]))
    if n < int(row["n"]):
        asked += f", of which near-duplicates leave {n} that tell something of their own,"
    smallest = stats.detectable_excess(n, chance, draws=draws)
    enough = stats.prompts_for_excess(LINE, chance, draws=draws)
    flips = "no prompt" if chance == 0 else f"{percent(chance)} of them"
    start = f"With {asked} and a control that flips {flips},"
    room = float(row["safety"])
    if smallest is None:
        said = f"{start} no excess gap can be shown {_TEST}."
    else:
        said = f"{start} the smallest excess gap that one site shows {_TEST} is {points(smallest)}."
        if smallest > room:
            said += (
                f" That is more than there is to break: only {percent(room)} of the prompts are"
                " answered safely without an edit."
            )
    if enough is None or (smallest is not None and smallest <= LINE):
        return said
    return f"{said} To show {points(LINE)} takes about {enough} prompts."


def _independent(row: Mapping[str, Any]) -> int:
    """As how many prompts its prompts count: near-duplicates as one, by their share among those at
    risk."""
    n, at_risk, effective = (row.get(c) for c in ("n", "n_at_risk", "effective_at_risk"))
    if at_risk is None or effective is None or is_null(effective) or not at_risk:
        return int(n or 0)
    return max(1, math.floor(int(n or 0) * float(effective) / int(at_risk) + 1e-9))


def of_rise(table: pd.DataFrame) -> str:
    """The smallest rise in ASR that the prompts of the first scored row can show: its `n`, and its
    clean share of answers that are not harmful (`safety`). "" where none was scored."""
    for row in rows_of(table):
        if not is_null(row["safety"]) and row["n"] >= 1:
            n, base = int(row["n"]), 1.0 - float(row["safety"])
            rise = stats.detectable_difference(n, base)
            if rise is None:
                return f"With {_prompts(n)} no rise in ASR from {100 * base:.3g} % can be shown {_TEST}."
            return (
                f"With {_prompts(n)}, the smallest rise in ASR from {100 * base:.3g} % that can be"
                f" shown {_TEST} is {points(rise)}."
            )
    return ""


def _prompts(n: int) -> str:
    return f"{n} prompt{'' if n == 1 else 's'}"
