"""The rows of a probe audit, and the examples they speak of: two answers a triple, y+ (0, safe) and
y− (1, unsafe)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from auditgap.data import dedup_key
from auditgap.errors import UsageError
from auditgap.models import Chat, Conversation
from auditgap.probes.fit import split_groups
from auditgap.types import ContrastTriple, digest

TRAIN, SELECTION, EVALUATION = "train", "selection", "evaluation"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRow:
    """One answer as one subject's activations show it to the fixed probe. None means "could not
    tell"; `unscored` says why."""

    subject: str
    role: str  #: base, or subject
    example_id: str  #: of triple and label
    prompt_id: str
    #: prompts that are the same but for case and white space share it, and a side of the split
    group: str
    label: int  #: 1: the unsafe answer
    #: train, selection (chose the epoch, and calibrates) or evaluation; subjects: evaluation only
    split: str
    n_tokens: int
    n_cut: int  #: tokens of the answer that the limit cut off
    logit: float | None  #: the probe's, larger = more unsafe
    probability: float | None  #: calibrated by Platt's scaling on the base's selection split
    #: log-odds of the baselines; null for subjects, whose text is the base's
    text_score: float | None
    length_score: float | None
    shuffled_score: float | None
    unscored: str = ""


@dataclass(frozen=True, eq=False, slots=True)
class ProbeExample:
    """One answer, rendered for one subject. `talk` is None where nothing of the answer is left;
    `problem` says so."""

    id: str
    prompt_id: str
    group: str
    label: int
    talk: Conversation | None
    problem: str = ""


def examples(triples: Sequence[ContrastTriple], chat: Chat, max_tokens: int) -> list[ProbeExample]:
    """Both answers of each triple, as this chat writes them: safe first. Raises UsageError when the
    template cannot be run."""
    found = []
    for triple in triples:
        # a template that fails, fails for all; only an answer that does not fit is this one's
        # matter
        chat.render(triple.prompt)
        group = digest(dedup_key(triple.prompt.text), 16)
        for label, answer in ((0, triple.safe), (1, triple.unsafe)):
            talk, problem = None, ""
            try:
                talk = chat.converse(triple.prompt, answer, max_tokens=max_tokens)
            except UsageError:
                problem = "empty_answer" if not answer.strip() else "too_long"
            found.append(
                ProbeExample(
                    digest([triple.id, label], 16), triple.prompt.id, group, label, talk, problem
                )
            )
    return found


def set_aside(groups: Sequence[str], share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on and rows of the evaluation split, by prompt.

    Hashed with another word than the monitor's own split, or the two would order the prompts alike.
    """
    return split_groups([f"evaluation:{g}" for g in groups], share, seed)


def answer_texts(found: Sequence[ProbeExample], chat: Chat) -> list[str]:
    """Each answer as the model read it (cut where it was cut), without special tokens; empty where
    there is none."""
    return [
        ""
        if e.talk is None
        else chat.tokenizer.decode(e.talk.ids[e.talk.n_prompt :], skip_special_tokens=True)
        for e in found
    ]


def answer_lengths(found: Sequence[ProbeExample]) -> list[int]:
    """Tokens of each answer, end of turn included."""
    return [0 if e.talk is None else len(e.talk.ids) - e.talk.n_prompt for e in found]
