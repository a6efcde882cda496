"""Patterns are a stranger's programs: they are tried in a child process that has seconds and
gigabytes, before they are used in this one.

    try_tokenizer(folder)       # Refused: its patterns never come to an end
    try_patterns(names, folder)
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from auditgap.errors import Refused, UsageError
from auditgap.models.bounds import TRIAL_BYTES, TRIAL_LETTERS, TRIAL_SECONDS
from auditgap.models.isolated import isolated

_PROGRAM = Path(__file__).with_name("trial_child.py")
#: What makes a pattern more than a name.
_RULES = re.compile(r"[*+{(\[|?\\]")
#: What is tried beside the letters that a pattern names.
_LETTERS = "a A0 \n.-'é東"


def try_tokenizer(path: Path, patterns: Sequence[str]) -> None:
    """Raises Refused where a tokenizer with these patterns does not read a few thousand like letters
    in bounded time and memory, UsageError where it cannot be read."""
    if patterns:
        letters = sorted({*_LETTERS, *"".join(patterns)[:200]})
        where = path.stat()
        _tried(str(path), tuple(letters), where.st_mtime_ns, where.st_size)


@lru_cache(maxsize=256)
def _tried(path: str, letters: tuple[str, ...], *_stamp: int) -> None:
    texts = [letter * TRIAL_LETTERS for letter in letters]
    _try({"tokenizer": path, "texts": texts, "patterns": [], "names": []}, path)


def try_patterns(patterns: Iterable[str], names: Sequence[str], path: Path) -> None:
    """Raises Refused where matching names of modules against an adapter's patterns does not end in
    bounded time, UsageError where one is none."""
    rules = sorted({pattern for pattern in patterns if _RULES.search(pattern)})
    if rules:
        tried = [*names[:1000], "base_model.model.model.layers.10.self_attn.q_proj", "a" * 60]
        _try({"tokenizer": None, "texts": [], "patterns": rules, "names": tried}, str(path))


def _try(question: dict[str, Any], path: str) -> None:
    child = subprocess.run(
        **isolated(_PROGRAM, str(TRIAL_SECONDS), str(TRIAL_BYTES), TOKENIZERS_PARALLELISM="false"),
        input=json.dumps(question).encode("ascii"),
        capture_output=True,
        check=False,
    )
    if child.returncode in (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGABRT, -signal.SIGSEGV):
        raise Refused(
            f"{path} holds patterns that take more than {TRIAL_SECONDS} seconds or"
            f" {TRIAL_BYTES >> 30} GiB on {TRIAL_LETTERS:,} letters, so it is not used. Download the"
            " model again from a source that you trust."
        )
    if child.returncode:
        words = child.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        raise UsageError(
            f"{path} cannot be used ({words[-1][:160]}); download the model again from a source"
            " that you trust."
        )
