"""The strength certificates of a run's targeted searches, as a table and as evidence.

table = strength_table(folders)      # a row a (subject, site, budget)
evidence(table, "smollm2", 0.03, "rms")["masked"]      # None: nothing was certified there
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from auditgap.report.columns import Column, Hide, budget, count, word
from auditgap.report.suite import names_of
from auditgap.report.text import is_null, number, percent
from auditgap.store import RunFolder
from auditgap.types import Site

COLUMNS: tuple[str, ...] = (
    "subject",
    "site",
    "layer_index",
    "unit",
    "eps",
    "n",
    "flags",
    "gradient_error",
    "first_step",
    "zero_gradients",
    "blind_positions",
    "random_as_good",
    "drop",
    "random_drop",
    "unreached",
    "gain",
)
#: What each flag says in a report; `interventions.strength` raises them.
FLAGS = {
    "masked": (
        "the search could not be certified: the gradient does not say what the loss does, or a"
        " random edit does as well."
    ),
    "weaker_check": "the model is in 16 bits, so gradients were checked along the first step only.",
    "not_converged": "four times the steps and three restarts still lower the loss.",
    "no_power": (
        "the attack lowers the loss less than twice as far as the best of 8 random edits."
    ),
}
#: What the absence of `not_converged` does not say.
NOT_SEARCHED = "Where no longer search was run, nothing is known of how much more steps would find."

STRENGTH: tuple[Column, ...] = (
    word("subject", "Subject", hide=Hide.ALIKE),
    word("site", "Site"),
    Column("eps", "ε", read=budget),
    count("n", "Prompts"),
    Column("drop", "NLL drop", number, help="median fall of the target's loss, nats a token"),
    Column("random_drop", "Random", number, help="under the best of 8 random edits"),
    Column("gradient_error", "Gradient error", number, help="0: exact; 1: says nothing"),
    Column("zero_gradients", "Zero gradients", percent, help="share of prompts"),
    Column("random_as_good", "Random as good", percent, help="share of prompts"),
    Column("gain", "Longer search", number, help="nats that 4 × the steps added", hide=Hide.EMPTY),
    word("flags", "Flags"),
)


def strength_table(folders: Sequence[RunFolder]) -> pd.DataFrame:
    """One row a targeted cell whose record has a certificate, in the order of subjects and
    sites."""
    rows = []
    for folder in folders:
        names = names_of(folder)
        for record in folder.records():
            found = (record.get("info") or {}).get("strength")
            if not found:
                continue
            told = record["description"]
            known = {name: found.get(name) for name in COLUMNS}
            rows.append(
                {
                    **known,
                    "subject": names.get(told["subject"], told["subject"]),
                    "site": str(Site(told["site"])),
                    "layer_index": told["site"],
                    "unit": told["unit"],
                    "eps": told["eps"],
                    "flags": " ".join(found.get("flags") or ()),
                }
            )
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.sort_values(["subject", "layer_index", "eps"], ignore_index=True)


def evidence(table: pd.DataFrame, subject: str, eps: float, unit: str) -> dict[str, bool | None]:
    """What the certificates at one budget say for a verdict: `masked`, `not_converged`,
    `no_power`. None: it was not looked at, at some site or at all."""
    mine = table[(table["subject"] == subject) & (table["eps"] == eps) & (table["unit"] == unit)]
    if mine.empty:
        return dict.fromkeys(("masked", "not_converged", "no_power"))
    raised = {word for words in mine["flags"] for word in words.split()}
    # a site without a longer search says nothing of convergence, unless every target was reached
    is_searched = not any(is_null(gain) for gain in mine["gain"])
    return {
        "masked": "masked" in raised,
        "no_power": "no_power" in raised,
        "not_converged": "not_converged" in raised if is_searched else None,
    }
