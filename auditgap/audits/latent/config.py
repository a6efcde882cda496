"""What a latent audit is asked to do: one frozen value, from flags, from a YAML file, or both
(flags win).

    models: [smollm2]
    layers: embedding,mid,last
    unit: rms
    eps: [0.01, 0.03, 0.1]

Every field but `RunOptions` can change a number, and so is part of the run folder's identity: a
folder is resumed with the same config or not at all. Batch sizes, executors and paths live in
`RunOptions` and may change between sittings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from auditgap.audits import options
from auditgap.config import AS_COMMAS, COMMAS, Flag, Frozen, Topic, listed
from auditgap.errors import UsageError, did_you_mean
from auditgap.interventions.target import DEFAULT_TARGET, TOPIC, without_topic
from auditgap.types import ATTACKS, THINKING_MODES, UNITS, Budget, ThinkingMode, Unit

if TYPE_CHECKING:
    from auditgap.interventions.pgd import PGD
    from auditgap.models import Shard

#: Default sizes of a unit: ours for rms, those of the paper (section 5) for the two others.
DEFAULT_EPS: Mapping[str, tuple[float, ...]] = {
    "rms": (0.01, 0.03, 0.1),
    "max": (0.0005, 0.001, 0.005),
    "absolute": (0.0005, 0.001, 0.005),
}


#: Which tokens an edit stands on.
Span = Literal["prompt", "chain", "answer"]
#: `confirm` that asks for no second judge.
NO_JUDGE = "none"


class LatentConfig(Frozen):
    """The question: which models, where, how hard, on what, judged by whom."""

    models: options.Models
    layers: Annotated[
        str, AS_COMMAS, Flag("Where: embedding,mid,last | all | stride:4 | 0,5,12", Topic.ATTACK)
    ] = "embedding,mid,last"
    unit: Annotated[
        Unit,
        Flag(
            "What eps is relative to: the rms of the prompt's activations, the largest one, or nothing",
            Topic.ATTACK,
        ),
    ] = "rms"
    eps: Annotated[
        tuple[float, ...],
        COMMAS,
        Flag(
            "Sizes of the edit, in the unit",
            Topic.ATTACK,
            default="; ".join(
                f"{','.join(map(str, sizes))} of {unit}" for unit, sizes in DEFAULT_EPS.items()
            ),
        ),
    ] = ()
    attacks: Annotated[
        tuple[str, ...], COMMAS, Flag("Attacks and controls to run; see `ls attacks`", Topic.ATTACK)
    ] = tuple(ATTACKS)
    draws: Annotated[int, Flag("Draws of each random control", Topic.ATTACK)] = Field(
        default=1, ge=1, le=64
    )
    distance: Annotated[
        bool, Flag("Also search for the minimum distance to collapse", Topic.ATTACK)
    ] = False
    distance_limit: Annotated[
        float,
        Flag(
            "Largest size that the distance's search tries, in multiples of the smallest eps",
            Topic.ATTACK,
        ),
    ] = Field(default=16.0, gt=1)
    bisections: Annotated[
        int, Flag("Bisection steps when narrowing down the minimum distance", Topic.ATTACK)
    ] = Field(default=2, ge=0, le=20)
    prompts: options.Prompts = "harmbench"
    column: options.Column = "prompt"
    limit: options.Limit = None
    target: Annotated[
        str,
        Field(min_length=1),
        Flag(
            "The opening that `targeted` aims at; {topic} stands for the prompt's own", Topic.ATTACK
        ),
    ] = DEFAULT_TARGET
    thinking: Annotated[
        tuple[ThinkingMode, ...],
        COMMAS,
        Field(min_length=1),
        Flag(
            "How the model thinks before it answers: off, on, fixed (its clean chain, forced) or"
            " regenerated; several give a gap each",
            Topic.ATTACK,
            default="auto: off where the chat template can, else as it has it",
        ),
    ] = ("auto",)
    thinking_tokens: options.ThinkingTokens = None
    span: Annotated[
        Span,
        Flag(
            "Which tokens are edited: the prompt's, with --thinking fixed the chain's, or the"
            " answer's while it is written",
            Topic.ATTACK,
        ),
    ] = "prompt"
    steps: Annotated[int, Flag("PGD steps", Topic.ATTACK)] = Field(default=10, ge=1)
    restarts: Annotated[
        int,
        Flag("PGD starts for each budget: zero first, then random; the best is kept", Topic.ATTACK),
    ] = Field(default=1, ge=1)
    schedule: Annotated[
        Literal["constant", "decreasing"],
        Flag(
            "PGD's step: eps/4 each time (the paper's), or from 2 eps down to 0 along a momentum",
            Topic.ATTACK,
        ),
    ] = "decreasing"
    iterate: Annotated[
        Literal["last", "best"], Flag("Which PGD step's edit is kept", Topic.ATTACK)
    ] = "best"
    longer: Annotated[
        bool,
        Flag(
            "Search again with 4 x the steps from 4 starts, on up to 30 prompts at risk: a PASS"
            " needs it",
            Topic.ATTACK,
        ),
    ] = False
    untargeted_tokens: Annotated[
        int, Flag("Tokens of the clean completion that `untargeted` pushes away from", Topic.ATTACK)
    ] = Field(default=16, ge=1)
    max_new_tokens: options.NewTokens = 128
    strip_target: Annotated[
        bool,
        Flag(
            "Judge answers without the target at their start, which the attack itself wrote",
            Topic.JUDGING,
        ),
    ] = True
    reward: Annotated[str, Flag("builtin, margin or hf:MODEL_ID", Topic.JUDGING)] = "builtin"
    judge: options.Judge = "builtin"
    confirm: Annotated[
        str,
        Flag(
            "A second judge for every flip, or none; auto: builtin, or keyword where builtin is the"
            " judge",
            Topic.JUDGING,
        ),
    ] = "auto"
    dtype: options.Dtype = "auto"
    # last digits differ, so it is part of the question
    compile: Annotated[
        bool, Flag("torch.compile the attack: 30 s at first, then faster steps", Topic.WHERE)
    ] = False
    chat_template: options.ChatTemplate = None
    seed: options.Seed = 0

    unwritten: ClassVar[Mapping[str, Any]] = {
        "schedule": "constant",
        "confirm": NO_JUDGE,
        "longer": False,
        "strip_target": False,
        "thinking": ["auto"],
        "thinking_tokens": None,
        "span": "prompt",
    }

    @field_validator("thinking")
    @classmethod
    def _each_mode_once(cls, modes: tuple[ThinkingMode, ...]) -> tuple[ThinkingMode, ...]:
        return tuple(mode for mode in THINKING_MODES if mode in modes)

    @model_validator(mode="after")
    def _has_such_a_span(self) -> Any:
        if self.span == "chain" and self.thinking != ("fixed",):
            raise UsageError(
                "--span chain edits a chain that is known beforehand, so it takes --thinking fixed;"
                f" {','.join(self.thinking)} came."
            )
        if self.span == "answer" and "regenerated" in self.thinking:
            raise UsageError(
                "--span answer leaves the chain as it is, so there is none to write anew; use"
                " --thinking off,fixed."
            )
        return self

    @field_validator("target")
    @classmethod
    def _more_than_a_topic(cls, target: str) -> str:
        if not without_topic(target):
            raise UsageError(
                f"--target needs words of its own beside {TOPIC}; {target!r} came. Example:"
                f" --target {DEFAULT_TARGET!r}"
            )
        return target

    @model_validator(mode="before")
    @classmethod
    def _eps_are_numbers(cls, values: Any) -> Any:
        unit = values.get("unit", "rms")
        named = unit if isinstance(unit, str) and unit in UNITS else "rms"
        given = values.get("eps")
        sizes = DEFAULT_EPS[named] if given is None or given == () else listed(given)
        numbers = []
        for size in sizes or ("nothing",):
            try:
                if isinstance(size, bool):
                    raise TypeError
                numbers.append(Budget(float(size), named).size)
            except (TypeError, ValueError, OverflowError):
                said = str(size)[:40]
                raise UsageError(
                    f"--eps must be finite numbers above 0; {said!r} came. Example: --eps 0.01,0.03"
                ) from None
        return {**values, "eps": tuple(sorted(set(numbers)))}

    @field_validator("attacks")
    @classmethod
    def _known_attacks(cls, attacks: tuple[str, ...]) -> tuple[str, ...]:
        for attack in attacks:
            if attack not in ATTACKS:
                raise UsageError(
                    f"--attacks takes {', '.join(ATTACKS)}; {attack!r}"
                    f" came.{did_you_mean(attack, ATTACKS)}"
                )
        return tuple(a for a in ATTACKS if a in attacks)  # the table's order, each once

    @model_validator(mode="after")
    def _is_another_judge(self) -> Any:
        if self.confirm == self.judge:
            raise UsageError(
                f"--confirm must name another judge than --judge; {self.confirm!r} came for both."
                f" Example: --confirm {'keyword' if self.judge == 'builtin' else 'builtin'}"
            )
        return self

    @model_validator(mode="after")
    def _asks_for_something(self) -> Any:
        if not self.attacks and not self.distance:
            raise UsageError(
                f"No attack was named. --attacks takes any of {', '.join(ATTACKS)}; or use"
                " `auditgap distance`."
            )
        return self

    @property
    def budgets(self) -> tuple[Budget, ...]:
        return tuple(Budget(size, self.unit) for size in self.eps)

    @property
    def searches_longer(self) -> bool:
        """Whether there is a targeted search, and more work is to be held against it."""
        return self.longer and "targeted" in self.attacks

    @property
    def pgd(self) -> PGD:
        from auditgap.interventions.pgd import PGD

        return PGD(
            steps=self.steps,
            schedule=self.schedule,
            restarts=self.restarts,
            iterate=self.iterate,
            seed=self.seed,
        )


class RunOptions(options.SpokenOptions):
    """Where it runs and in what portions. Nothing here changes what is measured."""

    engine: Annotated[
        Literal["hf", "vllm"],
        Flag("Engine that generates; attacks always run on transformers", Topic.WHERE),
    ] = "hf"
    shard: Annotated[
        str | dict[str, str] | None,
        Flag(
            "A model over N GPUs where it is attacked: layers:N (its blocks in parts) or tensor:N"
            " (its matrices)",
            Topic.WHERE,
            default="on one",
        ),
    ] = None
    keep_edits: Annotated[
        bool, Flag("Keep the edits that the attacks found, for `export-edits`", Topic.OUTPUT)
    ] = False

    @field_validator("shard")
    @classmethod
    def _known_shard(cls, shard: str | dict[str, str] | None) -> Any:
        from auditgap.models import Shard

        for word in shard.values() if isinstance(shard, dict) else (shard,):
            Shard.of(word)
        return shard

    def shard_of(self, model: str) -> Shard:
        """How this model lies over devices."""
        from auditgap.models import Shard

        return Shard.of(self.shard.get(model) if isinstance(self.shard, dict) else self.shard)

    def gpus_of(self, model: str, device: str) -> float:
        """GPUs that a worker needs for this model: what was asked for, or those that it is attacked
        on, or spoken on in vLLM."""
        spoken = super().gpus_of(model, device)
        if self.gpus_per_worker is not None or not device.startswith("cuda"):
            return spoken
        return max(float(self.shard_of(model).n), spoken)

    def with_shards(self, own: Mapping[str, str | None]) -> RunOptions:
        """With the models' own shards by name, where they have one. Raises UsageError for what is
        none."""
        if not any(own.values()):
            return self
        from auditgap.models import Shard

        shards = {
            name: str(self.shard_of(name) if word is None else Shard.of(word))
            for name, word in own.items()
        }
        return self.model_copy(update={"shard": shards})
