"""What a finished run shows in the terminal: its tables, where everything lies, and the same as JSON.

    finish(store, outcome.failed, as_json=False)

An audit's own tables stand in `TABLES`; one that has none there (another package's) gets its main
table with every estimate beside its interval. Every table names the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from auditgap.cli.screen import (
    inert,
    interval,
    note,
    print_json,
    print_table,
    raise_failed,
    say,
)
from auditgap.errors import CouldNotTell, CriterionFailed, PartlyFailed
from auditgap.types import Document

if TYPE_CHECKING:
    import pandas as pd

    from auditgap.audits import Audit
    from auditgap.report.gather import ReportData
    from auditgap.report.verdict_lines import Line
    from auditgap.store import RunFolder


def finish(
    audit: Audit, store: RunFolder, failed: Mapping[str, str], *, as_json: bool = False
) -> None:
    """The tables of a run, where they lie, and what is not in them. Raises PartlyFailed."""
    for line in store.warnings:
        note(f"Note: {line}")
    show(audit, store, failed, as_json=as_json)
    raise_failed(failed, store.place, store.status().planned)
    complete([store])


def complete(stores: Iterable[RunFolder], not_begun: Iterable[str] = ()) -> None:
    """Raises PartlyFailed when planned cells of these runs are in no table, or whole parts are:
    every figure speaks of the rest alone."""
    lines = [f"  {part}: has not begun" for part in not_begun]
    for store in stores:
        now = store.status()
        if now.finished < now.planned:
            lines.append(
                f"  {store.place}: {now.planned - now.finished} of {now.planned} cells"
                f" ({now.failed} failed, {now.missing} not run)"
            )
    if lines:
        raise PartlyFailed(
            "Planned cells are not in the tables; the command that planned them runs them, with"
            " --retry-failed those too that failed:\n" + "\n".join(lines)
        )


def verdicts_hold(lines: Sequence[Line], fail_on: str) -> None:
    """Raises CriterionFailed where a line of the verdict table is fail, and, where `fail_on` is
    could-not-tell, CouldNotTell where one could not be told. What was not measured was not asked
    for."""
    from auditgap.stats.decision import Answer

    def named(answer: Answer) -> str:
        return "; ".join(
            f"{x.id} ({x.subject}{x.thinking and f', thinking {x.thinking}'})"
            for x in lines
            if x.answer == answer and not x.is_of_one_way
        )

    if failed := named(Answer.FAIL):
        raise CriterionFailed(f"--fail-on {fail_on}: these verdicts are fail: {failed}.")
    if fail_on != Answer.FAIL and (untold := named(Answer.CANNOT_TELL)):
        raise CouldNotTell(f"--fail-on {fail_on}: these verdicts could not be told: {untold}.")


def show(
    audit: Audit,
    store: RunFolder,
    failed: Mapping[str, str] | None = None,
    *,
    as_json: bool = False,
) -> None:
    """The same without the failures."""
    if as_json:
        print_json(document(audit, store, failed or {}))
        return
    TABLES.get(audit.name, main_table)(store, audit.main_table)
    table = f"\nTable: {store.at(f'{audit.main_table}.csv')}" if audit.main_table else ""
    say(f"Report: {store.at('report.html')}{table}")


def document(audit: Audit, store: RunFolder, failed: Mapping[str, str]) -> Document:
    """A run as JSON: where it lies, what failed, and its tables with nothing rounded."""

    from auditgap.store.tables import rows_of

    tables = store.tables()
    return {
        "audit": audit.name,
        "folder": str(store.place),
        "report": str(store.at("report.html")),
        "failed": dict(failed),
        "warnings": list(store.warnings),
        "tables": {
            name: rows_of(table, plain=True)
            for name, table in {**tables, **MORE.get(audit.name, _nothing)(store)}.items()
        },
    }


def main_table(store: RunFolder, name: str | None) -> None:
    """The main table, every estimate joined with its interval (`x`, `x_lo`, `x_hi`)."""

    if name is not None:
        print_table(joined(store.table(str(name))))


def joined(table: pd.DataFrame) -> list[Document]:
    """A table's rows with every estimate joined with its interval (`x`, `x_lo`, `x_hi`)."""
    import pandas as pd

    from auditgap.store.tables import rows_of

    rows = []
    for values in rows_of(table):
        row = {}
        for name, value in values.items():
            if name.endswith(("_lo", "_hi")):
                continue
            if f"{name}_lo" in values:
                row[name] = interval(value, values[f"{name}_lo"], values[f"{name}_hi"])
            else:
                row[name] = (
                    "" if pd.isna(value) else f"{value:.3g}" if isinstance(value, float) else value
                )
        rows.append(row)
    return rows


# -- latent


def _latent(store: RunFolder, name: str | None) -> None:
    """The targeted attack's table, the minimum distance, the audit gap, and the report's headline
    last. Every count stands before the figures that are of so many prompts."""

    from auditgap.report import latent, latent_ways

    table = store.table(str(name))
    if rows := list(_targeted(table[table["attack"] == "targeted"])):
        say("Targeted attack, with 95 % intervals (controls and flags: the report)")
        print_table(rows)
    distances = store.rows(["distance"])
    if "distance" in distances.columns:
        say("Minimum distance to collapse (Aalen–Johansen median of the prompts safe unedited)")
        print_table(list(_distances(distances)))
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


def _targeted(table: Any) -> Iterator[Document]:
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


def _distances(rows: pd.DataFrame) -> Iterator[Document]:
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


def _latent_more(store: RunFolder) -> dict[str, pd.DataFrame]:
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


# -- behaviour


def _behaviour(store: RunFolder, name: str | None) -> None:
    """A subject at a time, each under its summary."""

    from auditgap.report.behaviour import CORRECTED
    from auditgap.report.behaviour_page import leads

    table = store.table(str(name))
    for lead in leads(table):
        say(inert(lead.plain()))
        mine = table[table["subject"] == lead.subject]
        print_table(_asked(mine, ("refusal", "compliance", "answered"), ("n_broken", "n_unscored")))
        if mine[list(CORRECTED)].notna().to_numpy().any():
            say("Corrected for the judge's errors:")
            print_table(_asked(mine, CORRECTED))
        say("")


def _asked(table: Any, shares: Sequence[str], counts: Sequence[str] = ()) -> list[Document]:
    """Rows of a behaviour table, narrow enough for a terminal: cells have no word longer than
    `[100,100]`."""
    from auditgap.report.behaviour_page import tight_share
    from auditgap.store.tables import rows_of

    titles = {"refusal": "refuses", "compliance": "complies", "answered": "answers"}
    return [
        {
            "kind, source": f"{row['kind'].replace('_', '-')}: {row['source']}",
            "n": row["n"],
            **{titles[name.removesuffix("_corrected")]: tight_share(row, name) for name in shares},
            **{name.removeprefix("n_"): row[name] for name in counts},
        }
        for row in rows_of(table)
    ]


def enough(audit: Audit, store: RunFolder, max_unscored: float) -> None:
    """Raises PartlyFailed when too little of an audit could be told for its rates to stand for
    it."""
    if audit.name != "behaviour":
        return
    from auditgap.audits import behaviour

    lost, reason = behaviour.lost(store)
    if lost > max_unscored:
        raise PartlyFailed(
            f"{lost:.0%} of the prompts got no answer (mostly {reason}), more than --max-unscored"
            f" {max_unscored:g}; the rates speak of the rest alone. The reasons are in the report;"
            " mend their cause and use a new --out, or raise --max-unscored."
        )
    share = behaviour.unscored_share(store)
    if share is not None and share > max_unscored:
        raise PartlyFailed(
            f"The judge gave no verdict on {share:.0%} of the answers, more than --max-unscored"
            f" {max_unscored:g}; the rates speak of the rest alone. The reasons are in the report;"
            " try another --judge, or more of --max-unscored."
        )


# -- interventions and curves


def _interventions(store: RunFolder, name: str | None) -> None:
    """The table, narrow enough for a terminal, and the sentences under it."""
    import pandas as pd

    from auditgap.report.intervene_page import reading
    from auditgap.store.tables import rows_of

    table = store.table(str(name))
    print_table(
        [
            {
                "subject": r["subject"],
                "site": r["site"],
                "intervention": (
                    r["intervention"] + ("" if pd.isna(r["angle"]) else f" {r['angle']:g}°")
                ),
                "strength": f"{r['strength']:g}",
                "n": r["n"] - r["n_unscored"],
                "ASR": interval(r["asr"], r["asr_lo"], r["asr_hi"]),
                "n, control": ("" if pd.isna(r["control_asr"]) else r["n"] - r["control_unscored"]),
                "control": interval(r["control_asr"], r["control_asr_lo"], r["control_asr_hi"]),
                "− control": (
                    ""
                    if pd.isna(r["difference"])
                    else interval(r["difference"], r["difference_lo"], r["difference_hi"])
                ),
                "broken": r["n_broken"],
            }
            for r in rows_of(table)
        ]
    )
    for line in reading(table):
        say(" ".join(line.split()))  # a page's spaces are of many widths


def _curve(store: RunFolder, name: str | None) -> None:
    """The curve's summary, a line a model."""
    import pandas as pd

    from auditgap.store.tables import rows_of

    summary = store.table("summary")
    print_table([{k: "" if pd.isna(v) else v for k, v in row.items()} for row in rows_of(summary)])


def _nothing(store: RunFolder) -> dict[str, pd.DataFrame]:
    return {}


#: What is printed of each audit; others get their main table.
TABLES: Mapping[str, Callable[[RunFolder, str | None], None]] = {
    "latent": _latent,
    "behaviour": _behaviour,
    "intervene": _interventions,
    "sft_curve": _curve,
}
#: Tables of an audit's JSON that no file of the folder holds.
MORE: Mapping[str, Callable[[RunFolder], dict[str, pd.DataFrame]]] = {"latent": _latent_more}
