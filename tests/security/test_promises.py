"""Every promise of SECURITY.md names a test that is there, and as many attacks are tried as it says."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from auditgap.models import bounds

ROOT = Path(__file__).parents[2]
TESTS = re.compile(r"`([\w/]+\.py(?:::\w+)+)`")


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below that heading, without its head."""
    text = (ROOT / "SECURITY.md").read_text("utf-8").partition(f"\n## {heading}\n")[2]
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert table, heading
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()[2:]
    ]


def named(row: list[str]) -> list[str]:
    """The tests that a row names, from the root of the checkout."""
    found = TESTS.findall(row[-1])
    return [one if "/" in one else f"tests/security/{one}" for one in found]


def test_every_promise_names_a_test():
    assert len(rows("Promised")) > 15 and all(map(named, rows("Promised")))


@pytest.mark.parametrize(
    "test", sorted({t for head in ("Promised", "Tried") for row in rows(head) for t in named(row)})
)
def test_it_is_there(test):
    file, *names = test.split("::")
    within = ast.parse((ROOT / file).read_text("utf-8")).body
    for name in names:
        found = [
            node
            for node in within
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
        ]
        assert found, name
        within = found[0].body


def test_as_many_are_tried_as_it_says():
    """Counted by pytest itself."""
    tried = rows("Tried")
    words = ["--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, *(test for row in tried for test in named(row))],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    cases = Counter(line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line)
    said = {row[0]: int(row[1]) for row in tried}
    assert said == {row[0]: sum(cases[test] for test in named(row)) for row in tried}


def test_the_bounds_that_it_states_are_the_bounds():

    text = (ROOT / "SECURITY.md").read_text("utf-8")
    assert (
        f"{bounds.TEMPLATE_SECONDS:g} seconds, {bounds.TEMPLATE_BYTES >> 30} GiB" in text
        and bounds.LONGEST_TEMPLATE == 1_000_000
    )
