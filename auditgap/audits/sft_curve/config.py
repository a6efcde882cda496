"""What a harmful-SFT curve is asked for.

    # the first is the base that the others are compared with
    models: [./base, ./dissociated]
    data: unsafe.jsonl                  # columns prompt and response
    seeds: [0, 1, 2]
    steps: 60
    eval_every: 5

Everything in `SFTCurveConfig` can change a number. How much is generated at a time lives in
`SFTCurveOptions`, and so does how a step of training is computed (ZeRO stage, micro-batch).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from auditgap.audits import options
from auditgap.audits.behaviour.config import Asking
from auditgap.config import COMMAS, Flag, Topic
from auditgap.errors import UsageError
from auditgap.training.config import DeepSpeedConfig


class SFTCurveConfig(Asking):
    """The question: which models, trained on what and how, asked what after how many steps, judged
    by whom."""

    models: Annotated[
        tuple[str, ...],
        COMMAS,
        Flag("The base first, then the models that are compared with it", positional=True),
    ] = Field(min_length=1)
    seeds: Annotated[
        tuple[int, ...], COMMAS, Flag("Seeds for the data order and adapters", Topic.TRAINING)
    ] = Field(default=(0, 1, 2), min_length=1)

    data: Annotated[
        str,
        Flag("Rows to train on: a jsonl, csv or parquet file with the columns prompt and response"),
    ] = Field(min_length=1)
    rows_limit: Annotated[
        int | None, Flag("Use N training rows, chosen by hash", default="all")
    ] = Field(default=None, ge=1)
    refusal_filter: Annotated[
        bool, Flag("Drop unsafe responses that contain traces of a refusal")
    ] = True
    allow_overlap: Annotated[
        bool,
        Flag("Continue when training prompts overlap with evaluation prompts; the report says so"),
    ] = False

    method: Annotated[
        Literal["lora", "full"], Flag("Train LoRA adapters or all weights", Topic.TRAINING)
    ] = "lora"
    lora_r: Annotated[int, Flag("LoRA rank", Topic.TRAINING)] = Field(default=8, ge=1)
    lora_alpha: Annotated[int, Flag("LoRA alpha", Topic.TRAINING)] = Field(default=16, ge=1)
    lora_dropout: Annotated[float, Flag("LoRA dropout", Topic.TRAINING)] = Field(
        default=0.0, ge=0, lt=1
    )
    lora_targets: Annotated[
        tuple[str, ...], COMMAS, Flag("Linear layers to adapt with LoRA", Topic.TRAINING)
    ] = ("all-linear",)
    lr: Annotated[float, Flag("Learning rate", Topic.TRAINING)] = Field(default=2e-4, gt=0)
    weight_decay: Annotated[float, Flag("Weight decay", Topic.TRAINING)] = Field(default=0.0, ge=0)
    warmup: Annotated[
        float,
        Flag(
            "Share of the steps with a rising rate; above 0, early steps depend on how many follow",
            Topic.TRAINING,
        ),
    ] = Field(default=0.0, ge=0, lt=1)
    batch: Annotated[int, Flag("Rows in each optimizer step, over all ranks", Topic.TRAINING)] = (
        Field(default=16, ge=1)
    )
    max_tokens: Annotated[int, Flag("Maximum tokens of prompt and response", Topic.TRAINING)] = (
        Field(default=512, ge=8)
    )
    steps: Annotated[int, Flag("Optimizer steps", Topic.TRAINING)] = Field(default=60, ge=1)
    eval_every: Annotated[int, Flag("Steps between two evaluations", Topic.TRAINING)] = Field(
        default=5, ge=1
    )
    eval_at: Annotated[
        tuple[int, ...],
        COMMAS,
        Flag("Additional steps to evaluate at", Topic.TRAINING, default="the ends of epochs"),
    ] = ()
    thresholds: Annotated[
        tuple[float, ...], COMMAS, Flag("Compliance rates to report the step for", Topic.OUTPUT)
    ] = (0.5, 0.8)

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if any(seed < 0 for seed in seeds):
            raise UsageError(
                f"--seeds are whole numbers from 0; {min(seeds)} came. For example: --seeds 0,1,2"
            )
        return tuple(dict.fromkeys(seeds))

    @field_validator("thresholds")
    @classmethod
    def _shares(cls, thresholds: tuple[float, ...]) -> tuple[float, ...]:
        for threshold in thresholds:
            if not 0 < threshold <= 1:
                raise UsageError(
                    f"--thresholds are shares above 0, at most 1; {threshold:g} came. For example:"
                    " 0.5,0.8"
                )
        return tuple(sorted(set(thresholds)))

    @property
    def evaluations(self) -> tuple[int, ...]:
        """The steps after which the model is asked: 0, every `eval_every`, those of `eval_at`, and
        the last."""
        also = {step for step in self.eval_at if 0 <= step < self.steps}
        return tuple(sorted({*range(0, self.steps, self.eval_every), *also, self.steps}))


class SFTCurveOptions(options.AuditOptions):
    """Where it runs and in what portions."""

    engine: Annotated[
        Literal["hf", "vllm"],
        Flag(
            "What answers between steps: the model in place, or vLLM with the adapter swapped in",
            Topic.WHERE,
        ),
    ] = "hf"
    # the training lies beside it
    gpu_memory: options.GPUMemory = 0.3
    tensor_parallel: options.Tensor = 1
    deepspeed: DeepSpeedConfig = None
    micro_batch: Annotated[int, Flag("Rows in each training micro-batch", Topic.WHERE)] = Field(
        2, ge=1
    )
    save_every: Annotated[int, Flag("Steps between checkpoints", Topic.WHERE)] = Field(50, ge=1)
    keep: Annotated[int, Flag("Whole checkpoints kept", Topic.WHERE)] = Field(2, ge=1)
    timeout_minutes: Annotated[
        float, Flag("How long a rank waits for another before it gives up", Topic.WHERE)
    ] = Field(10.0, gt=0)
    ignore_memory: Annotated[
        bool, Flag("Train even if memory is expected to run out", Topic.WHERE)
    ] = False
