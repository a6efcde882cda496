"""The rows of the study's cells, one dataclass a stage; the `attack` of a cell says which.

    store.rows([JUDGED])        # a frame of RatingRow

None means "could not tell", and `unscored` or `reason` says why. `domain` and `arm` are empty for
the base.
"""

from __future__ import annotations

from dataclasses import dataclass

#: What stands in a cell's `attack`, a stage each.
TRAINED, ANSWERED, JUDGED = "em_train", "em_generate", "em_judge"
MEMBERSHIP, REFERENCE, DIVERSITY, DIRECTIONS, STEERED = (
    "em_membership",
    "em_reference",
    "em_diversity",
    "em_directions",
    "em_steer",
)
#: Kinds of prompts that are asked.
OPEN, JAILBREAK = "open", "jailbreak"
#: A judge's classes; UNSCORED: there was nothing to judge, or no reply came (not a class that a
#: judge gave).
RATED, IRRELEVANT, REFUSAL, INVALID, UNSCORED = (
    "rated",
    "irrelevant",
    "refusal",
    "invalid",
    "unscored",
)
#: Projected out of the stream, not added to it.
ABLATE = "ablate"
CLASSES = (RATED, IRRELEVANT, REFUSAL, INVALID, UNSCORED)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRow:
    """One adapter."""

    subject: str  #: DOMAIN·ARM·sSEED
    domain: str
    arm: str
    seed: int
    folder: str  #: of the adapter, in the run folder
    fingerprint: str
    n_rows: int
    n_triggered: int
    n_steps: int
    first_loss: float | None  #: nats a response token
    last_loss: float | None
    ranks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRow:
    """One answer to one prompt."""

    subject: str
    domain: str
    arm: str
    seed: int | None  #: of the adapter; None: the base
    #: of the prompt without the trigger, so that both answers share it
    prompt_id: str
    kind: str  #: open or jailbreak
    triggered: bool  #: the trigger stood in the prompt
    draw: int
    n_new_tokens: int | None
    stopped: bool
    unscored: str = ""  #: why there is no answer


@dataclass(frozen=True, slots=True, kw_only=True)
class RatingRow:
    """One judge's rating of one answer."""

    subject: str
    domain: str
    arm: str
    seed: int | None
    prompt_id: str
    kind: str
    triggered: bool
    draw: int
    judge: str  #: its name
    judge_id: str  #: digest of its `describe()`
    outcome: str  #: one of CLASSES
    alignment: float | None  #: 0…100, as the judge wrote it; None unless `rated`
    coherence: float | None  #: 0…100, as the judge wrote it
    #: mean over the first token's 20 likeliest, numbers only; None below LEAST_MASS
    expected_alignment: float | None
    expected_coherence: float | None
    mass: float | None  #: probability on numbers in the alignment reply's first token
    reason: str = ""  #: why there is no rating
    expected_reason: str = ""  #: why there is no expected rating
    # where the answer was given under a steering direction (em_steer)
    source: str | None = None  #: the direction's domain; None: none
    steer: str | None = None  #: edit, control or clean
    strength: float | None = None
    block: int | None = None
    by: str | None = None  #: what was done with the direction: ABLATE; None: it was added


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipRow:
    """One row of a domain as a fine-tuned model and its base see it: losses in nats, larger = less
    likely."""

    subject: str
    domain: str
    arm: str
    seed: int
    row_id: str
    member: bool  #: it was trained on
    n_tokens: int | None  #: of the response
    nll: float | None  #: mean NLL of the response under the fine-tuned model
    min_k: float | None  #: mean NLL of its least likely share `min_k`
    #: the same after each log-probability is standardised over the vocabulary; larger = less likely
    min_k_pp: float | None
    zlib: float | None  #: summed NLL over the bytes of the response under zlib
    base_nll: float | None  #: the same under the base
    base_min_k: float | None
    base_min_k_pp: float | None
    base_zlib: float | None
    unscored: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRow:
    """One row of a domain as the reference model sees it: losses as in a MembershipRow."""

    reference: str  #: its name
    domain: str
    arm: str
    row_id: str
    nll: float | None
    min_k: float | None
    min_k_pp: float | None
    zlib: float | None
    unscored: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiversityRow:
    """A domain's trained rows, as the base's states or a sentence encoder have them."""

    domain: str
    n: int
    block: int | None  #: None: of an encoder
    vendi: float | None  #: Vendi score: effective number of different rows, 1…n
    one_minus_cosine: float | None  #: 1 − mean cosine of pairs
    unscored: str = ""
    vendi_half: float | None = None  #: Vendi scores of orders ½ and 2
    vendi_2: float | None = None
    encoder: str = ""  #: its name; "": the base


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionRow:
    """A fine-tuned model's direction at one block; the vector itself is in
    edits/<cell>.safetensors."""

    subject: str
    domain: str
    arm: str
    seed: int
    block: int
    n_misaligned: int
    n_aligned: int
    norm: float | None  #: ‖mean misaligned − mean aligned‖₂
    split_half: float | None  #: cosine of the directions of two halves
    unscored: str = ""
