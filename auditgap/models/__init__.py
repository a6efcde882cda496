"""Open a model to be audited: look at it, load it, render its chat, find its blocks.

    subject = load("smollm2", dtype="float32")
    # the chat template's tokens, ready for generation
    subject.render(Prompt("What colour is the vault?")).ids

Every name ends as a local folder of safetensors (`folder.py`), and nothing in that folder can make
foreign code run.
"""

from auditgap.models.adapters import with_adapter, with_lora
from auditgap.models.blocks import find_blocks
from auditgap.models.chat import Chat, Conversation, Rendered
from auditgap.models.choices import DTYPES, parse_sites, pick_device, pick_dtype
from auditgap.models.folder import OPENING, PACKAGED, cache_dir, resolve
from auditgap.models.identity import fingerprint
from auditgap.models.loading import LoadedModel, load, quiet, wrap
from auditgap.models.outlines import Outline, outline
from auditgap.models.shard import WHOLE, Shard
from auditgap.models.vetting import preflight

__all__ = [
    "DTYPES",
    "OPENING",
    "PACKAGED",
    "WHOLE",
    "Chat",
    "Conversation",
    "LoadedModel",
    "Outline",
    "Rendered",
    "Shard",
    "cache_dir",
    "find_blocks",
    "fingerprint",
    "load",
    "outline",
    "parse_sites",
    "pick_device",
    "pick_dtype",
    "preflight",
    "quiet",
    "resolve",
    "with_adapter",
    "with_lora",
    "wrap",
]
