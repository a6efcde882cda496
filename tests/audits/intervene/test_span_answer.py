"""`lvs --span answer`: a model that decides while it answers is broken by an edit of the answer, and
by none of the prompt."""

from __future__ import annotations

import planted
import pytest
import refusing

from auditgap.audits.latent.audit import LATENT
from auditgap.errors import UsageError

ASKED = {"layers": str(refusing.READER), "eps": [1.0], "steps": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("span")
    prompts = planted.write_prompts(folder / "prompts.txt", planted.PROMPTS[:4])
    with pytest.MonkeyPatch.context() as patch:
        planted.register(patch)
        yield folder, refusing.save(folder / "model"), prompts


@pytest.mark.parametrize(("span", "edited"), [("prompt", "refusal"), ("answer", "harmful")])
def test_what_is_decided_in_the_answer_is_broken_there(world, span, edited):
    folder, model, prompts = world
    store = planted.audit(folder / span, [model], prompts, span=span, **ASKED)
    attacked = store.rows(["targeted"])
    assert len(attacked) == 4 and set(attacked["verdict_clean"]) == {"refusal"}
    assert set(attacked["verdict_edited"]) == {edited}
    assert set(store.rows(["random_matched"])["verdict_edited"]) == {"refusal"}
    settings = [record["description"]["settings"] for record in store.records()]
    assert {s.get("span", "prompt") for s in settings} == {span}
    if span == "answer":  # one row of δ, within the budget of one of the user's words
        assert (attacked["linf"] <= attacked["eps_abs"] * (1 + 1e-6)).all()
        assert attacked["relative_norm"].between(0.5, 1.01).all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"thinking": "regenerated"}, "none to write anew"),
        ({"span": "chain"}, "takes --thinking fixed"),
    ],
    ids=["regenerated", "chain"],
)
def test_what_a_span_cannot_be_asked_with(tmp_path, changes, says):
    asked = {"models": "smollm2", "span": "answer", "out": str(tmp_path / "run"), **changes}
    with pytest.raises(UsageError, match=says):
        LATENT.check_together(*LATENT.read(None, asked))
