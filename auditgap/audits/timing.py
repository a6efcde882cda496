"""What a plan takes on a machine, as every audit estimates it: its work, and at the least what comes on
top, models to load and answers to judge.

    time = Time(starting(plan.outlines), speaking(outline, 200, 65.0, 128, "float32", "cpu"), 3.0)
    time.document()          # {"seconds": 190.0, "starting": 6.0, "judging": 3.0}

A search and a forward over a prompt are bound by matrix products, so their time follows from their
FLOPs. Decoding on a GPU is bound by steps: each reads all weights and the caches of its rows, and starts
a few dozen kernels a block, however few rows there are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from auditgap import models
from auditgap.engines.batching import SPEAKING_IN_MEMORY
from auditgap.judges import Judge
from auditgap.models import room
from auditgap.sweep.progress import MEASURED_HERE
from auditgap.types import Document

#: Of a square product's rate, what the passes of a model reach.
REACHED = 0.5
#: Kernels that a block starts for a new token.
_KERNELS = 47


#: Seconds in which a process imports its libraries, and bytes a second of a fast disk.
_IMPORTS, _DISK = 5.0, 2e9
#: Tokens of the shortest question to a judge that is a language model: its template, mostly.
_JUDGED_TOKENS = 100


@dataclass(frozen=True)
class Time:
    """Seconds: `starting` and `judging` at the least, `work` a guess of the right size."""

    starting: float
    work: float
    judging: float = 0.0

    def document(self) -> Document:
        """As it stands in an estimate."""
        total = self.starting + self.work + self.judging
        return dict(zip(MEASURED_HERE, (total, self.starting, self.judging), strict=True))


def starting(outlines: Iterable[models.Outline], times: int = 1) -> float:
    """Seconds until the models' weights are read, each so many times."""
    return _IMPORTS + times * sum(_size(o.folder) for o in outlines) / _DISK


def judging(judge: Judge, answers: int, device: str) -> float:
    """Seconds that the judge takes for so many answers: to read its models' weights, and to read
    each answer once. Nothing for rules, for the built-in judge, and for what an endpoint serves."""
    return sum(
        size / _DISK + answers * _JUDGED_TOKENS * 2 * (size / 4) / _rate(torch.float32, device)
        for one in getattr(judge, "judges", (judge,))
        if (size := _weights(one))
    )


def speaking(
    outline: models.Outline, said: int, tokens: float, new: int, dtype: str, device: str
) -> float:
    """Seconds for so many answers of at most `new` tokens to prompts of `tokens`."""
    kind = models.pick_dtype(dtype, device)
    each = 2.0 * (outline.n_block_params + outline.n_head_params)
    if device.startswith("cuda") and torch.cuda.is_available():
        machine = Machine.here(kind, device)
        read = said * tokens * each / (REACHED * machine.flops)
        return read + decoding(outline, said, tokens, new, machine, kind.itemsize)
    return said * (tokens + new) * each / _rate(kind, device)


def reading(outline: models.Outline, tokens: float, dtype: str, device: str) -> float:
    """Seconds for a forward over so many tokens in all."""
    return 2.0 * outline.n_block_params * tokens / _rate(models.pick_dtype(dtype, device), device)


def training(outline: models.Outline, tokens: float, dtype: str, device: str) -> float:
    """Seconds for a forward and a backward over so many tokens in all, under gradient
    checkpointing at most."""
    return 4 * reading(outline, tokens, dtype, device)


def _rate(dtype: torch.dtype, device: str) -> float:
    return REACHED * matmul_rate(dtype, device)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _weights(judge: Judge) -> int:
    """Bytes of the weights that a judge opens on this machine."""
    if folder := getattr(judge, "folder", None):
        return _size(folder)
    serving = getattr(judge, "serving", None)
    if serving is None or serving.engine == "openai":
        return 0
    return _size(models.resolve(getattr(judge, "model", "")))


@dataclass(frozen=True)
class Machine:
    """A device, or how much of one a worker has."""

    flops: float  #: FLOP/s of a large matrix product
    bandwidth: float  #: bytes/s of its memory
    kernel: float  #: seconds from the start of one small kernel to that of the next
    memory: float  #: bytes

    @classmethod
    @cache
    def here(cls, dtype: torch.dtype, device: str) -> Machine:
        """This machine's accelerator, measured in a second."""
        memory = room.total_memory(device)
        large = torch.empty(2**28, device=device)  # 1 GB
        copied = 2 * large.numel() * large.element_size()
        small = torch.zeros(1, device=device)

        def many() -> None:
            for _ in range(500):
                small.add_(1)

        return cls(
            matmul_rate(dtype, device),
            copied / _seconds(large.clone, device),
            _seconds(many, device) / 500,
            memory,
        )


#: In bf16, of what benchmarks of one saw; a kernel's start is a guess at transformers' pace.
H200 = Machine(flops=790e12, bandwidth=4.3e12, kernel=15e-6, memory=139 * 2**30)


def decoding(
    outline: models.Outline, said: int, tokens: float, new: int, machine: Machine, itemsize: int
) -> float:
    """Seconds in which so many texts of `new` tokens are written: steps × what one takes."""
    weights = itemsize * (outline.n_block_params + outline.n_head_params)
    # at most: heads that share keys and values have fewer
    row = 2.0 * outline.n_blocks * outline.width * itemsize * (tokens + new)
    in_memory = 0.8 * (machine.memory - weights) / row
    rows = max(1, int(min(in_memory, SPEAKING_IN_MEMORY / (tokens + new), said)))
    steps = math.ceil(said / rows) * new
    started = outline.n_blocks * _KERNELS * machine.kernel
    return steps * max(started, (weights + rows * row) / machine.bandwidth)


@cache
def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """This machine's FLOP/s in a square matrix product, measured once (a fifth of a second on a
    CPU).

    On a CPU the matrix grows until a product takes 20 ms: without instructions for bfloat16 a
    large one takes eight seconds.
    """
    size, largest = (192, 1536) if device == "cpu" else (8192, 8192)
    while (seconds := _matmul_time(size, dtype, device)) < 0.02 and size < largest:
        size *= 2
    return 2 * size**3 / seconds


def _matmul_time(size: int, dtype: torch.dtype, device: str) -> float:
    a = torch.randn(size, size, device=device).to(dtype)
    return _seconds(lambda: torch.mm(a, a), device)


def _seconds(run: Callable[[], object], device: str) -> float:
    """The median of five runs, after one that does not count."""
    run()
    times = []
    for _ in range(5):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[2]
