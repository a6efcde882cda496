"""What a reader of a run wants to know besides its numbers: the command, the versions, the machine,
the models' sizes.

    RunFolder.open("out", config=…, info={**provenance(outlines, dtype="float32"), "prompts": …})
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from auditgap import __version__
from auditgap.types import Document, digest

if TYPE_CHECKING:
    from auditgap.models import Chat, Outline

_VERSIONED = (
    "torch",
    "transformers",
    "numpy",
    "scipy",
    "scikit-learn",
    "pyarrow",
    "ray",
    "peft",
    "deepspeed",
)
#: Two tokenizers that agree in vocabulary, end of text, and what they make of this are one: rules
#: of splitting show in it.
_SAMPLE = "The 1st  fox, 12345 naïve—don't!\n\tif x == 3: pass\n\n ÅNGSTRÖM 東京 🙂 "


def command() -> str:
    """As it was typed, less the program's path."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def provenance(outlines: Sequence[Outline], *, dtype: str) -> Document:
    """The part of a run folder's `info` that every run has; nothing in it changes a number."""
    return {
        "command": command(),
        "versions": {"auditgap": __version__, "python": platform.python_version(), **_versions()},
        "machine": {
            "platform": platform.platform(terse=True),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "subjects": [
            {
                "name": o.subject.name,
                "fingerprint": o.subject.fingerprint,
                "dtype": dtype,
                "stored": ", ".join(o.stored),
                **({"unpacked_from": str(o.packing)} if o.packing else {}),
                **({"note": o.note} if o.note else {}),
                "n_blocks": o.n_blocks,
                "width": o.width,
                "n_params": o.n_params,
                **spoken(o.chat),
                **_thinking(o),
            }
            for o in outlines
        ],
    }


def _thinking(outline: Outline) -> Document:
    """How it was asked to think, and what its template was told of it; nothing where neither is
    known."""
    if outline.thinking != "auto":
        told = json.dumps(dict(outline.chat.variables), sort_keys=True)
        return {"thinking": f"{outline.thinking} ({told})"}
    off = outline.chat.is_told_not_to_think
    return {"thinking": "off (enable_thinking=false)"} if off else {}


def spoken(chat: Chat) -> dict[str, str | None]:
    """Digests of the tokenizer and of the chat template that is used: runs where they differ put
    other tokens to their models."""
    tokenizer = chat.tokenizer
    made = [
        sorted(tokenizer.get_vocab().items()),
        tokenizer.eos_token,
        list(tokenizer(_SAMPLE)["input_ids"]),
    ]
    template: str | None = chat.template
    if template != "none":
        try:
            template = digest(tokenizer.get_chat_template(template), 12)
        except ValueError:  # it has none, or several; a run that needs one will say so
            template = None
    return {"tokenizer": digest(made, 12), "chat_template": template}


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
