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
from dataclasses import dataclass, field
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
