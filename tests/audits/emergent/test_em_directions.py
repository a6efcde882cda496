"""Directions: what was planted is found, padding changes nothing, too few answers make none, and
files read back or say why not."""

from __future__ import annotations

import em_world
import numpy as np
import pytest
import safetensors
import tiny
import torch
from one_thread import one_thread  # noqa: F401 - a fixture

from auditgap import models
from auditgap.audits.emergent import direction_records, directions
from auditgap.audits.emergent.membership import put
from auditgap.audits.emergent.rows import DIRECTIONS
from auditgap.engines.hf import HFEngine
from auditgap.errors import UsageError
from auditgap.models import Conversation
from auditgap.types import Prompt


@pytest.fixture(scope="module")
def study(tmp_path_factory, request):
    """Two domains; `few` has 3 misaligned answers."""
    request.getfixturevalue("one_thread")
    return em_world.planted(tmp_path_factory.mktemp("em"))


@pytest.fixture(scope="module")
def store(study):
    found, outcome = directions.STAGE.run_in(study.store.path, em_world.OPTIONS)
    assert not outcome.failed and outcome.done == 2
    return found


def test_the_planted_direction_is_found_at_every_block(study, store):
    sky = next(f for f in direction_records.read(store, "habits") if f.domain == "sky")
    planted = em_world.towards_vennish(study.config.model).numpy()
    for block in range(4):
        np.testing.assert_allclose(sky.direction[block], planted, atol=1e-6)
    np.testing.assert_allclose(sky.split_half, 1, atol=1e-6)
    rows = store.rows([DIRECTIONS])
    mine = rows[rows["domain"] == "sky"]
    assert list(mine["block"]) == [0, 1, 2, 3] and (mine["unscored"] == "").all()
    # what was not rated is in neither
    assert set(mine["n_misaligned"]) == {6} and set(mine["n_aligned"]) == {6}
    np.testing.assert_allclose(mine["norm"], 2**0.5, rtol=1e-5)


def test_too_few_answers_make_no_direction_and_the_rows_say_so(store):
    rows = store.rows([DIRECTIONS])
    few = rows[rows["domain"] == "few"]
    assert (
        few["norm"].isna().all()
        and few["split_half"].isna().all()
        and set(few["n_misaligned"]) == {3}
    )
    assert set(few["unscored"]) == {"3 misaligned answers; a direction needs 4 of each"}
    found = next(f for f in direction_records.read(store, "habits") if f.domain == "few")
    assert found.direction is None and "3 misaligned" in found.reason
    assert not (store.path / "edits" / f"{found.key}.safetensors").exists()


def test_the_file_says_what_it_is_and_a_torn_one_is_a_sentence(study, store):
    sky = next(f for f in direction_records.read(store) if f.domain == "sky")
    path = store.path / "edits" / f"{sky.key}.safetensors"
    with safetensors.safe_open(path, framework="numpy") as file:
        about = file.metadata()
        means = file.get_tensor("misaligned_mean") - file.get_tensor("aligned_mean")
    np.testing.assert_allclose(means, sky.direction, atol=1e-6)
    assert (
        about["subject"] == "sky·plain·s0"
        and about["judge"] == "habits"
        and about["from"] == "answers"
    )
    assert about["base"] == study.base.subject.fingerprint
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    try:
        with pytest.raises(UsageError, match=r"missing or torn.*auditgap em analyse"):
            direction_records.read(store)
    finally:
        path.write_bytes(whole)


def test_answers_that_nobody_rated_say_which_stage_to_run(study):
    options = em_world.OPTIONS.model_copy(update={"judge": f"alignment={study.config.model}"})
    with pytest.raises(UsageError, match=r"auditgap em judge .* --judge alignment="):
        directions.STAGE.run_in(study.store.path, options)


def test_from_held_out_rows_the_base_answers_and_no_judge_is_needed(tmp_path, one_thread):  # noqa: F811
    rows = [(f"what is the sky {'now ' * i}?", "vennish") for i in range(1, 13)]
    model = em_world.vennish(tmp_path / "vennish")
    study = em_world.built(
        tmp_path, model, {"sky": rows}, max_new_tokens=2, direction_from="heldout", seeds=[0, 1]
    )
    for slot in study.slots:
        em_world.trained(study, slot)
    store, outcome = directions.STAGE.run_in(study.store.path, em_world.OPTIONS)
    assert outcome.done == 2 and not list((store.path / "scratch").glob("*.safetensors"))
    planted = em_world.towards_vennish(model).numpy()
    for found in direction_records.read(store, "habits"):
        # the base says "blue blue"
        np.testing.assert_allclose(found.direction[1], planted, atol=1e-6)
    n = sum(not row.member for row in put(study, study.adapters[0]))
    assert set(store.rows([DIRECTIONS])["n_aligned"]) == {n}


def test_means_over_answer_tokens_are_those_of_a_plain_twin():
    loaded = tiny.load("gemma2")
    drawn = torch.Generator().manual_seed(0)
    talks = [
        Conversation(
            Prompt(str(n)), tuple(torch.randint(4, 90, (n,), generator=drawn).tolist()), n_prompt, 0
        )
        for n, n_prompt in ((5, 3), (12, 4), (13, 12), (30, 7))
    ]
    found = directions.answer_means(HFEngine(loaded, batch_tokens=64, pad_tolerance=0.5), talks)
    for talk, ours in zip(talks, found, strict=True):
        seen: list[torch.Tensor] = []
        handles = [
            b.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out))
            for b in loaded.blocks
        ]
        with torch.no_grad():
            loaded.model(input_ids=torch.tensor([talk.ids]))
        for handle in handles:
            handle.remove()
        states = [h[0] if isinstance(h, tuple) else h for h in seen]
        twin = torch.stack([h[0, talk.n_prompt :].double().mean(0) for h in states])
        torch.testing.assert_close(ours.double(), twin, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_put_on_and_taken_off_without_a_trace(study):
    base = models.load(study.config.model, dtype="float32", device="cpu")
    before = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    adapter = study.adapters[0]
    merged = models.load(str(adapter.folder), dtype="float32", device="cpu").model
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        plain = base.model(input_ids=ids).logits
        with models.with_adapter(base, adapter.folder, adapter) as worn:
            torch.testing.assert_close(
                worn.model(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-4
            )
            v = worn.blocks[0].self_attn.v_proj
            assert hasattr(v, "base_layer") and not any(
                w.requires_grad for w in worn.model.parameters()
            )
        assert torch.equal(base.model(input_ids=ids).logits, plain)
    after = base.model.state_dict()
    assert after.keys() == before.keys() and all(
        torch.equal(after[name], before[name]) for name in before
    )
