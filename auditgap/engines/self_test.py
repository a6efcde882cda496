"""What is proven of the hook before anything is measured with it: that a known δ arrives, bites,
and runs the same both ways.

    problem(engine, Site(15))            # '' when all is well, else half a sentence
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from auditgap.engines import Request
from auditgap.models import Rendered
from auditgap.types import Edit, Prompt, Site

if TYPE_CHECKING:
    from auditgap.engines.hf import HFEngine


def problem(engine: HFEngine, site: Site) -> str:
    """What is wrong with editing at the site; the empty string when nothing is."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, engine.loaded.n_embeddings, (2, 6), generator=generator).to(
        engine.device
    )
    mask = torch.ones_like(ids)
    tolerance = 1e-3 if engine.loaded.dtype == torch.float32 else 0.1
    clean = engine.forward(ids, mask, keep=1).logits
    seen: list[torch.Tensor] = []
    with engine.edited(site, lambda h: (seen.append(h), h)[1]):
        same = engine.forward(ids, mask, keep=1).logits
    if not seen:
        return "the hook is never called"
    h = seen[0]
    delta = torch.randn(h.shape, generator=generator).to(h) * h.float().pow(2).mean().sqrt().to(h)
    with (
        engine.edited(site, lambda _: h + delta, skip_trunk=True),
        engine.edited(site, lambda g: (seen.append(g), g)[1]),
    ):
        engine.forward(ids, mask, keep=1)
    short = engine.logits_from(site, h + delta, ids, mask, keep=1)
    with engine.edited(site, lambda g: g + delta):
        whole = engine.forward(ids, mask, keep=1).logits

    def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
        return (a - b).abs().max().item() > tolerance * max(1e-3, b.abs().max().item())

    if not torch.isfinite(clean).all():
        return "the model's own logits are not all finite numbers"
    if not torch.equal(clean, same):
        return "a zero edit changes the logits"
    if not torch.equal(seen[1], h + delta):
        return "the edit did not arrive at the site"
    if torch.equal(whole, clean) or not torch.isfinite(whole).all():
        return "the edit does not reach the logits"
    if differ(short, whole):
        return "running above the site alone gives other logits than the whole model"
    padding = torch.full_like(ids[:, :3], engine.pad_id)
    padded = engine.forward(
        torch.cat([padding, ids], 1), torch.cat([0 * padding, mask], 1), keep=1
    ).logits
    if differ(padded, clean):
        return "padding changes the logits"
    cache = DynamicCache(config=engine.model.config)
    engine.forward(ids[:, :-1], mask[:, :-1], keep=1, cache=cache)
    if differ(engine.forward(ids[:, -1:], mask, keep=1, cache=cache).logits, clean):
        return "decoding from the cache gives other logits than the whole text"
    prompts = [Rendered(Prompt(""), tuple(row), (True,) * len(row)) for row in ids.tolist()]
    requests = [Request(r, Edit(site, d.float())) for r, d in zip(prompts, delta, strict=True)]
    if differ(engine.prefill(requests, site, ids, mask)[1], whole):
        return "a prefill that shares the trunk gives other logits than the whole model"
    return ""
