"""Whether a step fits what is free here, and what would fit when it does not.

check(need, free=80 * 2**30)     # UsageError: what is needed, what is free, what would fit
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psutil
import torch

from auditgap.errors import UsageError
from auditgap.models import Outline
from auditgap.training.config import TrainConfig, TrainOptions
from auditgap.training.footprint import Footprint
from auditgap.training.memory.model import (
    GIB,
    LIVE_PARAMS,
    Memory,
    MemoryInputs,
    estimate,
    lora_params,
)
from auditgap.types import Document


def check(need: Memory, free: float, *, free_host: float | None = None) -> None:
    """Raise UsageError when a step needs more than `free` bytes on a device (or `free_host` on the
    host, for each rank).

    The sentence says what is needed for what, what is free, and what would fit, computed in the
    same way.
    """
    host_short = free_host is not None and need.host > free_host
    if need.worst <= free and not host_short:
        return
    largest = sorted(need.parts.items(), key=lambda part: -part[1])[:3]
    mostly = ", ".join(f"{name} {_gib(size)}" for name, size in largest)
    wanted = (
        f"A training step needs about {_gib(need.total)} on each device ({mostly}), and"
        f" {_gib(free)} are free."
    )
    if need.total <= free:
        wanted = (
            f"A training step would fit, but the model's own answers and hidden states need about"
            f" {_gib(need.worst)} on each device, and {_gib(free)} are free."
        )
    if host_short:
        have = _gib(free_host or 0)
        wanted = (
            f"Offloading needs about {_gib(need.host)} of this machine's memory for each rank, and"
            f" {have} are free."
        )
    fitting = [
        (words, other)
        for words, other in alternatives(need.plan)
        if other.worst <= free and (free_host is None or other.host <= free_host)
    ]
    if fitting:
        simplest = min(words.count(" and ") for words, _ in fitting)
        possible = [
            f"{words} ({_gib(other.worst)})"
            for words, other in fitting
            if words.count(" and ") == simplest
        ][:3]
        advice = f"It would fit with {', or with '.join(possible)}."
    else:
        advice = _more_ranks(need.plan, free)
    raise UsageError(f"{wanted} {advice} To try all the same: --ignore-memory")


def check_run(
    outline: Outline,
    config: TrainConfig,
    options: TrainOptions,
    *,
    stage: int,
    ds: Document,
    dtype: str,
    world: int,
    tokens: int,
    device: str,
    footprint: Footprint,
) -> Memory:
    """The estimate of a run that is about to start, checked against what is free here; returned
    when it fits.

    `ds` is the DeepSpeed config without "auto"; `tokens` the longest row. On a CPU, ranks of this
    machine share its memory. Raises UsageError as `check`.
    """
    need = estimate(
        _plan(outline, config, options, stage, ds, dtype, world, tokens, device, footprint)
    )
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world)
    free_host = psutil.virtual_memory().available / max(1, here)
    if device.startswith("cuda"):
        check(need, torch.cuda.mem_get_info(device)[0], free_host=free_host if need.host else None)
    else:
        check(
            replace(need, parts={**need.parts, "offloaded": need.host}) if need.host else need,
            free_host,
        )
    return need


def _plan(
    outline: Outline,
    config: TrainConfig,
    options: TrainOptions,
    stage: int,
    ds: Document,
    dtype: str,
    world: int,
    tokens: int,
    device: str,
    footprint: Footprint,
) -> MemoryInputs:
    family = _family(outline)
    mlp = int(getattr(family, "intermediate_size", None) or 3.5 * outline.width)
    heads = int(getattr(family, "num_attention_heads", None) or max(1, outline.width // 64))
    shared = int(getattr(family, "num_key_value_heads", None) or heads)
    zero = ds.get("zero_optimization", {})
    lora = config.lora
    trainable = (
        outline.n_params
        if lora is None
        else lora_params(
            rank=lora.rank,
            n_blocks=outline.n_blocks,
            width=outline.width,
            mlp_width=mlp,
            kv_share=shared / heads,
        )
    )
    return MemoryInputs(
        n_params=outline.n_params + (0 if lora is None else trainable),
        n_trainable=trainable,
        n_blocks=outline.n_blocks,
        width=outline.width,
        vocabulary=outline.n_head_params // outline.width,
        dtype=dtype,
        stage=stage,
        world=world,
        micro_batch=options.micro_batch,
        tokens=tokens,
        gradient_checkpointing=config.gradient_checkpointing,
        footprint=footprint,
        lora=lora is not None,
        offload=zero.get("offload_optimizer", {}).get("device", "none") != "none",
        n_heads=heads,
        mlp_width=mlp,
        eager=bool(getattr(family, "attn_logit_softcapping", None)),
        bucket=_number(zero.get("reduce_bucket_size")),
        live_params=_number(zero.get("stage3_max_live_parameters")) or LIVE_PARAMS,
        device="cuda" if device.startswith("cuda") else "cpu",
    )


def _family(outline: Outline) -> Any:
    """The transformers config of the model, or of an adapter's base."""
    from auditgap.models.door import open_config
    from auditgap.models.folder import adapter_base
    from auditgap.models.weights import is_adapter

    base = adapter_base(outline.folder) if is_adapter(outline.folder) else outline.folder
    return open_config(base, outline.subject.name).get_text_config()


def _number(value: object) -> int | None:
    return int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def alternatives(p: MemoryInputs) -> Iterator[tuple[str, Memory]]:
    """What a user could change, one thing at a time and then together, from what costs least."""
    changes: list[tuple[str, MemoryInputs]] = []
    if p.micro_batch > 1:
        changes.append(("micro_batch: 1", replace(p, micro_batch=1)))
    if not p.gradient_checkpointing:
        changes.append(("gradient_checkpointing: true", replace(p, gradient_checkpointing=True)))
    if p.stage < 2 and p.world > 1:
        changes.append(("ZeRO-2 (ds_configs/zero2.json)", replace(p, stage=2)))
    if p.stage < 3 and p.world > 1:
        changes.append(("ZeRO-3 (ds_configs/zero3.json)", replace(p, stage=3)))
    if not p.lora:
        mlp = p.mlp_width or round(3.5 * p.width)
        few = lora_params(rank=8, n_blocks=p.n_blocks, width=p.width, mlp_width=mlp)
        small = replace(p, lora=True, n_trainable=few, n_params=p.n_params + few)
        changes.append(("lora: true", small))
    if not p.offload and p.device == "cuda":
        changes.append(
            (
                "ZeRO-3 with offload (ds_configs/zero3_offload.json)",
                replace(p, stage=3, offload=True),
            )
        )
    for words, plan in changes:
        yield words, estimate(plan)
    before = [
        words for words, _ in changes if words.startswith(("micro_batch", "gradient_checkpointing"))
    ]
    lean = replace(p, micro_batch=1, gradient_checkpointing=True)
    if len(before) > 1:
        yield " and ".join(before), estimate(lean)
    for words, plan in changes:
        if before and words not in before:
            yield (
                " and ".join([*before, words]),
                estimate(replace(plan, micro_batch=1, gradient_checkpointing=True)),
            )


def _more_ranks(p: MemoryInputs, free: float) -> str:
    """How many devices of this kind would do, as the last resort."""
    lean = replace(p, micro_batch=1, gradient_checkpointing=True, stage=3, offload=False)
    for world in (2, 4, 8, 16, 32, 64, 128, 256):
        if (
            world > p.world
            and estimate(replace(lean, world=world)).worst <= free
            and p.device == "cuda"
        ):
            return (
                f"No setting fits here; {world} such devices with ZeRO-3, micro_batch: 1 and"
                " gradient_checkpointing: true would."
            )
    return (
        "No setting fits here; choose a smaller model, fewer max_tokens, or a machine with more"
        " memory."
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size < 99.5 * GIB else f"{size / GIB:,.0f} GiB"
