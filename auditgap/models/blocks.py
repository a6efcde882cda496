"""Where a model's decoder blocks are: the list that text runs through, one block after the other.

blocks = find_blocks(model)          # an nn.ModuleList; in a wrapper, those of its text decoder
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from auditgap.errors import UsageError
from auditgap.models.shard import home


@dataclass(frozen=True)
class Family:
    """What one family needs said of its blocks."""

    count: Callable[[Any], int]  #: of its text config, where that is not `num_hidden_layers`
    blocks: str = ""  #: their name in the model, where running text does not tell
    width: Callable[[Any], int] = lambda config: config.hidden_size


FAMILIES = {
    # bytes run through an encoder and a decoder, patches of them through a model between the two
    "blt": Family(
        lambda c: c.decoder_config.num_hidden_layers,
        "model.local_decoder.layers",
        lambda c: c.decoder_config.hidden_size,
    ),
    "longcat_flash": Family(lambda c: c.num_layers),
    # text without images passes the cross-attention blocks by
    "mllama_text_model": Family(lambda c: c.num_hidden_layers - len(c.cross_attention_layers)),
}


def count_blocks(config: Any) -> int:
    """How many blocks `find_blocks` finds in a model of this text config."""
    family = FAMILIES.get(config.model_type)
    return config.num_hidden_layers if family is None else family.count(config)


def width_of(config: Any) -> int:
    """Numbers of an activation between the blocks of a model of this text config."""
    family = FAMILIES.get(config.model_type)
    return config.hidden_size if family is None else family.width(config)


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks. A plain decoder has one list of as many alike blocks as its config says,
    larger than any other list; anything else runs a few tokens, and the blocks are what they run
    through.

    Raises UsageError where text runs through no such list, or not at all.
    """
    config = model.config.get_text_config()
    if (family := FAMILIES.get(config.model_type)) and family.blocks:
        return model.get_submodule(family.blocks)  # type: ignore[return-value] - a ModuleList
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    if not lists:
        raise _without(model, "it holds no list of blocks")
    largest = max(map(_size, lists.values()))
    n = getattr(config, "num_hidden_layers", None)
    alike = [m for m in lists.values() if len(m) == n and len({type(b) for b in m}) == 1]
    if len(alike) == 1 and config is model.config and _size(alike[0]) == largest:
        return alike[0]
    return _run_through(model, lists)


@dataclass(frozen=True, eq=False)
class _Call:
    """A block of a list has run."""

    at: int
    given: Any
    gave: Any


def _run_through(model: PreTrainedModel, lists: dict[str, nn.ModuleList]) -> nn.ModuleList:
    """The largest list whose blocks are each handed what the one before gave."""
    with _watching(lists) as calls:
        try:
            ids = torch.arange(3, 9, device=home(model))[None] % n_embeddings(model)
            with torch.inference_mode():
                model(input_ids=ids, use_cache=False)
        except Exception as error:  # a model that wants more than text says so in its own way
            first = str(error).splitlines()[0][:120] if str(error) else "no message"
            raise _without(
                model, f"text alone does not run through it ({type(error).__name__}: {first})"
            ) from None
    found: list[nn.ModuleList] = []
    for name, seen in calls.items():
        order = [call.at for call in seen]
        once = bool(order) and order == sorted(set(order))  # else an edit has no one place
        if once and all(_follows(before, after) for before, after in pairwise(seen)):
            blocks = lists[name]
            if len(order) < len(blocks):  # some are for images
                blocks = nn.ModuleList(blocks[i] for i in order)
            found.append(blocks)
    if not found:
        raise _without(model, "no list's blocks run once each, one after the other")
    return max(found, key=_size)


@contextmanager
def _watching(lists: dict[str, nn.ModuleList]) -> Iterator[dict[str, list[_Call]]]:
    calls: dict[str, list[_Call]] = {name: [] for name in lists}
    handles = []
    for name, blocks in lists.items():
        for at, block in enumerate(blocks):

            def note(
                _m: nn.Module, args: tuple, kwargs: dict, out: Any, name: str = name, at: int = at
            ) -> None:
                given = kwargs.get("hidden_states", args[0] if args else None)
                calls[name].append(_Call(at, given, _first(out)))

            handles.append(block.register_forward_hook(note, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _follows(before: _Call, after: _Call) -> bool:
    if before.gave is after.given:
        return True
    shapes = getattr(before.gave, "shape", 0), getattr(after.given, "shape", 1)
    return shapes[0] == shapes[1]


def _first(value: Any) -> Any:
    return _first(value[0]) if isinstance(value, (tuple, list)) and value else value


def _size(module: nn.Module) -> int:
    """Parameters, those that DeepSpeed keeps on other ranks included."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def n_embeddings(model: PreTrainedModel) -> int:
    """Rows of a model's input embedding."""
    embedding: Any = model.get_input_embeddings()
    return embedding.num_embeddings


def _without(model: PreTrainedModel, why: str) -> UsageError:
    return UsageError(f"{type(model).__name__} cannot be audited: {why}, so an edit has no place.")
