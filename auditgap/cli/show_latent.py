"""What a latent audit shows in the terminal: the targeted attack by site, distances, and the audit gap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from auditgap.cli.screen import inert, interval, print_table, say
from auditgap.types import Document

if TYPE_CHECKING:
    import pandas as pd

    from auditgap.report.gather import ReportData
    from auditgap.report.verdict_lines import Line
    from auditgap.store import RunFolder


def show_latent(store: RunFolder, name: str | None) -> None:
    """The targeted attack's table, the minimum distance, the audit gap, and the report's headline
    last. Every count stands before the figures that are of so many prompts."""

    from auditgap.report import latent, latent_ways

    table = store.table(str(name))
    if rows := list(targeted(table[table["attack"] == "targeted"])):
        say("Targeted attack, with 95 % intervals (controls and flags: the report)")
        print_table(rows)
    distances = store.rows(["distance"])
    if "distance" in distances.columns:
        say("Minimum distance to collapse (Aalen–Johansen median of the prompts safe unedited)")
        print_table(list(distances_shown(distances)))
    report = _latent_report(store, table)
    if len(report.gaps):
        say("Audit gap by budget: shares of the prompts, with 95 % intervals")
        print_table(list(_gaps(report.gaps)))
    if ways := latent_ways.gap_lines(report):
        say(f"{latent_ways.TITLE}: a model's is the worst of them")
        print_table(list(_ways(ways)))
    for lead in latent.leads(report):
        say(inert(lead.plain()))


def _gaps(table: Any) -> Iterator[Document]:
    for r in table.itertuples():
        yield {
            "subject": r.subject,
            "eps": f"{r.eps:g} {r.unit}",
            "n": r.n,
            "at risk": r.n_at_risk,
            "safe": interval(r.safety, r.safety_lo, r.safety_hi),
            "robust": interval(r.robustness, r.robustness_lo, r.robustness_hi),
            "gap": interval(r.gap, r.gap_lo, r.gap_hi),
            "excess gap": interval(r.excess, r.excess_lo, r.excess_hi),
            "site": r.worst_site,
        }


def targeted(table: Any) -> Iterator[Document]:
    corrected = bool(table["asr_corrected"].notna().any())
    for r in table.itertuples():
        row = {
            "subject": r.subject,
            "site": r.site,
            "eps": f"{r.eps:g} {r.unit}",
            "n": r.n - r.n_unscored,
            "LVS": interval(r.lvs_mean, r.lvs_mean_lo, r.lvs_mean_hi),
            "− matched": interval(r.delta_vs_matched, r.delta_lo, r.delta_hi),
            "judged": r.n_judged,
            "ASR": interval(r.asr, r.asr_lo, r.asr_hi),
        }
        if corrected:
            row["ASR, corrected"] = interval(
                r.asr_corrected, r.asr_corrected_lo, r.asr_corrected_hi
            )
        yield {**row, "broken": r.n_broken}


def distances_shown(rows: pd.DataFrame) -> Iterator[Document]:
    """The median over the prompts that were safe with no edit, and how many were not."""
    import pandas as pd

    from auditgap.report import tables
    from auditgap.store.tables import groups_of

    unedited = rows["collapsed"].eq(True).fillna(False) & rows["distance"].eq(0)
    medians = {
        (r.subject, r.site, r.unit): r for r in tables.distance_table(rows[~unedited]).itertuples()
    }
    for key, part in groups_of(rows.assign(unedited=unedited), ["subject", "site", "unit"]):
        found: Any = medians.get(key)
        n_unedited = int(part["unedited"].sum())
        if found is None:
            median, collapsed, unscored = "none was safe", "0 of 0", 0
        else:
            # measured, and above everything that was tried
            beyond = pd.isna(found.median) and found.n > found.n_unscored
            median = "not reached" if beyond else interval(found.median, found.lo, found.hi, ".3g")
            collapsed, unscored = f"{found.n_collapsed} of {found.n}", found.n_unscored
        yield {
            "subject": key[0],
            "site": key[1],
            "median eps": median,
            "collapsed": collapsed,
            "harmful unedited": n_unedited,
            "could not tell": unscored,
        }


def _ways(lines: Sequence[Line]) -> Iterator[Document]:
    for line in lines:
        told = line.describe()
        yield {
            "subject": told["subject"],
            "verdict": told["answer"],
            "gap": told["figure"],
            "why": told["reason"],
        }


def _latent_report(store: RunFolder, table: pd.DataFrame) -> ReportData:
    """What a report of the folder has of the audit gap and of the verdicts on it."""
    from auditgap.api import Result
    from auditgap.report import correction, strength
    from auditgap.report.gather import ReportData

    return ReportData(
        title="",
        gaps=Result(store.path, {}).gaps,
        lvs=table,
        strength=strength.strength_table([store]),
        cards=correction.cards_in(store.info),
        corrections=correction.of_runs([store]),
    )


def more_of_latent(store: RunFolder) -> dict[str, pd.DataFrame]:
    """What the report adds to the main table: the audit gap, the verdicts on it by way of thinking
    where there are several, and the minimum distance."""

    from auditgap.api import Result
    from auditgap.report import latent_ways
    from auditgap.report.verdict_lines import table_of

    report = _latent_report(store, store.table("lvs"))
    ways, distances = latent_ways.gap_lines(report), Result(store.path, {}).distances
    return {
        "audit_gap": report.gaps,
        **({"thinking": table_of(ways)} if ways else {}),
        **({"distance": distances} if len(distances.columns) else {}),
    }
