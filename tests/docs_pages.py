"""What README, docs and examples show to be typed: commands, files and Python, in the order of the
page.

    # [Shown("docs/cluster.md:15", "command", "auditgap grid --config grid.yaml …"), …]
    read(ROOT / "docs/cluster.md")
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/**/*.md"),
        *ROOT.glob("benchmarks/*.md"),
    ]
)
#: What a line of code has to begin with to be a command.
PROGRAMS = (
    "auditgap inspect deepspeed torchrun accelerate python make pip srun ray source hf aws".split()
)
_COMMAND = re.compile(rf"(\$ )?({'|'.join(PROGRAMS)}) \S")
_FILE = re.compile(r"# (\S+\.(?:yaml|json|jsonl|txt))$")
_PYTHON = re.compile(r"(import|from|with) \w")


@dataclass(frozen=True)
class Shown:
    """A command (comment, pipe and redirection left out), a file (`name` says what it is called) or
    Python of a page."""

    place: str  #: page:line
    kind: str  #: command, file or python
    text: str
    name: str = ""


def read(page: Path) -> list[Shown]:
    return parse(page.read_text("utf-8"), str(page.relative_to(ROOT)))


def parse(text: str, page: str) -> list[Shown]:
    """Of every block of indented or fenced lines: a file or Python whole, else the lines that are
    commands, joined at `\\`."""
    found: list[Shown] = []
    for number, block in _blocks(text):
        first, place = block[0], f"{page}:{number}"
        if named := _FILE.match(first):
            found.append(Shown(place, "file", "\n".join(block[1:]) + "\n", named[1]))
        elif _PYTHON.match(first):
            found.append(Shown(place, "python", "\n".join(block) + "\n"))
        else:
            for line, words in _joined(block):
                if _COMMAND.match(words):
                    shown = re.split(r"\s+#\s|\s+\|\s+|\s+>\s", words.removeprefix("$ "))[0]
                    found += [
                        Shown(f"{page}:{number + line}", "command", one)
                        for one in re.split(r"\s+&&\s+", shown)
                    ]
    return found


def commands(page: Path) -> list[Shown]:
    return [shown for shown in read(page) if shown.kind == "command"]


def _blocks(text: str) -> list[tuple[int, list[str]]]:
    """(number of the first line, lines without their indent) of every block of code; after a blank
    line a command opens one."""
    blocks: list[tuple[int, list[str]]] = []
    fenced, inside = False, False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            fenced, inside = not fenced, False
            continue
        code = fenced or line.startswith("    ")
        if code and line.strip():
            if not inside:
                blocks.append((number, []))
                inside = True
            words, (began, block) = line if fenced else line[4:], blocks[-1]
            if (blank := number - began - len(block)) and _COMMAND.match(words):
                blocks.append((number, [words]))
            else:
                block += [*[""] * blank, words]
        elif line.strip():
            inside = False
    return blocks


def _joined(block: list[str]) -> list[tuple[int, str]]:
    lines: list[tuple[int, str]] = []
    going_on = False
    for i, line in enumerate(block):
        words = line.strip()
        if going_on:
            lines[-1] = (lines[-1][0], f"{lines[-1][1]} {words.removesuffix(chr(92)).strip()}")
        else:
            lines.append((i, words.removesuffix("\\").strip()))
        going_on = words.endswith("\\")
    return lines
