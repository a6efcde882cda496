"""A table of names: what is unknown, what a plug-in brings, and what is listed."""

from __future__ import annotations

import importlib.metadata
from fractions import Fraction
from typing import Protocol, runtime_checkable

import pytest

from auditgap.data import SOURCES, TRIPLES
from auditgap.engines import ENGINES
from auditgap.errors import UsageError
from auditgap.interventions import INTERVENTIONS
from auditgap.judges import JUDGES, REWARDS
from auditgap.judges.alignment import RATERS
from auditgap.judges.gold import GOLD_SETS
from auditgap.registry import Entry, Listed, Registry
from auditgap.training.constructions import CONSTRUCTIONS

TABLES = [
    JUDGES,
    REWARDS,
    RATERS,
    GOLD_SETS,
    ENGINES,
    SOURCES,
    TRIPLES,
    INTERVENTIONS,
    CONSTRUCTIONS,
]


@runtime_checkable
class Number(Protocol):
    numerator: int

    def conjugate(self) -> int: ...


@pytest.fixture
def numbers(monkeypatch) -> Registry[Entry]:
    points = {
        "half": "fractions:Fraction",
        "text": "builtins:str",
        "seven": "auditgap.types:__doc__",
        "gone": "auditgap.nowhere:X",
        "one": "fractions:Fraction",
    }
    made = [importlib.metadata.EntryPoint(n, v, "some.numbers") for n, v in points.items()]
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: made if group == "some.numbers" else []
    )
    lines = {"one": Entry("the unit", 1), "many": Entry("a class", "fractions:Fraction")}
    return Registry("number", lines, group="some.numbers")


def test_a_line_is_imported_when_it_is_used(numbers):
    assert numbers["one"].load() == 1 and numbers["many"].load() is Fraction
    later = Registry("number", {"never": Entry("", "auditgap.nowhere:X")})
    with pytest.raises(ModuleNotFoundError):
        later["never"].load()


def test_what_is_unknown_is_one_sentence(numbers):
    said = "Unknown number 'hal'. Did you mean 'half'? Known numbers: one, many, half, text, seven"
    assert str(numbers.unknown("hal", "give a file")) == f"{said}, gone; or give a file."
    assert "Did you mean 'many'" in str(numbers.unknown("mani=3"))
    assert str(Registry("number", numbers).unknown("x")) == (
        "Unknown number 'x'. Known numbers: one, many."
    )


def test_what_a_plug_in_brings(numbers):
    assert numbers.plugged("half", lambda made: made(1, 2), Number) == Fraction(1, 2)
    for name, said in (
        ("text", r"gave a str, which is no number: numerator, conjugate\(\) are wanted"),
        ("half", r"a plug-in that fails: ZeroDivisionError: .* \(fractions:Fraction\)"),
        ("gone", "a plug-in that fails: ModuleNotFoundError"),
        ("haf", "Unknown number 'haf'. Did you mean 'half'"),
    ):
        with pytest.raises(UsageError, match=said):
            numbers.plugged(name, lambda made: made() if made is str else made(1, 0), Number)

    def refuse(made):
        raise UsageError("its own sentence")

    with pytest.raises(UsageError, match=r"^its own sentence$"):
        numbers.plugged("half", refuse, Number)


def test_what_is_listed(numbers):
    listed = {(line.name, line.description): line.problem for line in numbers.listed()}
    assert listed.pop(("gone", "plug-in auditgap.nowhere:X")).startswith("ModuleNotFoundError")
    assert listed.pop(("half", Fraction.__doc__.partition("\n")[0])) == ""
    assert listed.pop(("text", str.__doc__.partition("\n")[0])) == ""
    assert listed == {
        ("one", "the unit"): "",
        ("many", "a class"): "",
        ("one", "plug-in fractions:Fraction"): "the name one is taken by auditgap's own number",
        ("seven", "plug-in auditgap.types:__doc__"): "a str is no number",
    }
    assert Listed("a", "b", licence="MIT").row() == {
        "name": "a",
        "what": "b",
        "licence": "MIT",
        "available": "yes",
    }


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.noun)
def test_every_table(table):
    listed = table.listed()
    assert len({line.name for line in listed}) == len(listed) >= len(table) > 0
    assert all(line.description for line in listed)
    assert all(line.load() is not None for line in table.values() if isinstance(line, Entry))
    first = next(iter(table))
    assert f"Did you mean '{first}'" in str(table.unknown(first + "x"))
