"""From questions to tokens, and from new tokens to replies and completions: what every engine shares
that holds a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from auditgap import models
from auditgap.engines import UNFINISHED, Completion, Question, Reply, Sampling
from auditgap.errors import AuditgapError
from auditgap.models import Rendered
from auditgap.types import ConstantEdit, Edit


def tokens_of(chat: models.Chat, question: Question) -> tuple[int, ...]:
    """A question as the model reads it. Raises UsageError where its chat template cannot write
    it."""
    return chat.write(question.messages) if question.text is None else chat.verbatim(question.text)


def to_ask(
    chat: models.Chat, questions: Sequence[Question], sampling: Sampling, window: int | None
) -> tuple[list[tuple[int, ...]], list[Reply], list[int]]:
    """The questions' tokens, a reply that says why not for each (`too_long`, `empty`), and which of
    them can be asked."""
    prompts = [tokens_of(chat, q) for q in questions]
    replies = [Reply("", problem="too_long" if p else "empty") for p in prompts]
    most = float("inf") if window is None else window - sampling.new_tokens
    return prompts, replies, [i for i, p in enumerate(prompts) if 0 < len(p) <= most]


def reply_of(
    chat: models.Chat,
    ids: Sequence[int],
    stopped: bool,
    sampling: Sampling,
    logprobs: tuple[Mapping[str, float], ...] = (),
) -> Reply:
    """New tokens as a reply: the answer, and the chain that came before it."""
    tokens = sampling.thinking_tokens
    one = chat.said(ids, most=(tokens, sampling.max_new_tokens) if tokens else (0, 0))
    problem = "" if one.finished else UNFINISHED
    stopped = stopped and len(one.ids) == len(ids)
    return Reply(
        one.text, one.ids, stopped, logprobs[one.n_chain :], problem, one.chain, one.n_chain
    )


def completion_of(
    chat: models.Chat,
    rendered: Rendered,
    ids: Sequence[int],
    stopped: bool,
    finite: bool,
    target_nll: float | None = None,
    l2_effective: float | None = None,
    linf_effective: float | None = None,
    *,
    most: tuple[int, int] = (0, 0),
) -> Completion:
    """New tokens as a completion; `most`: the tokens that a chain and an answer may have
    (`Chat.said`)."""
    one = chat.said(ids, is_answer=rendered.n_chain > 0, most=most)
    stopped = stopped and len(one.ids) == len(ids)
    return Completion(
        one.text,
        one.ids,
        stopped,
        finite,
        target_nll,
        l2_effective,
        linf_effective,
        one.chain,
        one.n_chain,
        one.finished,
    )


def check_length(rendered: Rendered, edit: Edit | ConstantEdit | None) -> None:
    """Raises AuditgapError when an edit of a prompt has not as many positions as that."""
    if isinstance(edit, Edit) and edit.delta.shape[0] != len(rendered.ids):
        raise AuditgapError(
            f"An edit of {edit.delta.shape[0]} positions came for prompt {rendered.prompt.id} of"
            f" {len(rendered.ids)} tokens."
        )
