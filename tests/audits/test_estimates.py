"""Every audit's dry run says how long it takes: its work, and at the least what comes on top."""

from __future__ import annotations

import pytest

from auditgap.audits import AUDITS
from auditgap.audits.timing import Time, judging
from auditgap.judges import load_judge
from auditgap.sweep.progress import MEASURED_HERE, computing

#: What each is asked; those of other packages and `probe`, whose triples no tiny set has, aside.
ASKED = {
    "behaviour": {"models": "demo", "suite": "demo", "limit": 3},
    "latent": {"models": "demo", "prompts": "demo", "limit": 3, "layers": "mid"},
    "intervene": {"models": "demo", "prompts": "demo", "limit": 8},
    "emergent": {"model": "demo", "domains": "demo", "steps": 2},
}


@pytest.mark.parametrize("name", ASKED)
def test_a_longer_answer_takes_longer_and_starting_is_counted(name):
    audit, found = AUDITS[name], []
    for tokens in (8, 64):
        asked = {**ASKED[name], "max_new_tokens": tokens, "device": "cpu"}
        config, options = audit.read(None, asked)
        found.append(audit.estimate(audit.prepare(config, options), options))
    short, long = found
    assert set(MEASURED_HERE) <= set(short)
    assert short["seconds"] > short["starting"] > 1
    assert long["seconds"] - long["starting"] > short["seconds"] - short["starting"]


def test_a_judge_that_is_a_model_is_counted_and_one_that_is_none_is_not():
    guard = load_judge("refusal=demo", device="cpu")
    both = load_judge("majority(keyword,refusal=demo)", device="cpu")
    one = judging(guard, 1000, "cpu")
    assert one > 0 and judging(both, 1000, "cpu") == pytest.approx(one, rel=0.5)
    assert judging(guard, 100_000, "cpu") > 10 * one
    assert judging(load_judge("builtin"), 1000, "cpu") == 0


def test_the_sentence_says_what_is_at_least_in_it():
    said = computing(Time(6.2, 170.0, 20.0).document())
    assert said == (
        "Up to about 3 min 16 s on one worker like this machine, of which at least 6 s to start"
        " and 20 s to judge"
    )
    assert (
        computing(Time(5.0, 0.1).document())
        == "Up to about a minute on one worker like this machine"
    )
