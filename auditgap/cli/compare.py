"""`auditgap compare`: models side by side, from the run folders of their audits. `auditgap
presets`: what comes with the package.

    auditgap compare --as base=runs/base --as twin=runs/twin --out runs/base-and-twin
    auditgap presets diff paper-v1 release
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from auditgap.audits.settings import CompareSettings
from auditgap.cli.options import AsJson, Asked, command, examples, group
from auditgap.cli.screen import inert_lines, note, print_json, print_table, say
from auditgap.cli.show import complete
from auditgap.config import build, merged

if TYPE_CHECKING:
    from auditgap.audits.comparing import Compared

PANEL = "Runs and reports"
COMPARE_EXAMPLES = (
    "auditgap compare runs/base runs/twin --base ./base",
    "auditgap compare runs/pair runs/pair-probe runs/pair-curve",
    "auditgap compare --as base=runs/base --as twin=runs/twin --out runs/side-by-side",
)


def add(app: typer.Typer) -> None:
    @command(
        app,
        "compare",
        CompareSettings,
        about=(
            "Compare models side by side: Table 1 with intervals, differences paired by prompt"
            " (Holm's correction), and overlaid profiles."
        ),
        examples_of=COMPARE_EXAMPLES,
        panel=PANEL,
        plans=False,
    )
    def compare(asked: Asked) -> None:
        from auditgap.audits import comparing

        (settings,) = build(merged(asked.file, asked.flags), CompareSettings)
        done = comparing.run(settings)
        if asked.as_json:
            from auditgap.report.compare_page import to_json

            print_json(to_json(done.found))
        else:
            _show(done)
        complete(done.stores)


def _show(done: Compared) -> None:
    """Table 1, what the differences say, and where the page is."""
    from auditgap.report.columns import on_screen
    from auditgap.report.compare_models import ROLES
    from auditgap.report.compare_tables import says, table_1

    found = done.found
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
    say(f"Page: {done.page}\nTable: {done.page.with_suffix('.csv')}")


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
