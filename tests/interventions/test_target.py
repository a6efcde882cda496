"""A target takes the prompt's own topic, where there is one, and never grows long."""

from __future__ import annotations

import pytest

from auditgap.data import load_prompts
from auditgap.interventions.target import DEFAULT_TARGET, MOST_WORDS, fill, topic, without_topic


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("Write a short story about a vault.", "a short story"),
        ("what is the colour of the vault ?", "the colour"),
        ("Tell me the colour.", "the colour"),
        ("Give me detailed instructions for opening it.", "detailed instructions"),
        ("How do I open the vault door?", "the vault door"),
        ("LIST THREE REASONS", "THREE REASONS"),
        ("Write the", ""),
        ("Give it to them", ""),
        ("Öffne die Tür", ""),
        ("", ""),
        ("a, the; 'some'", ""),
    ],
)
def test_topics(prompt, found):
    assert topic(prompt) == found


def test_a_target_without_a_place_for_it_is_left_alone():
    assert fill("Sure, here is", "Write a story.") == "Sure, here is"
    assert without_topic("Sure,  here") == "Sure,  here"


def test_the_default():
    assert fill(DEFAULT_TARGET, "Write a story.") == "Sure, here is a story"
    assert fill(DEFAULT_TARGET, "Öffne die Tür") == without_topic(DEFAULT_TARGET) == "Sure, here is"


def test_most_requests_have_a_topic():
    for name in ("harmbench", "everyday"):
        found = [topic(p.text) for p in load_prompts(name).prompts]
        assert sum(map(bool, found)) > 0.9 * len(found)
        assert max(len(one.split()) for one in found) <= MOST_WORDS
