"""A look at a model's folder before anything opens it.

# Refused: pickles only, or JSON that asks for code from outside
preflight(folder)
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from auditgap.errors import Refused, UsageError
from auditgap.models.bounds import LARGEST_HEADER, LARGEST_TEXT
from auditgap.models.claims import check_claims
from auditgap.models.reading import read_object
from auditgap.models.weights import ADAPTER, is_adapter, weights_files

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
#: Files that are read whole.
TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab", ".bpe")


def preflight(folder: Path) -> None:
    """Refuse a model or adapter folder that could run foreign code, before transformers opens it.

    Raises Refused for pickled weights without safetensors, for files that are no files of this
    folder (links out of it, pipes, devices) and for JSON that names code to run; UsageError for
    broken JSON, for safetensors that lie about themselves and for claims that nothing in the
    folder bears out. Takes bounded time, whatever the folder holds.
    """
    check_files(folder)
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
    check_claims(folder)


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


def check_files(folder: Path) -> None:
    """Every file is a regular one of this folder, of a size that can be read; safetensors are what
    their headers say."""
    roots = [home := folder.resolve()]
    # the hub's cache: files are links to blobs/ beside snapshots/
    if home.parent.name == "snapshots":
        roots.append(home.parents[1] / "blobs")
    for path in below(folder):
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
        elif path.suffix in TEXTS and seen.st_size > LARGEST_TEXT:
            raise UsageError(
                f"{path} has {seen.st_size:,} bytes, and no such file of a model has more than"
                f" {LARGEST_TEXT:,}; download the model again from a source that you trust."
            )


def below(folder: Path) -> list[Path]:
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
        if n > LARGEST_HEADER:
            raise SafetensorError(
                f"a header of {n:,} bytes, where {LARGEST_HEADER:,} hold 100,000 tensors"
            )
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{path} is not a readable safetensors file ({error}); download the model again."
        ) from None
