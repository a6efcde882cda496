"""What a harmful-SFT curve is asked for.

    # the first is the base that the others are compared with
    models: [./base, ./dissociated]
    data: unsafe.jsonl                  # columns prompt and response
    seeds: [0, 1, 2]
    steps: 60
    eval_every: 5

Everything in `SFTCurveConfig` can change a number. How much is generated at a time lives in
`SFTCurveOptions`, and how a step of training is computed (ZeRO stage, micro-batch) with whoever
trains (`train.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from auditgap.audits.behaviour.config import Asking
from auditgap.config import Frozen, build, listed, merged
from auditgap.errors import UsageError


class SFTCurveConfig(Asking):
    """The question: which models, trained on what and how, asked what after how many steps, judged
    by whom."""

    #: the base first
    models: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(min_length=1)
    #: of data order, adapters
    seeds: Annotated[tuple[int, ...], BeforeValidator(listed)] = Field(
        default=(0, 1, 2), min_length=1
    )

    data: str = Field(min_length=1)
    rows_limit: int | None = Field(default=None, ge=1)  #: of training rows
    refusal_filter: bool = True  #: drop unsafe responses that carry a refusal's traces
    allow_overlap: bool = False  #: train on prompts that are evaluated too; recorded

    method: Literal["lora", "full"] = "lora"
    lora_r: int = Field(default=8, ge=1)
    lora_alpha: int = Field(default=16, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_targets: Annotated[tuple[str, ...], BeforeValidator(listed)] = ("all-linear",)
    lr: float = Field(default=2e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    #: share of the steps; above 0, early steps depend on how many follow
    warmup: float = Field(default=0.0, ge=0, lt=1)
    batch: int = Field(default=16, ge=1)  #: rows an optimizer step, over all ranks
    max_tokens: int = Field(default=512, ge=8)  #: of prompt and response
    steps: int = Field(default=60, ge=1)
    eval_every: int = Field(default=5, ge=1)
    #: besides; the command adds the ends of epochs
    eval_at: Annotated[tuple[int, ...], BeforeValidator(listed)] = ()
    thresholds: Annotated[tuple[float, ...], BeforeValidator(listed)] = (0.5, 0.8)

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


class SFTCurveOptions(Frozen):
    """The sitting: where it runs and in what portions."""

    out: str | None = None
    device: str = "auto"
    #: what speaks between steps: the model in place, or vLLM with the adapter swapped in
    engine: Literal["hf", "vllm"] = "hf"
    #: share of a GPU that vLLM may take beside the training
    gpu_memory: float = Field(default=0.3, gt=0, le=1)
    tensor_parallel: int = Field(default=1, ge=1)
    batch_tokens: int | None = Field(default=None, ge=16)  #: of generation
    break_lock: bool = False
    retry_failed: bool = False
    allow_raw: bool = False


def read_config(
    file: Path | None, flags: Mapping[str, Any]
) -> tuple[SFTCurveConfig, SFTCurveOptions]:
    """The config file's values with the flags that were given (not None) on top. Raises
    UsageError."""
    values = merged(file, flags, section="sft-curve")
    if not values.get("models"):
        raise UsageError("Which models? The base first, for example: --set models=./base,./tuned")
    if not values.get("data"):
        raise UsageError(
            "Train on what? `data` is a jsonl, csv or parquet file with the columns prompt and"
            " response."
        )
    return checked(*build(values, SFTCurveConfig, SFTCurveOptions))


def checked(
    config: SFTCurveConfig, options: SFTCurveOptions
) -> tuple[SFTCurveConfig, SFTCurveOptions]:
    """Both, if they go together. Raises UsageError: vLLM can be handed an adapter between steps,
    but not all weights."""
    if options.engine == "vllm" and config.method != "lora":
        raise UsageError(
            "engine: vllm swaps adapters, and method: full trains all weights; use method: lora, or"
            " engine: hf."
        )
    return config, options
