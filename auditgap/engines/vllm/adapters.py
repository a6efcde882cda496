"""Which PEFT adapters vLLM computes as peft does, and what of a model they may change.

    # ["down_proj", "gate_proj", …]: what the engine is told to make ready
    linear_layers(folder)
    check(adapter, base=folder)       # its rank; or a sentence on why vLLM cannot take it

vLLM leaves out silently what it has no place for, so everything that an adapter holds is looked at
first.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auditgap.errors import UsageError
from auditgap.models.adapters import PLAIN_BEGINNINGS
from auditgap.models.reading import read_object
from auditgap.models.weights import ADAPTER, weights_files
from auditgap.types import digest

#: Ranks that vLLM has kernels for.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
#: Settings of an adapter that vLLM would leave out.
_FOREIGN = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "lora_bias",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
_IN_A_BLOCK = re.compile(
    r"\.(layers|h)\.\d+\.(.+\.)?(?P<layer>(?!lora_[AB]\b)\w+)(\.lora_[AB])?\.weight$"
)


def linear_layers(base: Path) -> list[str]:
    """Last names of the linear layers in a model's blocks, from its safetensors' headers.

    Adapters may change these alone: with an adapted output projection vLLM's CPU build cannot score
    prompts, and gathers a vocabulary times rank of numbers for every token.
    """
    found = (
        _IN_A_BLOCK.search(f".{key}")
        for path in weights_files(base)
        for key, n in _shapes(path)
        if n == 2
    )
    return sorted({match["layer"] for match in found if match})


def kernel_rank(rank: int) -> int:
    """The least rank that vLLM has kernels for and that holds `rank`. Raises UsageError."""
    for known in RANKS:
        if rank <= known:
            return known
    raise UsageError(f"max_lora_rank lies in 1…{RANKS[-1]}; {rank} came.")


def check(adapter: Path, *, base: Path) -> int:
    """The adapter's rank. Raises UsageError when it is no plain LoRA of the base's linear
    layers."""
    config, known = _config(adapter), linear_layers(base)
    rank, kind = config.get("r"), config.get("peft_type")
    foreign = [key for key in _FOREIGN if config.get(key)]
    if config.get("bias", "none") != "none":
        foreign.append("bias")
    if (beginning := config.get("init_lora_weights", True)) not in PLAIN_BEGINNINGS:
        foreign.append(f"init_lora_weights {beginning!r}"[:80])
    for key, _ in _shapes(adapter / ADAPTER):
        match = _IN_A_BLOCK.search(key)
        if not match or match["layer"] not in known:
            foreign.append(key[:80])
            break
    if kind != "LORA" or not isinstance(rank, int) or not 1 <= rank <= RANKS[-1]:
        foreign.append(f"{kind} of rank {rank}")
    if foreign or not isinstance(rank, int):
        raise UsageError(
            "vLLM takes plain LoRA adapters of the blocks' linear layers, of rank 1 to"
            f" {RANKS[-1]}; {adapter.name} has {', '.join(foreign)}. Merge it into its base, or use"
            " --engine hf."
        )
    return rank


def fingerprint(adapter: Path) -> str:
    """Of what an adapter adds: its settings, less where its base stood, and its weights' bytes."""
    settings = {
        k: v
        for k, v in _config(adapter).items()
        if k not in ("base_model_name_or_path", "revision")
    }
    with (adapter / ADAPTER).open("rb") as file:
        return digest([settings, hashlib.file_digest(file, "sha256").hexdigest()])


def _config(adapter: Path) -> Mapping[str, Any]:
    return read_object(adapter / "adapter_config.json")


def _shapes(path: Path) -> list[tuple[str, int]]:
    """Each tensor's name and number of dimensions, without reading one. Raises UsageError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return [(key, len(file.get_slice(key).get_shape())) for key in file.keys()]  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{path} is not a readable safetensors file ({error}); save the adapter again."
        ) from None
