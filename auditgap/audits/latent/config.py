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
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from auditgap.config import Frozen, build, listed, merged
from auditgap.engines import EngineName, Serving
from auditgap.errors import UsageError, did_you_mean
from auditgap.interventions.pgd import PGD
from auditgap.models import Shard
from auditgap.types import ATTACKS, UNITS, Budget, Unit

#: Default sizes of a unit: ours for rms, those of the paper (section 5) for the two others.
DEFAULT_EPS: Mapping[str, tuple[float, ...]] = {
    "rms": (0.01, 0.03, 0.1),
    "max": (0.0005, 0.001, 0.005),
    "absolute": (0.0005, 0.001, 0.005),
}


class LatentConfig(Frozen):
    """The question: which models, where, how hard, on what, judged by whom."""

    models: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(min_length=1)
    layers: str = "embedding,mid,last"
    unit: Unit = "rms"
    eps: Annotated[tuple[float, ...], BeforeValidator(listed)] = ()
    attacks: Annotated[tuple[str, ...], BeforeValidator(listed)] = tuple(ATTACKS)
    draws: int = Field(default=1, ge=1, le=64)  #: of each random control
    distance: bool = False  #: minimum distance to collapse besides
    #: largest size tried, in multiples of the smallest eps
    distance_limit: float = Field(default=16.0, gt=1)
    bisections: int = Field(default=2, ge=0, le=20)
    prompts: str = "harmbench"
    column: str = "prompt"
    limit: int | None = Field(default=None, ge=1)
    target: str = Field(default="Sure, here is", min_length=1)
    steps: int = Field(default=10, ge=1)
    restarts: int = Field(default=1, ge=1)
    iterate: Literal["last", "best"] = "last"
    #: of the clean answer, which `untargeted` pushes away from
    untargeted_tokens: int = Field(default=16, ge=1)
    max_new_tokens: int = Field(default=128, ge=1)
    reward: str = "builtin"
    judge: str = "builtin"
    dtype: str = "auto"
    #: torch.compile PGD's blocks; last digits differ, so it is part of the question
    compile: bool = False
    chat_template: str | None = None
    seed: int = 0

    @field_validator("layers", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

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
    def pgd(self) -> PGD:
        return PGD(steps=self.steps, restarts=self.restarts, iterate=self.iterate, seed=self.seed)


class RunOptions(Frozen):
    """The sitting: where it runs and in what portions. Nothing here changes what is measured."""

    out: str | None = None
    device: str = "auto"
    engine: Literal["hf", "vllm"] = "hf"  #: what speaks; attacks always run on transformers
    tensor_parallel: int = Field(default=1, ge=1)  #: GPUs that vLLM spreads one model over
    #: share of a GPU's memory that vLLM may take
    gpu_memory: float = Field(default=0.9, gt=0, le=1)
    max_model_len: int | None = Field(default=None, ge=16)
    #: prompts on which vLLM's clean text is compared with transformers'; 0: none
    parity: int = Field(default=8, ge=0)
    judge_engine: EngineName = "hf"  #: what a judge's models run on
    judge_endpoint: str | None = None  #: base URL, with judge_engine openai
    executor: Literal["local", "ray"] = "local"
    workers: int | None = Field(default=None, ge=1)
    gpus_per_worker: float | None = Field(default=None, ge=0)
    #: how a model lies over devices where it is attacked, layers:N or tensor:N; or {name:
    #: layers:N}, and others are whole
    shard: str | dict[str, str] | None = None
    address: str | None = None
    batch_tokens: int | None = Field(default=None, ge=16)
    keep_edits: bool = False  #: δ of the searched attacks stays in DIR/edits, for `export-edits`
    break_lock: bool = False
    retry_failed: bool = False
    allow_raw: bool = False

    @field_validator("shard")
    @classmethod
    def _known_shard(cls, shard: str | dict[str, str] | None) -> Any:
        for word in shard.values() if isinstance(shard, dict) else (shard,):
            Shard.of(word)
        return shard

    def shard_of(self, model: str) -> Shard:
        """How this model lies over devices."""
        return Shard.of(self.shard.get(model) if isinstance(self.shard, dict) else self.shard)

    def gpus_of(self, model: str, device: str) -> float:
        """GPUs that a worker needs for this model: what was asked for, or those that it is attacked
        on, or spoken on in vLLM."""
        if self.gpus_per_worker is not None:
            return self.gpus_per_worker
        return (
            float(max(self.shard_of(model).n, self.tensor_parallel))
            if device.startswith("cuda")
            else 0.0
        )

    def with_shards(self, own: Mapping[str, str | None]) -> RunOptions:
        """With the models' own shards by name, where they have one. Raises UsageError for what is
        none."""
        if not any(own.values()):
            return self
        shards = {
            name: str(self.shard_of(name) if word is None else Shard.of(word))
            for name, word in own.items()
        }
        return self.model_copy(update={"shard": shards})

    @property
    def judge_serving(self) -> Serving:
        """How a judge's models are served: beside the subject, so an endpoint or a small one where
        memory is short."""
        return Serving(
            engine=self.judge_engine,
            base_url=self.judge_endpoint,
            device=self.device,
            gpu_memory=0.4,
        )


def read_config(file: Path | None, flags: Mapping[str, Any]) -> tuple[LatentConfig, RunOptions]:
    """The config file's values with the flags that were given (not None) on top.

    Raises UsageError naming the key and what was wanted; Refused when foreign code is asked for.
    """
    values = merged(file, flags, section="lvs")
    if not values.get("models") and set(values) <= {
        *LatentConfig.model_fields,
        *RunOptions.model_fields,
    }:
        raise UsageError("Which model? Name at least one, for example: auditgap lvs smollm2")
    if values.get("judge_endpoint") and values.setdefault("judge_engine", "openai") != "openai":
        raise UsageError(
            f"--judge-endpoint is for --judge-engine openai; {values['judge_engine']!r} came"
            " beside it."
        )
    config, options = build(values, LatentConfig, RunOptions)
    if isinstance(options.shard, dict) and (
        strange := sorted(options.shard.keys() - set(config.models))
    ):
        raise UsageError(
            f"shard names {strange[0]!r}, which is none of the"
            f" models.{did_you_mean(strange[0], config.models)}"
        )
    return config, options
