"""A judge that is a language model is opened once a run, not once a pack; where memory is short,
once for all that a worker has said, and with the same verdicts. One at an endpoint is paid once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import chat_endpoint
import planted
import pytest
import tiny

from auditgap.audits.audit import run as run_audit
from auditgap.audits.intervene.audit import INTERVENE
from auditgap.audits.latent.audit import LATENT
from auditgap.audits.stage import Stage
from auditgap.engines import Serving, openai
from auditgap.engines.journal import Journal
from auditgap.models import room
from auditgap.store import DiskError, RunFolder

AUDITS = {
    "lvs": (
        LATENT,
        {
            "models": "model",
            "eps": "0.1",
            "attacks": "targeted,random",
            "steps": 1,
            "longer": False,
            "distance": True,
            "bisections": 1,
            "distance_limit": 2,
        },
    ),
    "intervene": (
        INTERVENE,
        {"models": "model", "strengths": [1.0], "interventions": "steering"},
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    for seed, name in enumerate(("model", "a", "b")):
        tiny.save("llama", folder / name, seed=seed)
    planted.write_prompts(folder / "prompts.txt", planted.PROMPTS[:4])
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each judge's model was opened, and into how many packs the speech went."""
    seen: Counter[str] = Counter()
    plain, packs = Serving.open, Stage.speaking_packs

    def opening(self: Serving, model: str):
        seen[Path(model).name] += 1
        return plain(self, model)

    def counting(self: Stage, lengths: list[int]) -> list[list[int]]:
        found = [pack[i : i + 2] for pack in packs(self, lengths) for i in range(0, len(pack), 2)]
        seen["packs"] += len(found)
        return found

    monkeypatch.setattr(Serving, "open", opening)
    monkeypatch.setattr(Stage, "speaking_packs", counting)
    return seen


def audited(world: Path, which: str, name: str, **more: object) -> RunFolder:
    audit, asked = AUDITS[which]
    shared = {
        "prompts": str(world / "prompts.txt"),
        "layers": "1",
        "max_new_tokens": 2,
        "dtype": "float32",
        "device": "cpu",
        "batch_tokens": 64,
        "judge": f"majority(guard={world / 'a'},refusal={world / 'b'})",
        "out": str(world / name),
    }
    asked = {**shared, **asked, "models": str(world / "model"), **more}
    store, outcome = run_audit(audit, *audit.read(None, asked))
    assert not outcome.failed, [r["cause"] for r in store.records() if "cause" in r]
    return store


@pytest.mark.parametrize("which", AUDITS)
def test_each_is_opened_once_and_where_memory_is_short_once_a_group(
    world, opened, monkeypatch, which
):
    monkeypatch.setattr(room, "has_room", lambda device: True)
    roomy = audited(world, which, f"{which}-roomy")
    assert opened["packs"] >= 6 and (opened["a"], opened["b"]) == (1, 1)

    opened.clear()
    monkeypatch.setattr(room, "has_room", lambda device: False)
    short = audited(world, which, f"{which}-short")
    # the clean pass and the site; in lvs each of three sizes of the distances besides
    assert 2 <= opened["a"] == opened["b"] <= (2 if which == "intervene" else 5)
    assert {r["key"]: r["sha256"] for r in roomy.records()} == {
        r["key"]: r["sha256"] for r in short.records()
    }


@pytest.mark.parametrize("which", AUDITS)
def test_a_reply_that_was_paid_for_is_not_asked_for_again(world, monkeypatch, which):
    """Stopped in the middle of a group's verdicts, which are asked for all at once."""
    quick = openai.Patience(tries=2, first_pause=0.01, longest_pause=0.02)
    monkeypatch.setattr(openai, "Patience", lambda: quick)
    asked: Counter[str] = Counter()

    def answer(body: dict) -> str:
        asked[str(body["messages"])] += 1
        return "complied"

    add, kept = Journal.add, []

    def until_the_disk_is_full(*told: object) -> None:
        if len(kept) == 3:
            raise DiskError("the disk is full")
        kept.append(add(*told))

    with chat_endpoint.Endpoint(answer).running() as endpoint:
        how = {"judge": "refusal=judge", "judge_endpoint": endpoint.url, "max_new_tokens": 8}
        monkeypatch.setattr(Journal, "add", until_the_disk_is_full)
        monkeypatch.setenv("OPENAI_API_KEY", "first")
        with pytest.raises(DiskError):
            audited(world, which, f"{which}-paid", **how)
        monkeypatch.setattr(Journal, "add", add)
        # those under way when it stopped may still arrive: the second run is told by its key
        monkeypatch.setenv("OPENAI_API_KEY", "second")
        store = audited(world, which, f"{which}-paid", **how)
    assert len(asked) > 8 and endpoint.asked_with["Bearer second"] == len(asked) - len(kept)
    assert not store.journals.exists()
