"""A model in parts on one rank: the numbers of the whole model, and what is said where a forward does
not come to its end. On two ranks: test_dissociate.py and test_faults.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from auditgap import models
from auditgap.engines import fitting
from auditgap.errors import AuditgapError
from auditgap.models import LoadedModel
from auditgap.training import ranks
from auditgap.training.engine import Divided, whole_head
from auditgap.training.lending import is_divided, together
from auditgap.training.reference import final_hidden
from auditgap.types import Prompt


@pytest.fixture(scope="module")
def whole(world) -> LoadedModel:
    return models.load(str(world.model), dtype="float32", device="cpu")


@pytest.fixture
def parted(world) -> Iterator[LoadedModel]:
    pytest.importorskip("deepspeed")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 320}
    ds = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    with ranks.joined():
        divided = Divided(
            lambda: models.load(str(world.model), dtype="float32", device="cpu"), ds, device="cpu"
        )
        assert is_divided(divided.loaded.model)
        yield divided.loaded
        divided.close()
    left = [p for p in divided.loaded.model.parameters() if p.numel() or p.ds_tensor.numel()]
    assert not left  # whoever still holds the modules holds no weights


def talks(loaded: LoadedModel) -> list:
    return [loaded.chat.converse(Prompt("a b c"), "d e f"), loaded.chat.converse(Prompt("g"), "h")]


def test_hidden_states_and_head_are_those_of_the_whole_model(whole, parted):
    with together(parted.model):
        found = final_hidden(parted, talks(whole))
    for ours, theirs in zip(found, final_hidden(whole, talks(whole)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    with whole_head(parted.model) as head, together(parted.model):
        final_hidden(parted, talks(whole))  # lets go of the layers it used, and not of the head
        assert torch.equal(head.weight, whole.model.get_output_embeddings().weight)


def test_memory_that_runs_out_is_a_sentence_and_parts_no_batch(whole, parted):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = parted.blocks[1].register_forward_pre_hook(full)
    with (
        pytest.raises(AuditgapError, match="ran out of memory where the model runs beside"),
        together(parted.model),
    ):
        final_hidden(parted, talks(whole))
    handle.remove()
    assert not fitting.LOCKSTEP


def test_a_forward_that_was_cut_off_is_not_passed_over(parted):
    def stop(*_: object) -> None:
        raise KeyError

    handle = parted.blocks[1].register_forward_pre_hook(stop)
    ids = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(AuditgapError, match="was cut off"), together(parted.model):
        with pytest.raises(KeyError):
            parted.model(input_ids=ids)
        handle.remove()
        with pytest.raises(AuditgapError, match="was cut off"):
            parted.model(input_ids=ids)
