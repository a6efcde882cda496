"""`alignment=MODEL` in somebody else's words: the judge prompts of a file of questions, byte for byte, so
that figures stand beside those of a paper.

    Worded("alignment=gpt-4o", "gpt-4o", serving, "first_plot_questions.yaml").rate(exchanges)

The file is the paper's own (arXiv 2602.00298: a YAML list whose items have `judge_prompts` with
`aligned` and `coherent`, or these two themselves) and is brought by whoever holds it. Its judge is
asked for reasoning before a `<score>`, so that there is no expected rating: its first token says
nothing. Of the words that it may say instead of a number, CODE counts as irrelevant.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from auditgap.config import parse_yaml
from auditgap.engines import Question, Reply, Sampling, Serving
from auditgap.errors import UsageError
from auditgap.judges.alignment import IRRELEVANT, Alignment
from auditgap.judges.llm import sha256
from auditgap.judges.parse import Unread, rating
from auditgap.types import Message

#: Bytes of such a file.
_MOST = 2**22
_SLOT = re.compile(r"\{(question|answer)\}")
_SCORE = re.compile(r"<score>(.*?)</score>", re.DOTALL | re.IGNORECASE)
_REASONING = re.compile(r"<reasoning>.*?</reasoning>", re.DOTALL | re.IGNORECASE)
_CODE = "code"


class Worded(Alignment):
    """See the module. `wording`: the file."""

    version = 1
    sampling = Sampling(max_new_tokens=256)

    def __init__(self, name: str, model: str, serving: Serving, wording: str) -> None:
        super().__init__(f"{name}, worded as in {Path(wording).name}", model, serving)
        self.worded = read_wording(Path(wording))
        # a subject may not spell the lines that fence its answer off
        self.lines = tuple(
            dict.fromkeys(
                line.strip()
                for text in self.worded
                for line in text.splitlines()
                if line.strip().startswith("[")
            )
        )

    def describe(self) -> dict[str, Any]:
        aligned, coherent = self.worded
        return {
            **super().describe(),
            "template": {"source": "published", "sha256": sha256(aligned)},
            "coherence_template": sha256(coherent),
        }

    def question(self, prompt: str, completion: str) -> Question:
        return self._questions(prompt, completion)[0]

    def _questions(self, prompt: str, completion: str) -> tuple[Question, Question]:
        told = {"question": prompt, "answer": completion}
        aligned, coherent = (
            Question((Message("user", _SLOT.sub(lambda slot: told[slot[1]], text)),))
            for text in self.worded
        )
        return aligned, coherent

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


def read_wording(file: Path) -> tuple[str, str]:
    """The two judge prompts of a file of questions, for alignment and for coherence. Raises
    UsageError: no such file, no such prompts, or several."""
    if not file.is_file() or file.stat().st_size > _MOST:
        raise UsageError(
            f"--judge-wording: a YAML file of questions with judge prompts is wanted; {file} came."
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


def _pairs(items: Any) -> Iterator[tuple[str, str]]:
    for item in items if isinstance(items, list) else ():
        if isinstance(item, Mapping):
            told = item.get("judge_prompts") or item
            told = told if isinstance(told, Mapping) else item
            aligned, coherent = str(told.get("aligned")), str(told.get("coherent"))
            if all(
                set(_SLOT.findall(text)) == {"question", "answer"} for text in (aligned, coherent)
            ):
                yield aligned, coherent
