"""Arrays that outlive a kill: the costly middle of a cell, stored under the hash of what it depends
on.

    # computed once, read back after a kill
    deltas = store.remember("51f0…", lambda: {"delta": pgd(...)})

safetensors with a checksum over names, types, shapes and values; mode 0600, because token ids are
text too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from auditgap.store import files


def remember(path: Path, compute: Callable[[], Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """What `path` holds, or what `compute` gives (arrays or CPU tensors by name), stored before it
    is returned.

    Both ways give equal, writable arrays. A torn file is set aside and computed again. Raises
    DiskError.
    """
    if path.exists():
        arrays = _read(path)
        if arrays is not None:
            return arrays
        files.set_aside(path)
    arrays = {name: np.array(value, order="C") for name, value in compute().items()}
    data = safetensors.numpy.save(arrays, metadata={"sha256": _checksum(arrays)})
    files.write_bytes(path, data, files.PRIVATE)
    return arrays


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    parts = [
        f"{name}:{a.dtype.str}:{a.shape}:{files.sha256(a.tobytes())}"
        for name, a in sorted(arrays.items())
    ]
    return files.sha256("\n".join(parts).encode("utf-8", "surrogatepass"))


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays, or None when the file is torn: it does not parse, or its checksum disagrees."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            arrays = {name: np.array(file.get_tensor(name), order="C") for name in file.keys()}  # noqa: SIM118
            stored = (file.metadata() or {}).get("sha256")
    except (safetensors.SafetensorError, OSError, ValueError):
        return None
    return arrays if stored == _checksum(arrays) else None
