"""What a training step needs, part by part: bytes that DeepSpeed keeps (ZeRO: arXiv 1910.02054, section
3; K = 12 for mixed-precision Adam), and what autograd saves of a Llama-like block.

    need = estimate(MemoryInputs(n_params=8_030_000_000, n_trainable=8_030_000_000, n_blocks=32, width=4096,
                                 vocabulary=128_256, dtype="bfloat16", stage=3, world=8, tokens=512))
    need.total                       # bytes on each device; need.parts says for what
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from auditgap.errors import UsageError
from auditgap.training.constructions import CONSTRUCTIONS, DEFAULT
from auditgap.training.footprint import Footprint

GIB = 2**30
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
#: Elements of objective.token_losses' chunk of logits.
_CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
#: Bytes a trained parameter while it is updated.
_UPDATE = {"cuda": 8, "cpu": 12}
#: Tokens of a pack that runs beside the step: `reference.BATCH_TOKENS`.
_RUNNING_TOKENS = 4096
#: DeepSpeed's stage3_max_live_parameters, unless the config says otherwise.
LIVE_PARAMS = 1_000_000_000
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
    n_heads: int | None = None  #: D / 64 by default
    #: attention without a fused kernel, which keeps each head's T × T (Gemma 2)
    eager: bool = False
    mlp_width: int | None = None  #: 3.5 D by default
    #: elements of DeepSpeed's reduce bucket; D² (at least 2^20) by default
    bucket: int | None = None
    live_params: int = LIVE_PARAMS  #: stage3_max_live_parameters
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

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return _DTYPE_BYTES[self.dtype]

    @property
    def shards(self) -> int:
        """Over how many ranks ZeRO divides the optimizer's states."""
        return self.world if self.stage >= 1 else 1

    @property
    def head(self) -> int:
        """Parameters of the output head."""
        return self.vocabulary * self.width

    @property
    def mlp(self) -> float:
        return self.mlp_width or 3.5 * self.width


@dataclass(frozen=True)
class Memory:
    """Bytes on each device at the worst moment of a step, part by part, and on the host for each
    rank."""

    plan: MemoryInputs
    parts: Mapping[str, int]
    host: int = 0
    #: what each moment adds to what is always there
    phases: Mapping[str, int] = field(default_factory=dict)
    #: bytes on each device beside the step: `answers` and hidden states, before there is an engine,
    #: and `speaking`, while it is there
    beside: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def worst(self) -> int:
        """Of a step, and of what runs before and between steps."""
        return max(self.total, *self.beside.values(), 0)


def lora_params(
    *, rank: int, n_blocks: int, width: int, mlp_width: int, kv_share: float = 1.0
) -> int:
    """Parameters of adapters of a rank on every linear layer of L Llama-like blocks: rank × (in +
    out) each."""
    attention = 2 * (width + width) + 2 * (width + kv_share * width)
    return round(n_blocks * rank * (attention + 3 * (width + mlp_width)))


def estimate(p: MemoryInputs) -> Memory:
    """The memory of one training step."""
    always, host = _kept(p)
    phases = _phases(p)
    worst = max(phases.values(), key=lambda parts: sum(parts.values()))
    sizes = {**always, **worst, "runtime": _RUNTIME[p.device]}
    sizes["allocator"] = _WASTE[p.device] * (sum(sizes.values()) - sizes["runtime"])
    parts = {name: round(size) for name, size in sizes.items() if size}
    adds = {name: round(sum(inner.values())) for name, inner in phases.items()}
    return Memory(p, parts, round(host), adds, _beside(p, always))


def _beside(p: MemoryInputs, always: Mapping[str, float]) -> dict[str, int]:
    """Where the model runs and is not trained, from weights as the stage leaves them: whole, or
    this rank's part and the layers that are gathered while they run."""
    if not p.footprint.speaks:
        return {}
    model = always["weights"] + _running(p)
    grown = 1 + _WASTE[p.device]
    return {
        name: round(size * grown + _RUNTIME[p.device])
        for name, size in (
            ("answers", model),
            ("speaking", sum(always.values()) - always["buckets"] + _running(p)),
        )
    }


def _running(p: MemoryInputs) -> float:
    """A pack of hidden states in one block, and at stage 3 the largest layers: the head whole, the
    embedding or a block's, and what comes next."""
    pack = _RUNNING_TOKENS * p.element * (3 * p.mlp + 2 * p.width)
    if p.stage < 3:
        return pack
    layer, bucket = p.width * p.mlp, p.bucket or p.width**2
    return pack + p.element * (p.head + max(p.head, layer) + bucket)


def _kept(p: MemoryInputs) -> tuple[dict[str, float], float]:
    """What is there all the time, on each device and on the host: ZeRO divides the optimizer's
    states over ranks, then gradients, then weights."""
    w, host = p.element, 0.0
    weights = w * p.n_params / (p.world if p.stage == 3 else 1)
    states = 8 * p.n_trainable / p.shards  # Adam's two moments, fp32
    # ZeRO keeps an fp32 master copy whatever the dtype; without ZeRO only weights that are not fp32
    # themselves have one
    master = 4 * p.n_trainable / p.shards if p.stage >= 1 or w == 2 else 0.0
    # micro-batches are summed in fp32; below stage 2, where each rank keeps the whole sum, what is
    # added to it stands beside it in the weights' dtype
    gradients = 4 * p.n_trainable / (p.world if p.stage >= 2 else 1)
    if p.stage < 2 and w < 4:
        gradients += w * p.n_trainable
    if p.offload and p.stage >= 1:
        host += states + master + 4 * p.n_trainable / p.shards
        states = master = 0.0
        gradients = 0.0 if p.stage >= 2 else gradients
        if p.stage == 3:
            host += weights
            weights = 0.0
    always = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": master + states,
        "buckets": _moved(p),
        **p.footprint.alongside(p.n_blocks, p.width),
    }
    if not p.lora and p.footprint.reference_head:
        always["reference head"] = w * p.head
    return always, host


def _moved(p: MemoryInputs) -> float:
    """What ZeRO moves: its buckets, and at stage 3 gathered weights."""
    bucket, moved = p.bucket or max(p.width**2, 1 << 20), 0.0
    if p.stage >= 1:
        # overlap_comm keeps two
        moved += p.element * min(bucket, p.n_trainable) * (2 if p.device == "cuda" else 1)
    if p.stage == 3:
        moved += p.element * (min(p.n_params, p.live_params) + p.head)
    return moved


def _phases(p: MemoryInputs) -> dict[str, dict[str, float]]:
    """What each moment of a step adds: activations stand while the head's losses and gradients are
    computed in chunks; they go block by block while gradients come; then the update."""
    w, full = p.element, not p.lora
    rows = p.micro_batch * p.footprint.sequences
    n = rows * p.tokens
    one_block = n * _block_bytes(p) + _attention_bytes(p, rows)
    kept = p.n_blocks * n * w * p.width if p.gradient_checkpointing else p.n_blocks * one_block
    # embedded ids, final norm, the predicting positions and their gradient, the reference's
    ends = n * p.width * (6 * w + 8)
    working = n * (3 * w * p.mlp + 8 * p.width) + (one_block if p.gradient_checkpointing else 0)
    elements = max(16 * p.vocabulary, min(_CHUNK_ELEMENTS[p.device], n * p.vocabulary))
    return {
        "loss": {
            "activations": kept + ends,
            "head": elements * 4 * p.footprint.chunk_buffers
            + ((4 + (w if w < 4 else 0)) * p.head if full else 0.0),
        },
        "backward": {
            "activations": kept + ends + working,
            "largest gradient": w * p.head if full else 0.0,
        },
        "update": {"update": _update(p)},
    }


def _update(p: MemoryInputs) -> float:
    """Gradients in fp32 and Adam's denominator (twice on a CPU); at stage 3 a sub-group of
    DeepSpeed's at a time."""
    if p.stage == 0 and p.element == 4:
        return 8.0 * (p.n_trainable / max(1, p.n_blocks) if p.lora else p.head)
    if p.offload:
        return 0.0
    updated = p.n_trainable / p.shards
    return _UPDATE[p.device] * (min(updated, 1e9) if p.stage == 3 else updated)


def _block_bytes(p: MemoryInputs) -> float:
    """What autograd saves of one Llama-like block, bytes a token."""
    d, w, mlp = p.width, p.element, p.mlp
    norm = 4 * d + w * d  # its input in fp32, and its output, which the linear layers keep
    if not p.lora:
        norm += w * d  # the normed input, for the gradient of the norm's own weight
    attention = w * d * 4  # query, key and value (shared heads are repeated under a mask), result
    return 2 * norm + attention + 4 * w * mlp  # gate, up, silu(gate), their product


def _attention_bytes(p: MemoryInputs, rows: int) -> float:
    """The T × T weights of every head, where no fused kernel spares them: capped, as fp32 softmax,
    and cast."""
    heads = p.n_heads or max(1, p.width // 64)
    return rows * heads * p.tokens**2 * (2 * p.element + 4) if p.eager else 0.0
