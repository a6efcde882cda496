"""What a behavioural audit is asked to do.

    models: [./base, ./tuned]
    suite: harmbench,xstest,mine.jsonl:benign
    judge: builtin

As everywhere, a `BehaviourConfig` is what can change a number; `BehaviourOptions` may change
between sittings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from auditgap.config import Frozen, build, listed, merged
from auditgap.engines import EngineName, Serving, engine_named
from auditgap.errors import UsageError


class Asking(Frozen):
    """What a model is asked while it is trained, and how it is judged."""

    prompts: str = "harmbench"
    column: str = "prompt"
    limit: int | None = Field(default=None, ge=1)
    benign: str | None = None  #: a set of harmless prompts, for over-refusal
    benign_limit: int | None = Field(default=None, ge=1)
    max_new_tokens: int = Field(default=64, ge=1)
    judge: str = "builtin"
    dtype: str = "auto"
    chat_template: str | None = None
    seed: int = 0  #: of the prompts' sample and of the intervals


class BehaviourConfig(Frozen):
    """The question: which models, asked what, judged by whom."""

    models: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(min_length=1)
    suite: str = "harmbench,everyday"  #: sources and files, a built suite's folder, or `paper`
    limit: int | None = Field(default=None, ge=1)  #: prompts of each source
    max_new_tokens: int = Field(default=128, ge=1)
    judge: str = "builtin"
    dtype: str = "auto"
    chat_template: str | None = None
    #: base URL: the models are names that an OpenAI-compatible endpoint serves there
    endpoint: str | None = None
    judge_endpoint: str | None = None  #: the same for the judge's models
    #: a window smaller than the models' own: vLLM's, and what a judge reads
    max_model_len: int | None = Field(default=None, ge=16)
    seed: int = 0  #: of the prompts' sample and of the intervals

    @field_validator("suite", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value


class BehaviourOptions(Frozen):
    """The sitting: where it runs, in what portions, and when its result is not good enough."""

    out: str | None = None
    engine: EngineName = "hf"
    judge_engine: EngineName | None = None  #: None: the engine of the subjects
    device: str = "auto"
    batch_tokens: int | None = Field(default=None, ge=16)
    tensor_parallel: int = Field(default=1, ge=1)
    gpu_memory: float = Field(default=0.9, gt=0, le=1)
    #: prompts on which vLLM's greedy text is compared with transformers'; 0: none
    parity: int = Field(default=8, ge=0)
    #: share of answers without a verdict above which the run counts as failed
    max_unscored: float = Field(default=0.2, ge=0, le=1)
    #: go on where a subject was trained on prompts of the suite; the report says so
    allow_overlap: bool = False
    break_lock: bool = False
    retry_failed: bool = False
    allow_raw: bool = False

    @field_validator("engine", "judge_engine", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        return value if value is None else engine_named(str(value))

    def serving(self, config: BehaviourConfig) -> Serving:
        """How the subjects are served."""
        return self._serving(
            self.engine,
            config,
            config.endpoint,
            dtype=config.dtype,
            chat_template=config.chat_template,
        )

    def judge_serving(self, config: BehaviourConfig) -> Serving:
        """How the judge's models are served: bfloat16 where a GPU has them, since verdicts are
        words."""
        return self._serving(
            self.judge_engine or self.engine, config, config.judge_endpoint or config.endpoint
        )

    def _serving(
        self, engine: EngineName, config: BehaviourConfig, base_url: str | None, **more: Any
    ) -> Serving:
        return Serving(
            engine=engine,
            base_url=base_url,
            device=self.device,
            batch_tokens=self.batch_tokens,
            tensor_parallel=self.tensor_parallel,
            gpu_memory=self.gpu_memory,
            max_model_len=config.max_model_len,
            **more,
        )


def read_config(
    file: Path | None, flags: Mapping[str, Any]
) -> tuple[BehaviourConfig, BehaviourOptions]:
    """The config file's values with the flags that were given (not None) on top. Raises
    UsageError."""
    values = merged(file, flags, section="evaluate")
    if not values.get("models"):
        raise UsageError("Which model? Name at least one, for example: auditgap evaluate smollm2")
    for which in ("", "judge_"):
        if (
            values.get(f"{which}endpoint")
            and (came := values.setdefault(f"{which}engine", "openai")) != "openai"
        ):
            flag = which.replace("_", "-")
            raise UsageError(
                f"--{flag}endpoint is for --{flag}engine openai; {came!r} came beside it."
            )
    return build(values, BehaviourConfig, BehaviourOptions)
