"""Text in, text out: what is put to a model, how it is to answer, what it answered, and the engines
that carry it.

    with Serving(engine="vllm", dtype="float32").open("smollm2") as engine:
        # [Reply("I can't …")]
        engine.ask([Question.of("What colour is the vault?")], Sampling(max_new_tokens=32))

An engine is opened for one model: `hf` (this process, edits and gradients), `vllm` (a process of
its own, edits, adapters) or `openai` (somebody's endpoint). To add one: a file in this folder and a
line in ENGINES; the contract tests run over it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from pydantic import Field

from auditgap.config import Frozen
from auditgap.errors import UsageError
from auditgap.registry import Entry, Registry
from auditgap.types import (
    Document,
    Edit,
    Message,
    Prompt,
    ThinkingMode,
    digest,
)

# configs name engines, and a config (`--help`, `auditgap schema`) costs no torch
if TYPE_CHECKING:
    import torch

    from auditgap import models
    from auditgap.models import Rendered

#: Most likely tokens that can be asked for at each new token; endpoints give no more.
MAX_TOP_LOGPROBS = 20
#: The problem of a reply whose chain of thought never ended.
UNFINISHED = "unfinished"


@dataclass(frozen=True, slots=True)
class Question:
    """What is put to a model: messages for its chat template, or a `text` that goes in as it
    stands, special tokens and all.

    `draw` counts repeated samples of one question: each has its own random stream.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    draw: int = 0

    @classmethod
    def of(cls, prompt: str, *, system: str | None = None, draw: int = 0) -> Question:
        """A user's single turn, after a system message if one is given."""
        head = () if system is None else (Message("system", system),)
        return cls((*head, Message("user", prompt)), None, draw)

    def seed(self, seed: int) -> int:
        """This question's own seed, 31 bits: the same in whatever company and order it is asked."""
        return (
            int(
                digest(
                    [seed, self.draw, self.text, [[m.role, m.content] for m in self.messages]], 8
                ),
                16,
            )
            & 0x7FFFFFFF
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to answer. Temperature 0 is greedy; `top_logprobs` k asks for the k most likely tokens at
    each new one. `thinking_tokens` are what a chain of thought may have beside the answer's; 0: it
    shares theirs."""

    max_new_tokens: int = 128
    thinking_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UsageError(
                "Sampling wants max_new_tokens of 1 or more, a temperature of 0 or more and 0 <"
                f" top_p <= 1; {self.max_new_tokens}, {self.temperature} and {self.top_p} came."
            )
        if self.thinking_tokens < 0:
            raise UsageError(
                f"Sampling wants thinking_tokens of 0 or more; {self.thinking_tokens} came."
            )
        if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise UsageError(
                f"top_logprobs lies in 0…{MAX_TOP_LOGPROBS}; {self.top_logprobs} came."
            )

    @property
    def new_tokens(self) -> int:
        """Tokens of a chain and of an answer together."""
        return self.thinking_tokens + self.max_new_tokens


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one question. `problem` says why there is no answer (then `text` is
    empty): `too_long`, `nonfinite_logits`, `endpoint: …`, `context_length`, `unfinished` (a chain of
    thought that never ended).

    `text` is the answer alone, `chain` what was thought before it. `logprobs`: at each token of the
    answer, the one that ended the turn included, the most likely ones: token text -> natural
    log-probability; where `top_logprobs` asked for them.
    """

    text: str
    #: new tokens without the end of turn; None where an endpoint does not tell
    ids: tuple[int, ...] | None = None
    stopped: bool = True  #: ended of itself; False: cut at max_new_tokens
    logprobs: tuple[Mapping[str, float], ...] = ()
    problem: str = ""
    chain: str = ""
    n_chain: int = 0  #: of `ids`, the first: those of the chain


@dataclass(frozen=True, eq=False, slots=True)
class Request:
    """A rendered prompt to complete greedily, under an edit or (None) as it is; `target` asks for
    its NLL besides."""

    rendered: Rendered
    edit: Edit | None = None
    target: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False, slots=True)
class Completion:
    """What the subject answered; `text` is the answer alone, `chain` what was thought before it.
    The effective norms are of (h + δ) − h after the model's dtype has rounded it.

    Not `finite`: the logits were not all numbers, so that what follows cannot be told and `ids` end
    there.
    """

    text: str
    ids: tuple[int, ...]
    stopped: bool
    finite: bool = True
    target_nll: float | None = None
    l2_effective: float | None = None
    linf_effective: float | None = None
    chain: str = ""
    n_chain: int = 0  #: of `ids`, the first: those of the chain
    finished: bool = True  #: False: the chain never ended, and there is no answer

    @property
    def problem(self) -> str:
        """Why there is no answer to judge, or nothing."""
        if not self.finite:
            return "nonfinite_logits"
        return "" if self.finished else UNFINISHED

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """The answer's tokens."""
        return self.ids[self.n_chain :]


@runtime_checkable
class Engine(Protocol):
    """One model that answers questions. `describe()` is the identity that changes numbers, and goes
    into cell keys."""

    name: str  #: of the engine: hf, vllm, openai

    def describe(self) -> Document: ...

    def ask(self, questions: Sequence[Question], sampling: Sampling) -> list[Reply]:
        """One reply a question, in order; order and company change nothing in fp32. Never raises
        for one question alone."""
        ...

    def close(self) -> None:
        """Give back memory and processes; a second call does nothing."""
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(self, *_: object) -> None: ...


@runtime_checkable
class Journalled(Protocol):
    """What can keep its answers in a file: an endpoint's are paid for one by one."""

    journal: Path | None


@runtime_checkable
class Speaker(Protocol):
    """An engine that has the subject's own tokens: what an audit of edits speaks through (`hf` and
    `vllm`)."""

    def render(self, prompt: Prompt) -> Rendered: ...

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[Completion]: ...

    def nll(
        self,
        rendered: Sequence[Rendered],
        answers: Sequence[Sequence[int]],
        edits: Sequence[Edit | None] | None = None,
    ) -> list[float | None]: ...


EngineName = Literal["hf", "vllm", "openai"]


def served_packed(outline: models.Outline) -> Document:
    """What is added to the identity of a quantised model where it is served as it is packed, as
    vLLM does, and not unpacked."""
    return {"served": str(outline.packing)} if outline.packing else {}


def weights_identity(outline: models.Outline | models.LoadedModel, dtype: torch.dtype) -> Document:
    """The `describe()` of an engine that holds the weights itself: what it computes, not where."""
    template = outline.chat.template
    return {
        "weights": outline.subject.fingerprint,
        "dtype": str(dtype).removeprefix("torch."),
        "chat_template": digest(template) if template else None,
        **outline.chat.told,
    }


class Serving(Frozen):
    """How models are served: which engine, on what.

    In fp32 an answer depends on `dtype` and `chat_template` alone; `max_model_len` and memory
    decide which questions are `too_long` for vLLM.
    """

    engine: EngineName = "hf"
    dtype: str = "auto"
    device: str = "auto"
    chat_template: str | None = None
    thinking: ThinkingMode = "auto"  #: whether its chat template has it think
    #: what a judge's chain of thought may have; None: see `LanguageModelJudge`
    thinking_tokens: int | None = Field(default=None, ge=1)
    batch_tokens: int | None = Field(default=None, ge=16)
    #: GPUs (on a CPU: ranks) a vLLM engine spreads one model over
    tensor_parallel: int = Field(default=1, ge=1)
    #: share of a GPU's memory that vLLM may take
    gpu_memory: float = Field(default=0.9, gt=0, le=1)
    #: vLLM's window; None: the model's own, or what its memory holds of it
    max_model_len: int | None = Field(default=None, ge=16)
    base_url: str | None = None  #: of an endpoint; None: OPENAI_BASE_URL, else OpenAI's own
    batched: bool = False  #: an endpoint is handed files of questions: half the price, within a day
    #: vLLM only: adapters up to this rank can be swapped in; None: none
    max_lora_rank: int | None = Field(default=None, ge=1)

    def open(self, model: str) -> Engine:
        """The engine of that model, loaded. Raises UsageError or Refused as the engine finds cause
        to."""
        return ENGINES[self.engine].load()(model, self)

    def describe(self, model: str) -> Document:
        """The `describe()` that `open(model)` would have, without loading a weight."""
        if self.engine == "openai":
            from auditgap.engines.openai import identity

            return identity(model, self)
        from auditgap import models

        dtype = models.pick_dtype(self.dtype, models.pick_device(self.device))
        outline = models.outline(model, chat_template=self.chat_template, thinking=self.thinking)
        if self.engine == "hf":
            outline.check_opens()
            return weights_identity(outline, dtype)
        return {**weights_identity(outline, dtype), **served_packed(outline)}


def _hf(model: str, serving: Serving) -> Engine:
    from auditgap import models
    from auditgap.engines.hf import HFEngine

    seen = models.outline(model, chat_template=serving.chat_template, thinking=serving.thinking)
    loaded = models.load(seen, dtype=serving.dtype, device=serving.device)
    return HFEngine(loaded, batch_tokens=serving.batch_tokens)


#: Each makes an `Engine` of (model, serving).
ENGINES: Registry[Entry] = Registry(
    "engine",
    {
        "hf": Entry("transformers, in this process", _hf),
        "vllm": Entry("vLLM, in a process of its own", "auditgap.engines.vllm:VLLMEngine"),
        "openai": Entry("a compatible endpoint", "auditgap.engines.openai:OpenAIEngine"),
    },
)


def adapter_path(adapter: str | Path) -> Path:
    """A PEFT adapter's folder that is safe to hand to an engine. Raises UsageError or Refused."""
    from auditgap import models

    folder = models.resolve(str(adapter))
    models.preflight(folder)
    if not (folder / "adapter_config.json").is_file():
        raise UsageError(
            f"{adapter} is no PEFT adapter: it has no adapter_config.json. Name a folder that peft"
            " has saved."
        )
    return folder
