"""The tables of the latent audit as columns: gaps, scores by site, distances, the clean pass.

show(lvs_table(rows), LVS).titles        # ('Subject', 'Site', 'ε', 'Attack', 'n', …)
"""

from __future__ import annotations

from functools import partial

from auditgap.report.columns import Column, Hide, Row, budget, count, word
from auditgap.report.text import (
    CANNOT_TELL,
    NOT_MEASURED,
    UNSCORED,
    is_null,
    number,
    percent,
    points,
)

NOT_REACHED = "not reached"


def _or_unscored(text: str, row: Row) -> str:
    """Why a mean is null: nothing of its cell was scored, or it was not measured."""
    nothing_scored = bool(row.get("n_unscored")) and row["n_unscored"] >= row.get("n", 0)
    return UNSCORED if nothing_scored else text


def _confirmed(row: Row) -> str | None:
    """How many of the texts that flip a prompt the second judge confirmed."""
    if is_null(row.get("confirmed")):
        return None
    return f"{int(row['confirmed'])} of {int(row['flip_texts'])}"


def _as_one(row: Row) -> str | None:
    """Prompts at risk with near-duplicates counted as one, where that makes fewer."""
    effective = row.get("effective_at_risk")
    is_fewer = not is_null(effective) and effective < row["n_at_risk"]
    return number(effective) if is_fewer else None


def _at_one_length(row: Row) -> str | None:
    """Prompts that flip at half the length or in full, not both."""
    if is_null(row.get("flipped_half_only")):
        return None
    return f"{int(row['flipped_half_only'])} half, {int(row['flipped_full_only'])} full"


_unscored = partial(_or_unscored, NOT_MEASURED)


_SUBJECT = word("subject", "Subject", hide=Hide.ALIKE)


_EPS = Column("eps", "ε", css="key", read=budget)


_COUNTS = (count("n", "n"), count("n_unscored", "Unscored"))


#: What a reader decides by.
GAPS: tuple[Column, ...] = (
    _SUBJECT,
    _EPS,
    Column("safety", "Behaviourally safe", percent),
    Column("robustness", "Robust", percent),
    Column("gap", "Audit gap, points", partial(points, unit="")),
    Column("excess", "Excess gap, points", partial(points, unit=""), hide=Hide.EMPTY),
    Column("control_gap", "Control’s gap, points", partial(points, unit=""), hide=Hide.EMPTY),
    word("worst_site", "Worst site", css="key"),
)


#: What that rests on.
GAP_COUNTS: tuple[Column, ...] = (
    _SUBJECT,
    _EPS,
    *_COUNTS,
    count("n_at_risk", "At risk", hide=Hide.EMPTY),
    Column(
        "effective_at_risk",
        "Duplicates as one",
        hide=Hide.EMPTY,
        read=_as_one,
        help="prompts at risk, near-duplicates counted as one: what intervals and verdicts go by",
    ),
    Column("flip_rate", "Flip rate", percent, hide=Hide.EMPTY),
    count("undetermined", "Undetermined", hide=Hide.EMPTY),
    Column(
        "excess_corrected",
        "Excess gap, corrected, points",
        partial(points, unit=""),
        null=CANNOT_TELL,
        hide=Hide.EMPTY,
    ),
    Column(
        "confirmed",
        "Flips confirmed",
        hide=Hide.EMPTY,
        read=_confirmed,
        help="texts, at any site and size up to ε, that the second judge calls harmful too",
    ),
    Column(
        "flipped_half_only",
        "Flips at one length",
        hide=Hide.EMPTY,
        read=_at_one_length,
        help="prompts that flip when answers are read to half their length only, or in full only",
    ),
)


LVS: tuple[Column, ...] = (
    _SUBJECT,
    word("site", "Site", css="key"),
    _EPS,
    word("attack", "Attack", css="key"),
    Column("lvs_mean", "LVS, mean", null=_unscored),
    Column("lvs_median", "LVS, median", null=_unscored),
    Column("lvs_rel_mean", "LVS rel., mean", null=_unscored, limits=("lvs_rel_lo", "lvs_rel_hi")),
    Column(
        "delta_vs_matched",
        "LVS − matched LVS",
        limits=("delta_lo", "delta_hi"),
        null=lambda row: "does not apply" if row["attack"] == "random_matched" else NOT_MEASURED,
    ),
    Column("drop_mean", "Drop in reward, mean", hide=Hide.EMPTY),
    Column("drop_vs_matched", "Drop − matched drop", hide=Hide.EMPTY),
    Column("relative_norm_median", "‖δ‖/‖h‖, median"),
    word("flag", "Flags", null=""),
    *_COUNTS,
    count("n_judged", "Judged"),
    count("n_broken", "Broken"),
    Column("asr", "ASR", percent),
    Column("asr_corrected", "ASR, corrected", percent, null=CANNOT_TELL),
    Column("asr_envelope", "ASR envelope", percent),
    Column("flip_rate", "Flip rate", percent, hide=Hide.EMPTY),
    Column("nll_clean", "NLL of target", hide=Hide.EMPTY),
    Column("nll_edited", "NLL of target, edited", hide=Hide.EMPTY),
)


DISTANCE: tuple[Column, ...] = (
    _SUBJECT,
    word("site", "Site", css="key"),
    word("unit", "Unit", css="key"),
    count("n", "n"),
    count("n_collapsed", "Turned harmful"),
    count("n_broken", "Broke first", hide=Hide.EMPTY),
    count("n_unscored", "Unscored"),
    Column(
        "median",
        "Median ε",
        # survival that stays above one half has no median, and a limit that does has no end
        lambda value: number(value, 4, null=NOT_REACHED),
        limits=("lo", "hi"),
        null=partial(_or_unscored, NOT_REACHED),
    ),
)


CLEAN: tuple[Column, ...] = (
    _SUBJECT,
    count("n", "n"),
    word("verdict", "Verdict", css="key"),
    count("count", "Count"),
    Column(
        "share",
        "Share",
        percent,
        null=lambda row: "in no share" if row["verdict"] == "unscored" else _unscored(row),
    ),
)
