"""What a model's JSON claims, held against what its weights hold, before a library believes it.

check_claims(folder)        # UsageError: config.json says num_hidden_layers 1,000,000,000 …
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from auditgap.errors import UsageError
from auditgap.models.bounds import (
    LARGEST_SIZE,
    MOST_ADDED_TOKENS,
    MOST_BLOCKS,
    MOST_GROWTH,
    MOST_PIECES,
    TIMES_LONGEST_SIDE,
)
from auditgap.models.reading import read_object
from auditgap.models.trial import try_patterns, try_tokenizer
from auditgap.models.weights import is_adapter, weights_files
from auditgap.types import Document

_AGAIN = "Download the model again from a source that you trust."
#: Keys of a config that say how many there are of something that is laid out in memory.
_BLOCKS = re.compile(r"(n|num)_(\w+_)?layers?")
_SIZES = re.compile(r"(n|num)_(\w+_)?(heads?|experts?)|n_embd|n_inner|d_\w+|\w+_(size|dim|rank)|r")
#: Of these, what is never 0 or below.
_POSITIVE = re.compile(
    r"num_hidden_layers|n_layers?|hidden_size|n_embd|vocab_size|num_attention_heads|n_heads?"
)


@dataclass(frozen=True)
class Held:
    """What the headers of a folder's weights say of them."""

    shapes: Mapping[str, tuple[int, ...]]  #: of each tensor, by its name

    @property
    def n_tensors(self) -> int:
        return len(self.shapes)

    @cached_property
    def sides(self) -> frozenset[int]:
        """Every length of a side of one of them."""
        return frozenset(side for shape in self.shapes.values() for side in shape)

    @property
    def longest(self) -> int:
        return max(self.sides, default=0)


def check_claims(folder: Path) -> None:
    """Raises UsageError where config, adapter or tokenizer claim sizes that nothing in the folder
    bears out, or rules that multiply what they are given, and Refused where trying their patterns
    does not come to an end."""
    held = held_by(folder)
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).is_file():
            _check_sizes(folder / name, held)
    if is_adapter(folder):
        _check_adapter(folder / "adapter_config.json", held)
    n_added = sum(
        _n_added(folder / name) for name in ("tokenizer_config.json", "added_tokens.json")
    )
    path = folder / "tokenizer.json"
    seen = _rules_of(path, *_stamp(path)) if path.is_file() else _Rules(0, ())
    if (n := max(n_added, seen.n_added)) > MOST_ADDED_TOKENS:
        raise UsageError(
            f"{folder.name} adds {n:,} tokens to its tokenizer's own, and at most"
            f" {MOST_ADDED_TOKENS:,} are taken. {_AGAIN}"
        )
    if path.is_file():
        try_tokenizer(path, seen.patterns)


def check_width(name: str, width: int, base: Path) -> None:
    """Raises UsageError where no tensor of the weights has a side as long as the config's width."""
    sides = held_by(base).sides
    if width not in sides:
        raise UsageError(
            f"{name}: its config.json says that activations have {width:,} numbers, and none of its"
            f" weights has a side of that length (the longest is {max(sides, default=0):,}); they"
            f" do not belong together. {_AGAIN}"
        )


def held_by(folder: Path) -> Held:
    """What the weights of a folder are, by their headers."""
    files = [path for path in weights_files(folder) if path.is_file()]
    return _held(tuple((str(path), *_stamp(path)) for path in files))


@lru_cache(maxsize=64)
def _held(files: tuple[tuple[str, int, int], ...]) -> Held:
    shapes: dict[str, tuple[int, ...]] = {}
    for path, *_ in files:
        with Path(path).open("rb") as file:  # which safetensors has found sound
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        shapes |= {name: tuple(tensor["shape"]) for name, tensor in header.items()}
    return Held(shapes)


def _stamp(path: Path) -> tuple[int, int]:
    seen = path.stat()
    return seen.st_mtime_ns, seen.st_size


def _check_sizes(path: Path, held: Held) -> None:
    most = {
        _BLOCKS: max(MOST_BLOCKS, held.n_tensors),
        _SIZES: max(LARGEST_SIZE, TIMES_LONGEST_SIDE * held.longest),
    }
    for key, value in numbers(read_object(path)):
        for kind, bound in most.items():
            if not kind.fullmatch(key):
                continue
            least = 1 if _POSITIVE.fullmatch(key) else 0 if key == "r" else value
            if not least <= value <= bound:
                raise UsageError(
                    f"{path} says {key} {_shown(value)}, which its weights do not bear out"
                    f" ({held.n_tensors:,} tensors, the longest side {held.longest:,}). {_AGAIN}"
                )


def numbers(value: Any) -> Iterator[tuple[str, int]]:
    """(key, number) of every whole number under a key, at every depth."""
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict):
            for key, one in inner.items():
                if isinstance(one, int) and not isinstance(one, bool):
                    yield key, one
                elif isinstance(one, (dict, list)):
                    waiting.append(one)
        elif isinstance(inner, list):
            waiting.extend(one for one in inner if isinstance(one, (dict, list)))


def _shown(value: int) -> str:
    return f"{value:,}" if abs(value) < 10**15 else f"of {len(str(value))} digits"


def _check_adapter(path: Path, held: Held) -> None:
    settings = read_object(path)
    patterns = [
        settings.get(key)
        for key in ("target_modules", "exclude_modules", "layers_pattern", "target_parameters")
    ]
    patterns += [
        key for name in ("rank_pattern", "alpha_pattern") for key in settings.get(name) or {}
    ]
    for value in list(patterns):
        patterns += value if isinstance(value, list) else []
    names = [re.sub(r"\.(lora|ia3|hada|lokr)_.*", "", name) for name in held.shapes]
    try_patterns((p for p in patterns if isinstance(p, str)), names, path)


def _n_added(path: Path) -> int:
    if not path.is_file():
        return 0
    told = read_object(path)
    added = told.get("added_tokens_decoder", {}) if path.name != "added_tokens.json" else told
    special = told.get("additional_special_tokens") or told.get("extra_special_tokens")
    return sum(len(some) for some in (added, special) if isinstance(some, (dict, list)))


@dataclass(frozen=True)
class _Rules:
    n_added: int
    patterns: tuple[str, ...]  #: regular expressions in it


@lru_cache(maxsize=64)
def _rules_of(path: Path, *_stamp: int) -> _Rules:
    told = read_object(path)
    for part in ("normalizer", "decoder"):
        if (growth := _growth(told.get(part))) > MOST_GROWTH:
            raise UsageError(
                f"{path} has a {part} that makes up to {growth:,.0f} characters of one, and at most"
                f" {MOST_GROWTH} are taken. {_AGAIN}"
            )
    n = sum(
        1 for key, _ in _each(told.get("post_processor")) if key in ("Sequence", "SpecialToken")
    )
    if n > MOST_PIECES:
        raise UsageError(
            f"{path} puts {n:,} pieces around a text, and at most {MOST_PIECES} are taken. {_AGAIN}"
        )
    added = told.get("added_tokens")
    parts = [told.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    patterns = {v for part in parts for k, v in _each(part) if k == "Regex" and isinstance(v, str)}
    return _Rules(len(added) if isinstance(added, list) else 0, tuple(sorted(patterns)))


def _growth(part: Any) -> float:
    """Characters that the rules of a tokenizer's part may make of one, one rule after another."""
    growth = 1.0
    for key, rule in [("", part), *_each(part)]:
        if isinstance(rule, dict) and rule.get("type") == "Replace" and key != "pattern":
            put = len(str(rule.get("content") or ""))
            taken = (rule.get("pattern") or {}).get("String") if _is_pattern(rule) else None
            # a regular expression may match where there is nothing
            growth *= max(put / max(len(taken), 1), 1) if isinstance(taken, str) else put + 1
    return growth


def _is_pattern(rule: Document) -> bool:
    return isinstance(rule.get("pattern"), dict)


def _each(value: Any) -> Iterator[tuple[str, Any]]:
    """Every value below, at every depth, with the key that it (or its list) stands under."""
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        key, inner = waiting.pop()
        below = (
            list(inner.items())
            if isinstance(inner, dict)
            else [(key, one) for one in inner]
            if isinstance(inner, list)
            else []
        )
        yield from below
        waiting.extend(below)
