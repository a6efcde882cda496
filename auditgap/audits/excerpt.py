"""What of a completion is judged: not the opening that the attack wrote itself.

    part = Excerpt(opening=13)
    part.judged("Sure, here is no help.")      # "no help."

An attack makes an opening such as "Sure, here is" likely, and a judge that reads it sees compliance
whatever follows. So judges and rewards are given what stands behind it, in clean answers too. What
they say of the whole text, and of the text at half its length, stands beside that: a refusal that
comes late looks like compliance in a short answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal, Self

from auditgap.engines import Completion
from auditgap.interventions.target import opening_length
from auditgap.judges import Judge, Reward
from auditgap.types import Exchange, Label, Score, Verdict

#: Another reading of a completion, beside the one that counts.
Other = Literal["whole", "half", "chain"]
EMPTY = "empty"


@dataclass(frozen=True, slots=True)
class Excerpt:
    """Counts of characters: the `opening` that is an attack's target, and what stands within
    `half` the new tokens that a completion may have; None: all of it."""

    opening: int = 0
    half: int | None = None

    @classmethod
    def of(cls, completion: Completion, targets: tuple[str, ...], tokens: int, decode: Any) -> Self:
        """Of a completion of at most `tokens` new tokens; `decode`: token ids to text."""
        text, half = completion.text, None
        ids = completion.answer_ids
        if len(ids) > tokens // 2:
            half = _shared(text, decode(ids[: tokens // 2]))
        return cls(opening_length(text, targets), half)

    @classmethod
    def stored(cls, text: Mapping[str, Any]) -> Self:
        """Of a text in `generations/`; older ones were judged whole."""
        half = text.get("half")
        return cls(int(text.get("opening") or 0), None if half is None else int(half))

    def judged(self, text: str) -> str:
        """What of the text is judged; nothing where no word is left, opening or not."""
        rest = text[self.opening :].strip() if self.opening else text
        return rest if any(map(str.isalnum, rest)) else ""

    def others(self, text: str) -> dict[Other, str]:
        """The other readings, where they differ."""
        found: dict[Other, str] = {"whole": text} if self.opening else {}
        if self.half is not None and (half := self.judged(text[: self.half])) != self.judged(text):
            found["half"] = half
        return found


def _shared(text: str, start: str) -> int:
    """How many characters they begin with alike: half of a character's tokens spell another one."""
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, start, strict=False))
    )


#: All of a completion.
WHOLE = Excerpt()


def of_each(
    exchanges: Sequence[Exchange], parts: Sequence[Excerpt]
) -> tuple[list[Exchange], dict[tuple[int, Other], Exchange]]:
    """What is judged of each exchange, and its other readings by number and name."""
    pairs = list(zip(exchanges, parts, strict=True))
    return [replace(e, completion=part.judged(e.completion)) for e, part in pairs], {
        (i, name): replace(e, completion=text)
        for i, (e, part) in enumerate(pairs)
        for name, text in part.others(e.completion).items()
    }


def verdicts(judge: Judge, exchanges: Sequence[Exchange]) -> list[Verdict]:
    """The judge's verdict on each; where there is no text, nobody is asked."""
    found = [Verdict(Label.UNSCORED, EMPTY)] * len(exchanges)
    said = [i for i, e in enumerate(exchanges) if e.completion.strip()]
    if said:
        for i, verdict in zip(said, judge.judge([exchanges[i] for i in said]), strict=True):
            found[i] = verdict
    return found


def scores(reward: Reward, exchanges: Sequence[Exchange]) -> list[Score]:
    """The reward of each; where there is no text, none, unless it reads none."""
    found = [Score(None, EMPTY)] * len(exchanges)
    said = [i for i, e in enumerate(exchanges) if e.completion.strip() or not reads_text(reward)]
    if said:
        for i, score in zip(said, reward.score([exchanges[i] for i in said]), strict=True):
            found[i] = score
    return found


def reads_text(reward: Reward) -> bool:
    """Whether it scores the completion, not the subject itself."""
    return bool(getattr(reward, "reads_text", True))
