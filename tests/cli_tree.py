"""The commands of the command line as data: what a hint may name."""

from __future__ import annotations

import re
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


def split(line: str) -> tuple[str, list[str]]:
    """`auditgap em run smollm2 --steps 2` as the command `em run` and its arguments, without what a
    shell does besides."""
    words = shlex.split(re.split(r" (?:>|&&|\|) ", line)[0])[1:]
    path = ""
    while words and (longer := f"{path} {words[0]}".strip()) in TREE:
        path, words = longer, words[1:]
    return path, words


def parsed(line: str) -> dict[str, object]:
    """What the command line reads of `auditgap …`, as it would before the command is called: every
    argument is there, and each is of its type. Raises click.ClickException."""
    path, words = split(line)
    command = TREE[path]
    # help is shown by a callback and ends the program, so it is not asked for
    words = [word for word in words if word != "--help"]
    return command.make_context(f"auditgap {path}", words).params


assert isinstance(app, typer.Typer)
