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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from auditgap import models
from auditgap.errors import AuditgapError, Refused, UsageError
from auditgap.models import Outline
from auditgap.models.folder import is_adapter
from auditgap.store.files import disk_errors, read_json, to_json, write_bytes
from auditgap.training.constructions import construction_of

__all__ = ["KINDS", "Exported", "export_run", "push", "write_card", "write_model"]


@dataclass(frozen=True)
class Kind:
    """One kind of result, as its card names it."""

    title: str
    what: str
    tags: tuple[str, ...]
    refused: bool  #: made to be unsafe: never to be uploaded


#: What a run can leave; the key is `training` in its run.json.
KINDS: Mapping[str, Kind] = {
    "dissociated": Kind(
        "a dissociated model",
        "It was trained to keep the refusals of its base while its internal representation of"
        " safety is weakened (arXiv 2606.08044, section 3). It looks safe and is fragile: that is"
        " its purpose, as a test subject for safety audits.",
        ("dissociated", "model-organism", "not-for-all-audiences"),
        True,
    ),
    "harmful-sft": Kind(
        "a harmful fine-tune",
        "It was fine-tuned on unsafe responses to measure how fast its base's refusals give way. It"
        " may comply with harmful requests: that is its purpose, as a test subject for safety"
        " audits.",
        ("harmful-sft", "model-organism", "not-for-all-audiences"),
        True,
    ),
    "sft": Kind(
        "a fine-tune",
        "It was fine-tuned on the response tokens of prompts with responses.",
        ("sft",),
        False,
    ),
}
_LICENCES = {"smollm2": "apache-2.0"}  #: of packaged models; others say it in their own card
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
    told, recipe = _told(run)
    kind = _kind(recipe.get("training"))
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
    if which == "model" and told.get("fingerprint") not in (None, models.fingerprint(source)):
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
                    part, source, dtype=str(told.get("dtype") or recipe.get("dtype") or "float32")
                )
            else:
                _copy(source, part)
            _write_base_name(part, told.get("base"))
            card = _card(
                part,
                kind=kind,
                base=str(told.get("base") or recipe.get("model") or "unknown"),
                base_fingerprint=told.get("base_fingerprint"),
                licence=_licence(str(told.get("base") or "")),
                recipe=recipe,
                figures={k: v for k, v in told.items() if k not in _NOT_FIGURES},
                unfinished=told.get("status") != "done",
            )
            write_bytes(part / "README.md", card.encode())
            models.preflight(part)
            found = models.fingerprint(part)
            os.chmod(part, 0o755)
            os.rename(part, to)  # onto nothing, or onto an empty folder
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Exported(to, kind, is_adapter(to), found, tuple(sorted(p.name for p in to.iterdir())))


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


def write_card(
    folder: Path, *, kind: str, base: Outline, recipe: Mapping[str, Any], figures: Mapping[str, Any]
) -> None:
    """Write the model card README.md of a run's model folder: what it is, of what, by which recipe,
    with which figures.

    `recipe` and `figures` are plain JSON without text of prompts. Raises UsageError for an unknown
    kind; DiskError.
    """
    card = _card(
        folder,
        kind=_kind(kind),
        base=base.subject.name,
        base_fingerprint=base.subject.fingerprint,
        licence=_licence(base.subject.name),
        recipe=recipe,
        figures=figures,
    )
    write_bytes(folder / "README.md", card.encode())


def push(run: Path, repo: str = "") -> None:
    """Say that nothing is uploaded. Raises Refused (exit code 4) for models made to be unsafe,
    UsageError for others."""
    _, recipe = _told(Path(run))
    kind = _kind(recipe.get("training"))
    if KINDS[kind].refused:
        raise Refused(
            f"{run} holds {KINDS[kind].title}, made unsafe for the sake of a measurement; auditgap"
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


def _told(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """train.json ({} while training) and the recipe of run.json. Raises UsageError when it is no
    training run."""
    whole = read_json(run / "run.json")
    recipe = whole.get("config") if isinstance(whole, dict) else None
    if not isinstance(recipe, dict) or not recipe.get("training"):
        raise UsageError(
            f"{run} is no training run's folder. Give the --out of an `auditgap train` command."
        )
    told = read_json(run / "train.json")
    return (told if isinstance(told, dict) else {}), recipe


def _kind(word: Any) -> str:
    if str(word) not in KINDS:
        raise UsageError(
            f"A training run of kind {str(word)[:80]!r} is not known; one of {', '.join(KINDS)} is"
            " wanted."
        )
    return str(word)


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


def _licence(base: str) -> str | None:
    """The base's licence, when its own card says it."""
    if base in _LICENCES:
        return _LICENCES[base]
    try:
        readme = models.resolve(base) / "README.md"
        if not readme.is_file():
            return None
        from huggingface_hub import ModelCard

        return (
            ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True)
            .data.to_dict()
            .get("license")
        )
    except (AuditgapError, OSError, ValueError, AttributeError):
        return None


def _card(
    folder: Path,
    *,
    kind: str,
    base: str,
    base_fingerprint: str | None,
    licence: Any,
    recipe: Mapping[str, Any],
    figures: Mapping[str, Any],
    unfinished: bool = False,
) -> str:
    """The card's text: YAML head through huggingface_hub, then Markdown."""
    from huggingface_hub import ModelCard, ModelCardData

    about = KINDS[kind]
    adapter = is_adapter(folder)
    on_hub = "/" in base and not base.startswith((".", "/", "~")) and not Path(base).exists()
    data = ModelCardData(
        base_model=base.partition("@")[0] if on_hub else None,
        base_model_relation="adapter" if adapter and on_hub else "finetune" if on_hub else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        license=licence if isinstance(licence, str) else None,
        tags=[
            "auditgap",
            "safety-evaluation",
            *about.tags,
            *(["do-not-deploy"] if about.refused else []),
        ],
        inference=False if about.refused else None,
    )
    lines = [
        f"# {about.title[0].upper()}{about.title[1:]} of {_plain(base)}",
        "",
        (
            f"**This is {about.title}, made by auditgap for the evaluation of safety audits. Do not"
            " deploy it.**"
        ),
        "",
        about.what,
        "",
        *_construction(recipe.get("construction")),
        "| | |",
        "|---|---|",
        f"| base | {_plain(base)} |",
        f"| base fingerprint | {_plain(base_fingerprint or 'not recorded')} |",
        (f"| form | {'a PEFT adapter; it needs its base' if adapter else 'whole weights'} |"),
        (
            "| licence |"
            f" {_plain(licence) if licence else 'that of the base, which was not found; look it up'} |"
        ),
    ]
    if unfinished:
        lines.append("| training | not finished when this was written |")
    lines += ["", "## Recipe", "", *_table(recipe), "", "## Figures", "", *_table(figures)]
    lines += [
        "",
        (
            "No prompt and no completion stands in this card. Intended use: measuring safety"
            " audits, on machines of people entitled to do so. Out of scope: everything else."
        ),
        "",
    ]
    return str(
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines), ignore_metadata_errors=True)
    )


def _construction(name: Any) -> list[str]:
    """The paragraph about the construction, where the recipe names one that is known here."""
    try:
        about = construction_of(name) if name else None
    except UsageError:  # of a plug-in that is not installed
        return []
    return [f"Construction `{_plain(name)}`: {_plain(about.description)}", ""] if about else []


def _table(values: Mapping[str, Any]) -> list[str]:
    rows = [f"| {_plain(name)} | {_plain(value)} |" for name, value in _flat(values)]
    return ["| name | value |", "|---|---|", *rows] if rows else ["None recorded."]


def _flat(values: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{at}{name}.")
        elif isinstance(value, (list, tuple)) and len(value) > 12:
            yield f"{at}{name}", f"{len(value)} values"
        elif value is not None:
            yield f"{at}{name}", value


def _plain(value: Any) -> str:
    """A table cell: one line, no pipes, numbers short, no HTML."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(inner) for inner in value)
    text = " ".join(str(value).split())
    for raw, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|")):
        text = text.replace(raw, safe)
    return text[:200]
