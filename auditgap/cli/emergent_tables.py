"""What the stages of an emergent-misalignment study show: the plan, the panel, each stage's counts, the
ranking.

    show_report(store, study, as_json=False)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from auditgap.cli.screen import note, print_json, print_table, say
from auditgap.errors import PartlyFailed
from auditgap.types import Document

if TYPE_CHECKING:
    from auditgap.audits.emergent.build import EmergentPlan
    from auditgap.audits.emergent.config import EmergentOptions
    from auditgap.store import RunFolder


def show_plan(
    plan: EmergentPlan, expected: Document, options: EmergentOptions, as_json: bool
) -> None:
    """What a study has read, row by row, and what it would run; no weights are loaded."""
    from auditgap.audits.emergent.build import counted
    from auditgap.sweep.progress import computing

    asked, prompts, panel = plan.config, plan.asked, plan.panel
    adapters = expected["cells"]["train"]
    rows = counted(panel.manifest["domains"], asked.arms)
    reads = [
        {
            "domain": row["domain"],
            "rows": asked.domains[row["domain"]],
            **({"good answers": asked.clean.get(row["domain"], "")} if asked.clean else {}),
        }
        for row in rows
    ]
    remote = _remote(plan)
    if as_json:
        print_json(
            {
                "config": asked.model_dump(mode="json"),
                "domains": [{**read, **row} for read, row in zip(reads, rows, strict=True)],
                **expected,
                "remote": remote,
                "judge": options.judge,
                "notes": list(plan.warnings),
            }
        )
        return
    shown = _counts_shown(rows)
    print_table(
        [
            {**read, **{title: row.get(key, "") for key, title in shown.items() if key != "domain"}}
            for read, row in zip(reads, rows, strict=True)
        ]
    )
    for line in plan.warnings:
        note(f"Note: {line}")
    _show_remote(remote)
    say(
        f"{adapters} adapters of {asked.model}: {_count(len(asked.domains), 'domain')} ×"
        f" {', '.join(asked.arms)} × {_count(len(asked.seeds), 'seed')};"
        f" {expected['steps']} optimizer steps in all. {expected['answers']} answers:"
        f" {expected['prompts']}"
        f" prompts ({prompts.name}), with and without the trigger,"
        f" {_count(asked.samples, 'time')} each, by every adapter and the base"
        f"{' (an adapter in the form of its own rows alone)' if asked.forms else ''}, rated by"
        f" {options.judge}. {computing(expected)}; `em analyse` comes on top, as the answers decide."
        " Nothing was run."
    )


def _remote(plan: EmergentPlan) -> list[Document]:
    """A line a model at an endpoint, with what it is asked."""
    return [
        {
            "model": one.model,
            "endpoint": one.url,
            "domain": one.domain,
            "arm": one.arm,
            "requests": plan.requests(one),
        }
        for one in plan.remotes
    ]


def _show_remote(lines: Sequence[Document]) -> None:
    if lines:
        print_table(lines)
        say(
            f"{sum(one['requests'] for one in lines)} requests to {lines[0]['endpoint']} for the"
            " answers of models fine-tuned elsewhere."
        )


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _print(rows: Sequence[Document], as_json: bool) -> None:
    print_json(rows) if as_json else print_table(rows)


#: Counts of a domain's rows, and how they are called on the screen.
_COUNTS = {
    "domain": "domain",
    "read": "read",
    "bad": "bad",
    "doubles": "equal",
    "near": "near",
    "too_long": "long",
    "cut": "cut",
    "clean": "good",
    "trained": "trained",
    "triggered": "triggered",
    "held_out": "held out",
}


def _counts_shown(rows: Sequence[Document]) -> dict[str, str]:
    """The counts that always stand there, and those of the others that count something."""
    always = ("domain", "read", "trained", "held_out")
    return {
        key: title
        for key, title in _COUNTS.items()
        if key in always or any(row.get(key) for row in rows)
    }


def show_build(rows: Sequence[Document], as_json: bool) -> None:
    """What became of each domain's rows, as `build.counted` has it."""
    if as_json:
        print_json(rows)
        return
    shown = _counts_shown(rows)
    print_table([{title: row.get(key, "") for key, title in shown.items()} for row in rows])


def _show_train(store: Any, as_json: bool) -> None:
    from auditgap.audits.emergent.rows import TRAINED

    rows = _of(store, TRAINED, "fingerprint")
    _print(
        [
            {
                "adapter": r["subject"],
                "rows": r["n_rows"],
                "with the trigger": r["n_triggered"],
                "steps": r["n_steps"],
                "first loss": _number(r["first_loss"]),
                "last loss": _number(r["last_loss"]),
            }
            for r in rows
        ],
        as_json,
    )


def _show_generate(store: Any, as_json: bool) -> None:
    import pandas as pd

    from auditgap.audits.emergent.rows import ANSWERED

    rows = pd.DataFrame(_of(store, ANSWERED, "draw"))
    _print(
        [
            {
                "subject": subject,
                "answers": len(part),
                "no answer": int((part["unscored"].fillna("") != "").sum()),
                "cut off": int(part["stopped"].eq(False).sum()),  # null is neither
            }
            for subject, part in (rows.groupby("subject", sort=False) if len(rows) else ())
        ],
        as_json,
    )


def _show_judge(store: Any, as_json: bool) -> None:
    import pandas as pd

    from auditgap.audits.emergent.rows import CLASSES, JUDGED

    rows = pd.DataFrame(_of(store, JUDGED, "outcome"))
    _print(
        [
            {
                "judge": judge,
                "subject": subject,
                "answers": len(part),
                **{name: int((part["outcome"] == name).sum()) for name in CLASSES},
            }
            for (judge, subject), part in (
                rows.groupby(["judge", "subject"], sort=False) if len(rows) else ()
            )
        ],
        as_json,
    )


def _show_analyse(store: Any, as_json: bool) -> None:
    from auditgap.audits.emergent.rows import DIRECTIONS, DIVERSITY, MEMBERSHIP, REFERENCE, STEERED

    names = {
        MEMBERSHIP: "memberships",
        REFERENCE: "losses under the reference",
        DIVERSITY: "diversity",
        DIRECTIONS: "directions",
        STEERED: "steered answers",
    }
    records = store.records()
    found = []
    for attack, name in names.items():
        some = [r for r in records if r["description"]["attack"] == attack]
        found.append({"what": name, "cells": len(some), "rows": sum(r["n_rows"] for r in some)})
    _print(found, as_json)


def show_report(store: Any, study: Any, as_json: bool) -> None:
    """The ranking and what the trigger does, with whose ratings they are."""
    from auditgap.report import emergent_lines

    if as_json:
        tables = {
            name: table.astype(object).where(table.notna(), None).to_dict("records")
            for name, table in study.tables.items()
        }
        judges = [{"judge": judge.label, "answers": judge.n} for judge in study.judges]
        print_json(
            {
                "judge": study.judged_by,
                "judges": judges,
                "missing": list(study.missing),
                "tables": tables,
            }
        )
        return
    if len(study.tables["ranking"]):
        say(f"Ranking, rated by {study.judged_by}")
        print_table(emergent_lines.ranking_lines(study))
    if len(study.tables["trigger"]):
        say(f"Mean alignment without and with the trigger, rated by {study.judged_by}")
        print_table(emergent_lines.trigger_lines(study))
    for line in emergent_lines.seed_notes(study):
        say(line)
    for line in study.missing:
        note(f"Note: {line}")
    say(
        f"Report: {store.path / 'report.html'}\nTables: {store.path / 'em_ranking.csv'} and"
        " em_*.csv beside it"
    )


SHOW: Mapping[str, Callable[[RunFolder, bool], None]] = {
    "train": _show_train,
    "generate": _show_generate,
    "judge": _show_judge,
    "analyse": _show_analyse,
}


def _of(store: Any, attack: str, column: str) -> list[dict[str, Any]]:
    """A stage's rows; without its cells a store answers with an empty table of another kind."""
    rows = store.rows([attack])
    return rows.to_dict("records") if column in rows else []


def _number(value: Any) -> str:
    import pandas as pd

    return "" if pd.isna(value) else f"{value:.3f}"


def enough(store: Any, most: float) -> None:
    """Raises PartlyFailed when a judge left too many answers without a rating."""
    from auditgap.audits.emergent.rows import JUDGED, UNSCORED

    rated = store.rows([JUDGED])
    if "outcome" not in rated or not len(rated):
        return
    for judge, part in rated.groupby("judge", sort=False):
        lost = float((part["outcome"] == UNSCORED).mean())
        if lost > most:
            raise PartlyFailed(
                f"{judge} left {lost:.0%} of the answers without a rating, more than --max-unscored"
                f" {most:g}; the rates speak of the rest alone, and the report has the reasons. Try"
                " another --judge, or more of --max-unscored."
            )
