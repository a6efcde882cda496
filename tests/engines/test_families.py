"""The table of families: the page is the stored table, the stored table answers for every type, and
a sample of types is proven again."""

from __future__ import annotations

import json
import random

import pytest
from docs_pages import ROOT

from auditgap import models
from auditgap.cli.lists import list_
from auditgap.engines.families import table
from auditgap.engines.families.building import CAUSAL, WRAPPERS, build, tokenizer
from auditgap.engines.families.proof import prove
from auditgap.errors import UsageError

TABLE = table.stored()
ANSWERS = {proof.type: proof for proof in TABLE.proofs}
#: Types that passed an older self-test and gave other numbers than transformers, or broke later.
ONCE_WRONG = (
    "roberta camembert xlm-roberta-xl deepseek_v32 glm_moe_dsa axk2 falcon_h1 hy_v4 inkling_text"
    " recurrent_gemma paligemma"
).split()
SAMPLE = random.Random(2026).sample(sorted(set(ANSWERS) - set(ONCE_WRONG)), 4)


def test_the_page_is_the_stored_table():
    assert (ROOT / "docs" / "families.md").read_text("utf-8") == TABLE.page()
    assert TABLE.versions["transformers"] in TABLE.page()


def test_no_family_is_wrong_and_most_are_proven():
    for wrapper, wanted in ((False, 169), (True, 56)):
        counts = TABLE.counts(wrapper=wrapper)
        proven = counts["proven"] + counts.get("proven without the short way", 0)
        assert "wrong" not in counts and proven >= wanted, counts
    assert sum(proof.answer == "proven" for proof in TABLE.proofs) >= 135
    assert all(proof.why and "\n" not in proof.why for proof in refused())


def refused() -> list[table.Proof]:
    return [proof for proof in TABLE.proofs if proof.answer == "refused"]


@pytest.mark.skipif(
    TABLE.versions["transformers"] != table.installed()["transformers"],
    reason="the table is of another transformers; `make families` writes it again",
)
def test_every_type_has_an_answer():
    assert sorted(p.type for p in TABLE.proofs if not p.wrapper) == sorted(CAUSAL)
    assert sorted(p.type for p in TABLE.proofs if p.wrapper) == sorted(WRAPPERS)


@pytest.mark.parametrize("model_type", [*ONCE_WRONG, *SAMPLE])
def test_a_type_is_what_the_table_says(model_type):
    said = ANSWERS[model_type]
    again = prove(model_type, wrapper=said.wrapper)
    assert again.answer == said.answer, again.why
    assert (again.streams, bool(again.why)) == (said.streams, bool(said.why))


@pytest.mark.parametrize("model_type", ["blt", "qwen4_exp_text", "hy_v4", "glm5_next", *SAMPLE])
def test_what_is_proven_opens_from_its_folder(model_type, tmp_path):
    """The proof holds of a model in memory; an audit begins with what its files say."""
    said = ANSWERS[model_type]
    if said.answer == "refused":
        pytest.skip(said.why)
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    build(model_type, wrapper=said.wrapper).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    outline = models.outline(str(tmp_path))
    outline.check_opens()
    loaded = models.load(outline, dtype="float32")
    assert (loaded.n_blocks, loaded.width) == (outline.n_blocks, outline.width)


def test_ls_families_shows_the_table(capsys):
    list_("families", None, as_json=True)
    assert json.loads(capsys.readouterr().out) == [proof.row() for proof in TABLE.proofs]
    with pytest.raises(UsageError, match="Did you mean 'llama'"):
        list_("families", "lama")
