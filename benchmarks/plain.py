"""What the engine is measured against: the same cells in the way they are usually written.

`plain_*`: one prompt, one site, one budget at a time; eager attention, whole forwards,
`model.generate`. `peer_attack`: the strongest way seen elsewhere: all rows of a site in one batch,
a hook, whole forwards, all logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import nn

from auditgap.models import Rendered
from auditgap.types import Site


@contextmanager
def added(blocks: nn.ModuleList, site: Site, delta: torch.Tensor, *, once: bool = False):
    """While open, δ [B, T, D] is added to the first T positions at the site; with `once`, in the
    first forward only."""
    calls = 0

    def edit(h: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if once and calls > 1:
            return h
        t = delta.shape[1]
        return torch.cat([(h[:, :t].float() + delta).to(h.dtype), h[:, t:]], 1)

    if site.is_embedding:

        def before(_module, args, kwargs):
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}
            return (edit(args[0]), *args[1:]), kwargs

        handle = blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = blocks[site.layer_index].register_forward_hook(lambda _m, _a, h: edit(h))
    try:
        yield
    finally:
        handle.remove()


def plain_attack(
    model: nn.Module,
    blocks: nn.ModuleList,
    rendered: Rendered,
    target: Sequence[int],
    site: Site,
    radius: float,
    steps: int = 10,
) -> torch.Tensor:
    """δ [T, D] of one prompt, by whole forwards."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*rendered.ids, *target]], device=device)
    t = len(rendered.ids)
    delta = torch.zeros(1, t, model.config.hidden_size, device=device)
    for _ in range(steps):
        delta.requires_grad_(True)
        with added(blocks, site, delta):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[0, t - 1 : -1].float(), ids[0, t:])
        (grad,) = torch.autograd.grad(loss, delta)
        delta = (delta.detach() - radius / 4 * grad.sign()).clamp(-radius, radius)
    return delta[0]


@torch.no_grad()
def plain_generate(
    model: nn.Module,
    blocks: nn.ModuleList,
    rendered: Rendered,
    site: Site,
    delta: torch.Tensor,
    n: int,
    pad_id: int,
) -> tuple[int, ...]:
    """Greedy token ids of one prompt under its δ."""
    ids = torch.tensor([rendered.ids], device=delta.device)
    with added(blocks, site, delta[None], once=True):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            do_sample=False,
            pad_token_id=pad_id,
        )
    return tuple(out[0, ids.shape[1] :].tolist())


def peer_attack(
    model: nn.Module,
    blocks: nn.ModuleList,
    rendered: Sequence[Rendered],
    target: Sequence[int],
    site: Site,
    radii: Sequence[Sequence[float]],
    pad_id: int,
    steps: int = 10,
) -> list[list[torch.Tensor]]:
    """δ of every prompt and budget of a site, all rows in one left-padded batch."""
    device = next(model.parameters()).device
    width, k = max(len(r.ids) for r in rendered), len(target)
    rows = [(n, e) for n in range(len(rendered)) for e in range(len(radii[n]))]
    ids = torch.tensor(
        [[pad_id] * (width - len(rendered[n].ids)) + [*rendered[n].ids, *target] for n, _ in rows],
        device=device,
    )
    mask = torch.tensor(
        [[0] * (width - len(rendered[n].ids)) + [1] * (len(rendered[n].ids) + k) for n, _ in rows],
        device=device,
    )
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    radius = torch.tensor([radii[n][e] for n, e in rows], device=device)[:, None, None]
    on = mask[:, :width, None]
    delta = torch.zeros(len(rows), width, model.config.hidden_size, device=device)
    for _ in range(steps):
        delta.requires_grad_(True)
        with added(blocks, site, delta * on):
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=place, use_cache=False
            ).logits
        nll = nn.functional.cross_entropy(
            logits[:, width - 1 : -1].flatten(0, 1).float(),
            ids[:, width:].flatten(),
            reduction="none",
        )
        (grad,) = torch.autograd.grad(nll.view(len(rows), k).mean(1).sum(), delta)
        delta = ((delta.detach() - radius / 4 * grad.sign()).clamp(-radius, radius)) * on
    found: list[list[torch.Tensor]] = [[] for _ in rendered]
    for b, (n, _) in enumerate(rows):
        found[n].append(delta[b, width - len(rendered[n].ids) :])
    return found
