"""What a training run is asked to do: the recipe, which can change a number, and the sitting, which
cannot.

    model: runs/safe/model
    triples: triples.jsonl
    lr: 2.0e-5
    lora: {rank: 16}

A run folder belongs to one recipe; batch portions, ZeRO stage and number of ranks may change
between sittings (equal up to the order of sums).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from auditgap.config import Frozen, listed
from auditgap.errors import UsageError


class LoRA(Frozen):
    """Low-rank adapters on these linear layers (`all-linear`, or their names); the base stays
    frozen."""

    rank: int = Field(default=8, ge=1)
    alpha: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Annotated[tuple[str, ...], BeforeValidator(listed)] = ("all-linear",)


def _lora(value: Any) -> Any:
    """`lora: true` is LoRA with its defaults, `false` full fine-tuning."""
    return LoRA() if value is True else None if value is False else value


class TrainConfig(Frozen):
    """What every kind of training has. Rows of a step: `batch`; an epoch visits every row once, in
    an order of the seed."""

    model: str = Field(min_length=1)
    chat_template: str | None = None
    max_tokens: int = Field(default=512, ge=8)  #: of prompt and response together
    lora: Annotated[LoRA | None, BeforeValidator(_lora)] = None
    #: auto: bfloat16 on a GPU, float32 on a CPU
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    lr: float = Field(default=2e-5, gt=0, lt=1)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(default=0.1, ge=0, lt=1)  #: share of the steps
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)  #: largest norm of the gradient
    batch: int = Field(default=16, ge=1)
    epochs: float = Field(default=3.0, gt=0)
    steps: int | None = Field(default=None, ge=1)  #: instead of epochs
    gradient_checkpointing: bool = False
    eval_every: int = Field(default=25, ge=1)  #: steps
    eval_at: Annotated[tuple[int, ...], BeforeValidator(listed)] = ()  #: steps besides
    seed: int = 0


class TrainOptions(Frozen):
    """The sitting: where it runs and in what portions."""

    out: str | None = None
    deepspeed: Path | None = None  #: a DeepSpeed JSON; None: ZeRO-2
    micro_batch: int = Field(default=2, ge=1)
    device: str = "auto"
    save_every: int = Field(default=50, ge=1)  #: steps between checkpoints
    keep: int = Field(default=2, ge=1)  #: whole checkpoints kept
    report_to: Annotated[tuple[str, ...], BeforeValidator(listed)] = ("none",)
    progress: bool = True  #: say how far it is
    #: after which a rank that waits for another gives up
    timeout_minutes: float = Field(default=10.0, gt=0)
    allow_overlap: bool = False
    ignore_memory: bool = False  #: run although the estimate says that it will not fit
    break_lock: bool = False


class SFTConfig(TrainConfig):
    """Supervised fine-tuning on response tokens: rows of a file with `prompt` and `response`."""

    #: a file with prompt and response, or contrast triples (their unsafe answers)
    data: str = Field(min_length=1)
    rows: int | None = Field(default=None, ge=1)  #: of them, chosen by hash
    #: drop responses with traces of a refusal (the harmful-compliance baseline)
    filter: bool = False
    kind: Literal["sft", "harmful-sft"] = "sft"
    #: what it will be evaluated on: refused when rows of `data` are among them
    prompts: str | None = None


class MonitorConfig(Frozen):
    """The linear probe on pooled activations, and how it is fitted (arXiv 2606.08044, section
    4)."""

    hidden: int = Field(default=512, ge=1)
    epochs: int = Field(default=30, ge=1)
    batch: int = Field(default=32, ge=1)
    lr: float = Field(default=3e-4, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    standardise: bool = True  #: per block; off in the paper
    #: Platt's scaling folded into it, so that ℓ* is a probability's logit; off in the paper
    calibrate: bool = True
    seed: int = 0


class DissociateConfig(TrainConfig):
    """A model that keeps its safe words and becomes fragile inside."""

    construction: Literal["monitor", "nudge"] = "monitor"
    triples: str = Field(min_length=1)
    benign: str = "everyday"  #: prompts; the base's own answers to them are the anchors
    benign_limit: int | None = Field(default=None, ge=2)
    limit: int | None = Field(default=None, ge=2)  #: of the triples
    #: share of the triples' prompts kept for choosing the checkpoint
    heldout: float = Field(default=0.2, gt=0, lt=1)
    heldout_limit: int = Field(default=48, ge=1)
    anchor_tokens: int = Field(default=128, ge=2)  #: of a benign answer
    eval_tokens: int = Field(default=32, ge=1)
    weights: tuple[float, float, float] = (0.05, 0.1, 0.3)  #: λ of NLL, monitor, KL
    target: float = 1.0986122886681098  #: ℓ* = logit(0.75) = ln 3
    #: how far refusal may fall below the base's
    refusal_margin: float = Field(default=0.05, ge=0, le=1)
    reference: Literal["cached", "adapter"] = "cached"
    monitor: MonitorConfig = MonitorConfig()
    #: a monitor.safetensors that was fitted on this model; None: fit one
    monitor_from: str | None = None
    cotrain_lr: float = Field(default=1e-4, gt=0)
    cotrain_weight_decay: float = Field(default=1e-4, ge=0)
    harmful_model: str | None = None  #: `nudge`: where its direction points
    nudge: float = Field(default=0.06, gt=0)  #: of the mean activation norm
    #: refuse, KL, match, comply, margins
    nudge_weights: tuple[float, float, float, float, float] = (1.0, 0.3, 0.2, 1.0, 1.0)
    nudge_margin: float = Field(default=0.5, ge=0)  #: nats a token
    #: what audits will use: refused when training prompts are among them
    prompts: str | None = "harmbench"

    @model_validator(mode="before")
    @classmethod
    def _nudge_defaults(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("construction") == "nudge":
            return {"lr": 1e-5, "schedule": "cosine", **values}
        return values

    @model_validator(mode="after")
    def _nudge_needs_a_direction(self) -> Any:
        if self.construction == "nudge" and not self.harmful_model:
            raise UsageError(
                "construction: nudge pushes towards a harmful model; name it with `harmful_model:"
                " FOLDER`."
            )
        if self.reference == "adapter" and (self.lora is None or self.construction == "nudge"):
            raise UsageError(
                "reference: adapter means the base without its adapter, so it needs `lora: true`"
                " and construction: monitor; or use cached."
            )
        return self


def n_steps(config: TrainConfig, n_rows: int) -> int:
    """Optimizer steps of the run: `steps`, else as many as the epochs need (the last batch is
    filled up)."""
    return config.steps or max(1, -(-round(config.epochs * n_rows) // config.batch))


def accumulation(config: TrainConfig, options: TrainOptions, world: int) -> int:
    """Micro-batches a rank and step. Raises UsageError when batch is not micro_batch × ranks × a
    whole number."""
    portion = options.micro_batch * world
    if config.batch % portion:
        raise UsageError(
            f"batch {config.batch} does not divide into micro-batches of {options.micro_batch} rows"
            f" on {world} ranks ({portion} rows at a time). Choose a batch of"
            f" {-(-config.batch // portion) * portion}, or another micro_batch."
        )
    return config.batch // portion


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The rate of step 0 … total − 1: linear warm-up to `lr`, then down to 0 linearly or as a half
    cosine, or constant."""
    import math

    warm = math.ceil(config.warmup * total)
    if step < warm:
        return config.lr * (step + 1) / warm
    left = (total - step) / max(1, total - warm)
    if config.schedule == "constant":
        return config.lr
    return config.lr * (
        left if config.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))
    )
