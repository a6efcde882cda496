"""A loaded model into whose blocks edits go: the one hook through which every edit goes, and
forwards that run no more of the model than is asked for.

    with model.edited(Site(15), lambda h: h + delta):
        logits = model.forward(ids, mask, keep=1).logits

Two facts make it fast without touching a family's own code. An edit at block i leaves blocks 0..i
as they were, so their work is done once a prompt and shared by all of its budgets, attacks and
draws; and the model's own forward does the rest with the lower blocks passing their input through.

The model may lie over several devices (`models.Shard`): edits are made at home, where token ids go
and logits come from, and handed to each block where it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from auditgap.engines.batching import positions
from auditgap.engines.caches import TextCache, WholeText, closed_up, growing, select
from auditgap.engines.choosing import TokenChooser
from auditgap.engines.layout import Layout, first_position
from auditgap.models import LoadedModel
from auditgap.types import Site


@dataclass(eq=False)
class Written:
    """What is known of a row while it is written."""

    ids: list[int] = field(default_factory=list)
    stopped: bool = False
    finite: bool = True
    #: ids and log-probabilities, a pair a step
    tops: list[tuple[list[int], list[float]]] = field(default_factory=list)


#: Logits of one forward, in numbers: 2 GB with what is computed of them in fp32.
_LOGITS = 2**27


class _Captured(Exception):
    """Not an error: it ends a forward whose upper blocks nobody needs."""


class HookedModel:
    """A loaded model that can be edited, cut and decoded."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        compile: bool = False,
        agreed: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    ) -> None:
        self.loaded = loaded
        self.model = loaded.model
        self.blocks = loaded.blocks
        pad = loaded.tokenizer.pad_token_id
        self.pad_id = pad if pad is not None and pad < loaded.n_embeddings else 0
        #: what is decided by numbers, as all ranks of a sharded model decide it
        self.agreed = agreed
        #: torch.compile for PGD's blocks: half a minute at first, then a tenth less time
        self.compile = compile
        self._compiled: dict[int, Callable] = {}
        #: sites above which the blocks alone give other numbers: there the whole model runs
        self.short: dict[Site, bool] = {}
        #: whether decoding from this family's cache is what the whole text is
        self.cached = True
        #: whether answers go in token by token, where a state cannot take several at once
        self.stepwise = False
        words = set(inspect.signature(self.model.forward).parameters)
        self._cache_word = "cache_params" if "cache_params" in words else "past_key_values"
        self.layout = Layout.of(self.model, self.blocks[0], self.device)
        self._first: int | None = 0
        self._first = first_position(self.model, self._all_logits, self.device)

    @property
    def device(self) -> torch.device:
        return self.loaded.device

    @property
    def width(self) -> int:
        """D of every h [B, T, D]: of several residual streams their joint width."""
        return self.loaded.width * self.layout.n_streams

    def _all_logits(self, ids: torch.Tensor, mask: torch.Tensor, first: int) -> torch.Tensor:
        place = positions(mask) + first
        return self.forward(ids, mask, keep=ids.shape[1], place=place).logits

    def new_cache(self) -> TextCache:
        """An empty one, of the kind that this family can be decoded with."""
        return growing(self.model.config) if self.cached else WholeText()

    @contextmanager
    def edited(
        self, site: Site, edit: Callable[[torch.Tensor], torch.Tensor], *, skip_trunk: bool = False
    ) -> Iterator[None]:
        """While open, the site's hidden states h [B, T, D] are replaced by `edit(h)`, which sees h
        at home and gives it there.

        With `skip_trunk` the blocks up to and including the site pass their input through, for an
        `edit` that does not read h. Everything is put back on the way out, after an exception too.
        """
        skip_trunk = skip_trunk and self.short.get(site, True)
        touched: list[tuple[nn.Module, Any]] = []

        def edit_here(h: torch.Tensor) -> torch.Tensor:
            edited = edit(self.layout.flat(h).to(self.device))
            return self.layout.laid_out(edited.to(h.device), h)

        def before(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": edit_here(kwargs["hidden_states"])}
            return (edit_here(args[0]), *args[1:]), kwargs

        def after(_module: nn.Module, _args: tuple, output: Any) -> Any:
            if isinstance(output, (tuple, list)):
                return type(output)([edit_here(output[0]), *output[1:]])
            return edit_here(output)

        if site.is_embedding:
            handle = self.blocks[0].register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = self.blocks[site.layer_index].register_forward_hook(after)
        try:
            if skip_trunk and not site.is_embedding:
                for block in self.blocks[: site.layer_index + 1]:
                    touched.append((block, block.__dict__.get("forward")))
                    block.forward = _passing_through(self.layout.returns_tuples)
            yield
        finally:
            handle.remove()
            for block, own in touched:
                _put_back(block, own)

    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        *,
        keep: int,
        cache: Any = None,
        place: torch.Tensor | None = None,
    ) -> Any:
        """One forward with logits at the last `keep` positions; `place` overrides the position
        ids."""
        if isinstance(cache, WholeText):
            text = cache.extended(ids)
            if cache.site is None:
                return self.forward(text, mask, keep=keep)
            with self.edited(cache.site, cache.replaced):
                return self.forward(text, mask, keep=keep)
        if place is None and self._first is not None:
            place = positions(mask)[:, -ids.shape[1] :] + self._first
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            use_cache=cache is not None,
            logits_to_keep=keep,
            **({} if place is None else {"position_ids": place}),
            **({} if cache is None else {self._cache_word: cache}),
        )
        if out.logits.shape[1] > keep:  # a family that gives them all
            out.logits = out.logits[:, -keep:]
        return out

    def logits_from(
        self, site: Site, hidden: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, *, keep: int
    ) -> torch.Tensor:
        """Logits [B, keep, V] of the blocks above the site, given its hidden states [B, T, D];
        differentiable in `hidden`."""
        with self.edited(site, lambda _: hidden, skip_trunk=True), self._for_gradients(site, keep):
            return self.forward(ids, mask, keep=keep).logits

    @contextmanager
    def _for_gradients(self, site: Site, keep: int) -> Iterator[None]:
        """What makes a step faster without changing it: work only where it counts, and compiled
        blocks if asked for."""
        above = list(enumerate(self.blocks))[site.layer_index + 1 :]
        touched: list[tuple[nn.Module, Callable | None]] = []
        # the kept positions are a strided slice, which would be multiplied row by row, reading the
        # weights every time
        head: Any = self.model.get_output_embeddings() or nn.Identity()
        handle = head.register_forward_pre_hook(lambda _m, args: (args[0].contiguous(), *args[1:]))
        try:
            if self.compile:
                for i, block in above:
                    touched.append((block, block.__dict__.get("forward")))
                    if i not in self._compiled:
                        self._compiled[i] = torch.compile(block.forward, dynamic=True)
                    block.forward = self._compiled[i]
            elif (
                above
                and self.short.get(site, True)
                and isinstance(mlp := getattr(self.blocks[-1], "mlp", None), nn.Module)
            ):
                # nothing reads the last block's other positions, and an MLP does not mix positions
                touched.append((mlp, mlp.__dict__.get("forward")))
                mlp.forward = _at_the_end(mlp.forward, keep)
            yield
        finally:
            handle.remove()
            for module, own in touched:
                _put_back(module, own)

    def capture(
        self, site: Site, ids: torch.Tensor, mask: torch.Tensor, *, cache: Any = None
    ) -> torch.Tensor:
        """The site's clean hidden states [B, T, D]; runs no block above the site. `cache` keeps the
        trunk's keys and values."""
        held: list[torch.Tensor] = []

        def hold(h: torch.Tensor) -> torch.Tensor:
            held.append(h)
            raise _Captured

        with torch.no_grad(), self.edited(site, hold), suppress(_Captured):
            self.forward(ids, mask, keep=1, cache=cache)
        return held[0]

    def decode(
        self,
        cache: TextCache,
        logits: torch.Tensor,
        mask: torch.Tensor,
        max_new_tokens: int,
        choose: TokenChooser,
        top_logprobs: int = 0,
        stayed: Callable[[torch.Tensor], None] | None = None,
    ) -> list[Written]:
        """New tokens of every row after the prompts in the cache, whose last logits [B, 1, V] and
        mask [B, T] are given.

        `stayed` is told which rows [B'] are left in the batch whenever finished ones have left it.
        """
        rows = list(range(len(logits)))
        stops = torch.tensor(sorted(self.loaded.stop_ids), device=self.device)
        written = [Written() for _ in rows]
        for step in range(max_new_tokens):
            here = logits[:, -1]
            broken = ~torch.isfinite(here.amax(-1))  # NaN wins a maximum
            token, broken = self.agreed(torch.stack([choose(here, rows), broken.long()]))
            ended = torch.isin(token, stops) | broken.bool()
            going = []
            # one copy to the host a step, which waits for the device
            for at, (t, e, b, *top) in enumerate(_told(here, token, ended, broken, top_logprobs)):
                row = written[rows[at]]
                row.stopped |= e and not b
                row.finite &= not b
                if not e:
                    row.ids.append(t)
                    going.append(at)
                if top_logprobs and not b:
                    row.tops.append((list(map(int, top[:top_logprobs])), top[top_logprobs:]))
            if step + 1 == max_new_tokens or not going:
                break
            if len(going) < len(rows):  # finished rows leave the batch
                left = closed_up(going)
                rows = [rows[at] for at in left]
                kept = torch.tensor(left, device=self.device)
                select(cache, left)
                token, mask = token[kept], mask[kept]
                if stayed is not None:
                    stayed(torch.tensor(rows, device=self.device))
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            logits = self.forward(token[:, None], mask, keep=1, cache=cache).logits
        return written

    def answer_logits(
        self, cache: TextCache, tokens: torch.Tensor, mask: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Logits [B, m, V] of n tokens [B, n] after the text in the cache, a few tokens after the
        other, each with the number of the token that its first predicts (the first of all is 1);
        mask [B, T + n]. All of them at once would be larger than the model."""
        n = tokens.shape[1]
        fits = max(1, _LOGITS // (len(tokens) * self.loaded.n_embeddings))
        step = 1 if self.stepwise and self.cached else min(n, fits)
        for at in range(0, n, step):
            m = min(step, n - at)
            done = mask.shape[1] - n + at
            out = self.forward(tokens[:, at : at + m], mask[:, : done + m], keep=m, cache=cache)
            yield at + 1, out.logits


def _told(
    logits: torch.Tensor, token: torch.Tensor, ended: torch.Tensor, broken: torch.Tensor, top: int
) -> list[list[Any]]:
    """A row each: its token [B], whether it ended and whether its logits [B, V] were no numbers, and
    the `top` likeliest ids and their log-probabilities. As doubles, which hold ids and fp32 whole."""
    columns = torch.stack([token, ended.long(), broken], 1)
    if top:
        found = logits.float().log_softmax(-1).topk(top, dim=-1)
        columns = torch.cat([c.double() for c in (columns, found.indices, found.values)], 1)
    return [[int(t), bool(e), bool(b), *rest] for t, e, b, *rest in columns.tolist()]


def _put_back(module: nn.Module, own: Callable | None) -> None:
    """Give a module the `forward` it had: an instance's own (accelerate's dispatch lives there), or
    its class's."""
    if own is not None:
        module.forward = own
    elif "forward" in module.__dict__:
        del module.forward


def _at_the_end(forward: Callable, keep: int) -> Callable:
    """A position-wise forward that computes the last `keep` positions of [B, T, D] and leaves zeros
    elsewhere."""

    def at_the_end(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:  # a family that adds the residual inside
            return forward(x, *args, **kwargs)
        out = forward(x[:, -keep:].contiguous())
        return (
            nn.functional.pad(out, (0, 0, x.shape[1] - keep, 0))
            if isinstance(out, torch.Tensor)
            else forward(x)
        )

    return at_the_end


def _passing_through(as_tuple: bool) -> Callable:
    def forward(hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return (hidden_states,) if as_tuple else hidden_states

    return forward
