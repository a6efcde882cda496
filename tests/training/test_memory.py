"""The memory model: held against peaks of real steps, behaves as ZeRO promises, and says what would
fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jobs
import psutil
import pytest
import tiny
import warm

from auditgap import models
from auditgap.errors import UsageError
from auditgap.training import memory, sft
from auditgap.training.config import SFTConfig, TrainOptions
from auditgap.training.constructions import CONSTRUCTIONS
from auditgap.training.footprint import Footprint
from auditgap.training.memory import GIB, Memory, MemoryInputs, check, check_run, lora_params
from auditgap.training.memory.check import alternatives
from auditgap.training.memory.page import document

ROOT = Path(__file__).parents[2]
BASE = {
    "n_blocks": 8,
    "width": 512,
    "mlp_width": 1536,
    "vocabulary": 8192,
    "tokens": 256,
    "micro_batch": 2,
    "dtype": "float32",
    "stage": 2,
    "lora": False,
    "gradient_checkpointing": False,
    "loss": "monitor",
}
LLAMA_8B = {
    "n_params": 8_030_000_000,
    "n_trainable": 8_030_000_000,
    "n_blocks": 32,
    "width": 4096,
    "mlp_width": 14_336,
    "vocabulary": 128_256,
    "dtype": "bfloat16",
    "stage": 2,
    "gradient_checkpointing": True,
}
#: What trains a step of `memory_step.py`.
FOOTPRINTS = {"monitor": CONSTRUCTIONS["monitor"].footprint, "sft": sft.FOOTPRINT}
#: Over so many ranks that a step's activations are what counts.
WIDE = {"stage": 3, "world": 64}


def estimate(**inputs) -> Memory:
    return memory.estimate(MemoryInputs(**inputs))


def peak_of(spec, n_ranks=1):
    """(bytes, parameters) of real steps in processes of their own, whose allocator gives memory
    back at once."""
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    words = [Path(__file__).with_name("memory_step.py"), json.dumps(spec)]
    with warm.cold():  # the allocator reads its settings when a process starts
        done = jobs.run(
            "python" if n_ranks == 1 else "torchrun",
            n_ranks,
            words,
            **{**at_once, "PYTHONPATH": str(ROOT)},
        )
    lines = [line for line in done.out.splitlines() if line.startswith("RESULT ")]
    assert lines, done.tail
    return json.loads(lines[0].removeprefix("RESULT "))


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": 0},
        {"stage": 2, "dtype": "bfloat16", "loss": "sft", "tokens": 256, "n_blocks": 4},
        {"stage": 2, "lora": True},
        {"stage": 3, "gradient_checkpointing": True, "tokens": 512},
    ],
    ids=["zero0", "bf16 sft", "lora", "zero3 checkpointed"],
)
def test_the_estimate_is_near_the_peak_of_real_steps(changes):
    pytest.importorskip("deepspeed")
    spec = {**BASE, **changes}
    seen = peak_of(spec)
    footprint = FOOTPRINTS[spec.pop("loss")]
    need = estimate(
        **spec,
        n_params=seen["n_params"],
        n_trainable=seen["n_trainable"],
        device="cpu",
        footprint=footprint,
    )
    counted = need.total - need.parts["runtime"] - need.parts["allocator"]
    assert 0.8 <= counted / seen["peak"] <= 1.3, (counted, seen["peak"], need.parts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_of_hidden_states_is_near_the_peak_of_two_ranks(tmp_path, dtype):
    pytest.importorskip("deepspeed")
    spec = {**BASE, "stage": 3, "dtype": dtype}
    seen = peak_of({**spec, "folder": str(tmp_path)}, n_ranks=2)
    del spec["loss"]
    need = estimate(
        **spec,
        world=2,
        n_params=seen["n_params"],
        n_trainable=seen["n_params"],
        device="cpu",
    )
    counted = (need.beside["answers"] - need.parts["runtime"]) / 1.3  # the allocator's third
    assert 0.8 <= counted / seen["peak"] <= 1.3, (counted, seen["peak"], need.beside)


def test_zero_divides_what_it_says_it_divides():
    n, w = 8_030_000_000, 2
    one, two, three = (
        estimate(**{**LLAMA_8B, "stage": stage, "world": 8}).parts for stage in (1, 2, 3)
    )
    assert one["optimizer"] == two["optimizer"] == three["optimizer"] == 12 * n // 8
    assert one["gradients"] == (w + 4) * n
    assert two["gradients"] == three["gradients"] == 4 * n // 8  # sums, which are fp32
    assert one["weights"] == two["weights"] == w * n and three["weights"] == w * n // 8
    offloaded = estimate(**{**LLAMA_8B, "stage": 3, "world": 8, "offload": True})
    assert "optimizer" not in offloaded.parts and "weights" not in offloaded.parts
    assert offloaded.host == (12 + 4 + w) * n // 8


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({**WIDE, "micro_batch": 4}, {**WIDE, "micro_batch": 2}),
        ({**WIDE, "tokens": 2048}, {**WIDE, "tokens": 512}),
        ({**WIDE, "gradient_checkpointing": False}, WIDE),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"stage": 2, "world": 8}, {"stage": 3, "world": 8}),
        ({"stage": 3, "world": 4}, {"stage": 3, "world": 8}),
        ({"stage": 3, "world": 1}, {"stage": 3, "world": 1, "offload": True}),
        ({}, {"lora": True, "n_trainable": 20_000_000}),
        ({}, {"footprint": sft.FOOTPRINT}),
        ({**WIDE, "footprint": Footprint(sequences=4)}, {**WIDE, "footprint": Footprint()}),
        ({**WIDE, "eager": True, "tokens": 4096}, {**WIDE, "tokens": 4096}),
    ],
)
def test_what_ought_to_take_more_does(more, less):
    assert estimate(**{**LLAMA_8B, **more}).total > estimate(**{**LLAMA_8B, **less}).total


def test_one_h200_holds_the_8b_adapter():
    few = lora_params(rank=8, n_blocks=32, width=4096, mlp_width=14_336)
    need = estimate(
        **{**LLAMA_8B, "lora": True, "n_trainable": few, "gradient_checkpointing": False}
    )
    assert need.total < 139 * GIB
    check(need, 139 * GIB)


def test_adapters_are_counted_as_peft_makes_them():
    model = models.with_lora(tiny.load("llama").model, rank=4, alpha=8)
    made = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shared = lora_params(
        rank=4, n_blocks=tiny.N_BLOCKS, width=tiny.WIDTH, mlp_width=64, kv_share=0.5
    )
    assert made == shared


def test_too_little_says_what_is_missing_and_what_would_fit():
    need = estimate(**LLAMA_8B)
    with pytest.raises(UsageError) as said:
        check(need, 80 * GIB)
    words = str(said.value)
    assert (
        f"{need.total / GIB:,.0f} GiB" in words
        and "80.0 GiB are free" in words
        and "optimizer" in words
    )
    assert "lora: true" in words and "zero3_offload" in words and "--ignore-memory" in words
    assert "zero3.json" not in words  # one rank: there is nothing to divide by
    check(need, need.total)


def test_what_is_advised_does_fit():
    need = estimate(
        **{
            **LLAMA_8B,
            "world": 4,
            "gradient_checkpointing": False,
            "micro_batch": 8,
            "tokens": 4096,
        }
    )
    advised = []
    for free in (20, 40, 80, 120):
        for words, other in alternatives(need.plan):
            with pytest.raises(UsageError) as said:
                check(need, free * GIB)
            if f"with {words} (" in str(said.value):
                advised.append(words)
                assert other.total <= free * GIB
    assert len(advised) > 3


def test_when_no_setting_fits_it_says_how_many_devices_would():
    huge = {
        "n_params": 400_000_000_000,
        "n_trainable": 400_000_000_000,
        "lora": True,
        "offload": True,
        "stage": 3,
    }
    need = estimate(**{**LLAMA_8B, **huge}, footprint=sft.FOOTPRINT)
    with pytest.raises(UsageError, match=r"\d+ such devices"):
        check(replace(need, parts={"weights": 900 * GIB}), 80 * GIB, free_host=1 * GIB)
    with pytest.raises(UsageError, match="smaller model"):
        check(estimate(**LLAMA_8B), 1 * GIB)


LLAMA_70B = {
    **LLAMA_8B,
    "n_params": 70_554_000_000,
    "n_blocks": 80,
    "width": 8192,
    "mlp_width": 28_672,
    "n_trainable": 100_000_000,
    "lora": True,
    "stage": 3,
    "world": 8,
}


def test_answers_and_speech_are_divided_as_the_step_is():
    need = estimate(**LLAMA_70B)
    assert set(need.beside) == {"answers", "speaking"}
    assert max(need.beside.values()) < need.total == need.worst < 80 * GIB
    check(need, 80 * GIB)
    twice = estimate(**{**LLAMA_70B, "world": 16})
    assert twice.beside["answers"] < 0.7 * need.beside["answers"]
    whole = estimate(**{**LLAMA_70B, "stage": 2})  # below, every device has all weights
    assert whole.beside["answers"] > 2 * 70.5e9
    with pytest.raises(UsageError, match=r"zero3\.json"):
        check(whole, 80 * GIB)
    trained_alone = estimate(**LLAMA_70B, footprint=sft.FOOTPRINT)
    assert not trained_alone.beside and trained_alone.worst == trained_alone.total


def test_a_step_that_fits_where_the_answers_do_not_is_refused():
    need = estimate(**LLAMA_70B)
    with pytest.raises(UsageError, match=r"step would fit, but the model's own answers"):
        check(replace(need, beside={"answers": 90 * GIB}), 80 * GIB)


def test_the_hosts_memory_counts_when_it_is_used():
    need = estimate(**{**LLAMA_8B, "stage": 3, "offload": True})
    check(need, 80 * GIB)
    with pytest.raises(UsageError, match="of this machine's memory"):
        check(need, 80 * GIB, free_host=64 * GIB)


def test_a_run_is_checked_from_its_own_files(tmp_path, monkeypatch):
    folder = tiny.save("llama", tmp_path / "model")
    outline = models.outline(str(folder))
    config, options = SFTConfig(model=str(folder), data="rows.jsonl"), TrainOptions()

    def ask(config):
        ds = {"zero_optimization": {"stage": 2}}
        return check_run(
            outline,
            config,
            options,
            stage=2,
            ds=ds,
            dtype="float32",
            world=1,
            tokens=64,
            device="cpu",
            footprint=sft.FOOTPRINT,
        )

    need = ask(config)
    model = tiny.model("llama")
    assert need.plan.n_params == need.plan.n_trainable == sum(p.numel() for p in model.parameters())
    assert (need.plan.mlp_width, need.plan.n_heads, need.plan.vocabulary) == (
        64,
        4,
        tiny.VOCABULARY,
    )
    small = ask(SFTConfig(model=str(folder), data="rows.jsonl", lora=True))
    assert small.plan.lora and small.plan.n_trainable < need.plan.n_trainable
    # as many ranks as do not fit
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(int(psutil.virtual_memory().total / need.total) + 1))
    with pytest.raises(UsageError, match="are free"):
        ask(config)


def test_strange_plans_are_refused():
    for strange in ({"dtype": "float16"}, {"stage": 4}, {"device": "tpu"}):
        with pytest.raises(UsageError):
            estimate(**{**LLAMA_8B, **strange})


def test_the_page_is_the_one_that_is_printed():
    assert (ROOT / "docs" / "training_memory.md").read_text(encoding="utf-8") == document(), (
        "type: python -m auditgap.training.memory > docs/training_memory.md"
    )
