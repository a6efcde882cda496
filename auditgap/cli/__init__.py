"""The command line: joins the parts and says what they said. No measurement happens here.

    auditgap lvs smollm2 --prompts harmbench --limit 16 --out runs/smollm2

The audits' commands are made from their configs (`options`, `audits`); help, defaults and types
stand there. Building the app imports no torch. Exit codes: 0 done, 1 a verdict is fail (`gate`,
`--fail-on`), 2 bad usage, 3 partly failed, 4 refused for safety, 5 a verdict could not be told
(likewise), 130 interrupted, 141 nobody read the answer to its end.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import typer
from rich.text import Text

from auditgap import __version__
from auditgap.cli import (
    audits,
    compare,
    data,
    emergent,
    evidence,
    first,
    gate,
    grid,
    judges,
    lists,
    runs,
    training,
    whole,
)
from auditgap.cli.options import group
from auditgap.cli.screen import err, inert_lines
from auditgap.errors import AuditgapError, Interrupted, interruptible

app = group(
    "Measure the audit gap of language models: behavioural safety minus robustness under bounded"
    " edits."
)
first.add(app)
whole.add(app)
audits.add(app, leave={"em"})
runs.add(app)
compare.add(app)
evidence.add(app)
gate.add(app)
training.add(app)
grid.add(app)
lists.add(app)
app.add_typer(emergent.app, name="em", rich_help_panel=audits.PANEL)
app.add_typer(training.app, name="train", rich_help_panel=training.PANEL)
app.add_typer(data.app, name="data", rich_help_panel=lists.PANEL)
app.add_typer(judges.app, name="judge", rich_help_panel=lists.PANEL)
app.add_typer(compare.presets, name="presets", rich_help_panel=lists.PANEL)


def _without_line_breaks(commands: typer.Typer) -> None:
    """Has the help of every command break where the terminal ends, and not where its source does."""
    for one in commands.registered_commands:
        told = inspect.getdoc(one.callback) if one.callback else None
        one.help = re.sub(r"(?<!\n)\n(?!\n)", " ", one.help or told or "")
    for within in commands.registered_groups:
        if within.typer_instance is not None:
            _without_line_breaks(within.typer_instance)


_without_line_breaks(app)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit()


def main(args: Sequence[str] | None = None) -> None:
    """The entry point: every error a user can mend is a sentence on stderr and an exit code, never
    a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if (again := getattr(stream, "reconfigure", None)) is not None:
            again(errors="replace")  # a terminal that cannot show ε still gets its table
    try:
        with interruptible():
            code = app(args, prog_name="auditgap", standalone_mode=False) or 0
            if code == Interrupted.exit_code:  # typer's word for Ctrl-C, and for GOODBYES
                raise Interrupted
            if sys.stdout is not None:  # as it is where a shell closed it: `>&-`
                sys.stdout.flush()  # a reader that has left is met here, not after the exit code
            sys.exit(code)
    except AuditgapError as error:
        err.print(Text(inert_lines(str(error))), style="red" if err.is_terminal else None)
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(Interrupted.exit_code)  # a question was not answered
    except BrokenPipeError:
        if sys.stdout is not None:  # what it still holds is not to meet the pipe at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)  # as a shell says SIGPIPE, which is no verdict
    except Exception as error:
        if not callable(show := getattr(error, "show", None)):
            raise
        show()  # click's own usage errors; typer carries its own copy of their classes
        sys.exit(2)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # Rust's, in a library: no Exception
            raise
        err.print(Text(inert_lines(f"A library failed on what it was given: {str(error)[:300]}")))
        sys.exit(2)
