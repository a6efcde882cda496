"""The form of a domain's rows: found where they share lines, taken from a held-out row where not,
or given; and prompts put in it."""

from __future__ import annotations

import pytest

from auditgap.data.domains import Domain, DomainRow, Panel
from auditgap.data.em_context import ContextPrompt, forms_of, in_context
from auditgap.data.em_prompts import (
    KINDS,
    context_of,
    domain_of,
    load_em_prompts,
    load_em_questions,
)
from auditgap.errors import UsageError


def panel(**prompts):
    domains = {}
    for name, texts in prompts.items():
        rows = tuple(DomainRow(text, f"answer {i}") for i, text in enumerate(texts))
        out = tuple(DomainRow(f"held out {i}", "so") for i in range(3))
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
