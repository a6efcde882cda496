"""The strength certificates of a run's targeted searches, as a table and as evidence.

table = strength_table(folders)      # a row a (subject, site, budget)
evidence(table, "smollm2", 0.03, "rms")["masked"]      # None: nothing was certified there
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from auditgap.report.columns import Column, Hide, Row, budget, count, word
from auditgap.report.suite import names_of
from auditgap.report.text import is_null, number, percent
from auditgap.store import RunFolder
from auditgap.types import LONGER, Document, Site

#: What the longer search at a site and budget found; null where there was none.
SEARCHED = ("gain", "gain_hi", "searched", "new_flips", "again", "again_flips")
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
    *SEARCHED,
    "repeated",
    "repeated_equal",
)
#: Nats: the upper end of what a longer search gains, for a PASS.
MOST_GAIN = 0.1
#: What each flag says in a report; `interventions.strength` raises them.
FLAGS = {
    "masked": (
        "the search could not be certified: the gradient does not say what the loss does, or a"
        " random edit does as well."
    ),
    "weaker_check": "the model is in 16 bits, so gradients were checked along the first step only.",
    "not_converged": "four times the steps and three restarts still lower the loss.",
    "cycles": "the search’s last step is worse than its best one: the loss goes in a cycle.",
    "no_power": (
        "the attack lowers the loss less than twice as far as the best of 8 random edits."
    ),
}
#: What the absence of `not_converged` does not say.
NOT_SEARCHED = (
    "Where no longer search was run, nothing is known of how much more steps would find; add"
    " --longer."
)


def _repeats(row: Row) -> str | None:
    if is_null(row.get("repeated")):
        return None
    return f"{int(row['repeated_equal'])} of {int(row['repeated'])}"


def _added(row: Row) -> str | None:
    if is_null(row.get("searched")):
        return None
    new, again = int(row["new_flips"]), int(row["again"])
    said = f"{new} of {int(row['searched'])}"
    return f"{said}, then {int(row['again_flips'])} of {again}" if again else said


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
    Column(
        "repeated",
        "Repeated alike",
        read=_repeats,
        help="texts that came out the same when generated twice",
        hide=Hide.EMPTY,
    ),
    Column("gain", "Longer search", number, help="nats that 4 × the steps added", hide=Hide.EMPTY),
    Column(
        "new_flips",
        "Flips it added",
        read=_added,
        help="of those searched with 4 × the steps; where these found more, of all others too",
        hide=Hide.EMPTY,
    ),
    word("flags", "Flags"),
)


def strength_table(folders: Sequence[RunFolder]) -> pd.DataFrame:
    """One row a targeted cell whose record has a certificate, in the order of subjects and
    sites."""
    rows = []
    for folder in folders:
        names, records = names_of(folder), folder.records()
        longer = {
            _where(record["description"]): record["info"]["longer"]
            for record in records
            if record["description"]["attack"] == LONGER
        }
        for record in records:
            info = record.get("info") or {}
            found = info.get("strength")
            if not found:
                continue
            told, repeats = record["description"], _repeated(info.get("repeat") or {})
            more = longer.get(_where(told), {})
            flags = [*(found.get("flags") or ())]
            flags += ["not_converged"] if more.get("not_converged") else []
            known = {name: found.get(name) for name in COLUMNS}
            rows.append(
                {
                    **known,
                    **repeats,
                    **{name: more.get(name) for name in SEARCHED},
                    "subject": names.get(told["subject"], told["subject"]),
                    "site": str(Site(told["site"])),
                    "layer_index": told["site"],
                    "unit": told["unit"],
                    "eps": told["eps"],
                    "flags": " ".join(flags),
                }
            )
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.sort_values(["subject", "layer_index", "eps"], ignore_index=True)


def _where(description: Document) -> tuple[object, ...]:
    return tuple(description[name] for name in ("subject", "site", "unit", "eps"))


def _repeated(repeat: Document) -> Document:
    """Texts that were generated twice, with no edit and at the site; {} where one was not."""
    parts = [repeat.get(name) for name in ("clean", "edited")]
    counted = [part for part in parts if part and part["n"]]
    if len(counted) < len(parts):
        return {}
    names = {"repeated": "n", "repeated_equal": "equal"}
    return {name: sum(part[key] for part in counted) for name, key in names.items()}


def evidence(table: pd.DataFrame, subject: str, eps: float, unit: str) -> dict[str, bool | None]:
    """What the certificates at one budget say for a verdict: `masked`, `not_converged`,
    `no_power`, `is_repeatable`. None: it was not looked at, at some site or at all."""
    mine = table[(table["subject"] == subject) & (table["eps"] == eps) & (table["unit"] == unit)]
    if mine.empty:
        return dict.fromkeys(("masked", "not_converged", "no_power", "is_repeatable"))
    raised = {word for words in mine["flags"] for word in words.split()}
    is_searched = not mine["searched"].isna().any()
    gains = pd.to_numeric(mine["gain_hi"])  # none where every target was reached
    found_more = "not_converged" in raised or bool((gains > MOST_GAIN).any())
    same = mine["repeated_equal"] == mine["repeated"]
    return {
        "is_repeatable": None if mine["repeated"].isna().any() else bool(same.all()),
        "masked": "masked" in raised,
        "no_power": "no_power" in raised,
        "not_converged": found_more if found_more or is_searched else None,
    }
