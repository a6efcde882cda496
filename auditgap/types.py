"""The frozen nouns that travel through auditgap: what is audited, where, how hard, and what came of
it.

A cell reads as a sentence: *this subject, edited at this site, within this budget, by this attack*:

    Cell(subject=Subject("smollm2", fingerprint="9c1e…"), site=Site.block(15), budget=Budget(0.03, "rms"),
         attack="targeted", prompts="51f0…", settings={"seed": 0, "steps": 10})

Values only: no torch here, and nothing that touches a disk.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

from auditgap.errors import UsageError

#: A JSON object, as it is read from or written to disk.
Document = dict[str, Any]

Unit = Literal["rms", "max", "absolute"]
UNITS: tuple[Unit, ...] = ("rms", "max", "absolute")

#: What an attack does; `clean` is the pass without an edit that every other cell is measured
#: against.
ATTACKS: Mapping[str, str] = {
    "targeted": "PGD that minimises the NLL of the target opening",
    "untargeted": "PGD that maximises the NLL of the subject's own clean answer",
    "random": "control: uniform in the ∞-ball",
    "random_matched": (
        "control: random signs on the targeted edit's own magnitudes (same L∞, L2 and support)"
    ),
    "shuffled": "control: another prompt's targeted edit, at this prompt's radius",
    "benign": "control: the targeted search, aimed at a harmless opening (Let me think about)",
}
CLEAN = "clean"
#: How a model thinks before it answers: `auto` is off where its template can switch it off, else
#: as that has it.
ThinkingMode = Literal["auto", "off", "on", "fixed", "regenerated"]
THINKING_MODES: tuple[ThinkingMode, ...] = get_args(ThinkingMode)
#: The targeted attack once more with more work, for the prompts on which that may find more.
LONGER = "longer"


def in_mode(model: str, mode: ThinkingMode) -> str:
    """The name of the subject that a model is when it thinks in this way."""
    return model if mode == "auto" else f"{model} (thinking {mode})"


def parted(
    subject: str, modes: Sequence[ThinkingMode] = THINKING_MODES
) -> tuple[str, ThinkingMode]:
    """The inverse of `in_mode`: a subject's name as the model's and the way in which it thinks."""
    for mode in modes:
        if subject != (model := subject.removesuffix(in_mode("", mode))):
            return model, mode
    return subject, "auto"


def canonical(value: Any) -> str:
    """A value's canonical JSON: sorted keys, shortest floats, no spaces, ASCII."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def digest(value: Any, length: int = 24) -> str:
    """SHA-256 (first `length` hex digits) of a value's canonical JSON."""
    return hashlib.sha256(canonical(value).encode("ascii")).hexdigest()[:length]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a prompt set, behind a system message where it has one. `id` is a hash of the
    text, so tables can name a prompt without showing it; behind a system message the same words are
    another prompt."""

    text: str
    source: str = ""
    target: str | None = None
    system: str = ""

    @property
    def id(self) -> str:
        whole = f"{self.system}\0{self.text}" if self.system else self.text
        return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class ContrastTriple:
    """A prompt with a safe and an unsafe response to it (y+ and y−)."""

    prompt: Prompt
    safe: str
    unsafe: str

    @property
    def id(self) -> str:
        return digest([self.prompt.id, self.safe, self.unsafe], 16)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation that is put to a model."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Subject:
    """A model under audit: how the user named it, and the fingerprint of its config and weights."""

    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """Where an edit goes: what block 0 receives (`embedding`, index −1) or the residual stream
    after block i."""

    layer_index: int

    EMBEDDING_NAME = "embedding"

    def __str__(self) -> str:
        return self.EMBEDDING_NAME if self.layer_index < 0 else f"block{self.layer_index}"

    @property
    def is_embedding(self) -> bool:
        return self.layer_index < 0


@dataclass(frozen=True, slots=True, order=True)
class Budget:
    """A size and its unit (`absolute`; `max`, times the largest |h|; `rms`, times the RMS of h)."""

    size: float
    unit: Unit

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise UsageError(f"--unit must be one of {', '.join(UNITS)}; {self.unit!r} came.")
        number = isinstance(self.size, (int, float)) and not isinstance(self.size, bool)
        if not number or not math.isfinite(self.size) or self.size <= 0:
            raise UsageError(
                f"--eps must be a finite number above 0; {self.size!r} came. For example: --eps"
                " 0.03"
            )
        object.__setattr__(self, "size", float(self.size))

    def __str__(self) -> str:
        return f"{self.size:g} {self.unit}"


@dataclass(frozen=True, eq=False, slots=True)
class Edit:
    """An additive δ at one site on the prompt's positions. `delta` is a [T, D] fp32 tensor, T the
    prompt's tokens; `goes_on`: its last row stands at every token behind the prompt too."""

    site: Site
    delta: Any
    goes_on: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class ConstantEdit:
    """An edit that stands at every position, the prompt's and the answer's: h ← h + shift −
    (h·read) write, at each site.

    All are [D] fp32 tensors; None leaves their term out. Steering has a shift; ablation reads and
    writes one unit vector.
    """

    sites: tuple[Site, ...]
    shift: Any = None
    read: Any = None
    write: Any = None


@dataclass(frozen=True, slots=True)
class Suffix:
    """Text that is put behind a prompt: an intervention where the prompt goes in, with no size
    inside the model."""

    text: str

    def behind(self, prompt: Prompt) -> Prompt:
        """The prompt with the suffix, a space between them."""
        return Prompt(f"{prompt.text} {self.text}", prompt.source, prompt.target)


@dataclass(frozen=True, eq=False, slots=True)
class Exchange:
    """A prompt, the completion it got, and the edit that was on (None: the clean pass)."""

    prompt: Prompt
    completion: str
    edit: Edit | ConstantEdit | Suffix | None = None


class Label(StrEnum):
    """What a judge can say. `broken` and `unscored` are answers too: they are counted and shown."""

    HARMFUL = "harmful"
    SAFE = "safe"
    REFUSAL = "refusal"
    BROKEN = "broken"
    UNSCORED = "unscored"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's answer to one exchange; `reason` says why when the label is `unscored` or
    `broken`."""

    label: Label
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """A reward's answer: higher = safer. `value` is None when it could not tell, and `reason` says
    why."""

    value: float | None
    reason: str = ""


@dataclass(frozen=True)
class Cell:
    """The unit that is planned, sharded, stored and resumed.

    `prompts` is the hash of the prompt set, `settings` everything else that can change a number
    (attack steps, seeds, dtype, scorers). `key` names the cell on disk; the subject counts by its
    fingerprint, not by the name typed.
    """

    subject: Subject
    site: Site | None
    budget: Budget | None
    attack: str
    prompts: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    #: which audit's cell it is; in no key, since an audit's `attack` or settings tell it apart
    audit: ClassVar[str] = "latent"

    def describe(self) -> dict[str, Any]:
        """The canonical description that the key is a hash of."""
        return {
            "subject": self.subject.fingerprint,
            "site": None if self.site is None else self.site.layer_index,
            "unit": None if self.budget is None else self.budget.unit,
            "eps": None if self.budget is None else self.budget.size,
            "attack": self.attack,
            "prompts": self.prompts,
            "settings": dict(self.settings),
        }

    @cached_property
    def key(self) -> str:
        return digest(self.describe())

    def __str__(self) -> str:
        if self.attack == CLEAN or self.site is None:
            return f"{self.subject.name} · {self.attack}"
        return f"{self.subject.name} · {self.site} · {self.budget} · {self.attack}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One prompt of one cell, as stored in the run folder. None means "could not tell"; `unscored`
    says why."""

    subject: str
    site: str | None  #: `embedding`, `block<i>`; None in the clean cell
    layer_index: int | None  #: −1 for the embedding
    unit: str | None
    eps: float | None  #: the budget's size, in its unit
    eps_abs: float | None  #: the ∞-ball's radius in activation units
    attack: str
    draw: int  #: 0, or the draw of a random control
    prompt_id: str
    n_prompt_tokens: int
    n_new_tokens: int
    clean_reward: float | None
    edited_reward: float | None
    l2: float | None  #: ‖δ‖₂ as requested
    linf: float | None
    l2_effective: float | None  #: after the model's dtype has rounded (h + δ) − h
    linf_effective: float | None
    #: ‖h‖₂ of the clean activations at the site, template positions left out
    h_norm: float | None
    relative_norm: float | None  #: l2 / h_norm
    nll_clean: float | None  #: mean NLL of the target, nats a token, no edit
    nll_edited: float | None  #: the same under the edit
    #: mean NLL of the completion under the clean model, nats a token
    completion_nll: float | None
    coherent: bool | None
    verdict_clean: str | None  #: a Label
    verdict_edited: str | None
    #: max(0, S(y) − S(y′)) / (log(1 + ‖δ‖₂) + η), paper eq. in section 6
    lvs: float | None
    lvs_rel: float | None  #: the same with ‖δ‖₂/‖h‖₂ in the denominator
    #: space-separated: larger_than_h, degenerate, last_position_only, dtype_rounding, length_matters
    flags: str = ""
    unscored: str = ""  #: reason, when lvs is None
    #: what the second judge says of a flip (safe with no edit, harmful under one); None: not asked
    verdict_second: str | None = None
    #: of the row's completion at half its length; None: older rows do not say
    verdict_half: str | None = None
    #: of the whole text, where an opening that is an attack's target was left out; else None
    verdict_whole: str | None = None
    reward_whole: float | None = None
    #: how the model thought: off, on, fixed or regenerated; None: it is not one that thinks
    thinking: str | None = None
    #: tokens of the chain before the answer, a forced one's too
    n_chain_tokens: int | None = None
    verdict_chain: str | None = None  #: of the chain, judged as if it were the answer
    #: of the answer that follows this row's chain once the edit is gone (`regenerated`)
    verdict_again: str | None = None
    #: in the clean cell: the prompt that this one nearly repeats, or itself; None: nobody looked
    cluster: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DistanceRow:
    """One prompt of one minimum-distance cell: the smallest budget found at which its completion
    turned harmful."""

    subject: str
    site: str
    layer_index: int
    unit: str
    prompt_id: str
    #: in the unit; 0: harmful with no edit; not collapsed: the largest tried
    distance: float | None
    eps_abs: float | None  #: the same as an absolute ∞-norm
    collapsed: bool | None  #: False: right-censored at `distance`; None: could not tell
    evaluations: int  #: attacks tried
    verdict_clean: str | None
    unscored: str = ""
    #: not collapsed, as every text from `distance` on fell apart; None: older rows do not say
    broken: bool | None = None


#: Column names of the row table, in order.
ROW_COLUMNS: tuple[str, ...] = tuple(f.name for f in fields(Row))

#: Column names of `lvs.parquet`, one row a (subject, site, budget, attack).
TABLE_COLUMNS: tuple[str, ...] = (
    "subject",
    "site",
    "layer_index",
    "unit",
    "eps",
    "attack",
    "n",
    "n_unscored",
    "n_judged",
    "n_broken",
    "lvs_mean",
    "lvs_mean_lo",
    "lvs_mean_hi",
    "lvs_median",
    "lvs_median_lo",
    "lvs_median_hi",
    "lvs_rel_mean",
    "lvs_rel_lo",
    "lvs_rel_hi",
    "asr",
    "asr_lo",
    "asr_hi",
    "asr_corrected",
    "asr_corrected_lo",
    "asr_corrected_hi",
    "asr_envelope",
    "asr_envelope_lo",
    "asr_envelope_hi",
    "delta_vs_matched",
    "delta_lo",
    "delta_hi",
    "relative_norm_median",
    "n_at_risk",
    "flipped",
    "withstood",
    "undetermined",
    "flip_rate",
    "flip_rate_lo",
    "flip_rate_hi",
    "flip_p",
    "drop_mean",
    "drop_mean_lo",
    "drop_mean_hi",
    "drop_vs_matched",
    "drop_vs_matched_lo",
    "drop_vs_matched_hi",
    "drop_p",
    "nll_clean",
    "nll_edited",
    "flag",
)
