"""A judge's card: how far its verdicts can be trusted, measured against people's labels, and how
easily it is fooled. `judges.measuring` makes it.

    card = judge_card(load_judge("builtin"), load_gold("pyrit-objective"))
    # κ, sensitivity, specificity, AUC beside the length-only baseline, injections
    print(format_card(card))

`errors` is what the Rogan–Gladen correction needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from auditgap.errors import UsageError
from auditgap.judges.gold import Task
from auditgap.judges.harmless import called_harmful

#: Raised whenever a figure is measured another way, so that cards that were kept are made anew.
VERSION = 3

Ends = tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class JudgeCard:
    """Figures of one judge on one gold set. None: could not be computed, and `notes` says why.
    Shares lie in 0…1.

    The positive class is the gold set's `task`: `harmful` or `refusal`. Intervals are at 95 % and
    count answers to one prompt as alike: Wilson's with `stats.effective_size` (sensitivity,
    specificity), DeLong's by prompt (AUC), resampled prompts (κ, rank correlation). Verdicts
    `unscored` and `broken` are in none of the shares, only in `unscored`.
    """

    name: str
    label: str  #: "screening", or nothing
    identity: dict[str, Any]  #: the judge's `describe()`: template hash, weights, parser version
    gold_set: str
    gold_digest: str
    task: Task
    n: int
    n_positive: int
    n_prompts: int
    n_unscored: int
    unscored: dict[str, int]  #: reason -> rows
    parse_failures: int  #: of these, rows whose reply could not be read
    n_held_out: int  #: rows judged by a refit that had not seen them
    confusion: dict[str, int]  #: true_positive, false_negative, true_negative, false_positive
    kappa: float | None
    kappa_interval: Ends
    #: of the judge itself on the `n_held_out` rows, which it was trained on
    kappa_in_sample: float | None
    sensitivity: float | None
    sensitivity_interval: Ends
    specificity: float | None
    specificity_interval: Ends
    #: sensitivity + specificity − 1 by the rule of `errors`: 0 for a judge that guesses
    informedness: float | None
    informedness_interval: Ends
    auc: float | None  #: of the judge's score
    auc_interval: Ends
    #: of the completion's length alone, in whichever direction is better
    length_only_auc: float | None
    length_only_auc_interval: Ends
    rank_correlation: float | None  #: Spearman's, of score and people's grades, where they graded
    rank_correlation_interval: Ends
    injection_flips: dict[str, int]  #: injection -> verdicts that it changed
    n_injected: int  #: scored rows that each injection was tried on
    #: kind -> label -> texts that are neither harmful nor did what was asked (`judges.harmless`)
    harmless: dict[str, dict[str, int]]
    #: sens_k of sens_n, spec_k of spec_n and the `rule` they are of; see `_errors`
    errors: dict[str, Any] | None
    seconds_per_row: float  #: a verdict's, loading or fitting included
    notes: tuple[str, ...] = ()
    version: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> JudgeCard:
        """The card of `to_dict()`, after a trip through JSON too. Raises UsageError: of another
        version, or no card."""
        wanted = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != wanted or values["version"] != VERSION:
            raise UsageError(
                f"A judge card of version {VERSION} is wanted; this is none. Make one: auditgap"
                " judge eval builtin --gold pyrit-objective --out cards/builtin"
            )
        ends = {
            key: value and tuple(value)
            for key, value in values.items()
            if key.endswith("_interval")
        }
        return cls(**{**values, **ends, "notes": tuple(values["notes"])})


def format_card(card: JudgeCard) -> str:
    """The card as plain lines for a terminal. It quotes no prompt and no completion."""

    def shown(name: str) -> str:
        value, ends = getattr(card, name), getattr(card, f"{name}_interval")
        number = "could not tell" if value is None else f"{value:.3f}"
        return number if ends is None else f"{number} [{ends[0]:.3f}, {ends[1]:.3f}]"

    held_out = f", {card.n_held_out} of them held out by refitting" if card.n_held_out else ""
    in_sample = (
        ""
        if card.kappa_in_sample is None
        else f" (on the {card.n_held_out} rows it knows: {card.kappa_in_sample:.3f})"
    )
    lines = [
        (
            f"Judge {card.name}{f' ({card.label})' if card.label else ''} on {card.gold_set}, task:"
            f" {card.task}"
        ),
        (
            f"  rows          {card.n} to {card.n_prompts} prompts ({card.n_positive}"
            f" {card.task}{held_out})"
        ),
        f"  unscored      {card.n_unscored}"
        + "".join(f"; {why}: {n}" for why, n in sorted(card.unscored.items())),
        f"  unreadable    {card.parse_failures}",
        f"  kappa         {shown('kappa')}{in_sample}",
        f"  sensitivity   {shown('sensitivity')}",
        f"  specificity   {shown('specificity')}",
        f"  informedness  {shown('informedness')}",
        f"  AUC           {shown('auc')}",
        f"  length alone  {shown('length_only_auc')}",
        *(
            [f"  rank corr.    {shown('rank_correlation')}"]
            if card.rank_correlation is not None
            else []
        ),
        "  injections    "
        + (
            ", ".join(f"{name} {n}" for name, n in card.injection_flips.items())
            + f" of {card.n_injected} changed"
            if card.injection_flips
            else "not tried"
        ),
        "  harmless      "
        + "; ".join(f"{kind}: {k} of {n}" for kind, (k, n) in called_harmful(card.harmless).items())
        + " called harmful",
        f"  speed         {card.seconds_per_row:.3g} s a verdict",
    ]
    return "\n".join([*lines, *(f"  note          {note}" for note in card.notes)])
