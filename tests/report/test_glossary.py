"""The words of a report: one list, of which each page explains those that occur on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from auditgap.report import glossary
from auditgap.report.section import Bullets, Prose, Section, Table, words_of


def test_the_page_of_the_documentation_is_this_list():
    """Made anew by: python -c "from auditgap.report import glossary; print(glossary.markdown(),
    end='')" > docs/glossary.md"""
    page = Path(__file__).parents[2] / "docs" / "glossary.md"
    assert page.read_text(encoding="utf-8") == glossary.markdown()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("12 of 20 prompts at risk flipped", ["at risk", "flip"]),
        ("Excess gaps at each site", ["excess gap", "site"]),
        ("the opposite of editing", []),
        ("an lvs of lasr", []),
        ("LVS and ASR", ["ASR", "LVS"]),
    ],
)
def test_terms_are_found_as_words(text, names):
    assert [term.name for term in glossary.used(text)] == names


def test_no_spelling_means_two_terms():
    forms = [form.lower() for term in glossary.TERMS for form in (term.name, *term.forms)]
    assert len(set(forms)) == len(forms)


def test_words_come_from_all_that_a_section_says(tmp_path):
    import pandas as pd

    from auditgap.report.columns import word

    table = Table("t", "Sites", pd.DataFrame({"a": ["x"]}), (word("a", "Withstood"),), note="NLL")
    section = Section(
        id="s", title="Judge", contents="", blocks=(Prose("PGD"), Bullets(["budget"]), table)
    )
    found = {term.name for term in glossary.used(words_of([section]))}
    assert found == {"judge", "PGD", "budget", "withstood", "site", "NLL"}
