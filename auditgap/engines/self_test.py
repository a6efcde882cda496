"""What is proven before anything is measured: that the model under the engine is transformers' own,
and that a known δ arrives, bites, and runs the same both ways.

    problem(AT_A_SITE[0], engine, Site(15))       # '' when all is well, else half a sentence

Each stage names the short cuts that it tests. Where one fails, the engine does without it and the
stage runs again; a stage that fails without them refuses the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from accelerate.utils.memory import should_reduce_batch_size

from auditgap.engines import Request
from auditgap.engines.caches import closed_up, select
from auditgap.engines.prefill import prefill
from auditgap.errors import AuditgapError
from auditgap.models import Rendered
from auditgap.types import Edit, Prompt, Site

if TYPE_CHECKING:
    from auditgap.engines.hf import HFEngine

ShortCut = Literal["padding", "several tokens", "cache", "trunk"]
#: Attention that families know by name; what goes by another name drops the parts they tie to it.
_KNOWN_ATTENTION = ("eager", "sdpa")
#: How many times further than by one unit in the last place of its embeddings a model's logits may
#: move, as every layer rounds; and the share of their size beyond which nothing is called rounding.
_ROUNDINGS, _AT_MOST = 16, 0.3


@dataclass(frozen=True)
class Stage:
    """One question, and what can be given up where its answer is no."""

    run: Callable[[HFEngine, Site], str]
    short_cuts: tuple[ShortCut, ...] = ()


def problem(stage: Stage, engine: HFEngine, site: Site) -> str:
    """What is wrong; the empty string when nothing is."""
    try:
        said = stage.run(engine, site)
    except AuditgapError:
        raise
    except Exception as error:  # what a family raises when it cannot be cut, patched or padded
        if isinstance(error, MemoryError) or should_reduce_batch_size(error):
            raise
        first = str(error).splitlines()[0][:120] if str(error) else "no message"
        said = f"{type(error).__name__}: {first}"
    # of several ranks one may see what another does not, and all have to go the same way
    return (said or "another rank saw other numbers") if _agreed(engine, bool(said)) else ""


def _agreed(engine: HFEngine, mine: bool) -> bool:
    """What rank 0 says, so that all ranks run the same."""
    return bool(engine.agreed(torch.tensor(int(mine), device=engine.device)).item())


@torch.inference_mode()
def settle(engine: HFEngine, stages: Sequence[Stage], site: Site, where: str) -> None:
    """Every stage passes, or a short cut that it stands on is given up and it runs again: an
    optimisation never decides what can be audited. Raises AuditgapError where none is left."""
    for stage in stages:
        left = list(stage.short_cuts)
        while said := problem(stage, engine, site):
            while left and not engine.give_up(left[0], site):
                left.pop(0)
            if not left:
                raise AuditgapError(
                    f"Self-test failed at {where} of {engine.loaded.subject.name}: {said}. This"
                    f" architecture ({type(engine.model).__name__}) cannot be audited with this"
                    " version; nothing was measured."
                )


def _text(engine: HFEngine, rows: int, length: int) -> torch.Tensor:
    """Random token ids, none of which is padding: some families count positions by it."""
    generator = torch.Generator().manual_seed(0)
    n = engine.loaded.n_embeddings
    ids = torch.randint(0, n, (rows, length), generator=generator).to(engine.device)
    own = getattr(engine.model.config.get_text_config(), "pad_token_id", None)
    padding = torch.tensor([engine.pad_id, -1 if own is None else own], device=ids.device)
    return torch.where(torch.isin(ids, padding), (ids + 5) % n, ids)


def _differ(engine: HFEngine, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether last logits [B, V] are further apart than rounding brings them."""
    scale = max(1e-3, b.abs().max().item())

    def rounding(_: torch.Tensor, moved: torch.Tensor) -> float:
        return moved[:, -1].abs().max().item()

    return _beyond(engine, (a - b).abs().max().item(), scale, rounding)


def _apart(engine: HFEngine, a: torch.Tensor, b: torch.Tensor) -> bool:
    """As `_differ`, over all logits [B, T, V]: kernels that round otherwise may move one of them
    far, where a model quantises or saturates."""
    scale = max(1e-3, b.float().norm().item())

    def rounding(logits: torch.Tensor, moved: torch.Tensor) -> float:
        return (moved.float().norm() / logits.float().norm()).item() * scale

    return _beyond(engine, (a - b).float().norm().item(), scale, rounding)


def _beyond(
    engine: HFEngine,
    gap: float,
    scale: float,
    rounding: Callable[[torch.Tensor, torch.Tensor], float],
) -> bool:
    """Whether a gap is beyond the tolerance at this scale, and beyond what `rounding` makes of
    `_rounded`."""
    tolerance = 1e-3 if engine.loaded.dtype == torch.float32 else 0.1
    if _agreed(engine, gap <= tolerance * scale):
        return False
    return not gap <= min(_ROUNDINGS * rounding(*_rounded(engine)), _AT_MOST * scale)


def _rounded(engine: HFEngine) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [2, 9, V] of the model's own, and how far they move when its embeddings are rounded
    another way: thresholds, routers and steep functions make much of little."""
    ids = _text(engine, 2, 9)
    unit = torch.finfo(engine.loaded.dtype).eps
    signs = torch.Generator().manual_seed(2)

    def round_another_way(h: torch.Tensor) -> torch.Tensor:
        up = torch.randint(0, 2, h.shape, generator=signs).to(h.device) * 2 - 1
        return (h.float() * (1 + unit * up)).to(h)

    logits = _whole(engine, ids)
    with engine.edited(Site(-1), round_another_way):
        return logits, _whole(engine, ids) - logits


def _whole(engine: HFEngine, ids: torch.Tensor) -> torch.Tensor:
    """The model's logits [B, T, V], as this engine runs it."""
    return engine.forward(ids, torch.ones_like(ids), keep=ids.shape[1]).logits


# -- of the model


def _is_itself(engine: HFEngine, _: Site) -> str:
    """Its logits are those of transformers' model that nobody touched."""
    ids = _text(engine, 2, 6)
    ours = _whole(engine, ids)
    if not torch.isfinite(ours).all():
        return ""  # nothing to compare; what is asked of it is unscored, and no site passes
    config = engine.model.config
    mine = config._attn_implementation
    if mine is not None and mine not in _KNOWN_ATTENTION:
        return f"its attention runs as {mine!r}, by which the family does not know it"
    own = engine.model(input_ids=ids, use_cache=False).logits
    if _apart(engine, ours, own):
        return "it gives other logits than when it is left to itself"
    # eager attention rounds otherwise, so that the comparison needs fp32
    if mine == "sdpa" and engine.loaded.dtype == torch.float32:
        try:
            with suppress(ValueError):
                engine.model.set_attn_implementation("eager")
            eager = engine.model(input_ids=ids, use_cache=False).logits
        finally:
            engine.model.set_attn_implementation(mine)
        if _apart(engine, ours, eager):
            return "SDPA gives other logits than eager attention"
    return ""


def _is_causal(engine: HFEngine, _: Site) -> str:
    ids = _text(engine, 2, 6)
    whole, start = _whole(engine, ids), _whole(engine, ids[:, :4])
    if torch.isfinite(whole).all() and _apart(engine, whole[:, :4], start):
        return (
            "a token changes the logits before it, so that the model does not only read backwards"
        )
    return ""


def _padded(engine: HFEngine) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and mask [2, 9] of two texts, the second three tokens shorter where this engine pads, and
    each one's last logits [2, V] without company."""
    ids = _text(engine, 2, 9)
    mask = torch.ones_like(ids)
    if not engine.alone:
        ids[1, :3], mask[1, :3] = engine.pad_id, 0
    alone = [
        _whole(engine, row[None, real.bool()])[:, -1] for row, real in zip(ids, mask, strict=True)
    ]
    return ids, mask, torch.cat(alone)


def _survives_padding(engine: HFEngine, _: Site) -> str:
    ids, mask, alone = _padded(engine)
    if not torch.isfinite(alone).all():
        return ""
    for pad in dict.fromkeys((engine.pad_id, int(ids[0, 0]))):  # its own embedding may be zero
        filled = ids.masked_fill(mask == 0, pad)
        if _differ(engine, engine.forward(filled, mask, keep=1).logits[:, -1], alone):
            return "padding changes the logits"
    return ""


def _decodes(engine: HFEngine, _: Site) -> str:
    """From the cache, in whichever rows are left: shared out, in another order, some gone."""
    ids, mask, alone = _padded(engine)
    if not torch.isfinite(alone).all():
        return ""
    n = ids.shape[1]
    rows = [1, 0, 1]
    cache = engine.new_cache()
    engine.forward(ids[:, : n - 3], mask[:, : n - 3], keep=1, cache=cache)
    select(cache, rows)
    parts = engine.answer_logits(copy.deepcopy(cache), ids[rows, n - 3 :], mask[rows])
    told = torch.cat([logits for _, logits in parts], 1)
    if _differ(engine, told[:, -1], alone[rows]):
        return "several tokens after the cache give other logits than the whole text"
    last = told
    for at in range(n - 3, n):
        last = engine.forward(
            ids[rows, at : at + 1], mask[rows, : at + 1], keep=1, cache=cache
        ).logits
        if at == n - 3:
            stay = closed_up([1, 2])
            select(cache, stay)
            rows = [rows[at] for at in stay]
    if _differ(engine, last[:, -1], alone[rows]):
        return "decoding from the cache gives other logits than the whole text"
    return ""


# -- at a site


def _edited(
    engine: HFEngine, site: Site
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids [2, 6], clean h [2, 6, D] and δ at the site, and the whole model's last logits under
    δ."""
    ids = _text(engine, 2, 6)
    mask = torch.ones_like(ids)
    h = engine.capture(site, ids, mask)
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(h.shape, generator=generator).to(h) * h.float().pow(2).mean().sqrt().to(h)
    with engine.edited(site, lambda g: g + delta):
        whole = engine.forward(ids, mask, keep=1).logits
    return ids, h, delta, whole


def _arrives(engine: HFEngine, site: Site) -> str:
    ids = _text(engine, 2, 6)
    mask = torch.ones_like(ids)
    clean = engine.forward(ids, mask, keep=1).logits
    seen: list[torch.Tensor] = []
    with engine.edited(site, lambda h: (seen.append(h), h)[1]):
        same = engine.forward(ids, mask, keep=1).logits
    if not seen:
        return "the hook is never called"
    if len(seen) > 1:
        return f"the block runs {len(seen)} times a forward, so that an edit has no one place"
    if not torch.isfinite(clean).all():
        return "the model's own logits are not all finite numbers"
    if not torch.equal(clean, same):
        return "a zero edit changes the logits"
    if seen[0].ndim != 3 or seen[0].shape[:2] != ids.shape:
        return "the site's positions are not the text's"
    _, h, delta, whole = _edited(engine, site)
    with (
        engine.edited(site, lambda _: h + delta),
        engine.edited(site, lambda g: (seen.append(g), g)[1]),
    ):
        engine.forward(ids, mask, keep=1)
    if not torch.equal(seen[1], h + delta):
        return "the edit did not arrive at the site"
    if torch.equal(whole, clean) or not torch.isfinite(whole).all():
        return "the edit does not reach the logits"
    return ""


def _is_short(engine: HFEngine, site: Site) -> str:
    ids, h, delta, whole = _edited(engine, site)
    short = engine.logits_from(site, h + delta, ids, torch.ones_like(ids), keep=1)
    if _differ(engine, short, whole):
        return "running above the site alone gives other logits than the whole model"
    return ""


def _prefills(engine: HFEngine, site: Site) -> str:
    """And decodes after it."""
    ids, _, delta, whole = _edited(engine, site)
    prompts = [Rendered(Prompt(""), tuple(row), (True,) * len(row)) for row in ids.tolist()]
    if engine.alone:
        ids, delta, whole, prompts = ids[:1], delta[:1], whole[:1], prompts[:1]
    requests = [Request(r, Edit(site, d.float())) for r, d in zip(prompts, delta, strict=True)]
    mask = torch.ones_like(ids)
    cache, logits, _ = prefill(engine, requests, site, ids, mask)
    if _differ(engine, logits, whole):
        return "a prefill that shares the trunk gives other logits than the whole model"
    more = torch.cat([ids, ids[:, :1]], 1)
    longer = torch.nn.functional.pad(delta, (0, 0, 0, 1))
    with engine.edited(site, lambda g: g + longer):
        whole = engine.forward(more, torch.ones_like(more), keep=1).logits
    after = engine.forward(more[:, -1:], torch.ones_like(more), keep=1, cache=cache).logits
    if _differ(engine, after, whole):
        return "decoding after an edited prompt gives other logits than the whole text"
    return ""


OF_THE_MODEL = (
    Stage(_is_causal),
    Stage(_is_itself),
    Stage(_survives_padding, ("padding",)),
    Stage(_decodes, ("several tokens", "cache")),
)
AT_A_SITE = (
    Stage(_arrives),
    Stage(_is_short, ("trunk",)),
    Stage(_prefills, ("trunk", "cache")),
)
