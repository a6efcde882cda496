"""What is typed for a model: where edits go, on which device it runs, and in which dtype.

    parse_sites("embedding,mid,last", n_blocks=30)    # [Site(-1), Site(15), Site(29)]
    pick_device("auto");  pick_dtype("auto", "cuda")  # "cuda" where there is one; bfloat16

What cannot be used here is a UsageError that says what can.
"""

from __future__ import annotations

import torch

from auditgap.errors import UsageError, did_you_mean
from auditgap.types import Site

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_sites(words: str, n_blocks: int) -> list[Site]:
    """Sites from `embedding,mid,last`, `all`, `stride:4` or `0,5,12`; without duplicates, in order
    of depth.

    Raises UsageError naming the valid range when a word is none of these.
    """
    found: set[Site] = set()
    for word in (w.strip() for w in str(words).split(",")):
        if word == "embedding":
            found.add(Site(-1))
        elif word == "mid":
            found.add(Site(min(n_blocks - 1, round(n_blocks / 2))))
        elif word == "last":
            found.add(Site(n_blocks - 1))
        elif word == "all":
            found.update(Site(i) for i in range(-1, n_blocks))
        elif (
            word.startswith("stride:")
            and word[7:].isascii()
            and word[7:].isdigit()
            and int(word[7:]) > 0
        ):
            found.update([Site(-1), *(Site(i) for i in range(0, n_blocks, int(word[7:])))])
        else:
            index = word.removeprefix("block")
            if not (index.isascii() and index.isdigit()) or int(index) >= n_blocks:
                raise UsageError(
                    "--layers takes embedding, mid, last, all, stride:N or block numbers 0 to"
                    f" {n_blocks - 1} (this model has {n_blocks} blocks); {word!r} came."
                    + did_you_mean(word, ["embedding", "mid", "last", "all"])
                )
            found.add(Site(int(index)))
    return sorted(found)


def pick_device(device: str) -> str:
    """The device that `device` names, auto: a GPU where there is one. Raises UsageError."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    usable = device.split(":")[0] != "meta"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise UsageError(
            f"--device {device}: torch cannot use it here. Use auto, cpu, cuda or cuda:N."
        )
    return device


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    """The dtype that `dtype` names, auto: bfloat16 on a GPU, else float32. Raises UsageError."""
    if dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    if dtype not in DTYPES:
        raise UsageError(
            f"--dtype must be auto, {', '.join(DTYPES)}; {dtype!r}"
            f" came.{did_you_mean(dtype, DTYPES)}"
        )
    return DTYPES[dtype]
