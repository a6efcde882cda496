"""What makes a model the one that it is: every file that a loader may open, and the tokenizer that
comes of them.

    # what the model computes and how it is spoken to, as a hash
    fingerprint(folder)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from auditgap.models.digests import digests
from auditgap.models.door import open_tokenizer
from auditgap.models.folder import adapter_base
from auditgap.models.reading import read_object
from auditgap.models.vetting import TEXTS, below
from auditgap.models.weights import is_adapter, weights_files
from auditgap.types import digest

#: What a subject is spoken to with; part of its fingerprint like its weights.
_SPEECH_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "chat_template.jinja",
    "tokenizer_config.json",
    "generation_config.json",
)
#: The only folder below a model's that a loader looks into.
_TEMPLATES = "additional_chat_templates"
#: Of these, what auditgap writes beside a model and no loader opens.
_BESIDE = ("ledger.json",)
#: Keys of config.json that say where a model was saved, not what it computes.
_VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "name_or_path"}
#: Keys of adapter_config.json that say where its base was, which counts by its fingerprint.
_PLACES = {"base_model_name_or_path", "revision"}


def fingerprint(folder: Path, *, base: str | None = None, tokenizer: Any = None) -> str:
    """SHA-256 over the config (less where it was saved), the tokenizer and template, every
    safetensors file's bytes, whatever else a loader may open (further templates, vocabularies,
    tables of special tokens, an index of shards), and over the tokenizer as it is once loaded.

    An adapter's base counts with it, whatever its name and wherever it lies: by `base`, its
    fingerprint, where that is known, so that many adapters read it once. `tokenizer`: the folder's, where it is open already. Raises UsageError
    where it cannot be opened.
    """
    total = hashlib.sha256()
    for name in ("config.json", "adapter_config.json", *_SPEECH_FILES):
        path = folder / name
        if not path.is_file():
            continue
        if name.endswith("config.json"):
            where = _VOLATILE | _PLACES if name == "adapter_config.json" else _VOLATILE
            told = {k: v for k, v in read_object(path).items() if k not in where}
            total.update(digest(told, 64).encode())
        else:
            total.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    weights = weights_files(folder)
    for path, found in zip(weights, digests(weights), strict=True):
        total.update(path.name.encode() + found)
    for name, path in _others(folder):
        total.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    adapted = is_adapter(folder)
    if not adapted or speaks(folder):  # an adapter without a tokenizer has its base's
        loaded = open_tokenizer(folder, folder.name) if tokenizer is None else tokenizer
        total.update(loaded_digest(loaded).encode())
    if adapted:
        total.update((base or fingerprint(adapter_base(folder))).encode())
    return total.hexdigest()[:24]


def speaks(folder: Path) -> bool:
    """Whether a folder brings a tokenizer of its own, as an adapter may."""
    return (folder / "tokenizer_config.json").is_file()


def loaded_digest(tokenizer: Any) -> str:
    """Of a tokenizer as it is in memory: its class, its tokens and rules, special tokens and their
    ids, its chat templates. What its files come to depends on the library that reads them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = None if backend is None else json.loads(backend.to_str())
    if rules:
        # how the last batch was padded and cut: set anew with every call
        rules = {k: v for k, v in rules.items() if k not in ("padding", "truncation")}
    tokens = None if rules else sorted(tokenizer.get_vocab().items())
    added = sorted((i, str(t), repr(t)) for i, t in tokenizer.added_tokens_decoder.items())
    special = {
        name: str(token) if not isinstance(token, list) else sorted(map(str, token))
        for name, token in tokenizer.special_tokens_map.items()
    }
    ids = sorted(i for i in tokenizer.all_special_ids if i is not None)
    template = getattr(tokenizer, "chat_template", None)
    return digest([type(tokenizer).__name__, rules, tokens, added, special, ids, template], 64)


def _others(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files below the folder that a loader may open besides those with a name of their own in
    the fingerprint. Runs and whatever else is put below a model are none of them: a run that is
    written there would change the model that it is of."""
    known = {"config.json", "adapter_config.json", *_SPEECH_FILES, *_BESIDE}
    for path in below(folder):
        name = path.relative_to(folder).as_posix()
        if path.parent not in (folder, folder / _TEMPLATES):
            continue
        if path.suffix in TEXTS and name not in known and path.is_file():
            yield name, path
