"""What is inside the fine-tuned models: memberships, diversity of rows, directions, and steering one
domain's model with another's.

    membership(view), diversity(view), directions(view), transfer(view)     # four sections
"""

from __future__ import annotations

from functools import partial

import pandas as pd

from auditgap.report import emergent_inside_figures as figures
from auditgap.report import emergent_membership
from auditgap.report.emergent_columns import (
    ARM,
    BLOCK,
    MEASURE,
    P_HOLM,
    REASON,
    REFERENCE,
    count,
    estimate,
    given,
    in_points,
    key,
    p_value,
    score,
    two_digits,
)
from auditgap.report.emergent_view import StudyView
from auditgap.report.section import Heading, Section
from auditgap.report.text import number, percent, plain

MEMBERSHIP = (
    given("domain", "Domain"),
    ARM,
    MEASURE,
    REFERENCE,
    estimate("auroc", "AUROC", two_digits),
    count("n_members", "Trained"),
    count("n_others", "Held out"),
    count("n_unscored", "Unscored"),
    REASON,
)
PREDICTION = (
    ARM,
    key("predictor", "From"),
    MEASURE,
    REFERENCE,
    BLOCK,
    estimate("rho", "ρ", two_digits),
    estimate("p", "p", p_value, ""),
    P_HOLM,
    estimate("error", "Mean error, points", in_points),
    estimate("error_of_mean", "… of the others’ mean", in_points),
    estimate("auroc", "AUROC, above the median", two_digits),
    count("n", "Domains"),
    REASON,
)
_ENCODER = given("encoder", "Read by", lambda name: str(name) or "the base")
DIVERSITY = (
    ARM,
    given("domain", "Domain"),
    _ENCODER,
    estimate("vendi", "Vendi score", partial(number, digits=1)),
    estimate("vendi_half", "… order ½", partial(number, digits=1)),
    estimate("vendi_2", "… order 2", partial(number, digits=1)),
    estimate("one_minus_cosine", "1 − mean cosine", number),
    count("n", "Rows"),
    BLOCK,
    estimate("em_rate", "EM rate", percent),
    REASON,
)
CORRELATION = (
    ARM,
    MEASURE,
    _ENCODER,
    estimate("rho", "ρ", two_digits),
    estimate("p", "p", p_value, ""),
    P_HOLM,
    count("n", "Domains"),
    REASON,
)
COSINES = (
    BLOCK,
    ARM,
    given("domain", "Domain"),
    given("other", "Other"),
    estimate("cosine", "Cosine", two_digits),
    estimate("lowest", "Lowest", two_digits, ""),
    estimate("highest", "Highest", two_digits, ""),
    estimate("ceiling", "Ceiling", two_digits),
    estimate("corrected", "Cosine / ceiling", two_digits, ""),
    count("n_pairs", "Pairs of seeds"),
    REASON,
)
TRANSFER = (
    given("source", "Direction of"),
    given("target", "Model of"),
    key("by", "Direction", lambda by: figures.BY[str(by)]),
    estimate("difference", "Alignment, steered − control", score),
    P_HOLM,
    estimate("coherence", "Coherence, steered", score),
    estimate("coherence_control", "… control", score),
    estimate("coherence_clean", "… no edit", score),
    estimate("alignment", "Alignment, steered", score),
    estimate("alignment_control", "… control", score),
    estimate("alignment_clean", "… no edit", score),
    estimate("em_rate", "EM rate, steered", percent),
    estimate("em_rate_control", "… control", percent),
    estimate("em_rate_difference", "Difference, points", in_points),
    count("n", "Prompts"),
    count("rated", "Rated"),
    count("n_edit", "Answers"),
    REASON,
)
_MEMBERSHIP_NOTE = (
    "AUROC: how often a trained row has a lower score than a held-out one; 0.5 is chance."
    " Relative to a model: minus the same under it, so that what is ordinary anyway counts for"
    " nothing. Its own base is the model that was fine-tuned; another name is a model that was"
    " named as reference or found as its pretrained counterpart."
)
_PREDICTION_NOTE = (
    "Each domain’s EM rate foretold by a line through the other domains; Spearman’s ρ of foretold"
    " and seen. p from permuting the rates and doing all of it again. AUROC: how often a domain"
    " whose EM rate is above the domains’ median has the larger value; 0.5 is chance."
)
_CORRELATION_NOTE = (
    "Spearman’s ρ of diversity and EM rate over domains; p from permuting, after Holm over measures,"
    " blocks and encoders of an arm."
)


def membership(view: StudyView) -> Section:
    # PREMIA's is drawn, of the named reference where there is one: chosen before any number was seen
    predicted = view.data["predicted"]
    premia = predicted[predicted["measure"] == emergent_membership.PREMIA]
    named = premia["reference"] != emergent_membership.OWN_BASE
    premia = premia[named if named.any() else ~named].reset_index(drop=True)
    foretold = (
        Heading("Does it foretell the EM rate?"),
        *view.says("prediction"),
        figures.prediction(premia, view.judge),
        view.table("prediction", PREDICTION, "EM rate foretold from membership", _PREDICTION_NOTE),
    )
    return Section(
        id="em-membership",
        title="Was a row trained on?",
        contents="Membership",
        blocks=(
            *view.says("membership"),
            figures.roc(view.study.memberships, view.study.reference),
            view.table(
                "membership", MEMBERSHIP, "Membership inference by domain", _MEMBERSHIP_NOTE
            ),
            *(foretold if len(view.data["prediction"]) else ()),
        ),
        data={"em_predicted": predicted},
    )


def diversity(view: StudyView) -> Section:
    return Section(
        id="em-diversity",
        title="How different a domain’s rows are",
        contents="Diversity",
        blocks=(
            *view.says("correlation"),
            figures.diversity(view.data["diversity"], view.judge),
            view.table("correlation", CORRELATION, "Diversity and EM rate", _CORRELATION_NOTE),
            view.table("diversity", DIVERSITY, "Diversity by domain"),
        ),
    )


def directions(view: StudyView) -> Section:
    cosines = view.data["cosines"]
    return Section(
        id="em-directions",
        title="Directions by block",
        contents="Directions",
        blocks=(
            *view.says("cosines"),
            figures.cosines(cosines),
            view.table("cosines", COSINES, "Cosines of directions by block", _chance(cosines)),
        ),
    )


def transfer(view: StudyView) -> Section:
    transfer = view.data["transfer"]
    return Section(
        id="em-transfer",
        title="Steering one domain’s model with another’s direction",
        contents="Transfer",
        blocks=(
            figures.transfer(transfer, view.judge),
            view.table("transfer", TRANSFER, "Steering transfer", _steered(transfer)),
        ),
    )


def _chance(table: pd.DataFrame) -> str:
    known = table["chance"].dropna() if len(table) else table
    chance = (
        f" Random directions of this width stay below {number(known.iloc[0], 2)} in 95 of 100"
        " pairs."
        if len(known)
        else ""
    )
    return (
        "Ceiling: what the noise of two estimates leaves of perfect agreement, from split halves"
        " after Spearman–Brown; of a domain with itself its reliability. Lowest and highest are"
        f" over pairs of seeds and no interval.{chance}"
    )


def _steered(table: pd.DataFrame) -> str:
    """Where and how strongly, which is the same in all of a study's rows."""
    where = (
        [f"block {plain(b)}" for b in sorted(table["block"].dropna().unique())]
        if len(table)
        else []
    )
    how = (
        [f"strength {plain(float(s))}" for s in sorted(table["strength"].dropna().unique())]
        if len(table)
        else []
    )
    at = f"At {', '.join([*where, *how])}." if where else ""
    return (
        f"{at} The difference is paired by prompt; the control is a random direction of the same"
        " norm, or, where the direction is projected out, as much taken off along a random one. An"
        " effect at much lower coherence than the control’s is damage, not misalignment."
    )
