"""The commands of the command line as data: what a hint may name."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import typer
from typer.main import get_command

from auditgap.cli import app


def commands() -> dict[str, object]:
    """Every command and group by what is typed, such as `em run`; `""` is auditgap itself."""
    found: dict[str, object] = {}

    def walk(command: object, path: tuple[str, ...]) -> None:
        found[" ".join(path)] = command
        for name, sub in getattr(command, "commands", {}).items():
            walk(sub, (*path, name))

    walk(get_command(app), ())
    return found


TREE = commands()


def options(command: str, *, hidden: bool = True) -> set[str]:
    """What begins with a dash and is understood by a command."""
    found = {"--help"}
    for one in TREE[command].params:
        if hidden or not getattr(one, "hidden", False):
            found |= {word for word in (*one.opts, *one.secondary_opts) if word.startswith("-")}
    return found


def faults(line: str) -> Iterator[str]:
    """What of `auditgap …` does not exist: its command, or an option of that command."""
    try:
        words = shlex.split(line)[1:]
    except ValueError:
        words = line.split()[1:]
    path = ""
    while words and (longer := f"{path} {words[0]}".strip()) in TREE:
        path, words = longer, words[1:]
    if hasattr(TREE[path], "commands") and words and not words[0].startswith("-"):
        yield f"auditgap {path} has no command {words[0]!r}"
        return
    for word in words:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in options(path):
            yield f"auditgap {path} has no option {option}"


assert isinstance(app, typer.Typer)
