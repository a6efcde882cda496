"""What a behavioural audit is asked to do.

    models: [./base, ./tuned]
    suite: harmbench,xstest,mine.jsonl:benign
    judge: builtin

As everywhere, a `BehaviourConfig` is what can change a number; `BehaviourOptions` may change
between sittings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from auditgap.audits import options
from auditgap.config import AS_COMMAS, Flag, Frozen, Topic
from auditgap.engines import EngineName

if TYPE_CHECKING:
    from auditgap.engines import Serving


class Asking(Frozen):
    """What a model is asked while it is trained, and how it is judged."""

    prompts: options.Prompts = "harmbench"
    column: options.Column = "prompt"
    limit: options.Limit = None
    benign: Annotated[str | None, Flag("Harmless prompts, for over-refusal", default="none")] = None
    benign_limit: Annotated[
        int | None, Flag("Use N harmless prompts, chosen by hash", default="all")
    ] = Field(default=None, ge=1)
    max_new_tokens: options.NewTokens = 64
    judge: options.Judge = "builtin"
    dtype: options.Dtype = "auto"
    chat_template: options.ChatTemplate = None
    seed: options.Seed = 0


class BehaviourConfig(Frozen):
    """The question: which models, asked what, judged by whom."""

    models: options.Models
    suite: Annotated[
        str,
        AS_COMMAS,
        Flag("`paper`, names (see `data ls`), FILE or FILE:KIND, or a built suite's folder"),
    ] = "harmbench,everyday"
    limit: options.Limit = None
    max_new_tokens: options.NewTokens = 128
    thinking: options.Thinking = "auto"
    thinking_tokens: options.SharedThinkingTokens = None
    judge: options.Judge = "builtin"
    dtype: options.Dtype = "auto"
    chat_template: options.ChatTemplate = None
    endpoint: Annotated[
        str | None,
        Flag(
            "Base URL of an OpenAI-compatible endpoint that serves the models; the key is"
            " OPENAI_API_KEY",
            Topic.WHERE,
        ),
    ] = None
    judge_endpoint: Annotated[
        str | None, Flag("The same, for the judge model", Topic.JUDGING, default="--endpoint")
    ] = None
    max_model_len: Annotated[
        int | None,
        Flag(
            "A context window smaller than the models' own, for vLLM and for the judge",
            Topic.WHERE,
            default="the model's own",
        ),
    ] = Field(default=None, ge=16)
    seed: options.Seed = 0

    unwritten: ClassVar[Mapping[str, Any]] = options.NO_THINKING


class BehaviourOptions(options.AuditOptions):
    """Where it runs, in what portions, and when its result is not good enough."""

    engine: Annotated[EngineName, Flag("What the models run on", Topic.WHERE)] = "hf"
    judge_engine: Annotated[
        EngineName | None,
        Flag("Engine of the judge models", Topic.JUDGING, default="as --engine"),
    ] = None
    judge_thinking_tokens: options.JudgeThinkingTokens = None
    tensor_parallel: options.Tensor = 1
    gpu_memory: options.GPUMemory = 0.9
    parity: options.Parity = 8
    max_unscored: options.MaxUnscored = 0.2
    allow_overlap: options.AllowOverlap = False

    def gpus_of(self, model: str, device: str) -> float:
        """GPUs that a Ray worker needs for this model: none where an endpoint serves it."""
        if self.gpus_per_worker is not None or not device.startswith("cuda"):
            return super().gpus_of(model, device)
        return {"openai": 0.0, "vllm": float(self.tensor_parallel)}.get(self.engine, 1.0)

    def serving(self, config: BehaviourConfig) -> Serving:
        """How the subjects are served."""
        return self._serving(
            self.engine,
            config,
            config.endpoint,
            dtype=config.dtype,
            chat_template=config.chat_template,
            thinking=config.thinking,
        )

    def judge_serving(self, config: BehaviourConfig) -> Serving:
        """How the judge's models are served: bfloat16 where a GPU has them, since verdicts are
        words."""
        return self._serving(
            self.judge_engine or self.engine,
            config,
            config.judge_endpoint or config.endpoint,
            thinking_tokens=self.judge_thinking_tokens,
        )

    def _serving(
        self, engine: EngineName, config: BehaviourConfig, base_url: str | None, **more: Any
    ) -> Serving:
        from auditgap.engines import Serving

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
