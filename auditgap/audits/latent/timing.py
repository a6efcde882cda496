"""What a plan will take on a machine: seconds by kind of work, memory and disk.

    estimate(plan, "cuda:0", options)               # on this machine, whose rates are measured
    sum(phases(plan, H200).values())                # on another, by what is known of it

A search and a forward over a prompt are bound by matrix products, so their time follows from their
FLOPs. Decoding is bound by steps: each reads all weights and the caches of its rows, and starts a few
dozen kernels a block, however few rows there are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from auditgap import models
from auditgap.audits.latent.config import LatentConfig, RunOptions
from auditgap.audits.latent.plan import DISTANCE, LatentPlan, flops_by_phase
from auditgap.audits.planning import mean_tokens
from auditgap.engines.batching import SPEAKING_IN_MEMORY
from auditgap.models import room
from auditgap.types import LONGER, Cell

#: Of a square product's rate, what the passes of a model reach.
_REACHED = 0.5
#: Kernels that a block starts for a new token.
_KERNELS = 47


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


@dataclass(frozen=True)
class Estimate:
    """What the run will take. `seconds` comes from this machine's measured rates, so it is a guess of
    the right size."""

    flops: float
    seconds: float
    memory_bytes: float
    disk_bytes: float


def phases(plan: LatentPlan, machine: Machine, itemsize: int = 2) -> dict[str, float]:
    """Seconds of `search`, `forward` (prompts, and the NLL of what was said) and `decoding`, one
    device doing all of it."""
    config, found = plan.config, {"search": 0.0, "forward": 0.0, "decoding": 0.0}
    tokens = {o.subject.name: mean_tokens(o, plan.prompts.prompts) for o in plan.outlines}
    outlines = {o.subject.name: o for o in plan.outlines}
    n, rate = len(plan.prompts.prompts), _REACHED * machine.flops
    for group in (*plan.clean, *plan.groups):
        outline = outlines[name := group.cells[0].subject.name]
        parts = flops_by_phase(config, outline, group.cells, n, tokens[name])
        said = completions(config, group.cells, n)
        answers = (
            2.0 * said * config.max_new_tokens * (outline.n_block_params + outline.n_head_params)
        )
        found["search"] += sum(v for key, v in parts.items() if key != "speak") / rate
        found["forward"] += max(0.0, parts["speak"] - answers) / rate
        found["decoding"] += decoding(
            outline, said, tokens[name], config.max_new_tokens, machine, itemsize
        )
    return found


def completions(config: LatentConfig, cells: Sequence[Cell], n: int) -> int:
    """Texts that a group's cells need of n prompts; those that a search asks for on its way not
    counted."""
    draws = (
        config.draws if cell.attack.startswith("random") else 1
        for cell in cells
        if cell.attack not in (DISTANCE, LONGER)
    )
    return n * sum(draws)


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


def estimate(plan: LatentPlan, device: str, options: RunOptions | None = None) -> Estimate:
    """Time, memory and disk of the whole plan on this machine; memory of a device, where `options`
    shard a model over several."""
    config = plan.config
    dtype = models.pick_dtype(config.dtype, device)
    flops = sum(g.work for g in (*plan.clean, *plan.groups))
    parts = {
        o: 1 if options is None or device == "cpu" else options.shard_of(o.chat.name).n
        for o in plan.outlines
    }
    largest = max(plan.outlines, key=lambda o: o.n_params / parts[o])
    tokens = mean_tokens(largest, plan.prompts.prompts)
    n = len(plan.prompts.prompts)
    deltas = 2 * n * len(config.eps) * tokens * largest.width * _bytes_a_value(config)
    rows = sum(n * (config.draws if c.attack.startswith("random") else 1) for c in plan.cells)
    weights = largest.n_params * dtype.itemsize / parts[largest]
    if device.startswith("cuda") and torch.cuda.is_available():
        seconds = sum(phases(plan, Machine.here(dtype, device), dtype.itemsize).values())
    else:
        seconds = flops / (_REACHED * matmul_rate(dtype, device))
    # under vLLM all sites' edits are searched before the first is spoken under
    searched = len({c.site for c in plan.cells}) if plan.joined else 1
    return Estimate(
        flops,
        seconds,
        weights * 1.6 + deltas + 1e9,
        deltas * searched + rows * 2_000,
    )


def _bytes_a_value(config: LatentConfig) -> float:
    """Of an edit that is kept: a byte and the values that it tells apart, where a search from zero
    makes few (`interventions.coded`)."""
    is_few = config.restarts == 1 and (config.schedule == "constant" or config.steps <= 12)
    return 1.1 if is_few else 4.0


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
