"""What an engine keeps of a text between two of its forwards, and which rows of it stay.

cache = DynamicCache(config=model.config)   # or WholeText(), where a family's cache fails
select(cache, torch.tensor([1, 0, 1]))      # row 1 twice, row 0 between
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from auditgap.engines.tensors import add
from auditgap.types import Site


@dataclass(eq=False)
class WholeText:
    """In the place of a cache that fails its test: the text so far, which runs whole at every step.

    With a `site`, the hidden states of the prompt are `hidden` [B, T, D] there at every step, and
    `behind` is added to all others.
    """

    ids: torch.Tensor | None = None
    site: Site | None = None
    hidden: torch.Tensor | None = None
    behind: torch.Tensor | None = None  #: [B, 1, D], added at every position behind the prompt's

    def extended(self, ids: torch.Tensor) -> torch.Tensor:
        """The text so far with `ids` [B, n] behind it."""
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], 1)
        return self.ids

    def replaced(self, h: torch.Tensor) -> torch.Tensor:
        """h [B, T + n, D] with the prompt's positions edited, and those behind it."""
        if self.hidden is None:
            return h
        behind = h[:, self.hidden.shape[1] :]
        return torch.cat(
            [self.hidden, behind if self.behind is None else add(behind, self.behind)], 1
        )

    def reorder_cache(self, rows: torch.Tensor) -> None:
        self.ids = None if self.ids is None else self.ids[rows]
        self.hidden = None if self.hidden is None else self.hidden[rows]
        self.behind = None if self.behind is None else self.behind[rows]


TextCache = DynamicCache | WholeText


def select(cache: TextCache, rows: torch.Tensor) -> None:
    """Keep these rows of a cache, each layer where it lies."""
    if isinstance(cache, WholeText):
        cache.reorder_cache(rows)
        return
    for layer in cache.layers:
        if type(layer).__module__ == DynamicCache.__module__:
            layer.reorder_cache(rows.long())  # type: ignore[arg-type] - any tensor of this dtype
        else:  # a family's own layer, which may hold more than its inherited method knows
            vars(layer).update({name: _kept(value, rows) for name, value in vars(layer).items()})


def is_filled(layer: Any) -> bool:
    """Whether a block has written keys, values or a state into this layer."""
    states = getattr(layer, "has_previous_state", False)
    any_state = any(states.values()) if isinstance(states, dict) else bool(states)
    return any_state or getattr(layer, "keys", None) is not None


def _kept(value: Any, rows: torch.Tensor) -> Any:
    if isinstance(value, torch.Tensor):
        return value.index_select(0, rows.to(value.device)) if value.ndim > 1 else value
    if isinstance(value, dict):
        return {key: _kept(one, rows) for key, one in value.items()}
    return [_kept(one, rows) for one in value] if isinstance(value, list) else value
