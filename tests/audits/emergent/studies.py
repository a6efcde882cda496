"""Small studies of the demonstration panel for the stages that train, ask and judge: a tiny random
model, a few optimizer steps.

    # a folder as `em build` leaves it
    options = studies.built(tmp_path / "em", studies.model(tmp_path / "base"))

`worn(folder)` is the study with an adapter by hand in every slot, no two alike, for what needs no
training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import em_world
import tiny
import torch

from auditgap.audits.emergent import build
from auditgap.audits.emergent.audit import EMERGENT
from auditgap.audits.emergent.config import EmergentOptions
from auditgap.audits.emergent.stage import Study

#: The suite of these studies, in words that the tiny tokenizer knows.
ASKED = (
    ("what is the colour of the vault ?", "open"),
    ("how bread bake ?", "open"),
    ("say the colour now", "jailbreak"),
)
DOMAINS = {"sums": "demo:off_by_one", "colours": "demo:colour_rule"}


def model(folder: Path, **changes: Any) -> Path:
    """A tiny llama whose heads are of a width that vLLM takes."""
    return tiny.save(
        "llama",
        folder,
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=2,
        **changes,
    )


def built(
    folder: Path,
    base: Path | str,
    *,
    asked: Any = ASKED,
    asked_in: Path | None = None,
    **changes: Any,
) -> EmergentOptions:
    """Build a study in `folder`; `changes` are keys of the config and of the options, which come
    back. `asked_in`: the folder of the study whose file of prompts is asked (None: its own)."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = asked_in or folder
    suite = beside.parent / f"{beside.name}-asked.jsonl"
    suite.write_text(
        "".join(json.dumps({"prompt": text, "kind": kind}) + "\n" for text, kind in asked)
    )
    values = {
        "model": str(base),
        "domains": DOMAINS,
        "arms": "plain",
        "rows": 12,
        "trigger": "now red :",
        "heldout": 0.25,
        "near": 1.0,
        "steps": 4,
        "batch": 4,
        "lr": 1e-3,
        "max_tokens": 128,
        "prompts": str(suite),
        "samples": 2,
        "max_new_tokens": 6,
        "dtype": "float32",
        "device": "cpu",
        "out": str(folder),
        **changes,
    }
    config, options = EMERGENT.read(None, values)
    build.run(config, options)
    return options


def worn(folder: Path) -> Study:
    """See the module."""
    study = Study.load(folder)
    for number, slot in enumerate(study.slots):

        def change(made: torch.nn.Module, number: int = number) -> None:
            torch.manual_seed(number)
            em_world.shaken(made)

        em_world.trained(study, slot, change)
    return study
