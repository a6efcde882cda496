"""`auditgap gate`: whether a run passes a policy, as an exit code for a pipeline.

auditgap gate runs/new --baseline runs/old --policy gate.yaml
"""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from auditgap.cli.options import AsJson, examples
from auditgap.cli.screen import note, print_json, print_table, say
from auditgap.errors import CouldNotTell, CriterionFailed, UsageError
from auditgap.report.exports import EXPORTS

PANEL = "Runs and reports"
EXAMPLES = (
    "auditgap gate runs/new --policy gate.yaml",
    "auditgap gate runs/new --baseline runs/old --policy gate.yaml --out-sarif gate.sarif"
    " --out-junit gate.xml",
)
#: The option of each export format.
OUTS = {f"out_{name.replace('-', '_')}": name for name in EXPORTS}


def add(app: typer.Typer) -> None:
    """The command, with an option for each export format."""
    own = inspect.signature(gate, eval_str=True).parameters.values()
    outs = [
        inspect.Parameter(
            option,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                Path | None,
                typer.Option(metavar="FILE", help=f"Write {EXPORTS[name].description}."),
            ],
        )
        for option, name in OUTS.items()
    ]
    signature = [one for one in own if one.kind != inspect.Parameter.VAR_KEYWORD]

    def run(**values: Any) -> None:
        gate(**values)

    run.__signature__ = inspect.Signature([*signature, *outs])  # type: ignore[attr-defined]
    run.__doc__ = gate.__doc__
    app.command("gate", epilog=examples(EXAMPLES), rich_help_panel=PANEL)(run)


def gate(
    run: Annotated[str, typer.Argument(help="The folder of an audit, or of a whole audit.")],
    policy: Annotated[
        Path | None,
        typer.Option(
            help="YAML with the sections verdicts, not_worse, accept_screening (`auditgap examples"
            " gate` copies one)",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The folder of the run that not_worse compares with")
    ] = None,
    subject: Annotated[
        str | None, typer.Option(help="Which model, where the run has several")
    ] = None,
    as_json: AsJson = False,
    **files_of: Path | None,
) -> None:
    """Judge a finished run by a policy: lines of its verdict table, and not worse than an earlier
    run. Exits with 0 if all criteria pass, 1 if one fails, 5 if none fails and one could not be
    told."""
    from auditgap.audits.findings import opened
    from auditgap.audits.gate import judge, read_policy
    from auditgap.stats.decision import Answer

    if policy is None:
        raise UsageError(
            "Which policy? auditgap examples gate copies one; then: auditgap gate"
            f" {shlex.quote(run)} --policy examples/gate/gate.yaml"
        )
    asked = read_policy(policy)
    found = judge(
        opened(run), asked, None if baseline is None else opened(baseline), subject=subject
    )
    for option, path in files_of.items():
        if path is not None:
            EXPORTS[OUTS[option]].write(found, path)
    if as_json:
        print_json(found.describe())
    else:
        for line in found.notes:
            note(f"Note: {line}")
        print_table(
            [
                {
                    "criterion": line["id"],
                    "verdict": line["answer"],
                    "figure": line["figure"],
                    "why": line["why"],
                }
                for line in ({**one.describe(), "why": one.why} for one in found.lines)
            ]
        )
        say(found.sentence)
    if found.answer == Answer.FAIL:
        raise CriterionFailed(f"{run} does not pass {policy}.")
    if found.answer != Answer.PASS:
        raise CouldNotTell(f"Whether {run} passes {policy} could not be told.")
