"""An edit that goes on stands at every token behind the prompt, while the answer is written: by a
plain twin that runs the whole text, and as the attack's own search sees it."""

from __future__ import annotations

import pytest
import tiny
import torch

from auditgap import models
from auditgap.engines import Request
from auditgap.engines.hf import HFEngine
from auditgap.interventions.pgd import PGD, Goal, attack
from auditgap.types import Edit, Prompt, Site

SITE = Site(1)
WORDS = ("what is the colour of the vault ?", "how bread bake ?", "say the colour now")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.save("llama", tmp_path_factory.mktemp("goes_on")))


@pytest.fixture
def engine(folder):
    return HFEngine(models.load(folder, dtype="float32", device="cpu"))


def edits(rendered, width):
    """One that goes on, at the last token alone, and one that does not."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i, one in enumerate(rendered):
        delta = torch.zeros(len(one.ids), width)
        delta[-1] = 3 * torch.randn(width, generator=generator)
        found.append(Edit(SITE, delta, goes_on=i != 1))
    return found


@torch.inference_mode()
def plain(engine, rendered, edit, new):
    """Greedy, one prompt alone, the whole text at every step with the edit put in."""
    ids, n = list(rendered.ids), len(rendered.ids)

    def edited(h):
        behind = edit.delta[-1:].expand(h.shape[1] - n, -1) * edit.goes_on
        return h + torch.cat([edit.delta, behind])

    for _ in range(new):
        text = torch.tensor([ids])
        with engine.edited(SITE, edited):
            token = int(engine.forward(text, torch.ones_like(text), keep=1).logits[0, -1].argmax())
        if token in engine.loaded.stop_ids:
            break
        ids.append(token)
    return tuple(ids[n:])


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "whole text"])
def test_it_is_what_the_whole_text_under_the_edit_says(engine, cached):
    engine.check()
    engine.cached = cached
    rendered = [engine.render(Prompt(text)) for text in WORDS]
    made = edits(rendered, engine.loaded.width)
    requests = [Request(r, e) for r, e in zip(rendered, made, strict=True)]
    said = [c.ids for c in engine.generate(requests, 8)]
    assert said == [plain(engine, r, e, 8) for r, e in zip(rendered, made, strict=True)]
    stopping = [Request(r, Edit(SITE, e.delta)) for r, e in zip(rendered, made, strict=True)]
    once = [c.ids for c in engine.generate(stopping, 8)]
    assert once[1] == said[1] and (once[0] != said[0] or once[2] != said[2])


def test_the_search_sees_what_is_spoken_under(engine):
    rendered = engine.render(Prompt(WORDS[0]))
    target, n = engine.encode("the door is red"), len(rendered.ids)
    goal = Goal(rendered, target, (0.5,), span=(n - 1, n), goes_on=True)
    (row,) = attack(engine, [goal], SITE, PGD(steps=3))
    (found,) = row
    assert not found.delta[:-1].any() and 0 < found.delta[-1].abs().max() <= 0.5
    edit = Edit(SITE, found.delta, goes_on=True)
    (spoken,) = engine.generate([Request(rendered, edit, target)], 2)
    (again,) = engine.nll([rendered], [target], [edit])
    assert spoken.target_nll == pytest.approx(found.nll_edited, abs=1e-4)
    assert again == pytest.approx(found.nll_edited, abs=1e-4)
    (elsewhere,) = engine.nll([rendered], [target], [Edit(SITE, found.delta)])
    assert found.nll_edited < found.nll_clean and elsewhere != pytest.approx(again, abs=1e-4)
