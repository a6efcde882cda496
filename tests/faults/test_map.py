"""README.md of this folder maps every case to tests: all numbers stand there, and every test that
it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
CASES = range(1, 81)
_ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+) \|$", re.MULTILINE)
_NAMED = re.compile(r"`([\w/]+\.py)((?:::\w+)+)`")


def rows() -> dict[int, tuple[str, str]]:
    """Case number -> (what happens, the cell that names its tests)."""
    text = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    found = [(int(number), (what, tests)) for number, what, tests in _ROW.findall(text)]
    assert len(found) == len(dict(found)), "a case stands twice"
    return dict(found)


def names_in(path: Path) -> set[str]:
    """`test_x`, `TestX` and `TestX::test_y` of a file, read and not imported."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            inner = {
                n.name
                for n in node.body
                if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")
            }
            found |= {node.name, *(f"{node.name}::{name}" for name in inner)}
    return found


def test_every_case_has_its_tests():
    found = rows()
    assert sorted(found) == list(CASES)
    for number, (what, tests) in found.items():
        assert what.strip(), number
        assert _NAMED.search(tests), f"case {number} names no test"


def test_every_test_that_is_named_exists():
    missing = []
    for number, (_, tests) in rows().items():
        for file, name in _NAMED.findall(tests):
            path = TESTS / file
            if not path.is_file() or name.removeprefix("::") not in names_in(path):
                missing.append(f"case {number}: {file}{name}")
    assert not missing, "\n".join(missing)


def test_nothing_else_stands_in_backticks_of_the_last_column():
    """A test that is written otherwise than as file.py::name would not be looked up."""
    for number, (_, tests) in rows().items():
        left = re.sub(_NAMED, "", tests).replace(",", "").replace("<br>", "").strip()
        assert not left, f"case {number}: {left!r}"
