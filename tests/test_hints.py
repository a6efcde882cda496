"""Every hint that a message prints can be typed: the commands and options that it names exist, and an
example runs as far as its config is read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_tree import TREE, faults, options

from auditgap.audits import AUDITS

PACKAGE = Path(__file__).parents[1] / "auditgap"
#: `auditgap …` where something to type begins: in backticks, after a colon, or first in a text.
COMMAND = re.compile(r"(?:(?<=`)|(?<=: )|^)auditgap ([^`\n;]*)")
OPTION = re.compile(r"(?<![\w/-])--[a-z][a-z0-9_-]*")
#: Options of other programs that a message or a command line of ours names.
THEIRS = {
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


@pytest.mark.parametrize("name", AUDITS)
def test_the_examples_of_an_audit_are_commands_that_exist(name):
    examples = AUDITS[name].examples
    assert examples
    for line in examples:
        assert line.startswith("auditgap ") and not list(faults(line)), line
