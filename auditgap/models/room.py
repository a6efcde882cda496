"""What memory a device has left.

free_memory("cuda:0")    # bytes that can still be allocated there
has_room("cpu")          # whether what is loaded may stay, beside what runs next
"""

from __future__ import annotations

import psutil
import torch

#: Of a device: with less than this share free, what could be opened again gives its memory back.
SPARE = 1 / 3


_share = 1.0


def keep_to(share: float, device: str) -> None:
    """Take no more than this share of a GPU, where several processes have one."""
    global _share
    if device.startswith("cuda"):
        _share = share
        torch.cuda.set_per_process_memory_fraction(share, device)


def free_memory(device: str) -> float:
    """Bytes free on the device; what torch keeps for its next tensors counts as free."""
    if not device.startswith("cuda"):
        return float(psutil.virtual_memory().available)
    held = torch.cuda.memory_allocated(device)
    kept = torch.cuda.memory_reserved(device) - held
    free, total = torch.cuda.mem_get_info(device)
    return float(min(free + kept, max(0.0, _share * total - held)))


def total_memory(device: str) -> float:
    """Bytes that the device has in all."""
    if not device.startswith("cuda"):
        return float(psutil.virtual_memory().total)
    return float(_share * torch.cuda.mem_get_info(device)[1])


def has_room(device: str) -> bool:
    """Whether a third of the device is free still."""
    return free_memory(device) >= SPARE * total_memory(device)
