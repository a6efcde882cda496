"""Started by test_engine.py as ranks: one bf16 step of eight micro-batches under DeepSpeed at every
ZeRO stage that has one; prints how far its gradient is from the same gradients added up in fp32.

    python tests/training/accumulate.py MODEL
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from auditgap import models
from auditgap.models import LoadedModel
from auditgap.training import ranks
from auditgap.training.config import SFTConfig, TrainOptions
from auditgap.training.ds_config import filled
from auditgap.training.engine import DeepSpeedEngine
from auditgap.training.sft import SFTLoss

MICRO_BATCHES, ROWS, N_TOKENS = 8, 2, 24


def batches() -> Iterator[dict[str, Tensor]]:
    drawn = torch.Generator().manual_seed(1)
    for _ in range(MICRO_BATCHES):
        ids = torch.randint(5, 60, (ROWS, N_TOKENS), generator=drawn)
        mask = torch.ones_like(ids)
        response = mask.bool() & (torch.arange(N_TOKENS) >= 6)
        yield {"input_ids": ids, "attention_mask": mask, "response_mask": response}


def build(model: str) -> tuple[SFTLoss, LoadedModel]:
    loaded = models.load(model, dtype="bfloat16")
    return SFTLoss(loaded.model.requires_grad_(True)), loaded


def plain(model: str) -> dict[str, Tensor]:
    """Each gradient as autograd gives it, in bf16, added up in fp32."""
    module, _ = build(model)
    module.train()
    summed: dict[str, Tensor] = {}
    for batch in batches():
        module.zero_grad()
        (module(batch)[0] / MICRO_BATCHES).backward()
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                summed[name] = summed.get(name, 0) + parameter.grad.float()
    return summed


def off(model: str, stage: int, summed: dict[str, Tensor]) -> float:
    """The largest relative distance of a parameter's gradient from `summed`."""
    recipe = SFTConfig(model=model, data="none", batch=MICRO_BATCHES * ROWS, dtype="bfloat16")
    ds = filled(
        {"zero_optimization": {"stage": stage, "overlap_comm": False}},
        recipe,
        TrainOptions(micro_batch=ROWS),
        width=32,
        dtype="bfloat16",
        device="cpu",
    )
    each = MICRO_BATCHES // ranks.world()
    engine = DeepSpeedEngine(lambda: build(model), ds, micro_batches=each, device="cpu")
    for batch in list(batches())[ranks.rank() :: ranks.world()]:
        engine.accumulate(batch)
    found = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
    engine.step(1e-5)
    engine.close()
    return max(float((found[k].float() - g).norm() / g.norm()) for k, g in summed.items())


def main(model: str) -> None:
    torch.set_num_threads(1)
    with ranks.joined():
        summed = plain(model)
        distances = {stage: off(model, stage, summed) for stage in (1, 2, 3)}
        if ranks.is_main():
            print("RESULT " + json.dumps(distances), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
