"""Tensors on disk that somebody reads back: every file carries the checksum of what it holds.

keep(Path("reference/door-9c1e.safetensors"), {"vector": v})
is_whole(Path("reference/door-9c1e.safetensors"))       # False: absent, torn, or a byte has changed
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from auditgap.store import files


def keep(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors, mode 0600: what a model made of a text says what it read. Raises
    DiskError."""
    files.write_bytes(path, sealed(tensors), files.PRIVATE)


def sealed(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The bytes of such a file."""
    return safetensors.torch.save(dict(tensors), {"sha256": checksum(tensors)})


def is_whole(path: Path) -> bool:
    """Whether the file is there and holds what `keep` wrote."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            stored = (file.metadata() or {}).get("sha256")
    except (safetensors.SafetensorError, OSError, ValueError):
        return False
    return stored == checksum(found)


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values of tensors on the CPU."""
    parts = [
        f"{name}:{t.dtype}:{tuple(t.shape)}:{_of_values(t)}" for name, t in sorted(tensors.items())
    ]
    return files.sha256("\n".join(parts).encode())


def _of_values(tensor: torch.Tensor) -> str:
    if not tensor.numel():
        return ""
    raw = tensor.detach().contiguous().flatten().view(torch.uint8)
    return files.sha256(raw.numpy().data)  # hashed where it lies: no copy
