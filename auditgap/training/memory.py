"""How much memory a training step needs, before anything is loaded: what fits where, and what to
change when it does not.

    need = estimate(MemoryInputs(n_params=8_030_000_000, n_trainable=8_030_000_000, n_blocks=32, width=4096,
                                 vocabulary=128_256, dtype="bfloat16", stage=3, world=8, tokens=512))
    need.total                       # bytes on each device; need.parts says for what
    check(need, free=80 * 2**30)     # UsageError: what is needed, what is free, what would fit

`python -m auditgap.training.memory` prints docs/training_memory.md. The model is counted, not
measured: bytes that DeepSpeed keeps (ZeRO: arXiv 1910.02054, section 3; K = 12 for mixed-precision
Adam), and what autograd saves of a Llama-like block. The tests hold it against the peaks of real
training steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import psutil
import torch

from auditgap.errors import UsageError
from auditgap.models import Outline
from auditgap.training.config import TrainConfig, TrainOptions
from auditgap.training.constructions import CONSTRUCTIONS, DEFAULT
from auditgap.training.footprint import Footprint

__all__ = ["Memory", "MemoryInputs", "check", "check_run", "document", "estimate", "lora_params"]

GIB = 2**30
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
#: Elements of objective.token_losses' chunk of logits.
_CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
#: Bytes a trained parameter while it is updated.
_UPDATE = {"cuda": 8, "cpu": 12}
#: DeepSpeed's stage3_max_live_parameters, unless the config says otherwise.
_LIVE_PARAMS = 1_000_000_000
#: The CUDA context and NCCL's buffers; a process's libraries on a CPU.
_RUNTIME = {"cuda": 1.5 * GIB, "cpu": 0.25 * GIB}
#: What an allocator holds and cannot use, as a share of the rest. glibc's wasted up to 0.5 of small
#: steps; see the tests.
_WASTE = {"cuda": 0.08, "cpu": 0.3}


@dataclass(frozen=True, kw_only=True)
class MemoryInputs:
    """What decides how much memory a step needs. Numbers are of the whole model; `estimate` divides
    them over ranks."""

    n_params: int
    n_trainable: int  #: all of them, or the adapter's
    n_blocks: int  #: L
    width: int  #: D
    vocabulary: int  #: V
    dtype: str  #: of weights and activations: float32 or bfloat16
    stage: int  #: ZeRO stage, 0–3
    world: int = 1  #: ranks
    micro_batch: int = 2  #: rows a rank and micro-batch
    tokens: int = 512  #: of the longest row, prompt and response
    gradient_checkpointing: bool = False
    footprint: Footprint = CONSTRUCTIONS[DEFAULT].footprint
    lora: bool = False
    offload: bool = False  #: optimizer states (and at stage 3 the weights) in the host's memory
    n_heads: int | None = None  #: D / 64 unless told
    #: attention without a fused kernel, which keeps each head's T × T (Gemma 2)
    eager: bool = False
    mlp_width: int | None = None  #: 3.5 D unless told
    #: elements of DeepSpeed's reduce bucket; D² (at least 2^20) unless told
    bucket: int | None = None
    live_params: int = _LIVE_PARAMS  #: stage3_max_live_parameters
    device: Literal["cuda", "cpu"] = "cuda"

    def __post_init__(self) -> None:
        if (
            self.dtype not in _DTYPE_BYTES
            or self.stage not in (0, 1, 2, 3)
            or self.device not in _RUNTIME
        ):
            raise UsageError(
                "A memory estimate is for float32 or bfloat16, ZeRO stages 0 to 3 and cuda or cpu;"
                f" {self.dtype}, {self.stage} and {self.device} came."
            )


@dataclass(frozen=True)
class Memory:
    """Bytes on each device at the worst moment of a step, part by part, and on the host for each
    rank."""

    plan: MemoryInputs
    parts: Mapping[str, int]
    host: int = 0
    #: what each moment adds to what is always there
    phases: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def lora_params(
    *, rank: int, n_blocks: int, width: int, mlp_width: int, kv_share: float = 1.0
) -> int:
    """Parameters of adapters of a rank on every linear layer of L Llama-like blocks: rank × (in +
    out) each."""
    attention = 2 * (width + width) + 2 * (width + kv_share * width)
    return round(n_blocks * rank * (attention + 3 * (width + mlp_width)))


def estimate(p: MemoryInputs) -> Memory:
    """The memory of one training step."""
    w, share = _DTYPE_BYTES[p.dtype], (p.world if p.stage >= 1 else 1)
    head = p.vocabulary * p.width
    full = not p.lora
    always: dict[str, float] = {}

    # -- weights, gradients, optimizer (ZeRO: the optimizer's states, then gradients, then weights
    # are divided over ranks)
    host = 0.0
    weights = w * p.n_params / (p.world if p.stage == 3 else 1)
    states = 8 * p.n_trainable / share  # Adam's two moments, fp32
    # ZeRO keeps an fp32 master copy whatever the dtype; without ZeRO only weights that are not fp32
    # themselves have one
    master = 4 * p.n_trainable / share if p.stage >= 1 or w == 2 else 0.0
    gradients = w * p.n_trainable / (p.world if p.stage >= 2 else 1)
    if p.stage == 0 and w == 2:
        gradients += 4 * p.n_trainable  # DeepSpeed accumulates them in fp32 there
    if p.offload and p.stage >= 1:
        host += states + master + 4 * p.n_trainable / share
        states = master = 0.0
        gradients = 0.0 if p.stage >= 2 else gradients
        if p.stage == 3:
            host += weights
            weights = 0.0
    always["weights"], always["gradients"], always["optimizer"] = (
        weights,
        gradients,
        master + states,
    )

    # -- what ZeRO moves: buckets, the largest gradient, gathered weights
    bucket = p.bucket or max(p.width**2, 1 << 20)
    moving = 0.0
    if p.stage >= 1:
        # overlap_comm keeps two
        moving += w * min(bucket, p.n_trainable) * (2 if p.device == "cuda" else 1)
    if p.stage == 3:
        moving += w * (min(p.n_params, p.live_params) + head)
    always["buckets"] = moving
    largest_gradient = w * head if full else 0.0

    # -- beside the model
    always |= p.footprint.alongside(p.n_blocks, p.width)
    if full and p.footprint.reference_head:
        always["reference head"] = w * head

    # -- the step itself
    rows = p.micro_batch * p.footprint.sequences
    n = rows * p.tokens
    one_block = n * _block_bytes(p, w) + _attention_bytes(p, w, rows)
    mlp = p.mlp_width or 3.5 * p.width
    kept = p.n_blocks * n * w * p.width if p.gradient_checkpointing else p.n_blocks * one_block
    # embedded ids, final norm, the predicting positions and their gradient, the reference's
    ends = n * p.width * (6 * w + 8)
    working = n * (3 * w * mlp + 8 * p.width) + (one_block if p.gradient_checkpointing else 0)
    chunk = (
        max(16 * p.vocabulary, min(_CHUNK_ELEMENTS[p.device], n * p.vocabulary))
        * 4
        * p.footprint.chunk_buffers
    )
    head_gradient = (4 + (w if w < 4 else 0)) * head if full else 0.0
    updated = p.n_trainable / share
    phases = {
        # activations stand, and the head's losses and gradients are computed in chunks
        "loss": {"activations": kept + ends, "head": chunk + head_gradient},
        # activations go block by block, gradients come
        "backward": {"activations": kept + ends + working, "largest gradient": largest_gradient},
        # gradients in fp32 and Adam's denominator (twice on a CPU); at stage 3 a sub-group of
        # DeepSpeed's at a time
        "update": {
            "update": (
                _UPDATE[p.device] * (min(updated, 1e9) if p.stage == 3 else updated)
                if not p.offload
                else 0.0
            )
        },
    }
    if p.stage == 0 and w == 4:
        phases["update"] = {"update": 8.0 * (head if full else p.n_trainable / max(1, p.n_blocks))}
    worst = max(phases.values(), key=lambda parts: sum(parts.values()))
    sizes = {**always, **worst, "runtime": _RUNTIME[p.device]}
    sizes["allocator"] = _WASTE[p.device] * (sum(sizes.values()) - sizes["runtime"])
    parts = {name: round(size) for name, size in sizes.items() if size}
    return Memory(
        p, parts, round(host), {name: round(sum(inner.values())) for name, inner in phases.items()}
    )


def _block_bytes(p: MemoryInputs, w: int) -> float:
    """What autograd saves of one Llama-like block, bytes a token."""
    d, mlp = p.width, p.mlp_width or 3.5 * p.width
    norm = 4 * d + w * d  # its input in fp32, and its output, which the linear layers keep
    if not p.lora:
        norm += w * d  # the normed input, for the gradient of the norm's own weight
    attention = w * d * 4  # query, key and value (shared heads are repeated under a mask), result
    return 2 * norm + attention + 4 * w * mlp  # gate, up, silu(gate), their product


def _attention_bytes(p: MemoryInputs, w: int, rows: int) -> float:
    """The T × T weights of every head, where no fused kernel spares them: capped, as fp32 softmax,
    and cast."""
    return (
        rows * (p.n_heads or max(1, p.width // 64)) * p.tokens**2 * (2 * w + 4) if p.eager else 0.0
    )


# ------------------------------------------------------------------ before a run


def check(need: Memory, free: float, *, free_host: float | None = None) -> None:
    """Raise UsageError when a step needs more than `free` bytes on a device (or `free_host` on the
    host, for each rank).

    The sentence says what is needed for what, what is free, and what would fit, computed in the
    same way.
    """
    host_short = free_host is not None and need.host > free_host
    if need.total <= free and not host_short:
        return
    largest = sorted(need.parts.items(), key=lambda part: -part[1])[:3]
    mostly = ", ".join(f"{name} {_gib(size)}" for name, size in largest)
    wanted = (
        f"A training step needs about {_gib(need.total)} on each device ({mostly}), and"
        f" {_gib(free)} are free."
    )
    if host_short:
        have = _gib(free_host or 0)
        wanted = (
            f"Offloading needs about {_gib(need.host)} of this machine's memory for each rank, and"
            f" {have} are free."
        )
    fitting = [
        (words, other)
        for words, other in _alternatives(need.plan)
        if other.total <= free and (free_host is None or other.host <= free_host)
    ]
    if fitting:
        simplest = min(words.count(" and ") for words, _ in fitting)
        told = [
            f"{words} ({_gib(other.total)})"
            for words, other in fitting
            if words.count(" and ") == simplest
        ][:3]
        advice = f"It would fit with {', or with '.join(told)}."
    else:
        advice = _more_ranks(need.plan, free)
    raise UsageError(f"{wanted} {advice} To try all the same: --ignore-memory")


def check_run(
    outline: Outline,
    config: TrainConfig,
    options: TrainOptions,
    *,
    stage: int,
    ds: Mapping[str, Any],
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
    ds: Mapping[str, Any],
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
        live_params=_number(zero.get("stage3_max_live_parameters")) or _LIVE_PARAMS,
        device="cuda" if device.startswith("cuda") else "cpu",
    )


def _family(outline: Outline) -> Any:
    """The transformers config of the model, or of an adapter's base."""
    from transformers import AutoConfig

    from auditgap.models.folder import adapter_base, is_adapter

    base = adapter_base(outline.folder) if is_adapter(outline.folder) else outline.folder
    return AutoConfig.from_pretrained(
        base, trust_remote_code=False, local_files_only=True
    ).get_text_config()


def _number(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _alternatives(p: MemoryInputs) -> Iterator[tuple[str, Memory]]:
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
            and estimate(replace(lean, world=world)).total <= free
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


# ------------------------------------------------------------------ the page

#: (name, parameters, L, D, MLP width, V, heads, eager): published shapes that stand for a size.
_SHAPES = (
    ("2B (Gemma 2 2B)", 2.614e9, 26, 2304, 9216, 256_000, 8, True),
    ("3B (Llama 3.2 3B)", 3.213e9, 28, 3072, 8192, 128_256, 24, False),
    ("8B (Llama 3.1 8B)", 8.030e9, 32, 4096, 14_336, 128_256, 32, False),
    ("13B (Llama 2 13B)", 13.016e9, 40, 5120, 13_824, 32_000, 40, False),
    ("34B (Code Llama 34B)", 33.744e9, 48, 8192, 22_016, 32_000, 64, False),
    ("70B (Llama 3.1 70B)", 70.554e9, 80, 8192, 28_672, 128_256, 64, False),
)
_WORLDS = (1, 2, 4, 8, 16)
_MODES = (("ZeRO-2", 2, False), ("ZeRO-3", 3, False), ("ZeRO-3 + offload", 3, True))
_GPU_BYTES = 80 * GIB


def document() -> str:
    """docs/training_memory.md: the table of what fits where, and what the numbers are worth."""
    lines = [
        "# What fits where",
        "",
        (
            f"GiB on each GPU for one step of dissociation (construction `{DEFAULT}`): bf16 weights,"
            " fp32 Adam, 512 tokens, micro-batch"
        ),
        (
            "2, gradient checkpointing on. **Bold** fits a GPU of 80 GiB. The last column is the"
            " memory that offloading takes from"
        ),
        "the hosts, over all 16 GPUs (much the same for fewer).",
        "",
        (
            "These numbers are computed, not measured at these sizes: by"
            " `auditgap/training/memory.py`, and `python -m"
        ),
        "auditgap.training.memory` prints this page.",
        "",
        *MEASURED,
        "",
        (
            "`auditgap train` computes the same for your model, your longest row and your ZeRO"
            " config before it loads anything, and"
        ),
        "says what would fit when it does not.",
    ]
    for title, lora in (("Full fine-tuning", False), ("LoRA (rank 8, all linear layers)", True)):
        lines += ["", f"## {title}", ""]
        lines.append(
            "| model | | "
            + " | ".join(f"{n} GPU{'s' if n > 1 else ''}" for n in _WORLDS)
            + " | host |"
        )
        lines.append("|---|---|" + "---:|" * (len(_WORLDS) + 1))
        for shape in _SHAPES:
            for mode, stage, offload in _MODES:
                cells, host = [], 0
                for world in _WORLDS:
                    need = _of_shape(shape, lora, stage, offload, world)
                    shown = f"{need.total / GIB:,.0f}"
                    cells.append(f"**{shown}**" if need.total <= _GPU_BYTES else shown)
                    host = need.host * world
                name = shape[0] if mode == "ZeRO-2" else ""
                lines.append(
                    f"| {name} | {mode} | {' | '.join(cells)} |"
                    f" {f'{host / GIB:,.0f}' if host else ''} |"
                )
    return "\n".join(lines) + "\n"


#: What the estimates were held against (tests/training/test_memory.py does it again, within 0.8 to
#: 1.3).
MEASURED = (
    (
        "What they were held against: peaks (`ru_maxrss` above the loaded libraries) of real steps"
        " under DeepSpeed on one CPU rank,"
    ),
    (
        "Llama shape, 36 M parameters, ZeRO-0, 2 and 3, fp32 and bf16, full and LoRA, with and"
        " without checkpointing. Estimate over"
    ),
    (
        "peak was 0.99 to 1.17 with an allocator that gives memory back at once; the allowance for"
        " one that does not (a third on"
    ),
    (
        "CPUs, 8 % on GPUs) is on top. Not measured: GPUs, more than one rank, offload, and the"
        " sizes of this table. The allocator's"
    ),
    "8 % and the 1.5 GiB for CUDA and NCCL are assumptions; leave a margin.",
)


def _of_shape(shape: tuple, lora: bool, stage: int, offload: bool, world: int) -> Memory:
    _, n, blocks, width, mlp, vocabulary, heads, eager = shape
    few = lora_params(rank=8, n_blocks=blocks, width=width, mlp_width=mlp)
    return estimate(
        MemoryInputs(
            n_params=round(n) + (few if lora else 0),
            n_trainable=few if lora else round(n),
            n_blocks=blocks,
            width=width,
            vocabulary=vocabulary,
            dtype="bfloat16",
            stage=stage,
            world=world,
            micro_batch=2,
            tokens=512,
            gradient_checkpointing=True,
            lora=lora,
            offload=offload,
            n_heads=heads,
            mlp_width=mlp,
            eager=eager,
        )
    )


if __name__ == "__main__":
    print(document(), end="")
