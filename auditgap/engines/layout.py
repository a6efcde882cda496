"""How a family lays out what passes through its blocks, and how it counts positions: found by
asking the model once, so that no family needs a line of its own.

    layout = Layout.of(model, blocks[0])
    layout.flat(h)          # [B, T, D], whatever the family's axes are
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from auditgap.errors import UsageError

#: Rows and positions of the question: numbers that are unlikely to be another axis's size.
_ROWS, _POSITIONS = 5, 7


@dataclass(frozen=True)
class Layout:
    """See the module."""

    returns_tuples: bool = False  #: blocks return (h, …) instead of h
    #: of several residual streams: the order of axes that makes [B, T, S, D] of h; None: one stream
    streams: tuple[int, ...] | None = None
    n_streams: int = 1

    @classmethod
    def of(cls, model: PreTrainedModel, block: nn.Module, device: torch.device) -> Layout:
        """Runs a few tokens. A model that cannot run them has the plain layout."""
        seen: list[Any] = []
        handles = [
            block.register_forward_pre_hook(
                lambda _m, args, kwargs: seen.append(kwargs.get("hidden_states", *args[:1])),
                with_kwargs=True,
            ),
            block.register_forward_hook(lambda _m, _a, output: seen.append(output)),
        ]
        ids = torch.ones(_ROWS, _POSITIONS, dtype=torch.long, device=device)
        try:
            with torch.inference_mode(), suppress(Exception):
                model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if len(seen) < 2:
            return cls()
        axes, shape = _axes(seen[0].shape), seen[0].shape
        return cls(isinstance(seen[1], (tuple, list)), axes, shape[axes[2]] if axes else 1)

    def flat(self, h: torch.Tensor) -> torch.Tensor:
        """[B, T, D]; several streams as one of their joint width, [B, T, S·D]."""
        return h if self.streams is None or h.ndim != 4 else h.permute(self.streams).flatten(2)

    def laid_out(self, flat: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """`flat` in the axes of `like`, as the family has them."""
        if self.streams is None or like.ndim != 4:
            return flat
        sizes = [like.shape[axis] for axis in self.streams[2:]]
        back = [self.streams.index(axis) for axis in range(4)]
        return flat.view(*flat.shape[:2], *sizes).permute(back)


def one_stream(output: Any) -> torch.Tensor:
    """What a block hands on, [B, T, D], for what reads or trains a single stream. Raises UsageError
    where a family has several."""
    hidden = output[0] if isinstance(output, tuple) else output
    if hidden.ndim != 3:
        raise UsageError(
            f"A block of this model hands on several residual streams at once, {list(hidden.shape)};"
            " probes, directions and constructions read one. Use `auditgap lvs`, `intervene` or"
            " `evaluate`, which take them as one of their joint width."
        )
    return hidden


def _axes(shape: torch.Size) -> tuple[int, ...] | None:
    sizes = tuple(shape)
    if len(sizes) != 4 or sizes.count(_ROWS) != 1 or sizes.count(_POSITIONS) != 1:
        return None
    first = sizes.index(_ROWS), sizes.index(_POSITIONS)
    return (*first, *(axis for axis in range(4) if axis not in first))


@torch.inference_mode()
def first_position(
    model: PreTrainedModel,
    forward: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
    device: torch.device,
) -> int | None:
    """The position id of a text's first token: what gives the logits that the model gives when it
    is left to count itself. None where no number does, and the model has to count.

    `forward` gives all logits [1, T, V] of ids, mask and a first position.
    """
    ids = torch.arange(3, 9, device=device)[None] % model.get_input_embeddings().num_embeddings  # type: ignore[union-attr]
    mask = torch.ones_like(ids)
    try:
        own = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    except Exception:
        return 0  # its self-test says what is wrong with it
    padding = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
    for first in (0, padding + 1):
        with suppress(Exception):
            if torch.allclose(forward(ids, mask, first), own, rtol=1e-3, atol=1e-4, equal_nan=True):
                return first
    return None
