"""The self-test itself: it refuses models whose numbers would be wrong, and gives up no more than
it must. Each case was once passed, or refused, by mistake."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from auditgap.engines.caches import WholeText, select
from auditgap.engines.hf import HFEngine
from auditgap.engines.layout import Layout
from auditgap.errors import AuditgapError, UsageError
from auditgap.models import wrap
from auditgap.models.blocks import find_blocks
from auditgap.types import Site, Subject

SMALL = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": tiny.WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


def engine(family: str, **settings: object) -> HFEngine:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SMALL, **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    return HFEngine(wrap(model, tiny.tokenizer(), Subject(family, family)))


def refused(speaker: HFEngine) -> str:
    with pytest.raises(AuditgapError) as caught:
        speaker.self_test(Site(1))
    return str(caught.value)


def test_positions_that_do_not_start_at_0_are_found():
    speaker = engine("roberta", is_decoder=True)
    speaker.self_test(Site(1))
    assert speaker._first == 1 and not speaker.ways(Site(1))
    speaker = engine("roberta", is_decoder=True)
    speaker._first = 0
    assert "other logits than when it is left to itself" in refused(speaker)


def test_attention_under_a_name_of_ours_is_refused():
    AttentionInterface.register("renamed", sdpa_attention_forward)
    AttentionMaskInterface.register("renamed", sdpa_mask)
    speaker = HFEngine(tiny.load("llama"))
    speaker.model.set_attn_implementation("renamed")
    assert "'renamed'" in refused(speaker)


def test_sparse_attention_that_is_dropped_is_seen():
    speaker = engine(
        "deepseek_v32",
        num_key_value_heads=4,
        index_topk=2,
        index_n_heads=16,
        index_head_dim=16,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    )
    speaker.self_test(Site(1))
    for module in speaker.model.modules():
        if type(module).__name__.endswith("Attention"):
            module.forward = with_all(module)
    assert "SDPA gives other logits than eager attention" in refused(HFEngine(speaker.loaded))


def with_all(module: torch.nn.Module):
    """This attention without its indexer, unless it runs eager."""
    own = module.forward

    def forward(*args, **kwargs):
        if module.config._attn_implementation == "eager":
            return own(*args, **kwargs)
        before, module.indexer.index_topk = module.indexer.index_topk, 10_000
        try:
            return own(*args, **kwargs)
        finally:
            module.indexer.index_topk = before

    return forward


def test_a_model_that_reads_forwards_is_refused():
    assert "does not only read backwards" in refused(engine("bert", is_decoder=False))


def test_padding_that_leaks_makes_rows_run_alone():
    speaker = HFEngine(tiny.load("llama"))
    speaker.blocks[1].register_forward_pre_hook(
        lambda _m, args: (args[0] + 0.5 * args[0].cumsum(1), *args[1:])
    )
    # what sums all positions reads padding, and cannot be decoded from a cache
    speaker.self_test(Site(0))
    assert speaker.packing.alone and not speaker.cached
    assert speaker.packing.packs([5, 5]) == [[0], [1]]


def test_one_token_that_is_not_as_in_the_whole_text_makes_the_whole_text_run():
    speaker = HFEngine(tiny.load("llama"))
    speaker.blocks[2].register_forward_pre_hook(
        lambda _m, args: (args[0] * 1.5, *args[1:]) if args[0].shape[1] == 1 else None
    )
    speaker.check()
    assert speaker.ways(Site(1)) == ("the whole text at each token",)


def test_what_passes_the_blocks_by_makes_the_whole_model_run():
    speaker = HFEngine(tiny.load("llama"))
    seen: list[torch.Tensor] = []
    speaker.blocks[0].register_forward_hook(lambda _m, _a, out: seen.append(out))
    speaker.blocks[3].register_forward_pre_hook(lambda _m, args: (args[0] + seen[-1], *args[1:]))
    speaker.self_test(Site(1))
    speaker.self_test(Site(3))
    assert not speaker.ways(Site(3))
    assert speaker.ways(Site(1)) == ("the whole model above the site",)


def test_a_whole_text_stands_in_for_a_cache():
    speaker = HFEngine(tiny.load("llama"))
    ids = torch.tensor([[5, 9, 30, 14], [7, 8, 11, 13]])
    mask = torch.ones_like(ids)
    speaker.cached = False
    cache = speaker.new_cache()
    assert isinstance(cache, WholeText)
    speaker.forward(ids[:, :3], mask[:, :3], keep=1, cache=cache)
    select(cache, [1, 0])
    last = speaker.forward(ids[[1, 0], 3:], mask, keep=1, cache=cache).logits
    whole = speaker.forward(ids, mask, keep=1).logits
    assert torch.allclose(last, whole[[1, 0]], atol=1e-5)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)])
def test_several_streams_are_one_of_their_joint_width(axes):
    h = torch.arange(5 * 7 * 2 * 3).view(5, 7, 2, 3)
    theirs = h.permute(*axes, 3)
    order = (*map(axes.index, range(3)), 3)
    layout = Layout(streams=order)
    assert torch.equal(layout.flat(theirs), h.flatten(2))
    assert torch.equal(layout.laid_out(layout.flat(theirs), theirs), theirs)


def test_blocks_are_those_that_text_runs_through():
    model = tiny.model("llama")
    model.tower = torch.nn.ModuleList(torch.nn.Linear(200, 200) for _ in range(4))  # larger
    assert find_blocks(model) is model.model.layers
    del model.tower
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(UsageError, match="LlamaForCausalLM cannot be audited"):
        find_blocks(model)
