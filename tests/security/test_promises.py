"""Every promise of SECURITY.md names a test, and the test is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from auditgap.models import bounds

ROOT = Path(__file__).parents[2]
ROWS = [
    line for line in (ROOT / "SECURITY.md").read_text("utf-8").splitlines() if line.startswith("| ")
][1:]
NAMED = [
    (row.split("|")[1].strip(), test)
    for row in ROWS
    for test in re.findall(r"`([\w/]+\.py::\w+)`", row)
]


def test_every_promise_names_one():
    assert len(ROWS) > 15
    assert {promise for promise, _ in NAMED} == {row.split("|")[1].strip() for row in ROWS}


@pytest.mark.parametrize("test", sorted({test for _, test in NAMED}))
def test_it_is_there(test):
    file, name = test.split("::")
    path = ROOT / file if "/" in file else ROOT / "tests" / "security" / file
    defined = {
        node.name
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert name in defined


def test_the_bounds_that_it_states_are_the_bounds():

    text = (ROOT / "SECURITY.md").read_text("utf-8")
    assert (
        f"{bounds.TEMPLATE_SECONDS:g} seconds, {bounds.TEMPLATE_BYTES >> 30} GiB" in text
        and bounds.LONGEST_TEMPLATE == 1_000_000
    )
