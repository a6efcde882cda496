"""The mean activation of every block, taken while the model runs: [B, L, D], and no block's [B, T,
D] is kept for it.

    with pooled(loaded.blocks, attention_mask) as pool:
        loaded.model(input_ids=ids, attention_mask=attention_mask)
    # [B, L, D] fp32, differentiable when the forward was
    h = pool.value()

What a probe reads (arXiv 2606.08044, section 4): for each block the mean over the real positions of
the chat-formatted sequence. A hook on each block takes it from the block's own output, so that the
last one is not the normed one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from auditgap.engines.layout import one_stream
from auditgap.errors import AuditgapError


class _Mean(torch.autograd.Function):
    """Σ_t shares[b, t] · hidden[b, t]: [B, D] fp32. It saves no tensor in autograd's own way.

    Gradient checkpointing runs a block again and demands that it saves the same tensors as before;
    a mean that saves none can be taken the first time only, and its hook be gone by then.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        ctx.shares, ctx.dtype = shares, hidden.dtype
        return torch.bmm(
            shares[:, None], hidden if hidden.dtype == shares.dtype else hidden.float()
        )[:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the names of its parameters
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        return (ctx.shares[..., None] * gradient[:, None]).to(ctx.dtype), None


class Pool:
    """Collects one mean a block; `value` joins them."""

    def __init__(self, n_blocks: int, mask: torch.Tensor) -> None:
        self._means: dict[int, torch.Tensor] = {}
        self._n = n_blocks
        #: [B, T] fp32: each real position's share of its row's mean
        self._shares = mask.float() / mask.sum(1, keepdim=True).clamp(min=1)

    def take(self, index: int, hidden: torch.Tensor) -> None:
        """Keep block `index`'s mean of `hidden` [B, T, D]; the first time only (checkpointing runs
        a block twice)."""
        if index not in self._means:
            self._means[index] = _Mean.apply(hidden, self._shares.to(hidden.device))

    def value(self) -> torch.Tensor:
        """[B, L, D] fp32. Raises AuditgapError when a block did not run inside the context."""
        missing = [i for i in range(self._n) if i not in self._means]
        if missing:
            raise AuditgapError(
                f"Blocks {missing[:5]} did not run, so their activations cannot be pooled."
            )
        return torch.stack(
            [self._means[i].to(self._means[0].device) for i in range(self._n)], dim=1
        )


@contextmanager
def pooled(blocks: nn.ModuleList, mask: torch.Tensor) -> Iterator[Pool]:
    """While open, a forward of the model leaves every block's masked mean in the pool. `mask` [B,
    T]: 1 at real positions.

    Backward of what `value` gave may run after the context is closed, under (non-reentrant)
    gradient checkpointing too.
    """
    pool = Pool(len(blocks), mask)

    def hook(index: int) -> Any:
        def after(_module: nn.Module, _args: tuple, output: Any) -> None:
            pool.take(index, one_stream(output))

        return after

    handles = [block.register_forward_hook(hook(i)) for i, block in enumerate(blocks)]
    try:
        yield pool
    finally:
        for handle in handles:
            handle.remove()
