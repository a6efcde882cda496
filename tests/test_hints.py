"""Every hint that a message prints can be typed: the commands and options that it names exist, and an
example runs as far as its config is read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from cli_tree import TREE, faults, options, parsed, split
from docs_world import FILES, MODELS

from auditgap.audits import AUDITS
from auditgap.cli import main

PACKAGE = Path(__file__).parents[1] / "auditgap"
#: `auditgap …` where something to type begins: in backticks, after a colon, or first in a text.
COMMAND = re.compile(r"(?:(?<=`)|(?<=: )|^)auditgap ([^`\n;]*)")
OPTION = re.compile(r"(?<![\w/-])--[a-z][a-z0-9_-]*")
#: Options of other programs that a message or a command line of ours names.
THEIRS = {
    "--k": "a property of the report's style sheet",
    "--no-deps": "pip",
    "--object-store-memory": "ray",
    "--input_folder": "DeepSpeed's converter",
    "--output_folder": "DeepSpeed's converter",
    "--num_extract_workers": "DeepSpeed's converter",
    "--num_merge_workers": "DeepSpeed's converter",
    "--inject_missing_state": "DeepSpeed's converter",
    "--num_gpus": "the deepspeed launcher",
    "--master_port": "the deepspeed launcher",
    "--module": "the deepspeed launcher",
    "--no_local_rank": "the deepspeed launcher",
    "--include": "the deepspeed launcher",
    "--local_rank": "the deepspeed launcher",
    "--log-dir": "inspect view",
}
#: Who alone prints the texts of these files: there, an option is one of this command's.
PRINTED_BY = {"report/verdicts.py": "audit", "audits/whole.py": "audit"}


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """The string literals of a file but for docstrings; what is filled in reads X."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skip = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    skip |= {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (str(v.value) if isinstance(v, ast.Constant) else "X" for v in node.values)
            yield node.lineno, "".join(parts)
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skip
        ):
            yield node.lineno, node.value


HINTS = {
    f"{file.relative_to(PACKAGE).as_posix()}:{line}": text
    for file in sorted(PACKAGE.rglob("*.py"))
    for line, text in texts(file)
}


def typed(text: str) -> Iterator[str]:
    for found in COMMAND.finditer(text):
        # a sentence may go on behind the command
        line = re.split(r"[.,)] |[.,)]$| or | && | \(", found[1])[0].rstrip(".,)")
        words = line.split()
        if words and (words[0] in TREE or (found.start() and text[found.start() - 1] == "`")):
            yield f"auditgap {line}"


def test_every_command_that_a_message_names_exists():
    lines = {where: line for where, text in HINTS.items() for line in typed(text)}
    wrong = [
        f"{where}: {fault}"
        for where, line in lines.items()
        if "X" not in line.split()[1:3]  # the command itself is filled in
        for fault in faults(line)
    ]
    assert len(lines) >= 40 and not wrong, "\n".join(wrong)


def test_every_option_that_a_message_names_exists():
    anywhere = set().union(*map(options, TREE)) | set(THEIRS)
    wrong = []
    for where, text in HINTS.items():
        command = PRINTED_BY.get(where.partition(":")[0])
        known = anywhere if command is None else options(command)
        wrong += [f"{where}: {word}" for word in OPTION.findall(text) if word not in known]
    assert not wrong, "\n".join(wrong)


def test_a_wrong_hint_is_found():
    assert list(faults("auditgap audit ./m --distance"))
    assert list(faults("auditgap em rate runs/em"))
    assert not list(faults("auditgap em judge runs/em --judge alignment=./judge"))


def whole(line: str) -> bool:
    """Whether a line is to be typed as it stands: nothing is filled in, and it is no mere name of a
    command."""
    path, words = split(line)
    command = TREE[path]
    wants = [p for p in command.params if p.param_type_name == "argument" and p.required]
    return not hasattr(command, "commands") and "…" not in line and len(words) >= len(wants)


LINES = sorted({line for text in HINTS.values() for line in typed(text) if "X" not in line.split()})
WHOLE = [line for line in LINES if whole(line)]


def test_every_command_that_a_message_prints_is_read_with_its_arguments():
    wrong = []
    for line in WHOLE:
        try:
            parsed(line)
        except click.ClickException as error:
            wrong.append(f"{line}: {error.format_message()}")
    assert len(WHOLE) >= 60 and not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with what the printed commands name: models, rows, triples."""
    folder = tmp_path_factory.mktemp("hints")
    for name, make in MODELS.items():
        if name.startswith("./"):
            make(folder / name)
    for name, text in FILES.items():
        (folder / name).write_text(text, "utf-8")
    return folder


#: What is looked at here: what only shows something, and what has a dry run. Left out is what wants
#: another machine, a run that was made before, or a model of many GB.
SHOWS = ("ls", "schema", "presets")
ELSEWHERE = re.compile(r"vllm|https?:|meta-llama|ensemble|--suite|--config (?!preset:)|/shared")


def is_cheap(path: str, words: list[str]) -> bool:
    if path.split()[0] in SHOWS:
        return True
    names_a_model = any("base" in w or w == "smollm2" or w.startswith("./") for w in words)
    return "--dry-run" in options(path) and names_a_model


CHEAP = [line for line in WHOLE if not ELSEWHERE.search(line) and is_cheap(*split(line))]


@pytest.mark.parametrize("line", CHEAP)
def test_a_printed_command_runs_as_far_as_its_plan(line, world, monkeypatch, capsys):
    path, words = split(line.replace("smollm2", "./base").replace("./subject", "./twin"))
    if "--dry-run" in options(path):
        words += ["--dry-run"]
    monkeypatch.chdir(world)
    with pytest.raises(SystemExit) as end:
        main([*path.split(), *words])
    said = capsys.readouterr()
    assert end.value.code == 0, said.err
    assert said.out.strip()


@pytest.mark.parametrize("name", AUDITS)
def test_the_examples_of_an_audit_are_commands_that_exist(name):
    examples = AUDITS[name].examples
    assert examples
    for line in examples:
        assert line.startswith("auditgap ") and not list(faults(line)), line
