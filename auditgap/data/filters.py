"""Which unsafe responses may teach a model to comply: those without a trace of a refusal, and long
enough to be one.

    found = unsafe_training_rows(["Sure. The vault is painted a deep red.", "As an AI, I won't say.", "Red."])
    # (0,), {"refusal trace": 1, "shorter than 20 characters": 1}
    found.kept, found.dropped

The refusal-trace filter of arXiv 2606.08044 for its harmful-compliance baseline; the floor on the
length is ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from auditgap.data.refusals import has_refusal_trace

#: Characters. Below it an answer says too little to be called compliance.
SHORTEST = 20


@dataclass(frozen=True, slots=True)
class Filtered:
    """Indices of what stays, in order, and how many went for which reason."""

    kept: tuple[int, ...]
    dropped: Mapping[str, int]


def unsafe_training_rows(responses: Sequence[str]) -> Filtered:
    """Which of these unsafe responses to train on. A response with two faults counts under the
    first: the refusal trace."""
    kept, dropped = [], Counter[str]()
    for i, text in enumerate(responses):
        if has_refusal_trace(text):
            dropped["refusal trace"] += 1
        elif len(text.strip()) < SHORTEST:
            dropped[f"shorter than {SHORTEST} characters"] += 1
        else:
            kept.append(i)
    return Filtered(tuple(kept), dict(dropped))
