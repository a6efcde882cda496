"""What an engine keeps of a text between two of its forwards, and which rows of it stay.

cache = growing(model.config)       # or WholeText(), where a family's cache fails
select(cache, [1, 0, 1])            # row 1 twice, row 0 between
select(cache, closed_up([0, 2]))    # rows 0 and 2 are left, moved as little as can be
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

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

    def keep(self, rows: Sequence[int]) -> None:
        rows = list(rows)
        self.ids = None if self.ids is None else self.ids[rows]
        self.hidden = None if self.hidden is None else self.hidden[rows]
        self.behind = None if self.behind is None else self.behind[rows]


class Growing(DynamicLayer):
    """Keys and values of a block of full attention, [B, H, T, D] each, that lie in a room for more:
    new tokens are written behind the others, where transformers' own layer copies all of them at
    every token; and rows that leave give their place to the last ones."""

    def __init__(self) -> None:
        super().__init__()
        #: by name the room, and the part of it that is `keys` or `values` unless those were replaced
        self.rooms: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n_kept = self.get_seq_length()
        self.keys = self._behind("keys", n_kept, key_states)
        self.values = self._behind("values", n_kept, value_states)
        return self.keys, self.values

    def _behind(self, name: str, n_kept: int, new: torch.Tensor) -> torch.Tensor:
        kept, room, n = getattr(self, name), self._room(name), new.shape[2]
        if room is None or n_kept + n > room.shape[2]:
            room = new.new_empty(*new.shape[:2], n_kept + n + _ROOM, new.shape[3])
            if n_kept:
                room[:, :, :n_kept] = kept
        whole = room[: len(new), :, : n_kept + n]
        whole[:, :, n_kept:] = new
        self.rooms[name] = room, whole
        return whole

    def _room(self, name: str) -> torch.Tensor | None:
        """What these keys or values lie in; None where another owner has put others in their place."""
        room, part = self.rooms.get(name, (None, None))
        return room if part is getattr(self, name) else None

    def keep(self, rows: Sequence[int]) -> None:
        """These rows, in this order; in place where none is written over before it is read."""
        moved = [(to, at) for to, at in enumerate(rows) if to != at]
        in_order = all(at >= len(rows) for _, at in moved)
        for name in ("keys", "values") if self.get_seq_length() else ():
            kept, room = getattr(self, name), self._room(name)
            if room is not None and in_order:
                for to, at in moved:
                    kept[to] = kept[at]
                kept = kept[: len(rows)]
                self.rooms[name] = room, kept
            else:
                kept = kept.index_select(0, torch.tensor(rows, device=kept.device))
            setattr(self, name, kept)


#: Tokens that there is room for behind those that a layer holds: so often are they copied.
_ROOM = 64


TextCache = DynamicCache | WholeText


def growing(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for a model: `Growing` layers, and transformers' own where a block attends
    otherwise (sliding windows, states, a family's compressed keys)."""
    cache = DynamicCache(config=config)
    cache.layers = [Growing() if type(one) is DynamicLayer else one for one in cache.layers]
    return cache


def closed_up(left: Sequence[int]) -> list[int]:
    """Rows that are left of a batch, ordered so that most stay where they are: the last ones take
    the places of those that are gone."""
    n = len(left)
    behind = iter([at for at in left if at >= n])
    stay = {at for at in left if at < n}
    return [at if at in stay else next(behind) for at in range(n)]


def select(cache: TextCache, rows: Sequence[int]) -> None:
    """Keep these rows of a cache, each layer where it lies."""
    if isinstance(cache, WholeText):
        cache.keep(rows)
        return
    kept = torch.tensor(rows)
    for layer in cache.layers:
        if isinstance(layer, Growing):
            layer.keep(rows)
        elif type(layer).__module__ == DynamicCache.__module__:
            layer.reorder_cache(kept)  # type: ignore[arg-type] - any tensor of this dtype
        else:  # a family's own layer, which may hold more than its inherited method knows
            vars(layer).update({name: _kept(value, kept) for name, value in vars(layer).items()})


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
