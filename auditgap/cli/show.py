"""What a finished run shows in the terminal: its tables, where everything lies, and the same as JSON.

    finish(store, outcome.failed, as_json=False)

An audit's own tables stand in `TABLES`; one that has none there (another package's) gets its main
table with every estimate beside its interval. Every table names the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from auditgap.cli.show_latent import more_of_latent, show_latent
from auditgap.errors import CouldNotTell, CriterionFailed, PartlyFailed
from auditgap.types import Document

if TYPE_CHECKING:
    import pandas as pd

    from auditgap.audits import Audit
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
    "latent": show_latent,
    "behaviour": _behaviour,
    "intervene": _interventions,
    "sft_curve": _curve,
}
#: Tables of an audit's JSON that no file of the folder holds.
MORE: Mapping[str, Callable[[RunFolder], dict[str, pd.DataFrame]]] = {"latent": more_of_latent}
