"""Training under an edit of the middle block's output: what constructions share that teach a model
to answer otherwise when its activations are pushed.

with edited(blocks[middle_block(len(blocks))], where, edit):
    final = losses.final_hidden(batch)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from auditgap.engines.layout import one_stream
from auditgap.engines.tensors import add
from auditgap.models import parse_sites


def middle_block(n_blocks: int) -> int:
    """The block whose output is edited: round(L/2), the site `mid`."""
    return parse_sites("mid", n_blocks)[0].layer_index


@contextmanager
def edited(block: nn.Module, where: Tensor, edit: Tensor) -> Iterator[None]:
    """While open, `edit` [D], or [B, 1, D], is added to the block's output at the positions
    `where` [B, T]."""

    def after(_module: nn.Module, _args: tuple, output: Any) -> Any:
        changed = add(one_stream(output), where[..., None] * edit)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = block.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
