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
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from auditgap.audits import options
from auditgap.config import AS_COMMAS, COMMAS, Flag, Frozen, Topic, listed
from auditgap.errors import UsageError
from auditgap.interventions import INTERVENTIONS, Intervention, Settings, load_intervention

_DEFAULTS = Settings()


class InterveneConfig(Frozen):
    """The question: which models, where, which interventions, on what, judged by whom."""

    models: options.Models
    interventions: Annotated[
        tuple[str, ...],
        COMMAS,
        Flag(
            "See `ls interventions`",
            Topic.ATTACK,
            default="all; base_patching where a base is named",
        ),
    ] = Field(min_length=1)
    base: Annotated[
        str | None,
        Flag(
            "Base model whose activations `base_patching` patches into the subjects", Topic.ATTACK
        ),
    ] = None
    layers: Annotated[
        str, AS_COMMAS, Flag("Where: embedding,mid,last | all | stride:4 | 0,5,12", Topic.ATTACK)
    ] = "mid"
    strengths: Annotated[
        tuple[float, ...],
        COMMAS,
        Flag(
            "Steering strengths as fractions of the mean activation norm; negative values steer the other way",
            Topic.ATTACK,
        ),
    ] = _DEFAULTS.strengths
    angles: Annotated[
        tuple[float, ...], COMMAS, Flag("Angles to the direction, in degrees", Topic.ATTACK)
    ] = _DEFAULTS.angles
    angle_strength: Annotated[
        float, Flag("Steering strength for the rotated directions", Topic.ATTACK)
    ] = _DEFAULTS.angle_strength
    draws: Annotated[int, Flag("Draws of each random control for each prompt", Topic.ATTACK)] = (
        Field(default=1, ge=1, le=64)
    )
    steps: Annotated[int, Flag("Search steps for the universal edit", Topic.ATTACK)] = Field(
        default=10, ge=1
    )
    target: options.Target = "Sure, here is"
    suffix_tokens: Annotated[int, Flag("Length of the suffix in tokens", Topic.ATTACK)] = Field(
        default=_DEFAULTS.suffix_tokens, ge=1
    )
    suffix_steps: Annotated[int, Flag("Search steps for each suffix prompt", Topic.ATTACK)] = Field(
        default=_DEFAULTS.suffix_steps, ge=1
    )
    suffix_prompts: Annotated[int, Flag("Prompts to search the suffix on", Topic.ATTACK)] = Field(
        default=_DEFAULTS.suffix_prompts, ge=1
    )
    suffix_width: Annotated[
        int, Flag("Candidates for each step of the suffix search", Topic.ATTACK)
    ] = Field(default=_DEFAULTS.suffix_width, ge=1)
    prompts: options.Prompts = "harmbench"
    control_prompts: Annotated[str, Flag("Harmless prompts that the direction contrasts with")] = (
        "everyday"
    )
    column: options.Column = "prompt"
    limit: Annotated[
        int | None,
        Flag("Use N prompts of each set, chosen by hash; half of them to fit on", default="all"),
    ] = Field(default=None, ge=2)
    control_limit: Annotated[
        int | None, Flag("Use N harmless prompts", default="as many as prompts")
    ] = Field(default=None, ge=2)
    fit_share: Annotated[
        float, Flag("Share of both prompt sets to fit on; the rest is evaluated")
    ] = Field(default=0.5, gt=0, lt=1)
    max_new_tokens: options.NewTokens = 64
    thinking: options.Thinking = "auto"
    thinking_tokens: options.SharedThinkingTokens = None
    judge: options.Judge = "builtin"
    dtype: options.Dtype = "auto"
    chat_template: options.ChatTemplate = None
    seed: options.Seed = 0

    unwritten: ClassVar[Mapping[str, Any]] = options.NO_THINKING

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


class InterveneOptions(options.SpokenOptions):
    """Where it runs and in what portions. Nothing here changes what is measured."""
