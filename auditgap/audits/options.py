"""The settings that audits share, each with its type and help, once.

    class MyConfig(Frozen):
        models: Models
        limit: Limit = None
        judge: Judge = "builtin"

    class MyOptions(AuditOptions): ...

What can change a number is a field of an audit's config and belongs to the run folder's identity;
where it runs and in what portions is a field of its options, and may change from one session to the
next. No torch here: `--help` and `auditgap schema` read these.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from auditgap.config import COMMAS, Flag, Frozen, Topic
from auditgap.engines import EngineName
from auditgap.errors import UsageError
from auditgap.training.config import ReportTo

if TYPE_CHECKING:
    from auditgap.engines import Serving

Models = Annotated[
    tuple[str, ...],
    COMMAS,
    Field(min_length=1),
    Flag("Models: hub ids, id@revision, folders, adapters, or smollm2", positional=True),
]
Base = Annotated[str | None, Flag("Model that the subjects were fine-tuned from")]
Prompts = Annotated[str, Flag("A name (see `ls prompts`) or a jsonl, csv, parquet or txt file")]
Column = Annotated[str, Flag("Column of the file that holds the prompt")]
Limit = Annotated[
    int | None, Field(ge=1), Flag("Use N prompts of each set, chosen by hash", default="all")
]
ChatTemplate = Annotated[
    str | None, Flag("A Jinja file, or `none`", default="the tokenizer's own template")
]
Judge = Annotated[
    str,
    Flag("Judge: builtin, refusal=MODEL, ensemble, hf:MODEL_ID, …; see `ls judges`", Topic.JUDGING),
]
JudgeEndpoint = Annotated[
    str | None, Flag("Base URL of the endpoint that serves the judge model", Topic.JUDGING)
]
MaxUnscored = Annotated[
    float,
    Field(ge=0, le=1),
    Flag(
        "Exit 3 when more than this share of the prompts got no answer, or of the answers no"
        " verdict",
        Topic.JUDGING,
    ),
]
NewTokens = Annotated[int, Field(ge=1), Flag("Maximum new tokens of a completion")]
ThinkingTokens = Annotated[
    int | None,
    Field(ge=1),
    Flag(
        "Maximum tokens of a chain of thought, beside the answer's",
        default="1024 where the model may think, else none",
    ),
]
Thinking = Annotated[
    Literal["auto", "off", "on"],
    Flag(
        "Whether the model thinks before it answers: off or on",
        default="auto: off where the chat template can, else as it has it",
    ),
]
#: The same where `auto` lets chain and answer share what an answer may have.
SharedThinkingTokens = Annotated[
    int | None,
    Field(ge=1),
    Flag(
        "Maximum tokens of a chain of thought, beside the answer's",
        default="1024 with --thinking on; else both share the answer's",
    ),
]
JudgeThinkingTokens = Annotated[
    int | None,
    Field(ge=1),
    Flag(
        "Maximum tokens of a judge's chain of thought, beside its verdict's",
        Topic.JUDGING,
        default="1024 where its chat template lets it think, none behind an endpoint",
    ),
]
#: What configs that were written before they could ask a model to think mean by it.
NO_THINKING: dict[str, Any] = {"thinking": "auto", "thinking_tokens": None}
Target = Annotated[
    str, Field(min_length=1), Flag("Opening that targeted attacks make likely", Topic.ATTACK)
]
Dtype = Annotated[
    str,
    Flag(
        "auto, float32, bfloat16 or float16; auto is bfloat16 on a GPU and float32 on a CPU",
        Topic.WHERE,
    ),
]
Seed = Annotated[int, Flag("Seed for sampling, controls and intervals")]
Device = Annotated[str, Flag("auto, cpu, cuda or cuda:N", Topic.WHERE)]
BatchTokens = Annotated[
    int | None,
    Field(ge=16),
    Flag("Tokens in each batch", Topic.WHERE, default="2048 on a CPU, 16384 on a GPU"),
]
Tensor = Annotated[
    int, Field(ge=1), Flag("Tensor-parallel size: GPUs for one vLLM model", Topic.WHERE)
]
GPUMemory = Annotated[
    float,
    Field(gt=0, le=1),
    Flag("Share of GPU memory for vLLM (0.55 at most beside a judge in vLLM)", Topic.WHERE),
]
Window = Annotated[
    int | None,
    Field(ge=16),
    Flag("vLLM's context window", Topic.WHERE, default="the model's own"),
]
Parity = Annotated[
    int,
    Field(ge=0),
    Flag(
        "Prompts for checking that vLLM and transformers generate the same text; 0: none",
        Topic.WHERE,
    ),
]
AllowOverlap = Annotated[
    bool, Flag("Continue when a subject was trained on prompts of the audit; the report says so")
]


AllowRaw = Annotated[bool, Flag("Include prompts and completions in the report", Topic.OUTPUT)]
RetryFailed = Annotated[bool, Flag("Retry cells that failed in an earlier run", Topic.OUTPUT)]


class AuditOptions(Frozen):
    """What every audit takes: where it runs, where its results go, how a run is resumed. Nothing
    here changes what is measured."""

    name: Annotated[
        tuple[str, ...],
        COMMAS,
        Flag(
            "What tables and reports call the models, in their order (a base has no part in it)",
            Topic.OUTPUT,
            default="as they were typed",
        ),
    ] = ()
    out: Annotated[
        str | None,
        Flag("Run folder; the same command resumes it", Topic.OUTPUT, default="runs/MODEL"),
    ] = None
    device: Device = "auto"
    executor: Annotated[
        Literal["local", "ray"], Flag("local (this process) or ray", Topic.WHERE)
    ] = "local"
    workers: Annotated[
        int | None, Field(ge=1), Flag("Number of Ray actors", Topic.WHERE, default="as many as fit")
    ] = None
    gpus_per_worker: Annotated[
        float | None,
        Field(ge=0),
        Flag(
            "GPUs for each Ray actor; a fraction shares one GPU", Topic.WHERE, default="as needed"
        ),
    ] = None
    address: Annotated[
        str | None,
        Flag(
            "Address of the Ray cluster", Topic.WHERE, default="the job's, else one on this machine"
        ),
    ] = None
    batch_tokens: BatchTokens = None
    allow_raw: AllowRaw = False
    break_lock: Annotated[
        bool, Flag("Take over the folder of a process that is no longer running", Topic.OUTPUT)
    ] = False
    retry_failed: RetryFailed = False
    report_to: ReportTo = ("none",)

    @property
    def trackers(self) -> tuple[str, ...]:
        """Those of `report_to`."""
        return tuple(name for name in self.report_to if name != "none")

    def gpus_of(self, model: str, device: str) -> float:
        """GPUs that a Ray worker needs for this model."""
        if self.gpus_per_worker is not None:
            return self.gpus_per_worker
        return 1.0 if device.startswith("cuda") else 0.0

    @property
    def card(self) -> float:
        """The share of a GPU that a worker has: less than all where several share one."""
        return min(1.0, self.gpus_per_worker or 1.0)


#: Of a card, what a judge in vLLM holds beside the subject, and what both leave to their processes.
JUDGE_SHARE, SPARE_SHARE = 0.4, 0.05


class JudgedOptions(AuditOptions):
    """The same for an audit whose judge runs beside the subject, on an engine of its own."""

    judge_engine: Annotated[EngineName, Flag("Engine of the judge models", Topic.JUDGING)] = "hf"
    judge_endpoint: JudgeEndpoint = None
    judge_thinking_tokens: JudgeThinkingTokens = None

    @property
    def judge_serving(self) -> Serving:
        """How a judge's models are served: beside the subject, so an endpoint or a small one where
        memory is short."""
        from auditgap.engines import Serving

        return Serving(
            engine=self.judge_engine,
            base_url=self.judge_endpoint,
            device=self.device,
            gpu_memory=JUDGE_SHARE * self.card,
            thinking_tokens=self.judge_thinking_tokens,
        )


class SpokenOptions(JudgedOptions):
    """The same for an audit that reads and searches on transformers, and may generate in vLLM."""

    engine: Annotated[
        Literal["hf", "vllm"],
        Flag(
            "Engine that generates; hidden states are read and edits searched on transformers",
            Topic.WHERE,
        ),
    ] = "hf"
    tensor_parallel: Tensor = 1
    gpu_memory: GPUMemory = 0.9
    max_model_len: Window = None
    parity: Parity = 8

    def vllm_serving(self, *, dtype: str, chat_template: str | None) -> Serving | None:
        """How vLLM serves the subjects; None where it does not."""
        from auditgap.engines import Serving

        if self.engine != "vllm":
            return None
        return Serving(
            engine="vllm",
            dtype=dtype,
            device=self.device,
            chat_template=chat_template,
            tensor_parallel=self.tensor_parallel,
            gpu_memory=self.subject_share,
            max_model_len=self.max_model_len,
        )

    @property
    def subject_share(self) -> float:
        """Of a GPU's memory, what vLLM takes for the subject: `gpu_memory` of the worker's part of
        it, or what a judge in vLLM leaves."""
        beside = JUDGE_SHARE if self.judge_engine == "vllm" else 0.0
        return min(self.gpu_memory, 1 - SPARE_SHARE - beside if beside else 1.0) * self.card

    def gpus_of(self, model: str, device: str) -> float:
        """GPUs that a Ray worker needs for this model: those that vLLM spreads it over."""
        if self.gpus_per_worker is not None or not device.startswith("cuda"):
            return super().gpus_of(model, device)
        return float(self.tensor_parallel)


def openai_for_endpoints(values: dict[str, Any], fields: Container[str]) -> None:
    """An endpoint that was named alone is called as OpenAI's: sets `engine` or `judge_engine`,
    whichever are among the settings `fields`. Raises UsageError where another engine came beside
    it."""
    for prefix in ("", "judge_"):
        if f"{prefix}engine" not in fields or not values.get(f"{prefix}endpoint"):
            continue
        if (came := values.setdefault(f"{prefix}engine", "openai")) != "openai":
            flag = prefix.replace("_", "-")
            raise UsageError(
                f"--{flag}endpoint is for --{flag}engine openai; {came!r} came beside it."
            )
