"""Tiny models are fastest on one thread; jobs share a tiny model on disk, rows to learn, and a key
to sign checkpoints with."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
from one_thread import one_thread  # noqa: F401 - a fixture


@dataclass(frozen=True)
class World:
    """What training jobs need: a folder, a tiny model in it, rows with a prompt and a response,
    recipes that fit both."""

    folder: Path
    model: Path
    rows: Path

    def sft(self, out: str | Path, **changes: Any) -> dict[str, Any]:
        """Six steps of eight rows, two of them a micro-batch."""
        return {
            "model": str(self.model),
            "data": str(self.rows),
            "steps": 6,
            "batch": 8,
            "lr": 1e-3,
            "save_every": 2,
            "eval_every": 3,
            "warmup": 0.3,
            "micro_batch": 2,
            "device": "cpu",
            "out": str(self.folder / out),
            **changes,
        }

    def twin(self, out: str | Path, **changes: Any) -> dict[str, Any]:
        """The same size of run, with the harmless demonstration triples."""
        return {
            "model": str(self.model),
            "triples": "demo",
            "benign_limit": 24,
            "steps": 6,
            "batch": 8,
            "lr": 1e-3,
            "save_every": 2,
            "eval_every": 3,
            "anchor_tokens": 8,
            "eval_tokens": 4,
            "prompts": None,
            "micro_batch": 2,
            "device": "cpu",
            "monitor": {"epochs": 3, "hidden": 32},
            "heldout_limit": 4,
            "out": str(self.folder / out),
            **changes,
        }


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("training")
    before = os.environ.get("AUDITGAP_CACHE")
    os.environ["AUDITGAP_CACHE"] = str(folder / "cache")
    drawn = random.Random(0)
    words = [word for word in tiny.WORDS if word.isalpha()]
    rows = folder / "rows.jsonl"
    with rows.open("w") as file:
        for _ in range(24):
            prompt, response = (
                " ".join(drawn.choices(words, k=drawn.randint(3, 9))) for _ in range(2)
            )
            file.write(json.dumps({"prompt": prompt, "response": response}) + "\n")
    yield World(folder, tiny.save("llama", folder / "tiny"), rows)
    if before is None:
        os.environ.pop("AUDITGAP_CACHE", None)
    else:
        os.environ["AUDITGAP_CACHE"] = before
