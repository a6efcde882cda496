"""What an intervention audit is asked to do: frozen values from flags or YAML (flags win).

    models: [smollm2]
    interventions: [steering, ablation]
    layers: stride:4
    strengths: [0.1, 0.2, 0.4]

As everywhere, an `InterveneConfig` is what can change a number; `InterveneOptions` may change
between sittings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from auditgap.config import Frozen, build, listed, merged
from auditgap.engines import EngineName, Serving
from auditgap.errors import UsageError
from auditgap.interventions import INTERVENTIONS, Intervention, Settings, load_intervention


class InterveneConfig(Frozen):
    """The question: which models, where, which interventions, on what, judged by whom."""

    models: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(min_length=1)
    interventions: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(min_length=1)
    base: str | None = None  #: whose activations `base_patching` puts into the models
    layers: str = "mid"
    #: of the mean activation norm
    strengths: Annotated[tuple[float, ...], BeforeValidator(listed)] = Settings().strengths
    angles: Annotated[tuple[float, ...], BeforeValidator(listed)] = Settings().angles  #: degrees
    angle_strength: float = Settings().angle_strength
    draws: int = Field(default=1, ge=1, le=64)  #: of each random control, a prompt
    steps: int = Field(default=10, ge=1)  #: of the universal edit's search
    target: str = Field(default="Sure, here is", min_length=1)
    suffix_tokens: int = Field(default=Settings().suffix_tokens, ge=1)
    #: of the suffix's search, on each of
    suffix_steps: int = Field(default=Settings().suffix_steps, ge=1)
    suffix_prompts: int = Field(default=Settings().suffix_prompts, ge=1)
    suffix_width: int = Field(default=Settings().suffix_width, ge=1)  #: candidates a step
    prompts: str = "harmbench"
    control_prompts: str = "everyday"  #: what a harmless prompt looks like inside
    column: str = "prompt"  #: of a file, in both sets
    limit: int | None = Field(default=None, ge=2)
    control_limit: int | None = Field(default=None, ge=2)  #: None: as many as prompts
    #: of both sets, by hash; the others are asked
    fit_share: float = Field(default=0.5, gt=0, lt=1)
    max_new_tokens: int = Field(default=64, ge=1)
    judge: str = "builtin"
    dtype: str = "auto"
    chat_template: str | None = None
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _default_interventions(cls, values: Any) -> Any:
        if values.get("interventions") not in (None, (), ""):
            return values
        named = [
            n
            for n, entry in INTERVENTIONS.items()
            if not entry.wants and (values.get("base") or not entry.needs_base)
        ]
        return {**values, "interventions": tuple(named)}

    @field_validator("layers", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    @field_validator("strengths", "angles", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: Any) -> Any:
        numbers = []
        for one in listed(value):
            try:
                if isinstance(one, bool):
                    raise TypeError
                number = float(one)
            except (TypeError, ValueError):
                number = math.nan
            low, high, words = (
                (-math.inf, math.inf, "not 0")
                if info.field_name == "strengths"
                else (0, 180, "of 0 to 180 degrees")
            )
            if (
                not math.isfinite(number)
                or not low <= number <= high
                or (number == 0 and info.field_name == "strengths")
            ):
                flag = info.field_name
                raise UsageError(
                    f"--{flag} takes finite numbers, {words}; {str(one)[:40]!r} came. For example:"
                    f" --{flag} 30,60"
                )
            numbers.append(number)
        if not numbers:
            raise UsageError(
                f"--{info.field_name} names no number. For example: --{info.field_name} 30,60"
            )
        return tuple(sorted(set(numbers)))

    @field_validator("angle_strength")
    @classmethod
    def _a_strength(cls, value: float) -> float:
        if not math.isfinite(value) or value == 0:
            raise UsageError(
                f"--angle-strength is a finite number, not 0; {value} came. For example:"
                " --angle-strength 0.2"
            )
        return value

    @field_validator("interventions")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            load_intervention(name, Settings())
        return tuple(dict.fromkeys(names))

    @model_validator(mode="after")
    def _has_its_base(self) -> Any:
        for name in self.interventions:
            if self.base is None and name in INTERVENTIONS and INTERVENTIONS[name].needs_base:
                raise UsageError(
                    f"{name} puts a base model's activations in; name the base. For example: --base"
                    " ./base"
                )
        return self

    @property
    def settings(self) -> Settings:
        """What the interventions are asked for."""
        return Settings(**{name: getattr(self, name) for name in Settings.__dataclass_fields__})

    def load(self, name: str) -> Intervention:
        return load_intervention(name, self.settings)


class InterveneOptions(Frozen):
    """The sitting: where it runs and in what portions. Nothing here changes what is measured."""

    out: str | None = None
    device: str = "auto"
    judge_engine: EngineName = "hf"
    judge_endpoint: str | None = None  #: base URL, with judge_engine openai
    executor: Literal["local", "ray"] = "local"
    workers: int | None = Field(default=None, ge=1)
    gpus_per_worker: float | None = Field(default=None, ge=0)
    address: str | None = None
    batch_tokens: int | None = Field(default=None, ge=16)
    break_lock: bool = False
    retry_failed: bool = False
    allow_raw: bool = False

    @property
    def judge_serving(self) -> Serving:
        """How a judge's models are served: beside the subject."""
        return Serving(
            engine=self.judge_engine,
            base_url=self.judge_endpoint,
            device=self.device,
            gpu_memory=0.4,
        )


def read_config(
    file: Path | None, flags: Mapping[str, Any]
) -> tuple[InterveneConfig, InterveneOptions]:
    """The config file's values with the flags that were given (not None) on top.

    Raises UsageError naming the key and what was wanted; Refused when foreign code is asked for.
    """
    values = merged(file, flags)
    if not values.get("models"):
        raise UsageError(
            "Which model? Name at least one, for example: auditgap intervene smollm2 --layers mid"
        )
    if values.get("judge_endpoint") and values.setdefault("judge_engine", "openai") != "openai":
        raise UsageError(
            f"--judge-endpoint is for --judge-engine openai; {values['judge_engine']!r} came"
            " beside it."
        )
    return build(values, InterveneConfig, InterveneOptions)
