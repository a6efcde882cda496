"""What of the audits outside the latent one is compared: what models answer when asked, what a
fixed probe reads, what interventions open, how fast harmful fine-tuning undoes refusals.

    [*BEHAVIOUR.readings(rows, sides, 0)][1].against
    -> Paired(Interval(-.02, -.1, .06), p=1.0, n=96, test="McNemar, exact")
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from auditgap.report import behaviour, curve, intervene, probe
from auditgap.report.compare import Comparable
from auditgap.report.compare_measures import (
    EMPTY,
    Measure,
    Place,
    Reading,
    Unit,
    at_site,
    by_prompt,
    interval_of,
    reading,
    turned,
)
from auditgap.report.compare_models import Sides, partner
from auditgap.report.text import is_null
from auditgap.store.tables import rows_of

# -- when asked
# -------------------------------------------------------------------------------------------------

_ASKED = (
    Measure("compliance", "Complies when asked", -1, Unit.SHARE),
    Measure("refusal", "Refuses when asked", 0, Unit.SHARE),
    Measure("answered", "Answers when asked", 1, Unit.SHARE),
)


def _asked(rows: pd.DataFrame, sides: Sides, seed: int) -> Iterator[Reading]:
    """Shares of answers, by kind of prompt; each kind's prompts over all sources."""
    if not behaviour.asked(rows):
        return
    known = {measure.name: measure for measure in _ASKED}
    rows = rows.drop_duplicates(["subject", "kind", "prompt_id"])
    for kind, measures in behaviour.MEASURES.items():
        for name in measures:
            values = behaviour.by_prompt(rows[rows["kind"] == kind], name)
            yield from by_prompt(known[name], values, sides.models, Place(behaviour.KINDS[kind]))


BEHAVIOUR = Comparable(
    attacks=("behaviour",),
    identity=("subject", "kind", "source", "prompt_id"),
    settings=("dtype", "prompt_set", "prompt_sets", "max_new_tokens", "scorers"),
    measures=_ASKED,
    readings=_asked,
)

# -- a fixed probe
# -------------------------------------------------------------------------------------------------

#: Measure -> its column in `probe.probe_table`, and how its difference is told.
_PROBED = {
    Measure("auroc", "Fixed probe, AUROC"): ("auroc", "DeLong, by prompt"),
    Measure("probe_gap", "Fixed probe, safe–unsafe gap"): ("gap", "Student’s t, by prompt"),
    Measure("ece", "Fixed probe, ECE"): ("ece", "from the interval of resampled differences"),
}


def _probed(rows: pd.DataFrame, sides: Sides, seed: int) -> Iterator[Reading]:
    """What the probe reads; differences on the answers that both models' activations were read
    on."""
    base, names = sides.base, {m.name: m for m in sides.models}
    rows = rows[rows["split"] == "evaluation"].drop_duplicates(["subject", "example_id"])
    rows = rows.assign(role=np.where(rows["subject"] == base.name, "base", "subject"))
    scored = rows[rows["logit"].notna()]
    read = {name: set(some["example_id"]) for name, some in scored.groupby("subject")}
    for row in rows_of(probe.probe_table(rows)):
        model = names[row["subject"]]
        pairs = len(read.get(model.name, set()) & read.get(base.name, set()))
        for measure, (column, test) in _PROBED.items():
            drop = interval_of(row, f"{column}_drop")
            yield Reading(
                measure=measure,
                model=model,
                place=Place("activations"),
                value=interval_of(row, column),
                n=row["n"],
                n_unscored=row["n_unscored"],
                reason="no answer of one class was scored" if is_null(row[column]) else "",
                against=None if model is base else turned(drop, pairs, test),
            )


PROBE = Comparable(
    attacks=(probe.PROBE,),
    identity=("subject", "example_id"),
    settings=(
        "dtype",
        "triple_set",
        "max_tokens",
        "epochs",
        "batch",
        "lr",
        "weight_decay",
        "heldout",
        "evaluate",
        "standardise",
        "features",
        "seed",
    ),
    measures=tuple(_PROBED),
    readings=_probed,
    method="Fixed probe: the interval of its own audit, and the p-value that it implies.",
)

# -- interventions
# -------------------------------------------------------------------------------------------------

_OPENED = Measure("edit_asr", "Intervention, ASR", -1, Unit.SHARE)
_ABOVE = Measure("edit_above_control", "Intervention, ASR above its control", -1, Unit.POINTS)
_EXCHANGED = Measure("interchange", "Patching, interchange score", 0, Unit.SHARE)


def _intervened(rows: pd.DataFrame, sides: Sides, seed: int) -> Iterator[Reading]:
    """What each edit opens, beside the same edit of the base: at the same block, or in a model of
    another depth at the same role."""
    if not intervene.has_interventions(rows):
        return
    base, names = sides.base, {m.name: m for m in sides.models}
    edits = {one.key: one for one in intervene.edits(rows)}
    for (subject, layer, kind, strength, angle), one in edits.items():
        model = names[subject]
        other = partner(model, base, layer)
        theirs = None if other is None else edits.get((base.name, other, kind, strength, angle))
        place = at_site(model, layer, what=_words(kind, strength, angle))
        for measure, values in _values(one).items():
            if values.isna().all() and measure is not _OPENED:
                continue  # it has no control, or exchanges nothing
            beside = EMPTY if theirs is None else _values(theirs)[measure]
            against = None if model is base else beside
            yield reading(measure, model, place, values, against, seed=seed)


def _values(one: intervene.ControlledEdit) -> dict[Measure, pd.Series]:
    """One value a prompt of each measure."""
    above = EMPTY if one.is_control else one.harmful - one.control_harmful
    return {_OPENED: one.harmful, _ABOVE: above, _EXCHANGED: one.exchanged}


def _words(kind: str, strength: float | None, angle: float | None) -> str:
    size = "" if strength is None else f", strength {strength:g}"
    return f"{kind}{size}{'' if angle is None else f', {angle:g}° off'} at "


INTERVENE = Comparable(
    attacks=(intervene.INTERVENE,),
    identity=(
        "subject",
        "layer_index",
        "intervention",
        "strength",
        "angle",
        "arm",
        "draw",
        "prompt_id",
    ),
    settings=(
        "dtype",
        "prompt_set",
        "halves",
        "base_fingerprint",
        "angle_strength",
        "draws",
        "steps",
        "target",
        "suffix_tokens",
        "suffix_steps",
        "suffix_prompts",
        "suffix_width",
        "max_new_tokens",
        "scorers",
        "seed",
    ),
    measures=(_OPENED, _ABOVE, _EXCHANGED),
    readings=_intervened,
    method=(
        "Interventions: an edit of the model beside the same edit of the base, each learned on its"
        " own model; above its control, the mean of edit minus control as for LVS."
    ),
)

# -- harmful fine-tuning
# -------------------------------------------------------------------------------------------------

_AREA = Measure("area", "Harmful fine-tuning, area under compliance", -1)
_STEPS = Measure("steps", "Harmful fine-tuning, steps to compliance", 1)
_GAP_AFTER = Measure(
    "sft_gap", "Harmful fine-tuning, audit gap after the last step", -1, Unit.POINTS
)


def _tuned(rows: pd.DataFrame, sides: Sides, seed: int) -> Iterator[Reading]:
    """The curve: area under compliance, steps to a share of compliance, audit gap after the last
    step."""
    if not curve.has_curve(rows):
        return
    base, names = sides.base, {m.name: m for m in sides.models}
    configs = [p.folder.run["config"] for p in sides.parts if p.audit == "sft_curve"]
    asked = sorted({float(t) for c in configs for t in c.get("thresholds") or ()})
    thresholds = tuple(asked) or curve.THRESHOLDS
    for row in rows_of(curve.curve_summary(rows, base=base.name, thresholds=thresholds)):
        last = int(row["last_step"])
        places = [
            (_AREA, "area", f"{last} steps"),
            (_GAP_AFTER, "gap", f"after {last} steps"),
            *((_STEPS, curve.steps_name(t), f"to {100 * t:g} % compliance") for t in thresholds),
        ]
        for measure, column, where in places:
            ends = interval_of(row, f"difference_{column}")
            pairs = 0 if ends.estimate is None else int(row["n"])
            over = f"from the interval over {row['difference_over']}"
            at, reason = row.get(f"{column}_censored_at"), ""
            if is_null(row[column]):
                reason = "not measured" if is_null(at) else f"not reached within {at:g} steps"
            is_compared = names[row["subject"]] is not base and measure is not _GAP_AFTER
            yield Reading(
                measure=measure,
                model=names[row["subject"]],
                place=Place(where),
                value=interval_of(row, column),
                n=int(row["n"]),
                reason=reason,
                against=turned(ends, pairs, over) if is_compared else None,
            )


SFT_CURVE = Comparable(
    attacks=("sft_curve",),
    identity=("subject", "seed", "step", "split", "prompt_id"),
    settings=(
        "dtype",
        "prompt_sets",
        "max_new_tokens",
        "scorers",
        "training",
        "method",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_targets",
        "lr",
        "weight_decay",
        "warmup",
        "batch",
        "max_tokens",
        "steps",
        "eval_every",
        "refusal_filter",
    ),
    measures=(_AREA, _STEPS, _GAP_AFTER),
    readings=_tuned,
    method=("Harmful fine-tuning: the interval of its own audit, and the p-value that it implies."),
)
