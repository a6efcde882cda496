"""A trained model as a folder that others can open: transformers, PEFT and vLLM, with a card that
says what the model is.

    # the run's model/: whole, or an adapter
    export_run(Path("runs/twin"), Path("out/twin"))
    # an adapter merged into its base
    export_run(Path("runs/harmful"), Path("out/harmful"), merge=True)

Weights are safetensors. The folder holds the tokenizer, its chat template and the generation config
as well, and appears under its name whole or not at all. Nothing is ever uploaded: auditgap has no
code for it, and `push` says why.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from auditgap import models
from auditgap.errors import AuditgapError, Refused, UsageError
from auditgap.models.weights import is_adapter
from auditgap.store.files import disk_errors, read_document, read_json, to_json, write_bytes
from auditgap.training.card import Card, kind_of
from auditgap.types import Document

#: What a model folder may hold; anything else (optimizer states, logs) stays in the run.
_TAKEN = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "tokenizer*",
    "*.model",
    "merges.txt",
    "vocab.txt",
)


@dataclass(frozen=True)
class Exported:
    """Where the model lies now and what it is. `files` are names in `path`."""

    path: Path
    kind: str
    adapter: bool
    fingerprint: str
    files: tuple[str, ...]


def export_run(run: Path, to: Path, *, merge: bool = False, which: str = "model") -> Exported:
    """Copy a training run's model to the new folder `to`; with `merge` an adapter is merged into
    its base first.

    `which` names the folder of the run: `model` is what the run ended with, `best`, `last` or
    `step00000012` are there when the run kept them. Raises UsageError: no training run, no such
    folder, a target that holds something, a model that changed since it was trained, `merge` of
    what is no adapter; Refused as `models.preflight`; DiskError.
    """
    run, to = Path(run), Path(to)
    summary, recipe = _record(run)
    card = _card(summary, recipe)
    source = _source(run, which)
    adapter = is_adapter(source)
    if merge and not adapter:
        raise UsageError(
            f"{source} is a whole model already, so there is nothing to merge. Leave --merge away."
        )
    if to.is_symlink() or (to.exists() and (not to.is_dir() or any(to.iterdir()))):
        raise UsageError(
            f"{to} is there already and not empty. Export into a new folder, for example"
            f" {to}-{which}."
        )
    models.preflight(source)
    if which == "model" and summary.get("fingerprint") not in (None, models.fingerprint(source)):
        raise UsageError(
            f"{source} is not what the run wrote (its fingerprint is not train.json's). Restore it,"
            " or train again."
        )
    with disk_errors(to):
        to.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{to.name}-", suffix=".part", dir=to.parent))
    try:
        with disk_errors(to, _size(source)):
            if merge:
                _write_merged(
                    part,
                    source,
                    dtype=str(summary.get("dtype") or recipe.get("dtype") or "float32"),
                )
            else:
                _copy(source, part)
            _write_base_name(part, summary.get("base"))
            write_bytes(part / "README.md", card.text(part).encode())
            models.preflight(part)
            found = models.fingerprint(part)
            os.chmod(part, 0o755)
            os.rename(part, to)  # onto nothing, or onto an empty folder
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Exported(
        to, card.kind, is_adapter(to), found, tuple(sorted(p.name for p in to.iterdir()))
    )


def write_model(
    folder: Path,
    model: Any,
    tokenizer: Any,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
    shard_size: str = "5GB",
) -> None:
    """Write a causal LM (or PeftModel: its adapter) with its tokenizer as sharded safetensors into
    an empty folder.

    `state_dict` holds weights gathered elsewhere, else the model's own; `dtype` casts what is
    floating. A weight that is tied to another is written once. Rank 0 alone calls it. Raises
    AuditgapError when a weight is empty, as a partitioned one is.
    """
    state = dict(model.state_dict() if state_dict is None else state_dict)
    if not hasattr(model, "peft_config"):
        for name, other in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            # gathered ones are equal copies that no longer share memory
            if name in state and other in state:
                del state[name]
    if empty := [name for name, value in state.items() if value.numel() == 0]:
        raise AuditgapError(
            f"{empty[0]} is empty: ZeRO-3 weights must be gathered before they are written."
        )
    if dtype is not None:
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    # no training here touches the vocabulary; left to find out, peft asks the hub about the base's
    # name
    own = (
        {"save_embedding_layers": False}
        if hasattr(model, "peft_config")
        else {"max_shard_size": shard_size}
    )
    _make_savable(model)
    model.save_pretrained(folder, state_dict=state, safe_serialization=True, **own)
    if dtype is not None and (folder / "config.json").is_file():
        config = {
            **(read_json(folder / "config.json") or {}),
            "dtype": str(dtype).removeprefix("torch."),
        }
        write_bytes(
            folder / "config.json", json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"
        )
    tokenizer.save_pretrained(folder)


def _make_savable(model: Any) -> None:
    """Have the generation config say what its sampling settings mean, which is to sample: without
    it transformers reads such a config but does not write it. What it does not write even then
    keeps its token ids alone."""
    generation = getattr(model, "generation_config", None)
    if generation is None or _is_writable(generation):
        return
    generation.do_sample = True
    if not _is_writable(generation):
        ids = {k: v for k, v in generation.to_dict().items() if k.endswith("_token_id")}
        model.generation_config = GenerationConfig(**ids)


def _is_writable(generation: GenerationConfig) -> bool:
    try:
        generation.validate(strict=True)
    except ValueError:
        return False
    return True


def push(run: Path, repo: str = "") -> None:
    """Say that nothing is uploaded. Raises Refused (exit code 4) for models made to be unsafe,
    UsageError for others."""
    _, recipe = _record(Path(run))
    kind = kind_of(recipe.get("training"))
    if kind.refused:
        raise Refused(
            f"{run} holds {kind.title}, made unsafe for the sake of a measurement; auditgap"
            " does not push it to a hub. Share the config instead: whoever is entitled to the base"
            " can make it again."
        )
    target = repo or "YOUR/REPO"
    raise UsageError(
        f"auditgap uploads nothing. Export with `auditgap export {run} FOLDER`, look at it,"
        f" then `hf upload {target} FOLDER`."
    )


# ------------------------------------------------------------------ inside

#: Of train.json, what the card says elsewhere.
_NOT_FIGURES = {"status", "kind", "base", "base_fingerprint", "fingerprint"}


def _record(run: Path) -> tuple[Document, Document]:
    """train.json ({} while training) and the recipe of run.json. Raises UsageError when it is no
    training run."""
    whole = read_document(run / "run.json")
    recipe = whole.get("config") if isinstance(whole, dict) else None
    if not isinstance(recipe, dict) or not recipe.get("training"):
        raise UsageError(
            f"{run} is no training run's folder. Give the --out of an `auditgap train` command."
        )
    summary = read_document(run / "train.json")
    return (summary if isinstance(summary, dict) else {}), recipe


def _card(summary: Document, recipe: Document) -> Card:
    return Card(
        kind=str(recipe.get("training")),
        base=str(summary.get("base") or recipe.get("model") or "unknown"),
        base_fingerprint=summary.get("base_fingerprint"),
        recipe=recipe,
        figures={k: v for k, v in summary.items() if k not in _NOT_FIGURES},
        unfinished=summary.get("status") != "done",
    )


def _source(run: Path, which: str) -> Path:
    there = sorted(
        p.name
        for p in run.iterdir()
        if (p / "config.json").is_file() or (p / "adapter_config.json").is_file()
    )
    if which not in there:
        have = (
            f"It has: {', '.join(there)}."
            if there
            else "It has none yet; run its training command until it is done."
        )
        raise UsageError(f"{run} has no model {which!r}. {have}")
    return run / which


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir() if p.is_file())


def _copy(source: Path, target: Path) -> None:
    taken = {path for pattern in _TAKEN for path in source.glob(pattern) if path.is_file()}
    for path in sorted(taken):
        shutil.copyfile(path, target / path.name)


def _write_merged(folder: Path, adapter: Path, *, dtype: str) -> None:
    """The base with the adapter's weights in it, merged in fp32 and rounded once to the run's
    dtype."""
    loaded = models.load(str(adapter), dtype="float32", device="cpu")
    wanted = models.DTYPES.get(dtype, torch.float32)
    write_model(folder, loaded.model, loaded.tokenizer, dtype=wanted)


def _write_base_name(folder: Path, base: Any) -> None:
    """An adapter names its base as the user typed it (a folder by its whole path, a hub's revision
    apart), not a cache."""
    path = folder / "adapter_config.json"
    if not path.is_file() or not base:
        return
    config = read_json(path) or {}
    if Path(base).expanduser().is_dir():
        config["base_model_name_or_path"] = str(Path(base).expanduser().absolute())
    else:
        config["base_model_name_or_path"], _, revision = str(base).partition("@")
        config["revision"] = revision or None
    write_bytes(path, to_json(config))
