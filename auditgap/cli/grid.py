"""`auditgap grid`, `submit` and `merge`: many audits as one sweep, on this machine or a cluster,
and their folders joined; and `auditgap status` of a grid.

    auditgap grid --config grid.yaml --out runs/grid --dry-run
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from auditgap.audits import AUDITS
from auditgap.audits.axes import GridAxes
from auditgap.cli.audits import long_run
from auditgap.cli.options import AsJson, Asked, command, examples
from auditgap.cli.screen import (
    answer,
    err,
    given,
    inert_lines,
    print_json,
    print_table,
    quiet,
    raise_failed,
    say,
)
from auditgap.errors import PartlyFailed, UsageError
from auditgap.types import Document

if TYPE_CHECKING:
    from auditgap.audits.grid import Case, Grid

Config = Annotated[
    Path,
    typer.Option(
        "--config",
        help="The grid: audit, models, prompts, budgets, vary, and any setting of the audit.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other key of the config."),
]

PANEL = "Many models and clusters"
GRID_EXAMPLES = (
    "auditgap grid --config grid.yaml --out runs/grid --dry-run",
    "auditgap grid --config grid.yaml --out /shared/runs/grid --executor ray --workers 8",
)


def add(app: typer.Typer) -> None:
    _add_grid(app)
    for name, act, lines in (
        ("submit", submit, SUBMIT_EXAMPLE),
        ("merge", merge, MERGE_EXAMPLE),
    ):
        app.command(name, epilog=examples(lines), rich_help_panel=PANEL)(act)


def _add_grid(app: typer.Typer) -> None:
    latent = AUDITS["latent"]

    @command(
        app,
        "grid",
        GridAxes,
        latent.config,
        latent.options,
        about=(
            "Run any audit over many models, prompt sets and settings in one sweep: a run folder and"
            " report for each case, and one table of all.\n\nThe file has the keys audit, models,"
            " prompts, budgets (of `lvs`), vary (a setting and its values), and any setting of the"
            " audit. The options below are those of `lvs`; set another audit's in the file or with"
            " --set."
        ),
        examples_of=GRID_EXAMPLES,
        leave=("name",),
        panel=PANEL,
        long=True,
    )
    def grid(asked: Asked) -> None:
        perform(asked)


def perform(asked: Asked) -> None:
    """Plan a grid, and either show the plan or run it. Raises PartlyFailed."""
    quiet()
    from auditgap.audits import grid
    from auditgap.store.remote import within
    from auditgap.sweep import Progress

    planned = grid.make_grid(grid.read_grid(asked.file, asked.flags))
    expected = grid.cost(planned)
    if asked.dry_run or not asked.as_json:
        _show(planned, expected, grid.repeated(asked.file, asked.flags), asked.as_json)
    if asked.dry_run:
        return
    if planned.options.executor == "local":  # on a cluster nobody sits and waits
        long_run(sum(guess.get("seconds", 0.0) for _, guess in expected), asked.yes)
    outcome = grid.run(planned, progress=lambda: Progress(console=err))
    folder = planned.folder
    raise_failed(outcome.failed, folder, len(planned.cells))
    table = within(folder, f"{planned.audit.main_table}.csv")
    reports = within(folder, "*", "report.html")
    answer(
        asked.as_json,
        f"Table: {table}\nReports: {reports}",
        folder=folder,
        table=str(table),
        reports=str(reports),
    )


SHOWN = 12  #: models whose place in the order is printed


def _case_row(case: Case, guess: Document) -> Document:
    """A case, and what it will take as far as its audit can tell."""
    row: Document = {"case": case.name, "models": len(case.plan.outlines)}
    if "prompts" in guess:
        row["prompts"] = guess["prompts"]
    row |= {"cells": len(case.plan.cells), "groups": sum(map(len, case.plan.passes))}
    if "seconds" in guess:
        row["seconds"] = round(guess["seconds"])
    if "memory_bytes" in guess:
        row["memory GB"] = round(guess["memory_bytes"] / 1e9, 1)
    return row


def _show(
    planned: Grid,
    expected: Sequence[tuple[Case, Document]],
    repeated: Mapping[str, int],
    as_json: bool,
) -> None:
    """What was asked twice, the cases with their cost, and the order in which models are taken
    up."""
    from auditgap.audits.grid import order
    from auditgap.sweep.progress import MEASURED_HERE, computing

    rows = [_case_row(case, guess) for case, guess in expected]
    models = order(planned)
    named = {name for case in planned.cases for name in getattr(case.config, "models", ())}
    twins = sorted(
        named - {outline.subject.name for case in planned.cases for outline in case.plan.outlines}
    )
    if as_json:
        groups = [{"group": group.name, "cells": len(group.cells)} for group in planned.groups]
        print_json(
            {
                "cases": rows,
                "cells": len(planned.cells),
                "repeated": repeated,
                "same weights": twins,
                "order": models,
                "groups": groups,
            }
        )
        return
    for what, times in repeated.items():
        say(f"{what} is asked for {times} times and counts once.")
    for name in twins:
        say(f"{name} has the weights of another model of the grid and is not run besides.")
    print_table(rows)
    say("\nIn this order; a worker keeps its model, and of each the dearest sites come first:")
    share = [f"{100 * one['work']:.0f} %" for one in models]
    print_table(
        [
            {**one, "work": work, "GPUs": one["GPUs"] or ""}
            for one, work in zip(models, share, strict=True)
        ][:SHOWN]
    )
    if len(models) > SHOWN:
        say(f"… and {len(models) - SHOWN} more")
    asked = sum(row["cells"] for row in rows)
    shared = (
        f" ({asked - len(planned.cells)} are shared by cases and run once)"
        if asked > len(planned.cells)
        else ""
    )
    total = {k: sum(guess.get(k, 0.0) for _, guess in expected) for k in MEASURED_HERE}
    long = f". {computing(total)}" if total["seconds"] else ""
    say(f"{len(planned.cells)} cells{shared}{long}.")


SUBMIT_EXAMPLE = (
    "auditgap submit --config grid.yaml --out /shared/runs/grid --address http://127.0.0.1:8265 --fetch tables",
)


def submit(
    config: Config,
    to: Annotated[
        str, typer.Option("--out", help="The grid's folder, on storage that every node sees.")
    ],
    address: Annotated[
        str | None,
        typer.Option(
            help="Address of the cluster's dashboard",
            show_default="RAY_ADDRESS, else this machine's",
        ),
    ] = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(
            help="A folder to ship to the cluster, with the config, prompts or auditgap itself"
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Number of Ray actors", show_default="as many as fit")
    ] = None,
    fetch: Annotated[
        Path | None,
        typer.Option(help="Local folder for the tables", show_default="they stay in --out"),
    ] = None,
    set_: Set = None,
) -> None:
    """Start `auditgap grid` as a Ray job, follow its log, and fetch the tables. The job keeps
    running if this command is stopped."""
    from auditgap.audits.grid import read_grid
    from auditgap.sweep import jobs

    # what is wrong with it is said here, not minutes later there
    read_grid(config, given(set_, out=to, workers=workers))
    if working_dir is not None and not working_dir.is_dir():
        raise UsageError(f"--working-dir {working_dir}: no such folder.")
    there = config
    if working_dir is not None and config.resolve().is_relative_to(working_dir.resolve()):
        there = config.resolve().relative_to(working_dir.resolve())
    words = ["grid", "--executor", "ray", "--config", str(there), "--out", to]
    words += [] if workers is None else ["--workers", str(workers)]
    words += [word for pair in set_ or () for word in ("--set", pair)]
    client = jobs.connect(address)
    code = jobs.run(client, ["python", "-m", "auditgap", *words], working_dir=working_dir, say=_say)
    if code not in (0, 3):
        raise SystemExit(code)
    if fetch is not None:
        for path in jobs.fetch(client, to, fetch, working_dir=working_dir):
            say(f"Fetched: {path}")
    if code == 3:
        raise PartlyFailed(f"Some cells of {to} failed; their causes stand in the log above.")


def _say(text: str) -> None:
    print(inert_lines(text.expandtabs()), end="\n" if text.endswith("\n") else "", flush=True)


MERGE_EXAMPLE = (
    "auditgap merge node1/runs/llama node2/runs/llama --out runs/llama",
    "auditgap merge node1/runs/grid node2/runs/grid --out runs/grid",
)


def merge(
    folders: Annotated[
        list[str], typer.Argument(help="Run folders of the same question, or the folders of grids.")
    ],
    to: Annotated[str, typer.Option("--out", help="Folder for the merged run.")],
    as_json: AsJson = False,
) -> None:
    """Merge runs of the same plan from several machines, and write the tables and reports of all
    cells; grids are merged case by case."""
    quiet()
    from auditgap.audits import reduce
    from auditgap.audits.grid import write_table
    from auditgap.store import cases_of, grid_status, merge_grids
    from auditgap.store import merge as join
    from auditgap.store.remote import within

    of_grids = any(map(cases_of, folders))
    stores = merge_grids(folders, to) if of_grids else {"": join(folders, to)}
    for store in stores.values():
        with store.lock():
            reduce(store)
    now = grid_status(stores)[1]
    where = within(to, "*", "report.html") if of_grids else within(to, "report.html")
    text = f"{now.finished} of {now.planned} cells, {now.failed} failed.\nReport: {where}"
    counts = {"finished": now.finished, "planned": now.planned, "failed": now.failed}
    if of_grids:
        table = write_table(to, stores)
        text += "" if table is None else f"\nTable: {within(to, table.name)}"
    answer(as_json, text, **counts, folder=to, report=str(where))


def show_status(folder: str, cases: Mapping[str, Any], as_json: bool) -> None:
    """`auditgap status` of a grid's folder: a line a case, and all of it."""
    from dataclasses import asdict

    from auditgap.store import RunFolder, grid_status
    from auditgap.sweep.progress import duration

    stores = {name: RunFolder.load(case) for name, case in cases.items()}
    each, total = grid_status(stores)
    failures = {
        name: {k: str(r.get("cause", "")) for k, r in store.failures().items()}
        for name, store in stores.items()
    }
    if as_json:
        shown = {
            name: {**asdict(status), "failures": failures[name]} for name, status in each.items()
        }
        print_json({**asdict(total), "cases": shown})
        return
    print_table(
        [
            {
                "case": name,
                "cells": s.planned,
                "done": s.finished,
                "failed": s.failed,
                "damaged": s.corrupt,
            }
            for name, s in each.items()
        ]
    )
    running = (
        f"running (pid {total.running.get('pid')} on {total.running.get('host')})"
        if total.running
        else "not running"
    )
    left = f", about {duration(total.eta_seconds)} left" if total.eta_seconds is not None else ""
    say(
        f"{folder}: {total.finished} of {total.planned} cells done, {total.failed} failed,"
        f" {running}{left}."
    )
    # cases may share a cell
    causes = {key: cause for some in failures.values() for key, cause in some.items()}
    for key, cause in causes.items():
        say(f"  {key}: {cause}")
