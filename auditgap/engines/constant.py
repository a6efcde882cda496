"""Speaks under edits that stand at every position, the prompt's and the answer's: what steering and
ablation need.

    r = direction / direction.norm()                                      # [D]
    # ablation: no site's stream has a component along r
    edits = [ConstantEdit(sites_of(engine), read=r, write=r)] * len(prompts)
    generate(engine, [engine.render(p) for p in prompts], edits, max_new_tokens=32)

It hangs on the engine's own hook, one a site, in the model's own whole forward: at prefill and at
every step of decoding. Rows of a batch have edits of their own; a row that has ended leaves with
its edit. The sum is taken in fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch

from auditgap.engines import Completion
from auditgap.engines.answers import completion_of
from auditgap.engines.batching import left_pad
from auditgap.engines.choosing import Greedy
from auditgap.engines.hf import HFEngine
from auditgap.errors import AuditgapError
from auditgap.models import Rendered
from auditgap.types import ConstantEdit, Site

_TESTED: WeakKeyDictionary[HFEngine, set[tuple[Site, ...]]] = WeakKeyDictionary()


def sites_of(engine: HFEngine) -> tuple[Site, ...]:
    """Every site of the subject, the embedding first."""
    return tuple(Site(i) for i in range(-1, len(engine.blocks)))


def change(edit: ConstantEdit, h: torch.Tensor) -> torch.Tensor:
    """What the edit adds to hidden states h [T, D] at one site: shift − (h·read) write, in fp32."""
    made = torch.zeros_like(h, dtype=torch.float32)
    if edit.read is not None:
        made = made - (h.float() @ edit.read)[:, None] * edit.write
    return made if edit.shift is None else made + edit.shift


def generate(
    engine: HFEngine,
    rendered: Sequence[Rendered],
    edits: Sequence[ConstantEdit],
    max_new_tokens: int,
) -> list[Completion]:
    """Greedy completions, in order, each under its edit. Raises AuditgapError where the hook does
    not hold (`self_test`)."""
    done: dict[int, Completion] = {}
    for sites in dict.fromkeys(edit.sites for edit in edits):
        self_test(engine, sites)
        mine = [i for i, edit in enumerate(edits) if edit.sites == sites]
        for pack in engine.packing.speaking_packs(
            [len(rendered[i].ids) + max_new_tokens for i in mine]
        ):
            rows = [mine[p] for p in pack]
            spoken = engine.fitting.run(
                ("speaking", sites),
                lambda some: _generate(engine, rendered, edits, some, max_new_tokens),
                rows,
                [len(rendered[i].ids) + max_new_tokens for i in rows],
            )
            done.update(zip(rows, spoken, strict=True))
    return [done[i] for i in range(len(rendered))]


class Rows:
    """The edits of a batch as one function of its hidden states [B, T, D]; `stay` says which rows
    are left in the batch."""

    def __init__(self, edits: Sequence[ConstantEdit], width: int, device: torch.device) -> None:
        self.sites = edits[0].sites
        self.rows = torch.arange(len(edits), device=device)
        zero = torch.zeros(width)

        def stacked(name: str) -> torch.Tensor | None:
            vectors = [getattr(edit, name) for edit in edits]
            if all(v is None for v in vectors):
                return None
            return torch.stack([zero if v is None else v.float() for v in vectors]).to(device)

        self.shift, self.read, self.write = stacked("shift"), stacked("read"), stacked("write")

    def stay(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        whole = h.float()
        edited = whole
        if self.read is not None and self.write is not None:
            along = torch.einsum("btd,bd->bt", whole, self.read[self.rows])
            edited = edited - along[..., None] * self.write[self.rows][:, None]
        if self.shift is not None:
            edited = edited + self.shift[self.rows][:, None]
        return edited.to(h.dtype)

    @contextmanager
    def on(self, engine: HFEngine) -> Iterator[Rows]:
        """While open, every site is edited."""
        with ExitStack() as stack:
            for site in self.sites:
                stack.enter_context(engine.edited(site, self))
            yield self


@torch.inference_mode()
def _generate(
    engine: HFEngine,
    rendered: Sequence[Rendered],
    edits: Sequence[ConstantEdit],
    some: Sequence[int],
    max_new_tokens: int,
) -> list[Completion]:
    ids, mask = left_pad([rendered[i].ids for i in some], engine.pad_id, engine.device)
    cache = engine.new_cache()
    with Rows([edits[i] for i in some], engine.width, engine.device).on(engine) as rows:
        logits = engine.forward(ids, mask, keep=1, cache=cache).logits
        written = engine.decode(cache, logits, mask, max_new_tokens, Greedy(), stayed=rows.stay)
    chat = engine.loaded.chat
    return [
        completion_of(chat, rendered[i], w.ids, w.stopped, w.finite)
        for i, w in zip(some, written, strict=True)
    ]


def self_test(engine: HFEngine, sites: tuple[Site, ...]) -> None:
    """Prove that a standing edit arrives at every one of the sites, at prefill and while decoding.
    Raises AuditgapError."""
    tested = _TESTED.setdefault(engine, set())
    if sites in tested:
        return
    try:
        with torch.inference_mode():
            found = problem(engine, sites)
    except AuditgapError:
        raise
    except Exception as error:  # what a family raises when it cannot be patched
        found = (
            f"{type(error).__name__}:"
            f" {str(error).splitlines()[0][:120] if str(error) else 'no message'}"
        )
    if found:
        raise AuditgapError(
            f"Self-test of standing edits failed for {engine.loaded.subject.name}: {found}. This"
            f" architecture ({type(engine.model).__name__}) cannot be steered with this version;"
            " nothing was measured."
        )
    tested.add(sites)


def problem(engine: HFEngine, sites: tuple[Site, ...]) -> str:
    """What is wrong with standing edits at these sites; the empty string when nothing is."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, engine.loaded.n_embeddings, (2, 6), generator=generator).to(
        engine.device
    )
    mask = torch.ones_like(ids)
    width, device = engine.width, engine.device
    u = torch.randn(width, generator=generator)
    u = u / u.norm()
    clean = engine.forward(ids, mask, keep=1).logits
    if not torch.isfinite(clean).all():
        return "the model's own logits are not all finite numbers"
    with Rows([ConstantEdit(sites, shift=torch.zeros(width))] * 2, width, device).on(engine):
        if not torch.equal(engine.forward(ids, mask, keep=1).logits, clean):
            return "a zero edit changes the logits"

    # ablation: seen after the edit, at prefill and at a decoding step, no site has a component
    # along u
    seen: list[torch.Tensor] = []
    cache = engine.new_cache()
    with ExitStack() as stack:
        stack.enter_context(
            Rows([ConstantEdit(sites, read=u, write=u)] * 2, width, device).on(engine)
        )
        for site in sites:
            stack.enter_context(engine.edited(site, lambda h: (seen.append(h), h)[1]))
        engine.forward(ids[:, :-1], mask[:, :-1], keep=1, cache=cache)
        if len(seen) != len(sites):
            return "the hook is not called once a site"
        last = engine.forward(ids[:, -1:], mask, keep=1, cache=cache).logits
    if len(seen) != 2 * len(sites):
        return "the hook is not called while decoding"
    exact = engine.loaded.dtype == torch.float32
    for h in seen:
        along = (h.float() @ u.to(device)).abs().amax().item()
        if along > (1e-4 if exact else 0.05) * max(1e-6, h.float().norm(dim=-1).amax().item()):
            return "an ablated direction is still there"

    # decoding under the edit is the whole text under the edit
    with Rows([ConstantEdit(sites, read=u, write=u)] * 2, width, device).on(engine):
        whole = engine.forward(ids, mask, keep=1).logits
    tolerance = (1e-3 if exact else 0.1) * max(1e-3, whole.abs().max().item())
    if not torch.isfinite(whole).all() or (last - whole).abs().max().item() > tolerance:
        return "decoding under the edit gives other logits than the whole text under it"
    if torch.equal(whole, clean):
        return "the edit does not reach the logits"
    return ""
