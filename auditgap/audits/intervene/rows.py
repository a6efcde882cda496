"""The rows of an intervention audit: one a prompt, trial and draw; and those of the clean pass,
which all are set beside."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from auditgap.engines.constant import change
from auditgap.types import ConstantEdit, Edit, Suffix

#: Arms besides those of a trial: the prompts that are asked and the donors, each without an edit.
CLEAN_ARM, DONOR_ARM = "clean", "donor"
#: Above this share of ‖h‖₂ an edit is larger than what it edits can bear being called.
LARGER_THAN_H = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class InterveneRow:
    """One prompt under one trial. None means "could not tell"; `unscored` says why.

    Every prompt is of the half that nothing was learned from; `n_fit` says how many the other half
    has.
    """

    subject: str
    site: str | None  #: None without an edit
    layer_index: int | None  #: −1 for the embedding
    intervention: str  #: or `clean`
    strength: float | None
    angle: float | None  #: degrees off the learned direction
    arm: str  #: edit, control; clean, donor
    draw: int
    prompt_id: str
    donor_id: str | None  #: whose activations were put in
    n_fit: int  #: prompts that the edit was learned from
    n_prompt_tokens: int
    n_new_tokens: int
    l2: float | None  #: ‖edit‖₂ at the site, over the prompt's positions
    relative_norm: float | None  #: the same over ‖h‖₂ of the user's own tokens
    #: mean NLL of the completion under the clean model, nats a token
    completion_nll: float | None
    coherent: bool | None
    verdict_clean: str | None  #: a Label
    verdict_donor: str | None
    verdict: str  #: of this row
    flags: str = ""  #: larger_than_h
    unscored: str = ""


@dataclass(frozen=True)
class Size:
    """How large an edit is on one prompt; `problem` says why nothing can be told of it."""

    l2: float | None
    relative: float | None
    problem: str = ""


def size_of(edit: Edit | ConstantEdit | Suffix, h: torch.Tensor, content: tuple[bool, ...]) -> Size:
    """Of an edit on clean hidden states h [T, D]; a standing edit's size is its first pass over the
    prompt, a suffix has none."""
    if isinstance(edit, Suffix):
        return Size(None, None)
    added = edit.delta if isinstance(edit, Edit) else change(edit, h)
    l2, own = added.double().norm().item(), h[torch.tensor(content)].double().norm().item()
    if not math.isfinite(own):
        return Size(None, None, "nonfinite_activations")
    if not math.isfinite(l2):
        return Size(None, None, "nonfinite_edit")
    return Size(l2, l2 / own if own else None, "" if l2 else "zero_edit")
