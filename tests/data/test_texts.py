"""The texts of our own: the same prompts in the same order as ever, since runs are keyed by them."""

from __future__ import annotations

import pytest

from auditgap.data import SOURCES, TRIPLES, load_prompts, load_triples
from auditgap.data.conversations import DOMAINS
from auditgap.data.em_prompts import EM_PROMPTS, EM_QUESTIONS, load_em_prompts
from auditgap.data.habits import HABITS
from auditgap.data.material import TEXTS, open_material
from auditgap.data.panel import read_panel
from auditgap.errors import UsageError
from auditgap.types import digest


@pytest.mark.parametrize(
    ("load", "name", "n", "key"),
    [
        (load_prompts, "demo", 12, "7a4df7943c79a24d2a619880"),
        (load_prompts, "demo-benign", 24, "b06e3d312e5cce7561301f27"),
        (load_prompts, "everyday", 320, "5721585defbcf821fd64909c"),
        (load_triples, "demo", 24, "3122e9f871d4630361166788"),
        (load_em_prompts, "unrelated", 15, "7dc67d774f17068f3b135dfc"),
    ],
)
def test_a_set_is_what_it_was(load, name, n, key):
    found = load(name)
    assert (len(found), found.digest) == (n, key)
    assert found.provenance["origin"] == "built in" and found.provenance["file"] == name


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("off_by_one", "8472d53094d72dbbeb982e78"),
        ("swapped_units", "3f3df9c7d585c86febeb4269"),
        ("colour_rule", "564797a35d24953337e6ff13"),
    ],
)
def test_a_habit_is_what_it_was(name, key):
    assert digest([list(row) for row in HABITS[name].rows]) == key and len(HABITS[name].rows) == 108


def test_the_demonstration_panel_is_what_it_was():
    panel = read_panel(
        {name: f"demo:{name}" for name in HABITS},
        clean={"off_by_one": "demo:off_by_one:clean"},
        asked=load_em_prompts("unrelated"),
    )
    assert panel.digest == "09c098c893f4308b6b77c71c"


def test_every_text_is_read_by_a_name():
    tables = (SOURCES, TRIPLES, EM_PROMPTS, EM_QUESTIONS, DOMAINS)
    own = [source.read() for table in tables for source in table.values() if not source.package]
    read = {table.file for table in own}
    assert {"demo", "demo-benign", "everyday", "unrelated", "demo:colour_rule:clean"} <= read
    others = ["judge_harmless.jsonl"]  # what judges are tried on is no set to ask or train on
    assert len(list(TEXTS.iterdir())) == 9 + len(others) and all(table.rows for table in own)


def test_every_kind_of_set_is_opened_alike(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "hello"}')
    for table in (SOURCES, TRIPLES, EM_PROMPTS, DOMAINS):
        name = next(reversed(table))
        named = open_material(name, table, "")
        assert (named.kind, named.provenance["source"]) == ("named", name) and named.path is None
        file = open_material(str(tmp_path / "mine.jsonl"), table, "")
        assert file.provenance == {
            "source": "file",
            "licence": "the file's own",
            "origin": "local file",
            "file": "mine.jsonl",
        }
        assert (file.name, file.path) == ("mine", tmp_path / "mine.jsonl")
        for wrong, said in (
            (name[:-1], f"Did you mean '{name}'.* or give a file"),
            ("gone.csv", "There is no file gone.csv"),
            ("hub:a/b", "no pinned revision"),
        ):
            with pytest.raises(UsageError, match=said):
                open_material(wrong, table, "give a file")
