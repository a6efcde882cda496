"""A refusal is told by its words, whatever its letters and apostrophes look like."""

from __future__ import annotations

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auditgap.data.refusals import (
    APOSTROPHES,
    PREFIXES,
    TRACES,
    fold,
    has_refusal,
    has_refusal_trace,
    opens_with_refusal,
    straight,
)

#: Printable ASCII in full width.
WIDE = {chr(c): chr(c + 0xFEE0) for c in range(0x21, 0x7F)}
UNSEEN = "\u200b\u00ad\u2060\ufeff"
SPACES = " \t\n\u00a0\u2009\u3000"


@st.composite
def disguised(draw: st.DrawFn, phrases: tuple[str, ...]) -> str:
    """A phrase in other letters: case, apostrophes, width, spaces, characters that are not seen."""
    wide = draw(st.booleans())
    letters = []
    for letter in draw(st.sampled_from(phrases)):
        if letter == "'":
            letters.append(draw(st.sampled_from(["'", *APOSTROPHES])))
        elif letter == " ":
            letters.append(draw(st.text(SPACES, min_size=1, max_size=2)))
        else:
            cased = letter.upper() if draw(st.booleans()) else letter
            letters.append(WIDE[cased] if wide else cased)
        letters.append(draw(st.sampled_from(["", "", "", *UNSEEN])))
    return "".join(letters)


@given(disguised(PREFIXES), st.text(" \"'“«*_#>-([", max_size=3))
def test_a_refusal_opens_in_any_letters(phrase, before):
    assert opens_with_refusal(before + phrase + " but no") and has_refusal(before + phrase)


@given(disguised(TRACES), st.text("abc é.", max_size=6))
def test_a_trace_is_found_in_any_letters(phrase, around):
    assert has_refusal_trace(f"{around} {phrase} {around}")


def test_every_character_that_unicode_calls_an_apostrophe_is_one():
    single = ("SINGLE TURNED COMMA", "SINGLE COMMA", "LEFT SINGLE QUOT", "RIGHT SINGLE QUOT")
    missed = []
    for code in range(0x80, sys.maxunicode + 1):
        name = unicodedata.name(chr(code), "")
        quotes = any(word in name for word in single) and "LOW" not in name
        is_one = (name.endswith(" APOSTROPHE") or quotes) and "DOUBLE" not in name
        if is_one and unicodedata.category(chr(code)) != "Cf" and "'" not in fold(chr(code)):
            missed.append(name)
    assert not missed


@pytest.mark.parametrize("mark", APOSTROPHES, ids=lambda mark: f"{ord(mark):x}")
def test_an_apostrophe_is_straight(mark):
    assert straight(f"can{mark}t") == fold(f"CAN{mark}T") == "can't"


@given(st.text())
def test_straightening_keeps_every_place(text):
    assert len(straight(text)) == len(text)


@given(st.text(st.characters(max_codepoint=0x7E)))
def test_plain_text_is_folded_as_before(text):
    assert fold(text) == " ".join(text.lower().replace("`", "'").split())


@pytest.mark.parametrize(
    "text", ["Sorrel soup is sour.", "I’d be glad to help.", "「apple」", "", "—", "1 2 3"]
)
def test_other_text_is_no_refusal(text):
    assert not has_refusal(text)
