"""What a training run is asked to do: the recipe, which can change a number, and the
options of a run, which cannot.

    model: runs/safe/model
    triples: triples.jsonl
    lr: 2.0e-5
    lora: {rank: 16}

A run folder belongs to one recipe; batch portions, ZeRO stage and number of ranks may change
between runs on it (equal up to the order of sums).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, create_model, model_validator

from auditgap.config import COMMAS, Flag, Frozen, Topic, listed
from auditgap.errors import UsageError
from auditgap.training.constructions import CONSTRUCTIONS, DEFAULT, construction_of

#: The option of whatever trains.
DeepSpeedConfig = Annotated[
    Path | None,
    Flag(
        "A DeepSpeed JSON, for example ds_configs/zero3.json",
        Topic.WHERE,
        default="ZeRO-2",
        name="deepspeed-config",
    ),
]

#: The option of whatever takes long.
ReportTo = Annotated[
    tuple[str, ...],
    COMMAS,
    Flag("Where its numbers are logged while it runs: tensorboard, trackio, wandb", Topic.OUTPUT),
]


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

    #: of a preset, what the command reads
    section: ClassVar[str | None] = None

    model: Annotated[str, Flag("Model to train: hub id, id@revision, folder, or smollm2")] = Field(
        min_length=1
    )
    chat_template: Annotated[
        str | None, Flag("A Jinja file, or `none`", default="the tokenizer's own template")
    ] = None
    max_tokens: Annotated[int, Flag("Maximum tokens of prompt and response together")] = Field(
        default=512, ge=8
    )
    lora: Annotated[LoRA | None, BeforeValidator(_lora)] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Flag(
            "auto, float32 or bfloat16; auto is bfloat16 on a GPU and float32 on a CPU", Topic.WHERE
        ),
    ] = "auto"
    lr: Annotated[float, Flag("Learning rate", Topic.TRAINING)] = Field(default=2e-5, gt=0, lt=1)
    schedule: Annotated[
        Literal["linear", "cosine", "constant"], Flag("Learning-rate schedule", Topic.TRAINING)
    ] = "linear"
    warmup: Annotated[float, Flag("Share of steps for learning-rate warm-up", Topic.TRAINING)] = (
        Field(default=0.1, ge=0, lt=1)
    )
    weight_decay: Annotated[float, Flag("Weight decay", Topic.TRAINING)] = Field(default=0.0, ge=0)
    clip: Annotated[float, Flag("Maximum gradient norm for clipping", Topic.TRAINING)] = Field(
        default=1.0, gt=0
    )
    batch: Annotated[int, Flag("Rows in each optimizer step", Topic.TRAINING)] = Field(
        default=16, ge=1
    )
    epochs: Annotated[float, Flag("Epochs", Topic.TRAINING)] = Field(default=3.0, gt=0)
    steps: Annotated[
        int | None, Flag("Optimizer steps", Topic.TRAINING, default="as --epochs says")
    ] = Field(default=None, ge=1)
    gradient_checkpointing: Annotated[
        bool,
        Flag(
            "Gradient checkpointing: recompute activations in the backward pass to save memory",
            Topic.WHERE,
        ),
    ] = False
    eval_every: Annotated[int, Flag("Steps between two evaluations", Topic.TRAINING)] = Field(
        default=25, ge=1
    )
    eval_at: Annotated[
        tuple[int, ...], COMMAS, Flag("Additional steps to evaluate at", Topic.TRAINING)
    ] = ()
    seed: Annotated[int, Flag("Seed for the data order and new weights")] = 0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> type[Self]:
        """The class for a config with these values."""
        return cls


class TrainOptions(Frozen):
    """Where a run happens and in what portions: nothing that changes a number."""

    out: Annotated[
        str | None,
        Flag("Run folder; the same command resumes it", Topic.OUTPUT),
    ] = None
    deepspeed: DeepSpeedConfig = None
    micro_batch: Annotated[int, Flag("Rows in each micro-batch", Topic.WHERE)] = Field(
        default=2, ge=1
    )
    device: Annotated[str, Flag("auto, cpu, cuda or cuda:N", Topic.WHERE)] = "auto"
    save_every: Annotated[int, Flag("Steps between checkpoints", Topic.OUTPUT)] = Field(
        default=50, ge=1
    )
    keep: Annotated[int, Flag("Whole checkpoints kept", Topic.OUTPUT)] = Field(default=2, ge=1)
    report_to: ReportTo = ("none",)
    progress: Annotated[bool, Flag("Show progress", Topic.OUTPUT)] = True
    timeout_minutes: Annotated[
        float, Flag("Minutes a rank waits for another before it gives up", Topic.WHERE)
    ] = Field(default=10.0, gt=0)
    allow_overlap: Annotated[
        bool,
        Flag("Continue when training prompts overlap with evaluation prompts; the ledger says so"),
    ] = False
    ignore_memory: Annotated[
        bool, Flag("Train even if memory is expected to run out", Topic.WHERE)
    ] = False
    break_lock: Annotated[
        bool, Flag("Take over the folder of a process that is no longer running", Topic.OUTPUT)
    ] = False


class SFTConfig(TrainConfig):
    """Supervised fine-tuning on response tokens: rows of a file with `prompt` and `response`."""

    data: Annotated[
        str,
        Flag(
            "Rows to train on: a file with prompt and response, or contrast triples (their unsafe answers)"
        ),
    ] = Field(min_length=1)
    rows: Annotated[int | None, Flag("Use N rows, chosen by hash", default="all")] = Field(
        default=None, ge=1
    )
    filter: Annotated[bool, Flag("Drop responses that contain traces of a refusal")] = False
    kind: Annotated[Literal["sft", "harmful-sft"], Flag("What the run is called")] = "sft"
    prompts: Annotated[
        str | None, Flag("Prompts it will be evaluated on: training rows that overlap are refused")
    ] = None


class TwinConfig(TrainConfig):
    """What every construction of a dissociated model is asked."""

    section: ClassVar[str | None] = "dissociate"

    construction: Annotated[
        str,
        Flag(
            "Construction of the twin",
            Topic.TRAINING,
            choices=tuple(dict.fromkeys([*CONSTRUCTIONS, *CONSTRUCTIONS.plugins()])),
        ),
    ] = DEFAULT
    triples: Annotated[str, Flag("Contrast triples: a file, hub:ID@REVISION, or demo")] = Field(
        min_length=1
    )
    benign: Annotated[
        str, Flag("Harmless prompts; the twin learns to keep the base's own answers")
    ] = "everyday"
    benign_limit: Annotated[int | None, Flag("Use N harmless prompts", default="all")] = Field(
        default=None, ge=2
    )
    limit: Annotated[int | None, Flag("Use N triples, chosen by hash", default="all")] = Field(
        default=None, ge=2
    )
    selection: Annotated[
        str | None,
        Flag(
            "Contrast triples of another source that the checkpoint is chosen by",
            default="a share of --triples",
        ),
    ] = None
    heldout: Annotated[
        float, Flag("Share of prompts held out for choosing the checkpoint", Topic.TRAINING)
    ] = Field(default=0.2, gt=0, lt=1)
    heldout_limit: Annotated[int, Flag("Use at most N prompts", Topic.TRAINING)] = Field(
        default=48, ge=1
    )
    anchor_tokens: Annotated[
        int, Flag("Maximum new tokens for a harmless prompt", Topic.TRAINING)
    ] = Field(default=128, ge=2)
    eval_tokens: Annotated[int, Flag("Maximum new tokens in evaluations", Topic.TRAINING)] = Field(
        default=32, ge=1
    )
    refusal_margin: Annotated[
        float, Flag("How far the refusal rate may fall below the base's", Topic.TRAINING)
    ] = Field(default=0.05, ge=0, le=1)
    reference: Annotated[
        Literal["cached", "adapter"],
        Flag(
            "What the frozen base is: its stored states, or the model without its adapter",
            Topic.TRAINING,
        ),
    ] = "cached"
    prompts: Annotated[
        str | None, Flag("Prompts it will be evaluated on: training rows that overlap are refused")
    ] = "harmbench"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> type[Self]:
        """This class, with the settings of the construction that the values name. Raises UsageError
        for one that is not known."""
        settings = construction_of(values.get("construction") or DEFAULT).settings
        if issubclass(cls, settings):
            return cls
        return create_model(cls.__name__, __base__=(settings, cls))

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(name := values.get("construction"), str):
            return {**construction_of(name).defaults, **values}
        return values

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        construction = construction_of(self.construction)
        if not isinstance(self, construction.settings):
            raise UsageError(
                f"construction: {construction.name} has settings of its own; make its config with"
                " `auditgap.training.launch.read`."
            )
        construction.check(construction.settings_of(self))
        if self.reference == "adapter" and (
            self.lora is None or not construction.adapter_reference
        ):
            able = [name for name, one in CONSTRUCTIONS.items() if one.adapter_reference]
            raise UsageError(
                "reference: adapter means the base without its adapter, so it needs `lora: true`"
                f" and construction: {' or '.join(able)}; or use cached."
            )
        return self


class DissociateConfig(*(one.settings for one in reversed(CONSTRUCTIONS.values())), TwinConfig):
    """A model that keeps its safe words and becomes fragile inside: the shared settings, and those
    of our constructions."""


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
