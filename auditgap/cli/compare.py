"""`auditgap compare`: models side by side, from the run folders of their audits. `auditgap
presets`: what comes with the package.

    auditgap compare --as base=runs/base --as twin=runs/twin --out runs/base-and-twin
    auditgap presets diff paper-v1 release
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from auditgap.cli.options import AsJson, examples, group
from auditgap.cli.screen import inert_lines, note, print_json, print_table, say
from auditgap.cli.show import complete
from auditgap.errors import UsageError

PANEL = "Runs and reports"
COMPARE_EXAMPLES = (
    "auditgap compare runs/base runs/twin --base ./base",
    "auditgap compare runs/pair runs/pair-probe runs/pair-curve",
    "auditgap compare --as base=runs/base --as twin=runs/twin --out runs/side-by-side",
)


def add(app: typer.Typer) -> None:
    app.command("compare", epilog=examples(COMPARE_EXAMPLES), rich_help_panel=PANEL)(compare)


def compare(
    folders: Annotated[
        list[str] | None,
        typer.Argument(
            help="Run folders of lvs, evaluate, probe, intervene, harmful-sft, or audit."
        ),
    ] = None,
    named: Annotated[
        list[str] | None,
        typer.Option(
            "--as",
            metavar="NAME=DIR",
            help="A name for a folder's one subject, or for a subject: NAME=SUBJECT",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Run that the others are compared with", show_default="base, or the first"
        ),
    ] = None,
    to: Annotated[
        Path, typer.Option("--out", help="Folder for compare.html and its tables")
    ] = Path("runs/compare"),
    only_compatible: Annotated[
        bool,
        typer.Option(
            "--only-compatible",
            help="Leave out runs with other settings than the base's, and say so.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare models side by side: Table 1 with intervals, differences paired by prompt (Holm's
    correction), and overlaid profiles."""
    from auditgap.audits.comparing import compare as comparison_of
    from auditgap.audits.findings import stores_in
    from auditgap.report import compare_page
    from auditgap.report.columns import on_screen
    from auditgap.report.compare_models import ROLES
    from auditgap.report.compare_tables import says, table_1

    names = _names(named or [])
    given = [store for folder in folders or [] for store in stores_in(folder)]
    there = {store.path.resolve() for store in given}
    also = [
        store for target in names.values() if _holds_runs(target) for store in stores_in(target)
    ]
    stores = [*given, *(store for store in also if store.path.resolve() not in there)]
    found = comparison_of(stores, named=names, base=base, only_compatible=only_compatible)
    page = compare_page.write(found, to)
    if as_json:
        print_json(compare_page.to_json(found))
        complete(stores)
        return
    for line in (*found.sides.left_out, *found.sides.warnings, *found.notes):
        note(f"Note: {inert_lines(line)}")
    for one in table_1(found):
        say(f"Layer-wise LVS at {on_screen(one.budget)} (*largest*, _smallest_ of a column)")
        titles = ("model", "emb", *ROLES[1:])
        print_table(
            [
                dict(zip(titles, (name, *(c.line() for c in cells)), strict=True))
                for name, cells in one.rows
            ]
        )
        for i, reason in enumerate(one.reasons, 1):
            say(f"  ({i}) {inert_lines(reason)}")
    for sentence in says(found):
        say(f"- {inert_lines(on_screen(sentence))}")
    say(f"Page: {page}\nTable: {to / 'compare.csv'}")
    complete(stores)


def _holds_runs(folder: str) -> bool:
    return (
        "://" in folder
        or any(Path(folder).glob("run.json"))
        or any(Path(folder).glob("*/run.json"))
    )


def _names(pairs: list[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for pair in pairs:
        name, equals, target = pair.partition("=")
        if not (name.strip() and equals and target):
            raise UsageError(
                f"--as takes NAME=DIR, for example --as base=runs/base; {pair!r} came."
            )
        if name in names:
            raise UsageError(f"--as {name} came twice; a name is one model's.")
        names[name] = target
    return names


presets = group(
    "Show and compare the presets that ship with auditgap (used with `--config preset:NAME`)."
)
Name = Annotated[str, typer.Argument(help="A preset, see `auditgap ls presets`.")]


@presets.command(epilog=examples(("auditgap presets diff paper-v1 release",)))
def diff(first: Name, second: Name, as_json: AsJson = False) -> None:
    """Show where two presets differ, and why."""
    from auditgap.report.presets import differences

    rows = differences(first, second)
    print_json(rows) if as_json else print_table(rows)


@presets.command(epilog=examples(("auditgap presets show paper-v1",)))
def show(name: Name, as_json: AsJson = False) -> None:
    """Show every choice of a preset, with its reason."""
    from auditgap.report.presets import choices, why

    rows = [
        {"choice": key, "value": value, "why": why(name, key)}
        for key, value in choices(name).items()
    ]
    print_json(rows) if as_json else print_table(rows)


@presets.command()
def page() -> None:
    """Print the contents of docs/presets.md."""
    from auditgap.report.presets import document

    print(document(), end="")
