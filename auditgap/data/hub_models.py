"""Whether a model of the Hugging Face hub can be opened here: now, after a download, or not.

    reach("Qwen/Qwen2.5-7B-Instruct")    # Reach(needs="a download of 15.2 GB")
    reach("meta-llama/Llama-Guard-3-8B") # Reach(problem="gated: accept its licence at …")

Reads no weights and downloads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from auditgap.data.hub import PATIENCE

#: What is downloaded of a model.
WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "tokenizer*",
    "*.model",
    "*.txt",
    "*.jinja",
]
#: Second copies of the weights in another layout, and what lies in folders of its own.
UNWANTED = ["consolidated*.safetensors", "*/*"]


@dataclass(frozen=True, slots=True)
class Reach:
    """`problem`: why it cannot be opened here; `needs`: what has to happen first. Both are empty
    for a model that is on the disk."""

    problem: str = ""
    needs: str = ""


def reach(model: str) -> Reach:
    """What stands between this machine and a model of the hub, a repository's name. Asks the hub
    once for a model that is not on the disk, and waits for a few seconds at the most."""
    from huggingface_hub import constants

    return _reach(model, constants.HF_HUB_CACHE, constants.ENDPOINT, constants.HF_HUB_OFFLINE)


@cache  # a list names a model more than once: on its own, and as one of an ensemble
def _reach(model: str, disk: str, hub: str, offline: bool) -> Reach:
    if _on_disk(model, disk):
        return Reach()
    if offline:
        return Reach("not downloaded, and HF_HUB_OFFLINE is set; name a folder, or unset it")
    return _of_the_hub(model, hub)


def _on_disk(model: str, disk: str) -> bool:
    """Whether opening it would find all of its files, without the hub."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            model,
            cache_dir=disk,
            local_files_only=True,
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
        )
    except Exception:  # the library's own errors and the system's have no common base
        return False
    return any(Path(found).glob("*.safetensors"))


def _of_the_hub(model: str, hub: str) -> Reach:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.utils import filter_repo_objects

    api, page = HfApi(endpoint=hub), f"https://huggingface.co/{model}"
    if hub in _SILENT:
        return _UNKNOWN
    try:
        told = api.model_info(model, files_metadata=True, timeout=PATIENCE)
        if told.gated:
            api.auth_check(model)
    except GatedRepoError:
        return Reach(f"gated: accept its licence at {page}, then type: hf auth login")
    except RepositoryNotFoundError:
        return Reach(f"the hub has no such model, or it is private: see {page}")
    except Exception:  # httpx's and the library's own errors have no common base
        _SILENT.add(hub)
        return _UNKNOWN
    sizes = {file.rfilename: file.size or 0 for file in told.siblings or ()}
    wanted = filter_repo_objects(sizes, allow_patterns=WANTED, ignore_patterns=UNWANTED)
    size = sum(sizes[name] for name in wanted)
    return Reach(needs=f"a download of {size / 1e9:,.1f} GB" if size else "a download")


#: Hubs that did not answer: a list of models waits once.
_SILENT: set[str] = set()
_UNKNOWN = Reach("not downloaded; not known whether it can be: the hub is out of reach")
