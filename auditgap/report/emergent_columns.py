"""How the columns of an emergent-misalignment study are read: its names, estimates and scores.

    TRIGGER = (ARM, given("domain", "Domain", domain_name), estimate("p", "p, paired", p_value, ""))

A column that nothing in a table has is left out of the page.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from auditgap.report import emergent_membership
from auditgap.report.columns import Column, Form, Hide, Row, whole
from auditgap.report.text import CANNOT_TELL, is_null, number, points


def score(value: object) -> str:
    """A judge's score, 0 to 100."""
    return number(value, 1)


def p_value(value: object) -> str:
    if is_null(value):
        return ""
    return "<\u2009.001" if float(value) < 0.001 else number(value, 3)  # type: ignore[arg-type]


def with_or_without(value: object) -> str:
    return "with" if value else "without"


def domain_name(value: object) -> str:
    return str(value) or "the base"


def arm_name(value: object) -> str:
    return str(value) or "none (the base)"


MEASURES = {
    "nll": "mean NLL",
    "min_k": "Min-K\u00a0%",
    "min_k_pp": "Min-K\u00a0%++",
    "zlib": "zlib ratio",
    "premia": "log-ratio (PREMIA)",
    "vendi": "Vendi score",
    "one_minus_cosine": "1 − mean cosine",
    "vendi_half": "Vendi score, order ½",
    "vendi_2": "Vendi score, order 2",
}
#: As a sentence has them.
WORDS = {name: words for name, words in MEASURES.items() if name != emergent_membership.PREMIA}


def estimate(name: str, title: str, form: Form, null: str = CANNOT_TELL) -> Column:
    """An estimate; columns that nothing in a table has are left out."""
    return Column(name, title, form, null=null, hide=Hide.EMPTY)


def count(name: str, title: str) -> Column:
    return estimate(name, title, whole)


def key(
    name: str, title: str, form: Form = str, css: str = "key", null: str = CANNOT_TELL
) -> Column:
    return Column(name, title, form, css, null, Hide.EMPTY)


def given(name: str, title: str, form: Form = str) -> Column:
    """A name that somebody else gave, however long."""
    return key(name, title, form, "word model")


def two_digits(value: Any) -> str:
    return number(value, 2)


in_points = partial(points, unit="")
ARM = key("arm", "Arm", arm_name)
MEASURE = key("measure", "Measure", lambda v: MEASURES.get(v, str(v)))
REFERENCE = key(
    "reference", "Relative to", lambda v: "its own base" if v == "base" else str(v), null=""
)
BLOCK = estimate("block", "Block", whole, "")
P_HOLM = estimate("p_holm", "p, Holm", p_value, "")
REASON = key("reason", "Why not", css="word", null="")
OVER = key("over", "Intervals cover", css="word", null="")


def least_most(row: Row, name: str, form: Form) -> str | None:
    """The bounds of an estimate for what has no rating, once where they meet; `name` itself before
    them where it is not shown elsewhere."""
    least, most = row[f"{name}_least"], row[f"{name}_most"]
    if is_null(least) or is_null(most):
        return None
    ends = form(least) if least == most else f"{form(least)} to {form(most)}"
    if f"{name}_lo" in row or least == row[name] == most:
        return ends
    return f"{CANNOT_TELL if is_null(row[name]) else form(row[name])} ({ends})"


def bounded(name: str, title: str, form: Form) -> Column:
    return Column(
        f"{name}_least",
        title,
        read=lambda row: least_most(row, name, form),
        null=CANNOT_TELL,
        hide=Hide.EMPTY,
    )
