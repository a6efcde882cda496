"""A model under accelerate's dispatch, whose hooks live in `block.forward` like ours: the same
numbers, and nothing of it lost.

A CPU is one device, so here all parts lie on it (or on the disk) under the hooks that carry
activations elsewhere; the twins that cross from one device to another are marked `gpu`.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import dispatch_model
from accelerate.big_modeling import attach_align_device_hook_on_blocks
from one_thread import one_thread  # noqa: F401 - a fixture
from peft import LoraConfig, get_peft_model

from auditgap import models
from auditgap.engines import Question, Request, Sampling, fitting
from auditgap.engines.hf import HFEngine
from auditgap.errors import AuditgapError, UsageError
from auditgap.interventions.pgd import PGD, Goal, attack
from auditgap.models import Rendered, Shard, wrap
from auditgap.types import Edit, Prompt, Site, Subject

SITES = [Site(-1), Site(0), Site(2), Site(3)]
RENDERED = [
    Rendered(Prompt(str(i)), ids, (True,) * len(ids))
    for i, ids in enumerate([(5, 9, 30, 14, 61, 22), (7, 8, 9), (44, 3, 17, 80)])
]
TARGET = (13, 9)


def engine(model: torch.nn.Module) -> HFEngine:
    return HFEngine(wrap(model, tiny.tokenizer(), Subject("tiny", "tiny")), pad_tolerance=0.9)


def parts(model: torch.nn.Module) -> dict[str, int | None]:
    """Every module that dispatch would place on its own, and the number of the block that it is."""
    blocks = {id(b): i for i, b in enumerate(models.find_blocks(model))}
    base = model.base_model_prefix
    found: dict[str, int | None] = {}
    for name, module in model.named_modules():
        direct = name.count(".") == (1 if name.startswith(f"{base}.") else 0) and name not in (
            "",
            base,
        )
        if id(module) in blocks:
            found[name] = blocks[id(module)]
        elif direct and not any(id(b) in blocks for b in module.children()):
            found[name] = None
    return found


def on_one(model: torch.nn.Module, _folder) -> torch.nn.Module:
    return dispatch_model(
        model,
        {"": "cpu"},
        main_device="cpu",
        force_hooks=True,
        skip_keys=model._skip_keys_device_placement,
    )


def on_disk(model: torch.nn.Module, folder) -> torch.nn.Module:
    """Every other block is on the disk, and read when it is its turn."""
    where = {name: "disk" if i is not None and i % 2 else "cpu" for name, i in parts(model).items()}
    return dispatch_model(
        model,
        where,
        main_device="cpu",
        offload_dir=str(folder),
        skip_keys=model._skip_keys_device_placement,
    )


def said(speaker: HFEngine, site: Site) -> dict[str, object]:
    """All that an audit asks of an engine at one site."""
    speaker.self_test(site)
    goals = [Goal(r, TARGET, (0.1, 0.4)) for r in RENDERED]
    found = attack(speaker, goals, site, PGD(steps=4))
    edits = [Edit(site, row[1].delta) for row in found]
    asked = [Request(r, e, TARGET) for r, e in zip(RENDERED, edits, strict=True)] + [
        Request(RENDERED[0])
    ]
    return {
        "activations": speaker.activations(RENDERED, site),
        "found": [(f.delta, f.nll_clean, f.nll_edited) for row in found for f in row],
        "completions": [astuple(c) for c in speaker.generate(asked, 5)],
        "nll": (
            speaker.nll(RENDERED, [(1, 2, 3), (4,), TARGET], edits)
            + speaker.nll(RENDERED, [TARGET] * 3)
        ),
        "replies": speaker.ask(
            [Question(text="red blue green")], Sampling(max_new_tokens=4, temperature=0.7)
        ),
    }


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


@pytest.mark.parametrize("dispatched", [on_one, on_disk], ids=["hooks", "disk"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "qwen2", "gpt_neox"])
def test_a_dispatched_model_gives_the_same_numbers(family, dispatched, tmp_path):
    plain = tiny.model(family)
    spread = dispatched(copy.deepcopy(plain), tmp_path / "weights")
    here, there = engine(plain), engine(spread)
    forwards = [block.__dict__["forward"] for block in there.blocks]
    assert "forward" not in here.blocks[0].__dict__ and len(forwards) == tiny.N_BLOCKS
    if dispatched is on_disk:
        assert next(there.blocks[1].parameters()).device.type == "meta", "it is on the disk"
    for site in SITES:
        expected, found = said(here, site), said(there, site)
        for name, value in expected.items():
            assert same(value, found[name]), (name, site)
    assert [block.__dict__["forward"] for block in there.blocks] == forwards, (
        "what dispatch put there is there again"
    )


def test_a_dispatched_forward_is_put_back_after_an_exception(tmp_path):
    speaker = engine(on_disk(tiny.model("llama"), tmp_path / "weights"))
    forwards = [block.__dict__["forward"] for block in speaker.blocks]
    for site in SITES:
        for error in (ValueError, KeyboardInterrupt):
            with pytest.raises(error), speaker.edited(site, lambda h: h, skip_trunk=True):
                raise error
        with (
            pytest.raises(RuntimeError),
            speaker.edited(site, lambda h: h + torch.zeros(tiny.WIDTH + 1)),
        ):
            speaker.model(input_ids=torch.tensor([[5, 9]]))
    assert [block.__dict__["forward"] for block in speaker.blocks] == forwards
    there, here = (
        e.generate([Request(RENDERED[0])], 5) for e in (speaker, engine(tiny.model("llama")))
    )
    assert astuple(there[0]) == astuple(here[0])


def test_nothing_of_two_devices_meets():
    """Devices that are made up, but differ: δ, masks, positions, caches and chosen rows are where
    they are read."""
    script, families = Path(__file__).parent / "two_devices.py", ["llama", "gemma2", "gpt_neox"]
    done = subprocess.run(
        [sys.executable, str(script), *families],
        capture_output=True,
        text=True,
        timeout=200,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(script.parent), str(script.parents[1])]),
        },
    )
    assert done.stdout.split("\n") == [
        *(f"{family}: all at home" for family in families),
        "",
    ], done.stderr[-1500:]


def test_what_the_ranks_agree_on_is_what_is_said():
    """`agreed` is rank 0's word: the next token, and whether the logits were numbers. A single
    number is the self-test's answer, which all have alike here."""
    plain = engine(tiny.model("llama"))

    def sevens(told: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[7] * told.shape[1], [0] * told.shape[1]]) if told.ndim else told

    ranked = HFEngine(plain.loaded, agreed=sevens)
    assert [c.ids for c in ranked.generate([Request(r) for r in RENDERED], 3)] == [(7, 7, 7)] * 3
    signs = HFEngine(plain.loaded, agreed=lambda told: torch.ones_like(told) if told.ndim else told)
    (found,) = attack(signs, [Goal(RENDERED[0], TARGET, (0.2,))], Site(1), PGD(steps=1))[0]
    assert found.delta.eq(-0.05).all(), "every gradient is that of rank 0"


def test_no_rank_parts_a_batch_alone(monkeypatch):
    """Out of memory on one rank: half a batch there would meet whole ones on the others."""

    def full(rows):
        raise MemoryError

    monkeypatch.setattr(fitting, "LOCKSTEP", True)
    with pytest.raises(
        AuditgapError, match=r"rank of a sharded model ran out of memory.*--batch-tokens"
    ):
        fitting.halving(full, [1, 2, 3, 4])


# -------------------------------------------------------------------------------------------------------------
# loading


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    for family in ("llama", "gpt_neox"):
        tiny.save(family, home / family)
    tiny.save("llama", home / "odd", num_attention_heads=3, num_key_value_heads=3, hidden_size=36)
    model = get_peft_model(
        tiny.model("llama"),
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    model.peft_config["default"].base_model_name_or_path = str(home / "llama")
    model.save_pretrained(home / "adapter")
    return home


@pytest.mark.parametrize("name", ["llama", "adapter"])
def test_a_subject_is_loaded_in_parts(folders, name):
    whole, spread = (
        HFEngine(
            models.load(str(folders / name), dtype="float32", device="cpu", shard=Shard.of(word))
        )
        for word in (None, "layers:2")
    )
    assert hasattr(spread.blocks[0], "_hf_hook") and not hasattr(whole.blocks[0], "_hf_hook")
    for name, value in said(whole, Site(1)).items():
        assert same(value, said(spread, Site(1))[name]), name


@pytest.mark.parametrize(
    "word",
    [
        "layers",
        "tensor:",
        "tensor:x",
        "tensor:0",
        "rows:2",
        "2",
        "tensor:-1",
        "tensor:²",
        "layers:65",
    ],
)
def test_what_is_no_shard_is_refused(word):
    with pytest.raises(UsageError, match="--shard takes layers:N"):
        Shard.of(word)


def test_one_part_is_a_whole_model():
    assert (
        Shard.of("layers:1")
        == Shard.of("tensor:1")
        == Shard.of("whole")
        == Shard.of(None)
        == models.WHOLE
    )


@pytest.mark.parametrize(
    ("name", "word", "wanted"),
    [
        ("odd", "tensor:2", "3 attention heads, which 2 ranks cannot share"),
        ("llama", "tensor:4", "2 key/value heads"),
        ("adapter", "tensor:2", "is an adapter"),
        ("llama", "layers:5", "has 4 blocks, too few"),
        ("bloom", "tensor:2", r"no tensor-parallel plan for .*bloom.*Use --shard layers:2"),
    ],
)
def test_what_cannot_lie_so_is_refused_before_a_weight_is_read(folders, name, word, wanted):
    if name == "bloom":
        from transformers import BloomConfig, BloomForCausalLM

        BloomForCausalLM(
            BloomConfig(vocab_size=96, hidden_size=32, n_layer=4, n_head=4)
        ).save_pretrained(folders / "bloom")
        tiny.tokenizer().save_pretrained(folders / "bloom")
    with pytest.raises(UsageError, match=wanted) as caught:
        Shard.of(word).check(models.outline(str(folders / name)))
    assert "\n" not in str(caught.value)


def test_more_gpus_than_there_are_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="wants 2 GPUs, and 1 can be used"):
        Shard.of("layers:2").check_devices("cuda")
    with pytest.raises(UsageError, match="is one GPU"):
        Shard.of("tensor:2").check_devices("cuda:0")
    Shard.of("tensor:2").check_devices("cpu")


# ----------------------------------------------------------------------------------------------------------
# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_a_model_half_on_a_gpu_gives_the_cpus_edits_and_words(family):
    """Two devices that really differ: the upper blocks run on the CPU, the rest on the GPU."""
    plain = tiny.model(family)
    spread = copy.deepcopy(plain)
    where = {
        name: "cpu" if i is not None and i >= 2 else "cuda:0" for name, i in parts(spread).items()
    }
    attach_align_device_hook_on_blocks(
        spread,
        execution_device={**where, "": "cuda:0"},
        offload=dict.fromkeys(where, False),
        tied_params_map={},
        skip_keys=spread._skip_keys_device_placement,
    )
    there, here = engine(spread), engine(plain)
    assert there.device.type == "cuda" and next(there.blocks[2].parameters()).device.type == "cpu"
    for site in SITES:
        expected, found = said(here, site), said(there, site)
        for (delta, *_), (other, *_) in zip(expected["found"], found["found"], strict=True):
            assert (delta.sign() == other.sign()).float().mean() > 0.98
        assert [ids for _, ids, *_ in expected["completions"]] == [
            ids for _, ids, *_ in found["completions"]
        ]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_edits_and_words_of_one(folders):
    one, two = (
        HFEngine(
            models.load(
                str(folders / "llama"), dtype="float32", device="cuda", shard=Shard.of(word)
            )
        )
        for word in (None, "layers:2")
    )
    assert {p.device.index for p in two.model.parameters()} == {0, 1}
    for site in SITES:
        expected, found = said(one, site), said(two, site)
        assert [ids for _, ids, *_ in expected["completions"]] == [
            ids for _, ids, *_ in found["completions"]
        ]
