"""Models side by side outside the latent audit: what they answer when asked, what a fixed probe
reads, how fast they give way.

    asked(store.rows(["behaviour"]), models)[0]
    -> {"model": "twin", "measure": "refusal", "where": "harmful requests", "value": .93, "difference": -.02, "p": 1.0, …}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from auditgap import stats
from auditgap.report import behaviour, curve, probe
from auditgap.report.compare_alike import Model
from auditgap.report.compare_measures import Record, difference, ends, none, turned
from auditgap.report.text import is_null
from auditgap.stats import Interval
from auditgap.store.tables import rows_of


def asked(rows: pd.DataFrame, models: Sequence[Model]) -> list[Record]:
    """Shares of answers when asked, by kind of prompt; each kind's prompts over all sources."""
    if not behaviour.asked(rows):
        return []
    base, found = models[0], []
    rows = rows.drop_duplicates(["subject", "kind", "prompt_id"])
    for kind, measures in behaviour.MEASURES.items():
        part = rows[rows["kind"] == kind]
        for measure in measures:
            column = behaviour.SHARES[measure]
            told = part.assign(
                told=np.array(
                    [np.nan if is_null(v) else float(v) for v in part[column]], dtype=float
                )
            )
            values = {
                name: some.set_index("prompt_id")["told"] for name, some in told.groupby("subject")
            }
            for model in (m for m in models if m.name in values):
                mine, known = values[model.name], values[model.name].dropna()
                record = {
                    "model": model.name,
                    "audit": "behaviour",
                    "measure": measure,
                    "where": behaviour.KINDS[kind],
                    "n": len(mine),
                    "n_unscored": len(mine) - len(known),
                    **ends(stats.wilson(float(known.sum()), len(known))),
                }
                if not len(known):
                    record["reason"] = "no answer could be told"
                if model is not base:
                    record |= {"base": base.name, "n_pairs": 0}
                    if base.name in values:
                        both = pd.concat([mine, values[base.name]], axis=1, join="inner").to_numpy(
                            float
                        )
                        record |= difference(base, stats.paired_shares(both[:, 0], both[:, 1]))
                found.append(record)
    return found


def probed(rows: pd.DataFrame, models: Sequence[Model]) -> list[Record]:
    """What the fixed probe reads: AUROC, gap, ECE; differences on the answers that both models'
    activations were read on."""
    if not len(rows) or "example_id" not in rows:
        return []
    base, found = models[0], []
    rows = rows[rows["split"] == "evaluation"].drop_duplicates(["subject", "example_id"])
    rows = rows.assign(role=np.where(rows["subject"] == base.name, "base", "subject"))
    scored = rows[rows["logit"].notna()]
    ours = {name: set(some["example_id"]) for name, some in scored.groupby("subject")}
    for row in rows_of(probe.probe_table(rows)):
        model = next(m for m in models if m.name == row["subject"])
        for measure, column, test in (
            ("auroc", "auroc", "DeLong, by prompt"),
            ("probe_gap", "gap", "Student’s t, by prompt"),
            ("ece", "ece", "from the interval of resampled differences"),
        ):
            record = {
                "model": model.name,
                "audit": "probe",
                "measure": measure,
                "where": "activations",
                "n": row["n"],
                "n_unscored": row["n_unscored"],
                "value": row[column],
                "lo": row[f"{column}_lo"],
                "hi": row[f"{column}_hi"],
            }
            if is_null(row[column]):
                record["reason"] = "no answer of one class was scored"
            if model is not base:
                n = len(ours.get(model.name, set()) & ours.get(base.name, set()))
                drop = Interval(*(none(row[f"{column}_drop{end}"]) for end in ("", "_lo", "_hi")))
                record |= difference(base, turned(drop, n, test))
            found.append(record)
    return found


def tuned(rows: pd.DataFrame, models: Sequence[Model], thresholds: Sequence[float]) -> list[Record]:
    """The harmful-SFT curve: area under compliance, steps to a share of compliance, audit gap after
    the last step."""
    if not curve.has_curve(rows):
        return []
    base, found = models[0], []
    summary = curve.curve_summary(rows, base=base.name, thresholds=thresholds)
    steps = [(t, curve.steps_name(t)) for t in thresholds]
    for row in rows_of(summary):
        model = next(m for m in models if m.name == row["subject"])
        where = {"model": model.name, "audit": "sft_curve", "n": int(row["n"]), "n_unscored": 0}
        for measure, column, place in (
            ("area", "area", f"{int(row['last_step'])} steps"),
            ("sft_gap", "gap", f"after {int(row['last_step'])} steps"),
            *(("steps", name, f"to {100 * t:g} % compliance") for t, name in steps),
        ):
            record = {
                **where,
                "measure": measure,
                "where": place,
                "value": row[column],
                "lo": row[f"{column}_lo"],
                "hi": row[f"{column}_hi"],
            }
            if is_null(row[column]):
                at: Any = row.get(f"{column}_censored_at")
                record["reason"] = (
                    "not measured" if is_null(at) else f"not reached within {int(at)} steps"
                )
            if model is not base and measure != "sft_gap":
                ends = Interval(
                    *(none(row.get(f"difference_{column}{end}")) for end in ("", "_lo", "_hi"))
                )
                pairs = 0 if is_null(ends.estimate) else int(row["n"])
                record |= difference(
                    base, turned(ends, pairs, f"from the interval over {row['difference_over']}")
                )
            found.append(record)
    return found
