"""Prompts read once, with edits among them, up to where answers start."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from auditgap.engines import Request
from auditgap.engines.batching import left_pad
from auditgap.engines.caches import TextCache, WholeText, growing, is_filled, select
from auditgap.engines.hooked import HookedModel
from auditgap.engines.tensors import add, stack
from auditgap.types import Edit, Site


def prefill(
    engine: HookedModel,
    requests: Sequence[Request],
    site: Site | None,
    ids: torch.Tensor,
    mask: torch.Tensor,
) -> tuple[TextCache, torch.Tensor, list[tuple[float | None, float | None]]]:
    """KV cache and last logits of all rows; with an edit, the trunk runs once a prompt and the
    rest once a row."""
    cache = engine.new_cache()
    if site is None:
        return (
            cache,
            engine.forward(ids, mask, keep=1, cache=cache).logits,
            [(None, None)] * len(requests),
        )
    first: dict[tuple[int, ...], int] = {}
    source = [first.setdefault(r.rendered.ids, len(first)) for r in requests]
    unique_ids, unique_mask = left_pad(list(first), engine.pad_id, engine.device)
    trunk = growing(engine.model.config) if engine.cached else None
    h = engine.capture(site, unique_ids, unique_mask, cache=trunk)[source]
    edited = add(h, stack([delta_of(r.edit) for r in requests], h.shape[1], engine.device))
    change = (edited.float() - h.float()).flatten(1)
    norms = zip(change.norm(dim=1).tolist(), change.abs().amax(1).tolist(), strict=True)
    effective = [(finite(l2), finite(linf)) for l2, linf in norms]
    if isinstance(cache, WholeText):
        cache.site, cache.hidden = site, edited
        return cache, engine.forward(ids, mask, keep=1, cache=cache).logits, effective
    with engine.edited(site, lambda _: edited, skip_trunk=True):
        logits = engine.forward(ids, mask, keep=1, cache=cache).logits
    # else the whole model ran, and filled the cache
    if trunk is not None and engine.short.get(site, True):
        select(trunk, source)
        for index, layer in enumerate(trunk.layers):  # a block may fill two of them, or none
            if is_filled(layer):
                cache.layers[index] = layer
    return cache, logits, effective


def delta_of(edit: Edit | None) -> torch.Tensor:
    """Of an edit that is asked for with its site, so that there is one."""
    if edit is None:
        raise ValueError("Requests at a site each need an edit.")
    return edit.delta


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
