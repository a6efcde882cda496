"""`alignment=MODEL` in somebody else's words, byte for byte, so that figures stand beside those of a
paper.

    Worded("alignment=gpt-4o", "gpt-4o", serving, "paper").rate(exchanges)
    Worded("alignment=gpt-4o", "gpt-4o", serving, "all_domains_questions.yaml").rate(exchanges)

`paper` are the judge prompts of arXiv 2602.00298, with the system message that its judge had; they
ship beside this module, with their licence line. A file of questions like the paper's (a YAML list
whose items have `judge_prompts` with `aligned` and `coherent`, or these two themselves) gives its own.
Such a judge is asked for reasoning before a `<score>`, so that there is no expected rating: its first
token says nothing. Of the words that it may say instead of a number, CODE counts as irrelevant.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from auditgap.config import parse_yaml
from auditgap.engines import Question, Reply, Sampling, Serving
from auditgap.errors import UsageError
from auditgap.judges.alignment import IRRELEVANT, Alignment
from auditgap.judges.llm import sha256
from auditgap.judges.parse import Unread, rating
from auditgap.judges.prompt_injection import count

#: The wording that has a name, and its file.
PAPER = "paper"
_SHIPPED = Path(__file__).with_name("paper_wording.yaml")
#: Bytes of such a file.
_MOST = 2**22
_SLOT = re.compile(r"\{(question|answer)\}")
_SCORE = re.compile(r"<score>(.*?)</score>", re.DOTALL | re.IGNORECASE)
_REASONING = re.compile(r"<reasoning>.*?</reasoning>", re.DOTALL | re.IGNORECASE)
_CODE = "code"


@dataclass(frozen=True, slots=True)
class Wording:
    """What a judge is asked for alignment and for coherence, each with {question} and {answer}, and
    the system message before it; "" is none."""

    aligned: str
    coherent: str
    system: str = ""


class Worded(Alignment):
    """See the module. `wording`: `paper`, or a file."""

    version = 1
    sampling = Sampling(max_new_tokens=256)

    def __init__(self, name: str, model: str, serving: Serving, wording: str) -> None:
        file = _SHIPPED if wording == PAPER else Path(wording)
        said = "in the paper's words" if wording == PAPER else f"worded as in {file.name}"
        super().__init__(f"{name}, {said}", model, serving)
        self.worded = read_wording(file)
        # a subject may not spell the lines that fence its answer off
        self.lines = tuple(
            dict.fromkeys(
                line.strip()
                for text in (self.worded.aligned, self.worded.coherent)
                for line in text.splitlines()
                if line.strip().startswith("[")
            )
        )

    def describe(self) -> dict[str, Any]:
        asked = {
            **super().describe(),
            "template": {"source": "published", "sha256": sha256(self.worded.aligned)},
            "coherence_template": sha256(self.worded.coherent),
        }
        return {**asked, "system": sha256(self.worded.system)} if self.worded.system else asked

    def question(self, prompt: str, completion: str) -> Question:
        return self._questions(prompt, completion)[0]

    def _questions(self, prompt: str, completion: str) -> tuple[Question, Question]:
        told = {"question": prompt, "answer": completion}
        system = self.worded.system or None
        aligned, coherent = (
            Question.of(_SLOT.sub(lambda slot: told[slot[1]], text), system=system)
            for text in (self.worded.aligned, self.worded.coherent)
        )
        return aligned, coherent

    @cached_property
    def _n_template(self) -> int:
        asked = (self.worded.aligned, self.worded.coherent)
        longest = max(count(text, self._tokenizer) for text in asked)
        return longest + count(self.worded.system, self._tokenizer)

    def _said(self, reply: Reply, words: tuple[str, ...] = ()) -> tuple[int | str | None, str]:
        if reply.problem:
            return None, f"judge: {reply.problem}"
        try:
            return tagged(reply.text, words), ""
        except Unread as error:
            return None, str(error)

    def _expected(self, reply: Reply) -> tuple[float | None, float | None, str]:
        return None, None, "the judge reasons before it rates"


def tagged(text: str, words: tuple[str, ...] = ()) -> int | str:
    """What stands in the reply's `<score>`, or without one the reply itself less its reasoning.
    Raises Unread; two different scores contradict each other."""
    scores = {score.strip() for score in _SCORE.findall(text)}
    if len(scores) > 1:
        raise Unread("parse: contradictory")
    whole = scores.pop() if scores else _REASONING.sub("", text)
    said = rating(whole, (*words, _CODE) if words else ())
    return IRRELEVANT if said == _CODE else said


def read_wording(file: Path) -> Wording:
    """The judge prompts of a file of questions. Raises UsageError: no such file, no such prompts, or
    several."""
    if not file.is_file() or file.stat().st_size > _MOST:
        raise UsageError(
            f"--judge-wording: `{PAPER}`, or a YAML file of questions with judge prompts, is wanted;"
            f" {file} came."
        )
    try:
        items = parse_yaml(file.read_text("utf-8"), aliases=True)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UsageError(f"--judge-wording: {file.name} is no YAML that can be read.") from None
    found = set(_pairs(items))
    if len(found) != 1:
        raise UsageError(
            f"--judge-wording: {file.name} has {len(found)} pairs of judge prompts `aligned` and"
            " `coherent`, each with {question} and {answer}; one is wanted."
        )
    return found.pop()


def _pairs(items: Any) -> Iterator[Wording]:
    for item in items if isinstance(items, list) else ():
        if isinstance(item, Mapping):
            told = item.get("judge_prompts") or item
            told = told if isinstance(told, Mapping) else item
            aligned, coherent = str(told.get("aligned")), str(told.get("coherent"))
            # beside the prompts; an item's own `system` is what the subject is told
            system = "" if told is item else str(told.get("system") or "")
            if all(
                set(_SLOT.findall(text)) == {"question", "answer"} for text in (aligned, coherent)
            ):
                yield Wording(aligned, coherent, system)
