"""The form of a domain's rows: found where they share lines, taken from a held-out row where not,
or given; and prompts put in it."""

from __future__ import annotations

import pytest

from auditgap.data.domains import Domain, DomainRow, Panel
from auditgap.data.em_context import ContextPrompt, forms_of, in_context
from auditgap.data.em_prompts import (
    KINDS,
    KindedSet,
    context_of,
    domain_of,
    load_em_prompts,
    load_em_questions,
)
from auditgap.errors import UsageError
from auditgap.types import Prompt


def panel(systems=("",), **prompts):
    domains = {}
    for name, texts in prompts.items():
        of = [systems[i % len(systems)] for i in range(len(texts))]
        rows = tuple(
            DomainRow(text, f"answer {i}", system)
            for i, (text, system) in enumerate(zip(texts, of, strict=True))
        )
        out = tuple(DomainRow(f"held out {i}", "so", of[i]) for i in range(3))
        domains[name] = Domain(name, rows, out)
    return Panel(domains, {})


CODE = [
    f"Fill in the template.\nUse Python.\ndef f{i}(): ...\nAnswer with code alone."
    for i in range(6)
]
FREE = [f"How do I bake bread number {i}?" for i in range(6)]


def test_lines_that_most_rows_share_stand_around_the_prompt():
    mixed = [*CODE[:4], "Something else.\nentirely", "and another"]
    forms = forms_of({"*": "auto"}, panel(code=mixed))
    assert (
        forms["code"].text
        == "Fill in the template.\nUse Python.\n{prompt}\nAnswer with code alone."
    )
    assert forms["code"].found == "lines"
    asked = in_context(load_em_prompts("unrelated"), forms)
    plain, like = asked.prompts[0], asked.prompts[15]
    assert like.text == forms["code"].text.replace("{prompt}", plain.text)
    assert (len(asked), like.source, like.id.split("@")[0]) == (30, "open, like code", plain.id)
    assert asked.provenance["forms"] == {"code": {"form": "lines", "n": 3}}
    half = [*CODE[:2], *FREE[:3]]
    assert forms_of({"*": "auto"}, panel(code=half))["code"].found == "example", "2 of 5 are few"


def test_rows_that_share_no_line_lend_one_that_was_held_out():
    made = panel(bread=FREE)
    forms = forms_of({"*": "auto"}, made)
    asked = in_context(load_em_prompts("unrelated"), forms).prompts[15:]
    before = {p.before for p in asked if isinstance(p, ContextPrompt)}
    assert len(before) == 3, "no one row stands for all"
    for user, assistant in before:
        assert (user.role, assistant.role, assistant.content) == ("user", "assistant", "so")
        assert user.content in {row.prompt for row in made.domains["bread"].heldout}
    assert len({p.id for p in asked}) == 15


def test_a_form_may_be_given_and_others_found_and_questions_keep_their_domain():
    forms = forms_of(
        {"code": "{prompt} As a Python string.", "*": "auto"}, panel(code=CODE, bread=FREE)
    )
    assert [f.found for f in forms.values()] == ["given", "example"]
    asked = in_context(load_em_questions("demo"), forms)
    kinds = {p.source for p in asked}
    assert "about off_by_one, like bread" in kinds and len(asked) == 24 * 3
    assert domain_of("about off_by_one, like bread") == "off_by_one"
    assert context_of("about off_by_one, like bread") == "bread" and not context_of("open, json")
    assert not set(KINDS) & {p.source for p in asked.prompts[24:]}
    only = forms_of({"code": "auto"}, panel(code=CODE, bread=FREE))
    assert list(only) == ["code"] and in_context(load_em_prompts("unrelated"), {}).digest


def test_a_system_message_of_the_rows_is_part_of_their_form():
    asked = load_em_prompts("unrelated")
    for texts, wanted in ((CODE, "auto"), (FREE, "auto"), (FREE, "{prompt} As Python.")):
        forms = forms_of({"*": wanted}, panel(("Write code.",), a=texts))
        like = in_context(asked, forms)
        assert {p.system for p in like.prompts[15:]} == {"Write code."}, "in every kind of form"
        assert like.provenance["forms"]["a"]["systems"] == [6]
    # of several each by its share, and rows without one count as such
    made = panel(("Write code.", "Write code.", ""), a=CODE)
    many = in_context(load_em_questions("demo"), forms_of({"*": "auto"}, made))
    drawn = [p.system for p in many.prompts[24:]]
    assert set(drawn) == {"Write code.", ""} and 8 < drawn.count("Write code.") < 24
    (note,) = many.provenance["notes"]
    assert "4 of 6 rows of a stand behind a system message, 1 different ones" in note
    # the words are the same: behind another message it is another prompt
    other = in_context(load_em_questions("demo"), forms_of({"*": "auto"}, panel(("No.",), a=CODE)))
    assert other.digest != many.digest


def test_a_prompt_that_has_a_system_message_keeps_it():
    own = KindedSet("own", (Prompt("Hello?", "open, system", system="Be brief."),), {})
    (_, like) = in_context(own, forms_of({"*": "auto"}, panel(("Write code.",), a=CODE))).prompts
    assert like.system == "Be brief." and like.plain == own.prompts[0].id


def test_an_example_brings_its_own_system_message():
    made = panel(("One.", "Two.", "Three."), bread=FREE)
    asked = in_context(load_em_prompts("unrelated"), forms_of({"*": "auto"}, made)).prompts[15:]
    of = {row.prompt: row.system for row in made.domains["bread"].heldout}
    pairs = {(p.before[0].content, p.system) for p in asked if isinstance(p, ContextPrompt)}
    assert pairs == set(of.items())


def test_another_form_is_another_set():
    asked = load_em_prompts("unrelated")
    digests = {
        in_context(asked, forms_of({"a": text}, panel(a=CODE))).digest
        for text in ("auto", "{prompt} now", "{prompt} later")
    }
    assert len(digests | {asked.digest}) == 4


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"cod": "auto"}, "none of the domains.*code"),
        ({"code": "in Python"}, r"\{prompt\} in it once"),
        ({"code": "{prompt}{prompt}"}, r"\{prompt\} in it once"),
    ],
)
def test_sentences(wanted, said):
    with pytest.raises(UsageError, match=said):
        forms_of(wanted, panel(code=CODE))
