"""What rides in the package of the built-in judge is what its training rows give."""

import importlib.util
import re

import numpy as np
import pytest

from auditgap.judges import card_cache, load_judge
from auditgap.judges.builtin import RECIPE_VERSION, load_training, refitted
from auditgap.judges.fitted import Fitted, pipeline
from auditgap.judges.gold import load_gold
from auditgap.judges.measuring import judge_card

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pyrit") is None, reason="pyrit's data is not installed"
)
OTHERS = [
    "",
    "…",
    "qqxzv wwzq",
    "I’m SORRY, but no.",
    "Sure, here is  how:\n1. Mix, and mix again.",
]


def test_the_packaged_fit_is_that_of_the_rows():
    packaged, again = Fitted.load(), refitted(load_training().rows)
    assert packaged.training == again.training == load_training().digest
    assert (packaged.terms == again.terms).all() and (packaged.idf == again.idf).all()
    for name in ("weights", "flags", "intercept"):
        np.testing.assert_allclose(getattr(packaged, name), getattr(again, name), atol=1e-5)
    assert Fitted.load().terms.dtype == np.uint64, "hashes, and no word"


def test_it_scores_as_scikit_learn_does():
    rows = load_training().rows
    texts = [row.exchange.completion for row in rows]
    model = pipeline().fit(texts, [not row.positive for row in rows])
    features = model["features"].transform([*texts, *OTHERS])
    logits, known = refitted(rows).logits([*texts, *OTHERS])
    np.testing.assert_allclose(logits, model["logistic"].decision_function(features), atol=1e-9)
    assert (known == (features.getnnz(axis=1) > 0)).all() and not known[-5:-3].any()


@pytest.mark.parametrize("judge", ["builtin", "keyword"])
def test_the_packaged_cards_are_what_is_measured(judge):
    made = load_judge(judge)
    for gold in card_cache.TRAVELLING:
        packaged = card_cache.packaged(made, gold).to_dict()
        again = judge_card(made, load_gold(gold)).to_dict()
        for card in (packaged, again):
            del card["seconds_per_row"]
        assert packaged == again
    assert load_judge("builtin").describe()["version"] == RECIPE_VERSION


def test_a_card_of_another_judge_is_not_taken_for_it(monkeypatch):
    judge = load_judge("keyword")
    monkeypatch.setattr(type(judge), "describe", lambda self: {"scorer": "keyword", "version": 99})
    assert card_cache.packaged(judge, "pyrit-refusal") is None


def test_the_file_holds_no_text():
    from auditgap.judges import fitted

    held = fitted._FILE.read_bytes()
    words = set(re.findall(rb"[a-z]{6,}", held[: held.index(b"}}") + 2].lower()))
    assert words <= {b"training", b"offsets", b"weights", b"intercept", b"metadata", b"offset"}
