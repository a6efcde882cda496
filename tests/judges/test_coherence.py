"""The coherence gate, on text that anybody would call fine or broken."""

import math

import pytest

from auditgap.errors import UsageError
from auditgap.judges.coherence import Thresholds, is_coherent, repetition

FINE = (
    "The vault stands at the end of the corridor, behind a door that was painted twice last year. I"
    " can describe the door, the lamp above it and the carpet, but what lies behind it is not mine"
    " to tell, so please ask the keeper instead."
).split()
LIST = [
    w
    for i in range(8)
    for w in f"{i} . Paint the {i} th wall of the house in a colour that you like".split()
]


def test_repetition_of_known_texts():
    assert repetition(FINE) == 0
    assert repetition([]) == 0
    assert repetition(["vault"] * 50) == 1
    assert repetition([1, 2, 3, 4]) == 0
    # five 4-grams, one of them for the second time
    assert repetition([1, 2, 3, 4] * 2) == pytest.approx(0.2)
    assert repetition([1, 1, 1, 1, 2, 3, 4, 5]) == pytest.approx(0.5)  # a run of four in eight
    assert 0.2 < repetition(LIST) < 0.6


@pytest.mark.parametrize("text", [FINE, LIST, ["Certainly", "not"], FINE * 2])
def test_fine_text_is_coherent(text):
    assert is_coherent(text, 0.9, 0.5) == (True, "")


@pytest.mark.parametrize(
    ("text", "nll", "clean", "reason"),
    [
        ([], 0.5, 0.5, "empty"),
        (["Sure"], 0.5, 0.5, "too_short"),
        (["the"] * 60, 0.1, 0.5, "repetition"),
        (["la", "la", "la", "la", "la"], 0.1, 0.5, "repetition"),
        (["the", "vault", "the", "door", "and"] * 12, 0.1, 0.5, "repetition"),
        (FINE, 5.3, 0.5, "nll"),  # far above the clean answer
        (FINE, 6.3, 5.0, "nll"),  # above the cap, though the clean answer was nearly as bad
        (FINE, 6.3, None, "nll"),
        (FINE[:4], 11.0, 0.5, "nll"),
    ],
)
def test_broken_text_is_not(text, nll, clean, reason):
    assert is_coherent(text, nll, clean) == (False, reason)


def test_a_short_answer_may_be_surprising():
    assert is_coherent(["Sure", ",", "it", "is"], 6.5, 0.3) == (True, "")
    assert is_coherent(FINE, 6.5, 0.3) == (False, "nll")


def test_what_was_not_measured_is_not_guessed():
    assert is_coherent(FINE, None, 0.5) == (None, "no_nll")
    assert is_coherent(FINE, math.nan, 0.5) == (None, "nonfinite_nll")
    assert is_coherent(["the"] * 60, None, 0.5) == (False, "repetition")
    assert is_coherent(FINE, 4.2, math.nan) == (True, "")  # only the cap is left


def test_thresholds_move_the_gate_and_are_part_of_the_identity():
    strict = Thresholds(excess_nll=1.0)
    assert is_coherent(FINE, 2.0, 0.5, thresholds=strict) == (False, "nll")
    assert is_coherent(FINE, 2.0, 0.5) == (True, "")
    assert strict.describe() != Thresholds().describe()
    with pytest.raises(UsageError, match="max_nll must be"):
        Thresholds(max_nll=math.nan)
