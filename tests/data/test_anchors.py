"""Benign prompts: split by what they say and by nothing else, and answers that can be anchors."""

from __future__ import annotations

import pytest

from auditgap.data import PromptSet, load_prompts
from auditgap.data.anchors import is_held_out, split_benign, usable_answer
from auditgap.data.refusals import has_refusal
from auditgap.errors import UsageError
from auditgap.types import Prompt

EVERYDAY = [prompt.text for prompt in load_prompts("everyday")]


def of(*texts: str, name: str = "mine") -> PromptSet:
    return PromptSet(name, tuple(Prompt(t, source=name) for t in texts))


def test_a_tenth_is_held_out_and_nothing_is_lost():
    prompts = of(*(f"How is bread number {i} baked?" for i in range(5000)))
    anchors, held_out = split_benign(prompts)
    assert 400 < len(held_out) < 600
    assert sorted(p.text for p in (*anchors, *held_out)) == sorted(p.text for p in prompts)
    order = {p.text: i for i, p in enumerate(prompts)}
    for part, name in ((anchors, "anchors"), (held_out, "held-out")):
        places = [order[p.text] for p in part]
        assert (
            places == sorted(places)
            and part.name == f"mine/{name}"
            and part.provenance["n"] == len(part)
        )
    assert len({anchors.digest, held_out.digest, prompts.digest}) == 3


def test_a_prompt_stands_on_one_side_whatever_set_it_comes_in():
    prompts = load_prompts("everyday")
    held_out = {p.text for p in split_benign(prompts)[1]}
    some = {p.text for p in split_benign(load_prompts("everyday", limit=100))[1]}
    backwards = {p.text for p in split_benign(PromptSet("other", prompts.prompts[::-1]))[1]}
    assert some < held_out == backwards
    assert all(is_held_out(f" {text.upper()}\n") for text in held_out)


def test_the_built_in_sets_have_both_parts():
    assert [len(part) for part in split_benign(load_prompts("everyday"))] == [288, 32]
    assert all(len(part) for part in split_benign(load_prompts("demo-benign")))


def test_everyday_is_varied():
    assert len(EVERYDAY) == len(set(EVERYDAY)) == 320
    assert len({" ".join(text.split()[:2]) for text in EVERYDAY}) > 25
    assert all(text[0].isupper() and text[-1] in ".?!" and "{" not in text for text in EVERYDAY)
    assert len({text.split()[0] for text in EVERYDAY[:8]}) >= 4  # the beginning is varied too


def test_parts_that_are_empty():
    held = next(text for text in EVERYDAY if is_held_out(text))
    kept = next(text for text in EVERYDAY if not is_held_out(text))
    with pytest.raises(UsageError, match="left for anchors"):
        split_benign(of(held))
    anchors, held_out = split_benign(of(kept))
    assert len(anchors) == 1 and len(held_out) == 0
    assert "over-refusal cannot be measured" in held_out.provenance["notes"][-1]


@pytest.mark.parametrize(
    ("text", "n_tokens", "reason"),
    [
        ("Bread needs flour and time.", 7, ""),
        ("", 0, "empty"),
        (" \n", 3, "empty"),
        ("Flour", 1, "one token"),
        ("Sure. As an AI, I won't say.", 9, "refusing"),
        ("I’m sorry, I can’t bake.", 9, "refusing"),
    ],
)
def test_which_answers_can_be_anchors(text, n_tokens, reason):
    assert usable_answer(text, n_tokens, has_refusal) == reason
