"""A comparison as it is read: the paper's Table 1, a table a measure, and what the differences show.

table_1(found)[0].rows      # (("twin", (Marked("4.917 [3.2, 6.8]", "largest"), …)), …)
measures(found)[0]          # (Measure("gap", …), its rows): one for every measure that is there
says(found)[0]              # "LVS, mean: 2 of 6 differences from base are shown: …"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from markupsafe import Markup

from auditgap.report import text
from auditgap.report.columns import Column, Hide, Row, budget, escaped, on_screen, word
from auditgap.report.compare import Comparison
from auditgap.report.compare_measures import Measure
from auditgap.report.compare_models import ROLES, Model, roles_of, site_of
from auditgap.report.figures import budget_label
from auditgap.report.text import CANNOT_TELL, clean
from auditgap.store.tables import rows_of
from auditgap.types import Site

#: A difference whose corrected p lies below is called shown.
ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Marked:
    """A cell of Table 1: its reading, how it is marked, and the number of the reason when there is
    none."""

    text: str
    mark: str = ""
    reason: int = 0

    def html(self) -> Markup:
        tag = {"largest": "<b>{}</b>", "smallest": "<u>{}</u>"}.get(self.mark, "{}")
        note = Markup("<sup>{}</sup>").format(self.reason) if self.reason else ""
        return Markup(tag).format(clean(self.text)) + note

    def markdown(self) -> str:
        said = escaped(self.text) + (f" ({self.reason})" if self.reason else "")
        return {"largest": f"**{said}**", "smallest": f"<u>{said}</u>"}.get(self.mark, said)

    def line(self) -> str:
        """For a terminal: * largest, _ smallest, (1) the first reason."""
        sign = {"largest": "*", "smallest": "_"}.get(self.mark, "")
        note = f" ({self.reason})" if self.reason else ""
        return f"{sign}{on_screen(self.text)}{sign}{note}"


@dataclass(frozen=True, slots=True)
class TableOne:
    """The paper's Table 1 at one budget; `reasons` say what each — stands for."""

    budget: str
    rows: tuple[tuple[str, tuple[Marked, ...]], ...]
    reasons: tuple[str, ...]


def table_1(comparison: Comparison) -> list[TableOne]:
    """Mean LVS of the targeted attack at the embedding, the middle and the last block: models by
    sites, one table a budget."""
    lvs = comparison.table[
        (comparison.table["measure"] == "lvs") & (comparison.table["role"] != "")
    ]
    found = []
    for (unit, eps), part in lvs.groupby(["unit", "eps"], sort=True):
        reasons: dict[str, int] = {}
        rows = []
        for model in comparison.sides.models:
            mine = {row["role"]: row for row in rows_of(part[part["model"] == model.name])}
            rows.append(
                (model.name, tuple(_marked(model, role, mine.get(role), reasons) for role in ROLES))
            )
        found.append(TableOne(budget_label(eps, unit), tuple(rows), tuple(reasons)))
    return found


def _marked(
    model: Model, role: str, row: Mapping[str, Any] | None, reasons: dict[str, int]
) -> Marked:
    if row is not None and not text.is_null(row["value"]):
        return Marked(text.with_interval(row["value"], row["lo"], row["hi"]), row["mark"])
    reason = (row or {}).get("reason") or "no targeted latent audit of this model was given"
    layer = site_of(model, role)
    if row is None and layer is not None and roles_of(model).get(layer, role) != role:
        reason = f"{Site(layer)} is {roles_of(model)[layer]} too, and stands there"
    return Marked("—", "", reasons.setdefault(f"{model.name}, {role}: {reason}", len(reasons) + 1))


def columns_of(measure: Measure, base: str) -> tuple[Column, ...]:
    """One measure as it is read: every model's value and, below the base's, the difference."""

    def pairs(row: Row) -> str:
        return "0" if text.is_null(row["difference"]) else str(row["n_pairs"])

    def of_others(
        read: Callable[[Row], str | None], of_base: str = ""
    ) -> Callable[[Row], str | None]:
        return lambda row: of_base if row["model"] == base else read(row)

    def p(name: str, title: str) -> Column:
        def read(row: Row) -> str:
            if text.is_null(row["difference"]):
                return ""
            return "—" if text.is_null(row[name]) else text.number(row[name])

        return Column(name, title, read=of_others(read))

    def difference(row: Row) -> str | None:
        return None if text.is_null(row["difference"]) else _difference(measure, row)

    return (
        word("model", "Model"),
        word("where", "Where", css="key", read=lambda row: row["where"] or row["role"]),
        Column("eps", "ε", read=lambda row: budget(row) or "", hide=Hide.EMPTY),
        Column(
            "value",
            "Value",
            measure.value,
            limits=("lo", "hi"),
            null=lambda row: f"— {row['reason']}",
        ),
        Column(
            "difference",
            "Difference",
            read=of_others(difference, "base"),
            null="— no pairs",
            mark=lambda row: "shown" if is_shown(row) else "",
        ),
        Column("n_pairs", "Pairs", read=of_others(pairs)),
        p("p", "p"),
        p("p_holm", "p, Holm"),
        word("p_holm", "Reading", css="key", read=lambda row: verdict(measure, row)),
    )


def _difference(measure: Measure, row: Row) -> str:
    value, lo, hi = (row[f"difference{end}"] for end in ("", "_lo", "_hi"))
    return text.with_interval(value, lo, hi, measure.difference)


def is_shown(row: Row) -> bool:
    """Whether a difference is told from chance, after Holm."""
    return not text.is_null(row["p_holm"]) and row["p_holm"] < ALPHA


def verdict(measure: Measure, row: Row) -> str:
    """What a difference says in words; "" where there was nothing to test."""
    if text.is_null(row["p_holm"]):
        return CANNOT_TELL if row["test"] else ""
    if not is_shown(row):
        return "not shown"
    is_higher = row["difference"] > 0
    if measure.direction == 0:
        return "higher" if is_higher else "lower"
    return "safer" if is_higher == (measure.direction > 0) else "more vulnerable"


def measures(comparison: Comparison) -> list[tuple[Measure, pd.DataFrame]]:
    """Every measure that is there with its rows, in the order of the audits."""
    table = comparison.table
    found = [(m, table[table["measure"] == m.name]) for m in comparison.measures]
    return [(measure, rows) for measure, rows in found if len(rows)]


def says(comparison: Comparison) -> list[str]:
    """What the differences show: a sentence a measure, and one for those that show none."""
    base = comparison.sides.base.name
    said, none, pairs = [], [], 0
    for measure, rows in measures(comparison):
        part = rows[rows["p_holm"].notna()]
        if part.empty:
            continue
        shown = part[part["p_holm"] < ALPHA].sort_values("p_holm", kind="stable")
        if shown.empty:
            none.append(measure.title)
            pairs = max(pairs, int(part["n_pairs"].max()))
            continue
        each = [f"{_place(row)} {_difference(measure, row)}" for row in rows_of(shown.head(3))]
        more = f", and {len(shown) - 3} more below" if len(shown) > 3 else ""
        which = {
            -1: " Above 0 is more vulnerable than the base.",
            1: " Above 0 is safer than the base.",
        }.get(measure.direction, "")
        of = "the one difference" if len(part) == 1 else f"{len(shown)} of {len(part)} differences"
        said.append(
            f"{measure.title}: {of} from {base} {'is' if len(shown) == 1 else 'are'} shown:"
            f" {'; '.join(each)}{more}.{which}"
        )
    if none:
        said.append(
            f"No difference from {base} is shown in at most {pairs} pairs of prompts, and none ruled"
            f" out: {'; '.join(none)}."
        )
    return said or ["No difference could be tested."]


def _place(row: Mapping[str, Any]) -> str:
    budget = "" if text.is_null(row["eps"]) else f", {budget_label(row['eps'], row['unit'])}"
    return f"{text.shorten(row['model'], 40)} ({row['where']}{budget})"
