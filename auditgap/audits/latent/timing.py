"""What a plan will take on a machine: seconds by kind of work, memory and disk.

estimate(plan, "cuda:0", options)               # on this machine, whose rates are measured
sum(phases(plan, H200).values())                # on another, by what is known of it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from auditgap import models
from auditgap.audits.latent.config import LatentConfig, RunOptions
from auditgap.audits.latent.plan import DISTANCE, LatentPlan, flops_by_phase
from auditgap.audits.planning import mean_tokens
from auditgap.audits.timing import REACHED, Machine, decoding, matmul_rate
from auditgap.interventions.descent import bytes_a_value
from auditgap.types import LONGER, Cell


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
    n, rate = len(plan.prompts.prompts), REACHED * machine.flops
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
    deltas = 2 * n * len(config.eps) * tokens * largest.width * bytes_a_value(config.pgd)
    rows = sum(n * (config.draws if c.attack.startswith("random") else 1) for c in plan.cells)
    weights = largest.n_params * dtype.itemsize / parts[largest]
    if device.startswith("cuda") and torch.cuda.is_available():
        seconds = sum(phases(plan, Machine.here(dtype, device), dtype.itemsize).values())
    else:
        seconds = flops / (REACHED * matmul_rate(dtype, device))
    # under vLLM all sites' edits are searched before the first is spoken under
    searched = len({c.site for c in plan.cells}) if plan.joined else 1
    return Estimate(
        flops,
        seconds,
        weights * 1.6 + deltas + 1e9,
        deltas * searched + rows * 2_000,
    )
