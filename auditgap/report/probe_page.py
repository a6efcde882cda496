"""The probe audit on the page: histograms, sentences, tables, the terms.

sections(gathered)[0].title
reading(table)[0]           # what the fixed probe says of each subject, a sentence
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from auditgap.report import svg
from auditgap.report.charts import Axis, Bar, Figure, bars, numbers
from auditgap.report.columns import Column, count, word
from auditgap.report.section import Facts, Findings, Heading, Prose, Section, Table, code, silent
from auditgap.report.text import is_null, number, percent, with_interval
from auditgap.stats import Interval
from auditgap.store.tables import rows_of

if TYPE_CHECKING:
    from auditgap.report.gather import ReportData
from auditgap.report.probe import BASELINES, FLAGS, doubts, floats, probe_table, subjects_of

_STYLES = {"safe": svg.Style("k1", "", "circle"), "unsafe": svg.Style("k0", "", "square")}


_BINS = 20


def histograms(probes: Sequence[pd.DataFrame]) -> Figure:
    """Calibrated scores of safe and unsafe answers of the evaluation split: one drawing a subject,
    shares of their class.

    `probes`: the rows of each probe audit; a subject that several of them read is drawn once.
    """
    name, title = "probe_scores", "Scores of the fixed probe"
    caption = (
        f"Share of safe and of unsafe answers in each of {_BINS} equal bins of the calibrated"
        " score, on prompts that the probe has not seen. Base first; the probe and its calibration"
        " are the base's in every drawing."
    )
    data = pd.concat([_bins(rows) for rows in probes] or [_bins(pd.DataFrame())], ignore_index=True)
    data = data.drop_duplicates(["subject", "answers", "from"], ignore_index=True)
    if data.empty:
        return Figure(name, title, caption, data=data, missing="No answer was scored by the probe.")
    x = Axis(0.0, 1.0, "calibrated score", [(v, f"{v:g}") for v in (0, 0.25, 0.5, 0.75, 1)])
    y = numbers(0.0, float(data["share"].max()), "answers", percent)
    groups = []
    for s, (subject, part) in enumerate(data.groupby("subject", sort=False)):
        counts = {
            label: int(part.loc[part["answers"] == label, "count"].sum()) for label in _STYLES
        }
        panel = bars(
            [_bar(row) for row in rows_of(part[part["share"] > 0])],
            x,
            y,
            title=f"{title}, {subject}",
            desc="; ".join(f"{label}: {n} answers" for label, n in counts.items()),
            key=f"{name}-{s}",
        )
        groups.append((str(subject), (panel,)))
    legend = svg.legend([(s, f"{label} answers") for label, s in _STYLES.items()], filled=True)
    return Figure(name, title, caption, tuple(groups), legend, data)


def _bins(rows: pd.DataFrame) -> pd.DataFrame:
    found = []
    if len(rows) and "split" in rows:
        rows = rows[(rows["split"] == "evaluation") & rows["probability"].notna()]
        for subject in subjects_of(rows):
            for value, label in ((0, "safe"), (1, "unsafe")):
                p = floats(
                    rows.loc[(rows["subject"] == subject) & (rows["label"] == value), "probability"]
                )
                counts = np.bincount(
                    np.minimum((p * _BINS).astype(int), _BINS - 1), minlength=_BINS
                )
                found += [
                    {
                        "subject": subject,
                        "answers": label,
                        "from": i / _BINS,
                        "to": (i + 1) / _BINS,
                        "count": int(c),
                        "share": c / max(len(p), 1),
                    }
                    for i, c in enumerate(counts)
                ]
    return pd.DataFrame(found, columns=["subject", "answers", "from", "to", "count", "share"])


def _bar(row: Mapping[str, Any]) -> Bar:
    """Safe answers in the left half of a bin, unsafe ones in the right: side by side, neither hides
    the other."""
    label, middle = row["answers"], (row["from"] + row["to"]) / 2
    left, right = (row["from"], middle) if label == "safe" else (middle, row["to"])
    tip = (
        f"{label}, score {row['from']:g} to {row['to']:g}: {row['count']} answers,"
        f" {percent(row['share'])}"
    )
    return Bar(left, right, row["share"], style=_STYLES[label], tip=tip)


def reading(table: pd.DataFrame) -> list[str]:
    """What the table says, a sentence a subject."""
    said = []
    for row in rows_of(table):
        name, who = row["subject"], "the base" if row["role"] == "base" else "a subject"
        if is_null(row["auroc"]):
            said.append(
                f"{name} ({who}): the probe could not be tested, no answer of one class was scored."
            )
            continue
        parts = [
            f"AUROC {_with(row, 'auroc')}",
            f"gap {_with(row, 'gap')}",
            f"ECE {_with(row, 'ece')}",
        ]
        line = f"{name} ({who}): {', '.join(parts)}, on {row['n_prompts']} prompts."
        if not is_null(row["auroc_drop"]):
            line += (
                f" Base minus subject: AUROC {_with(row, 'auroc_drop')}, gap"
                f" {_with(row, 'gap_drop')}."
            )
        said.append(line)
    return said


def _with(row: Mapping[str, Any], key: str) -> str:
    return with_interval(row[key], row[f"{key}_lo"], row[f"{key}_hi"], number)


SAYS_NOT = (
    (
        "A score that fell does not show that the model behaves worse; it shows that what the base"
        " represents of harm is no longer where the probe looks for it."
    ),
    (
        "A score that did not fall does not show that nothing has changed: a linear probe of mean"
        " activations sees a part."
    ),
)


def says(probes: Sequence[pd.DataFrame]) -> list[tuple[str, list[str]]]:
    """The reading of each probe audit, as the page's reading section takes it; empty where there is
    none."""
    return [("", reading(table)) for table in map(probe_table, probes) if not table.empty]


def header(probes: Sequence[pd.DataFrame]) -> list[str]:
    """What a page without a latent audit says of the probe under its title; [] without a probe
    audit."""
    read = [rows[rows["split"] == "evaluation"] for rows in probes]
    n = sum(part["example_id"].nunique() for part in read)
    return [f"{n} answers read by a fixed probe"] if n else []


_INTRO = (
    "A linear probe was fitted on the base’s activations to tell unsafe answers from safe ones, and"
    " never touched again. Here it reads the base and what was made of it, on the same answers to"
    " prompts that it has not seen."
)


_TERMS = (
    (
        "Safe–unsafe gap",
        (
            "mean calibrated score of unsafe answers minus that of safe ones; scores are calibrated"
            " on the base alone (Platt’s scaling, on the prompts that chose the probe’s epoch)"
        ),
    ),
    (
        "ECE",
        (
            "expected calibration error over 15 bins of equal width; beside it what a perfectly"
            " calibrated probe with these scores would show at this n"
        ),
    ),
    (
        "Intervals",
        (
            "95\u00a0%, by prompt: AUROC after DeLong, on the logit scale; gap with Student’s t;"
            " ECE by inverting a simulated test"
        ),
    ),
)


def table_of(probes: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The tables of several probe audits as one."""
    made = [table for table in map(probe_table, probes) if not table.empty]
    return pd.concat(made, ignore_index=True) if made else probe_table(pd.DataFrame())


def warnings(table: pd.DataFrame) -> list[str]:
    """What the bases' baselines give cause to doubt."""
    said = []
    for row in rows_of(table[table["role"] == "base"]):
        known = {
            m: Interval(*(_none(row[f"{m}{end}"]) for end in ("", "_lo", "_hi")))
            for m in ("auroc", *(f"{b}_auroc" for b in BASELINES))
        }
        said += doubts(known["auroc"], {b: known[f"{b}_auroc"] for b in BASELINES})
    return said


def sections(report: ReportData) -> list[Section]:
    """What a fixed probe reads."""
    table = table_of(report.probes)
    if table.empty:
        return [silent("probe", probe=table)]
    flags = {flag for flags in table["flag"] for flag in str(flags).split()}
    bases = rows_of(table[table["role"] == "base"])
    lost = Table("probe", "Base minus subject, paired by prompt", table, DROPS, of=_others)
    return [
        Section(
            id="probe",
            title="A fixed probe of the base",
            contents="Fixed probe",
            blocks=(
                Prose(_INTRO),
                Findings(),
                *(Prose(line, "warn") for line in warnings(table)),
                Table("probe", "The fixed probe by subject", table, PROBE_READ),
                *((Heading("Base minus subject"), lost) if len(_others(table)) else ()),
                Heading("Three probes that should lose"),
                Table(
                    "probe_baselines",
                    "Baselines on the base",
                    baseline_table(bases),
                    BASELINES_READ,
                ),
                histograms(report.probes),
                Facts((*_TERMS, *((code(f), what) for f, what in FLAGS.items() if f in flags))),
            ),
            findings=says(report.probes),
            limits=SAYS_NOT,
            facts=header(report.probes),
        )
    ]


def _others(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["role"] != "base"]


def _none(value: Any) -> float | None:
    return None if is_null(value) else float(value)


_NAME = word("subject", "Subject")


#: `probe_table` as it is read, and what of it stands in a table of its own: what subjects lost, and
#: the baselines.
PROBE_READ: tuple[Column, ...] = (
    _NAME,
    word("role", "Role"),
    count("n", "n"),
    count("n_prompts", "Prompts"),
    count("n_unscored", "Unscored"),
    Column("auroc", "AUROC"),
    Column("gap", "Safe–unsafe gap"),
    Column("ece", "ECE"),
    Column("ece_by_chance", "ECE if calibrated"),
    word("flag", "Flags", css="key", null=""),
)


DROPS: tuple[Column, ...] = (
    _NAME,
    Column("auroc_drop", "AUROC"),
    Column("gap_drop", "Gap"),
    Column("ece_drop", "ECE"),
)


BASELINES_READ: tuple[Column, ...] = (
    word("subject", "Base"),
    word("what", "Baseline"),
    Column("auroc", "AUROC"),
)


def baseline_table(base: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A row a base and baseline, from the bases' rows of `probe_table`."""
    rows = [
        {
            "subject": row["subject"],
            "what": words,
            **{f"auroc{end}": row[f"{b}_auroc{end}"] for end in ("", "_lo", "_hi")},
        }
        for row in base
        for b, words in BASELINES.items()
    ]
    return pd.DataFrame(rows, columns=["subject", "what", "auroc", "auroc_lo", "auroc_hi"])
