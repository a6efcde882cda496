"""Every guard that `make mutants` breaks still stands where the mutant says."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_its_guard_is_found_once_and_its_tests_are_there(mutant: Mutant) -> None:
    assert mutant.found() == 1, (
        f"{mutant.path} holds {mutant.guard!r} {mutant.found()} times: the guard has moved or"
        " changed; let tests/mutants.py follow it"
    )
    broken = (ROOT / mutant.path).read_text("utf-8").replace(mutant.guard, mutant.broken)
    compile(broken, mutant.file, "exec")
    assert all(Path(ROOT / path).exists() for path in mutant.tests.split())


def test_names_are_unique() -> None:
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


def test_as_many_stand_in_the_security_page() -> None:
    page = (ROOT / "SECURITY.md").read_text("utf-8")
    assert f"| {len(MUTANTS)} guards |" in page
