"""What the plans of several audits have in common: a config with `auto` resolved, the subjects, the
scorers, the settings that every cell has.

    config = with_dtype(config, options.device)
    outlines = outlines_of(config.models, config.chat_template)
    settings = settings_of(config, outlines[0], scorers_of(config.judge, device=options.device))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, Self, TypeVar

from auditgap import models
from auditgap.engines import Serving
from auditgap.judges import load_judge
from auditgap.judges.coherence import Thresholds
from auditgap.types import Cell, Document, Prompt, ThinkingMode, digest


class _Typed(Protocol):
    """A config with the dtype that models run in."""

    @property
    def dtype(self) -> str: ...
    def model_copy(self, *, update: Document) -> Self: ...


class _Asking(_Typed, Protocol):
    """A config of an audit in which models answer."""

    @property
    def max_new_tokens(self) -> int: ...


class _Thinking(_Asking, Protocol):
    """The same where they may be asked to think."""

    @property
    def thinking(self) -> ThinkingMode: ...
    @property
    def thinking_tokens(self) -> int | None: ...


TypedT = TypeVar("TypedT", bound=_Typed)


def with_dtype(config: TypedT, device: str) -> TypedT:
    """The config with the dtype that `auto` means on this machine."""
    dtype = models.pick_dtype(config.dtype, models.pick_device(device))
    return config.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})


def outlines_of(
    names: Iterable[str],
    chat_template: str | None,
    outline: Callable[..., models.Outline] = models.outline,
    *,
    thinking: ThinkingMode = "auto",
) -> tuple[models.Outline, ...]:
    """Outlines of the models named; the same weights count once. Raises UsageError, Refused, also
    where a chat template cannot have its model think so."""
    found: dict[str, models.Outline] = {}
    for name in dict.fromkeys(names):
        one = outline(name, chat_template=chat_template)
        found.setdefault(one.subject.fingerprint, one.asked_to_think(thinking))
    return tuple(found.values())


def check_subject(
    outline: models.Outline, prompts: Iterable[Prompt], *, opens: bool = True
) -> None:
    """What can be known to be wrong with a subject and these prompts before weights are loaded.

    Raises UsageError where transformers would open another model than is served (`opens`: it is
    transformers that opens it), and where the chat template leaves out words of a prompt.
    """
    if opens:
        outline.check_opens()
    outline.chat.prove(prompts)


def mean_tokens(outline: models.Outline, prompts: Sequence[Prompt]) -> float:
    """Mean length of a rendered prompt, from a sample of them."""
    sample = prompts[:: max(1, len(prompts) // 16)]
    return sum(len(outline.chat.render(p).ids) for p in sample) / len(sample)


def scorers_of(judge: str, *, device: str, serving: Serving | None = None) -> Document:
    """What judges the answers, as it goes into cells and run.json. Raises UsageError: no such
    judge."""
    return {
        "judge": load_judge(judge, device=device, serving=serving).describe(),
        "coherence": Thresholds().describe(),
    }


def chain_tokens(config: _Thinking, chat: models.Chat) -> int:
    """What a chain of thought may have beside the answer's tokens; 0: it shares them, or there is
    none."""
    if config.thinking == "auto" and config.thinking_tokens is None:
        return 0
    return chat.chain_budget(config.thinking_tokens)


def thought(config: _Thinking, outline: models.Outline) -> Document:
    """What of thinking stands in a cell's settings: nothing where nothing is asked for, so that
    such cells have their keys as ever."""
    tokens = chain_tokens(config, outline.chat)
    asked = {**outline.chat.told, **({"tokens": tokens} if tokens else {})}
    return {"thinking": asked} if asked else {}


def chain_of(cell: Cell) -> int:
    """`chain_tokens` of a cell, by its settings."""
    return cell.settings.get("thinking", {}).get("tokens", 0)


def settings_of(config: _Asking, outline: models.Outline, scorers: Document) -> Document:
    """What of the question can change the numbers of any cell with this subject."""
    template = outline.chat.template
    return {
        "dtype": config.dtype,
        "chat_template": digest(template) if template else None,
        "max_new_tokens": config.max_new_tokens,
        **scorers,
    }
