"""The rows of an intervention audit: one a prompt, trial and draw; and those of the clean pass,
which all are set beside."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from auditgap.audits.scored import ScoredCompletion
from auditgap.engines.constant import change
from auditgap.interventions import Trial
from auditgap.models import Rendered
from auditgap.types import CLEAN, Cell, ConstantEdit, Document, Edit, Label, Prompt, Suffix

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
    """Of an edit on clean hidden states h [T, D]; a constant edit's size is its first pass over the
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


@dataclass(frozen=True)
class Clean:
    """What the clean pass measured of one prompt."""

    verdict: str
    nll: float | None


@dataclass(frozen=True)
class Donor:
    """Whose activations are put in, and the verdict on that prompt."""

    prompt_id: str
    verdict: str


@dataclass(frozen=True)
class RowMaker:
    """Makes the rows of one subject; `n_fit`: prompts that its edits were learned from."""

    subject: str
    n_fit: int

    def row(
        self,
        cell: Cell,
        rendered: Rendered,
        trial: Trial,
        one: ScoredCompletion,
        size: Size,
        *,
        clean: Mapping[str, Clean] | None,
        donor: Donor | None = None,
    ) -> InterveneRow:
        """One prompt's row; `clean`: None in the clean pass itself."""
        large = size.relative is not None and size.relative > LARGER_THAN_H
        return InterveneRow(
            **self._of(cell, rendered.prompt, trial, clean, donor),
            n_prompt_tokens=len(rendered.ids),
            n_new_tokens=len(one.completion.ids),
            l2=size.l2,
            relative_norm=size.relative,
            completion_nll=one.completion_nll,
            coherent=one.coherent,
            verdict=str(one.verdict.label),
            flags="larger_than_h" if large else "",
            unscored=one.verdict.reason if one.verdict.label == Label.UNSCORED else "",
        )

    def lost(
        self,
        cell: Cell,
        prompt: Prompt,
        trial: Trial,
        problem: str,
        clean: Mapping[str, Clean] | None = None,
    ) -> InterveneRow:
        """A prompt that was not asked, and why."""
        return InterveneRow(
            **self._of(cell, prompt, trial, clean, None),
            n_prompt_tokens=0,
            n_new_tokens=0,
            l2=None,
            relative_norm=None,
            completion_nll=None,
            coherent=None,
            verdict=str(Label.UNSCORED),
            unscored=problem,
        )

    def _of(
        self,
        cell: Cell,
        prompt: Prompt,
        trial: Trial,
        clean: Mapping[str, Clean] | None,
        donor: Donor | None,
    ) -> Document:
        name, site = cell.settings["intervention"], cell.site
        before = None if clean is None else clean.get(prompt.id)
        return {
            "subject": self.subject,
            "site": None if site is None else str(site),
            "layer_index": None if site is None else site.layer_index,
            "intervention": name,
            "strength": None if name == CLEAN else trial.strength,
            "angle": trial.angle,
            "arm": trial.arm,
            "draw": trial.draw,
            "prompt_id": prompt.id,
            "donor_id": donor and donor.prompt_id,
            "n_fit": self.n_fit,
            "verdict_clean": before and before.verdict,
            "verdict_donor": donor and donor.verdict,
        }
