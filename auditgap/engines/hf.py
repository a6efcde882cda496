"""The engine on transformers: it speaks under an edit, and holds the one hook through which every
edit goes.

    engine = HFEngine(models.load("smollm2"))
    clean = engine.generate([Request(engine.render(prompt))], max_new_tokens=32)

Two facts make it fast without touching a family's own code. An edit at block i leaves blocks 0..i
as they were, so their work is done once a prompt and shared by all of its budgets, attacks and
draws; and the model's own forward does the rest with the lower blocks passing their input through.
An edit acts on the prompt's positions at prefill only; decoding reads it from the KV cache.

The model may lie over several devices (`models.Shard`): edits are made at home, where token ids go
and logits come from, and handed to each block where it is.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from auditgap.engines import (
    Completion,
    Question,
    Reply,
    Request,
    Sampling,
    check_length,
    self_test,
    to_ask,
    weights_identity,
)
from auditgap.engines.batching import Packing, halving, in_packs, left_pad, positions, right_pad
from auditgap.engines.choosing import Greedy, Sampler, TokenChooser, likeliest
from auditgap.errors import AuditgapError
from auditgap.models import LoadedModel, Rendered
from auditgap.types import Edit, Prompt, Site


@dataclass(eq=False)
class Written:
    """What is known of a row while it is written."""

    ids: list[int] = field(default_factory=list)
    stopped: bool = False
    finite: bool = True
    #: ids and log-probabilities, a pair a step
    tops: list[tuple[list[int], list[float]]] = field(default_factory=list)


class _Captured(Exception):
    """Not an error: it ends a forward whose upper blocks nobody needs."""


class HFEngine:
    """Text in, text out, with edits, for one loaded subject."""

    name = "hf"

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        batch_tokens: int | None = None,
        pad_tolerance: float | None = None,
        compile: bool = False,
        agreed: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    ) -> None:
        self.loaded = loaded
        #: what is decided by numbers, as all ranks of a sharded model decide it
        self.agreed = agreed
        #: torch.compile for PGD's blocks: half a minute at first, then a tenth less time
        self.compile = compile
        self._compiled: dict[int, Callable] = {}
        self.model = loaded.model
        self.blocks = loaded.blocks
        self.packing = Packing.on(loaded.device.type, batch_tokens, pad_tolerance)
        pad = loaded.tokenizer.pad_token_id
        self.pad_id = pad if pad is not None and pad < loaded.n_embeddings else 0
        self._tested: set[Site] = set()

    @property
    def device(self) -> torch.device:
        return self.loaded.device

    def describe(self) -> dict[str, Any]:
        return weights_identity(self.loaded, self.loaded.dtype)

    @cached_property
    def _blocks_return_tuples(self) -> bool:
        """Whether this family's blocks return (h, …) or h itself; transformers 5 settled on h for
        nearly all."""
        seen: list[bool] = []
        handle = self.blocks[0].register_forward_hook(
            lambda _m, _a, output: seen.append(isinstance(output, tuple))
        )
        try:
            with torch.inference_mode():
                self.model(
                    input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device),
                    use_cache=False,
                )
        finally:
            handle.remove()
        return seen[0]

    def render(self, prompt: Prompt) -> Rendered:
        return self.loaded.render(prompt)

    def encode(self, text: str) -> tuple[int, ...]:
        return self.loaded.chat.encode(text)

    # -- the hook
    # ------------------------------------------------------------------------------------------------------

    @contextmanager
    def edited(
        self, site: Site, edit: Callable[[torch.Tensor], torch.Tensor], *, skip_trunk: bool = False
    ) -> Iterator[None]:
        """While open, the site's hidden states h [B, T, D] are replaced by `edit(h)`, which sees h
        at home and gives it there.

        With `skip_trunk` the blocks up to and including the site pass their input through, for an
        `edit` that does not read h. Everything is put back on the way out, after an exception too.
        """
        touched: list[tuple[nn.Module, Any]] = []
        # probed before the hook is on
        as_tuple = skip_trunk and not site.is_embedding and self._blocks_return_tuples

        def edit_here(h: torch.Tensor) -> torch.Tensor:
            return edit(h.to(self.device)).to(h.device)

        def before(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": edit_here(kwargs["hidden_states"])}
            return (edit_here(args[0]), *args[1:]), kwargs

        def after(_module: nn.Module, _args: tuple, output: Any) -> Any:
            if isinstance(output, tuple):
                return (edit_here(output[0]), *output[1:])
            return edit_here(output)

        if site.is_embedding:
            handle = self.blocks[0].register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = self.blocks[site.layer_index].register_forward_hook(after)
        try:
            if skip_trunk and not site.is_embedding:
                for block in self.blocks[: site.layer_index + 1]:
                    touched.append((block, block.__dict__.get("forward")))
                    block.forward = _passing_through(as_tuple)
            yield
        finally:
            handle.remove()
            for block, own in touched:
                _put_back(block, own)

    def self_test(self, site: Site) -> None:
        """Prove that a known δ arrives at the site, reaches the logits, and is the same by both
        ways of running.

        Raises AuditgapError when the model's blocks cannot be edited; nothing is measured with a
        hook that does not bite.
        """
        if site in self._tested:
            return
        try:
            with torch.inference_mode():
                problem = self_test.problem(self, site)
        except AuditgapError:
            raise
        except Exception as error:  # what a family raises when it cannot be cut, patched or padded
            problem = (
                f"{type(error).__name__}:"
                f" {str(error).splitlines()[0][:120] if str(error) else 'no message'}"
            )
        if problem:
            raise AuditgapError(
                f"Self-test failed at {site} of {self.loaded.subject.name}: {problem}. This"
                f" architecture ({type(self.model).__name__}) cannot be audited with this version;"
                " nothing was measured."
            )
        self._tested.add(site)

    # -- forwards
    # ------------------------------------------------------------------------------------------------------

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
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask)[:, -ids.shape[1] :] if place is None else place,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=keep,
        )

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
        head: Any = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _m, args: (args[0].contiguous(), *args[1:]))
        try:
            if self.compile:
                for i, block in above:
                    touched.append((block, block.__dict__.get("forward")))
                    if i not in self._compiled:
                        self._compiled[i] = torch.compile(block.forward, dynamic=True)
                    block.forward = self._compiled[i]
            elif above and isinstance(mlp := getattr(self.blocks[-1], "mlp", None), nn.Module):
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

    def activations(self, rendered: Sequence[Rendered], site: Site) -> list[torch.Tensor]:
        """Each prompt's clean hidden states [T, D] at the site, fp32 on the CPU, one prompt at a
        time in memory."""

        def run(rows: Sequence[int]) -> list[torch.Tensor]:
            ids, mask = left_pad([rendered[i].ids for i in rows], self.pad_id, self.device)
            h = self.capture(site, ids, mask)
            return [h[b, -len(rendered[i].ids) :].float().cpu() for b, i in enumerate(rows)]

        return in_packs(run, self.packing.packs([len(r.ids) for r in rendered]))

    # -- speaking
    # ------------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[Completion]:
        """Greedy completions, in order. Requests of one site share that site's trunk; order and
        packing change nothing.

        Raises AuditgapError for an edit that has not as many positions as its prompt.
        """
        for request in requests:
            check_length(request.rendered, request.edit)
        done: dict[int, Completion] = {}
        sites = {_site(r.edit) for r in requests}
        for site in sorted(sites, key=lambda s: -2 if s is None else s.layer_index):
            if site is not None:
                self.self_test(site)
            mine = [i for i, r in enumerate(requests) if _site(r.edit) == site]
            for pack in self.packing.speaking_packs(
                [len(requests[i].rendered.ids) + max_new_tokens for i in mine]
            ):
                rows = [mine[p] for p in pack]
                completions = halving(
                    lambda some, site=site: self._generate(
                        [requests[i] for i in some], site, max_new_tokens
                    ),
                    rows,
                )
                done.update(zip(rows, completions, strict=True))
        return [done[i] for i in range(len(requests))]

    def ask(self, questions: Sequence[Question], sampling: Sampling) -> list[Reply]:
        """A reply a question. `too_long` where prompt and new tokens exceed the model's window,
        `nonfinite_logits` where the logits were not all numbers. Raises UsageError where the chat
        template cannot write a question.
        """
        prompts, replies, mine = to_ask(
            self.loaded.chat, questions, sampling, self.loaded.max_positions
        )
        for pack in self.packing.speaking_packs(
            [len(prompts[i]) + sampling.max_new_tokens for i in mine]
        ):
            rows = [mine[p] for p in pack]
            found = halving(
                lambda some: self._ask(
                    [prompts[i] for i in some], [questions[i] for i in some], sampling
                ),
                rows,
            )
            for i, reply in zip(rows, found, strict=True):
                replies[i] = reply
        return replies

    @torch.inference_mode()
    def _ask(
        self, prompts: Sequence[tuple[int, ...]], questions: Sequence[Question], sampling: Sampling
    ) -> list[Reply]:
        ids, mask = left_pad(prompts, self.pad_id, self.device)
        cache = DynamicCache(config=self.model.config)
        logits = self.forward(ids, mask, keep=1, cache=cache).logits
        seeds = [q.seed(sampling.seed) for q in questions]
        choose = (
            Sampler(seeds, sampling.temperature, sampling.top_p)
            if sampling.temperature > 0
            else Greedy()
        )
        written = self._decode(
            cache, logits, mask, sampling.max_new_tokens, choose, sampling.top_logprobs
        )
        decode = self.loaded.tokenizer.decode
        return [
            (
                Reply(
                    decode(w.ids, skip_special_tokens=True),
                    tuple(w.ids),
                    w.stopped,
                    tuple(likeliest(top, decode) for top in w.tops),
                )
                if w.finite
                else Reply("", problem="nonfinite_logits")
            )
            for w in written
        ]

    @torch.inference_mode()
    def _generate(
        self, requests: Sequence[Request], site: Site | None, max_new_tokens: int
    ) -> list[Completion]:
        ids, mask = left_pad([r.rendered.ids for r in requests], self.pad_id, self.device)
        cache, logits, effective = self.prefill(requests, site, ids, mask)
        target_nll: list[float | None] = [None] * len(requests)
        if any(r.target for r in requests):
            # on a copy, so that the target's keys and values never stand in the completion's cache
            target_nll = self._answer_nll(
                copy.deepcopy(cache), logits, mask, [r.target for r in requests]
            )
        decode = self.loaded.tokenizer.decode
        return [
            Completion(
                decode(w.ids, skip_special_tokens=True), tuple(w.ids), w.stopped, w.finite, n, *e
            )
            for w, n, e in zip(
                self._decode(cache, logits, mask, max_new_tokens, Greedy()),
                target_nll,
                effective,
                strict=True,
            )
        ]

    def _decode(
        self,
        cache: DynamicCache,
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
        rows = torch.arange(len(logits), device=self.device)
        stops = torch.tensor(sorted(self.loaded.stop_ids), device=self.device)
        written = [Written() for _ in rows]
        for step in range(max_new_tokens):
            here = logits[:, -1]
            broken = ~torch.isfinite(here.amax(-1))  # NaN wins a maximum
            token, broken = self.agreed(torch.stack([choose(here, rows.tolist()), broken.long()]))
            broken = broken.bool()
            ended = torch.isin(token, stops) | broken
            tops = here.float().log_softmax(-1).topk(top_logprobs, dim=-1) if top_logprobs else None
            columns = (rows.tolist(), token.tolist(), ended.tolist(), broken.tolist())
            for at, (row, t, e, b) in enumerate(zip(*columns, strict=True)):
                written[row].stopped |= e and not b
                written[row].finite &= not b
                if not e:
                    written[row].ids.append(t)
                if tops is not None and not b:
                    written[row].tops.append((tops.indices[at].tolist(), tops.values[at].tolist()))
            if step + 1 == max_new_tokens or bool(ended.all()):
                break
            if bool(ended.any()):  # finished rows leave the batch
                going = (~ended).nonzero().squeeze(1)
                _select(cache.layers, going)
                rows, token, mask = rows[going], token[going], mask[going]
                if stayed is not None:
                    stayed(rows)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            logits = self.forward(token[:, None], mask, keep=1, cache=cache).logits
        return written

    def prefill(
        self, requests: Sequence[Request], site: Site | None, ids: torch.Tensor, mask: torch.Tensor
    ) -> tuple[DynamicCache, torch.Tensor, list[tuple[float | None, float | None]]]:
        """KV cache and last logits of all rows; with an edit, the trunk runs once a prompt and the
        rest once a row."""
        cache = DynamicCache(config=self.model.config)
        if site is None:
            return (
                cache,
                self.forward(ids, mask, keep=1, cache=cache).logits,
                [(None, None)] * len(requests),
            )
        first: dict[tuple[int, ...], int] = {}
        source = torch.tensor(
            [first.setdefault(r.rendered.ids, len(first)) for r in requests], device=self.device
        )
        unique_ids, unique_mask = left_pad(list(first), self.pad_id, self.device)
        trunk = DynamicCache(config=self.model.config)
        h = self.capture(site, unique_ids, unique_mask, cache=trunk)[source]
        edited = add(h, stack([_delta(r.edit) for r in requests], h.shape[1], self.device))
        change = (edited.float() - h.float()).flatten(1)
        norms = zip(change.norm(dim=1).tolist(), change.abs().amax(1).tolist(), strict=True)
        effective = [(_finite(l2), _finite(linf)) for l2, linf in norms]
        with self.edited(site, lambda _: edited, skip_trunk=True):
            logits = self.forward(ids, mask, keep=1, cache=cache).logits
        _select(trunk.layers[: site.layer_index + 1], source)
        for index in range(site.layer_index + 1):
            cache.layers[index] = trunk.layers[index]
        return cache, logits, effective

    def close(self) -> None:
        """Let go of the model; its memory goes when nobody else holds it."""
        for name in ("loaded", "model", "blocks"):
            vars(self).pop(name, None)  # it may be closed twice
        self._compiled.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __enter__(self) -> HFEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- scoring
    # -------------------------------------------------------------------------------------------------------

    def nll(
        self,
        rendered: Sequence[Rendered],
        answers: Sequence[Sequence[int]],
        edits: Sequence[Edit | None] | None = None,
    ) -> list[float | None]:
        """Mean NLL (nats a token) of each answer after its prompt, teacher-forced, under its edit
        if it has one.

        None for an empty answer or a non-finite result. Prompts' caches are computed once and equal
        questions asked once.
        """
        edits = [None] * len(answers) if edits is None else edits
        for one, edit in zip(rendered, edits, strict=True):
            check_length(one, edit)
        asked: dict[tuple, int] = {}
        for i, (r, a, e) in enumerate(zip(rendered, answers, edits, strict=True)):
            if len(a):
                asked.setdefault((r.ids, tuple(a), None if e is None else id(e)), i)
        found: dict[tuple, float | None] = {}
        sites = {_site(edits[i]) for i in asked.values()}
        for site in sorted(sites, key=lambda s: -2 if s is None else s.layer_index):
            if site is not None:
                self.self_test(site)
            keys = [k for k, i in asked.items() if _site(edits[i]) == site]
            for pack in self.packing.speaking_packs([len(k[0]) + len(k[1]) for k in keys]):
                mine = [keys[p] for p in pack]
                values = halving(
                    lambda some, site=site: self._nll(
                        [Request(rendered[asked[k]], edits[asked[k]]) for k in some],
                        [k[1] for k in some],
                        site,
                    ),
                    mine,
                )
                found.update(zip(mine, values, strict=True))
        keys = (
            (r.ids, tuple(a), None if e is None else id(e))
            for r, a, e in zip(rendered, answers, edits, strict=True)
        )
        return [found.get(k) for k in keys]

    @torch.inference_mode()
    def _nll(
        self, requests: Sequence[Request], answers: Sequence[Sequence[int]], site: Site | None
    ) -> list[float | None]:
        if site is None:  # the clean prompt's cache serves all of its answers
            first: dict[tuple[int, ...], int] = {}
            source = torch.tensor(
                [first.setdefault(r.rendered.ids, len(first)) for r in requests], device=self.device
            )
            unique, unique_mask = left_pad(list(first), self.pad_id, self.device)
            cache = DynamicCache(config=self.model.config)
            logits = self.forward(unique, unique_mask, keep=1, cache=cache).logits[source]
            _select(cache.layers, source)
            mask = unique_mask[source]
        else:
            ids, mask = left_pad([r.rendered.ids for r in requests], self.pad_id, self.device)
            cache, logits, _ = self.prefill(requests, site, ids, mask)
        return self._answer_nll(cache, logits, mask, answers)

    def _answer_nll(
        self,
        cache: DynamicCache,
        logits: torch.Tensor,
        mask: torch.Tensor,
        answers: Sequence[Sequence[int]],
    ) -> list[float | None]:
        """Mean NLL of each answer after the prompt whose cache [B, …], last logits [B, 1, V] and
        mask [B, T] are given."""
        tokens, real = right_pad(answers, self.pad_id, self.device)
        if tokens.shape[1] > 1:
            whole = torch.cat([mask, real[:, :-1]], 1)
            rest = self.forward(tokens[:, :-1], whole, keep=tokens.shape[1] - 1, cache=cache).logits
            logits = torch.cat([logits, rest], 1)
        return [_finite(v) for v in mean_nll(logits, tokens, real).tolist()]


def _site(edit: Edit | None) -> Site | None:
    return None if edit is None else edit.site


def _delta(edit: Edit | None) -> torch.Tensor:
    """Of an edit that is asked for with its site, so that there is one."""
    if edit is None:
        raise ValueError("Requests at a site each need an edit.")
    return edit.delta


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def mean_nll(logits: torch.Tensor, tokens: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean NLL [B] over each row's real tokens; logits [B, K, V] predict tokens [B, K]. In fp32."""
    nll = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), tokens.flatten(), reduction="none"
    ).view_as(tokens)
    return (nll * real).sum(1) / real.sum(1)


def add(h: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """h + δ, added in fp32 and rounded once to the model's dtype."""
    return h + delta if h.dtype == delta.dtype else (h.float() + delta).to(h.dtype)


def stack(deltas: Sequence[torch.Tensor], width: int, device: torch.device) -> torch.Tensor:
    """Edits [T_i, D] as one [B, width, D] tensor, aligned on the right; padding positions get no
    edit."""
    return torch.stack(
        [nn.functional.pad(d.to(device), (0, 0, width - d.shape[0], 0)) for d in deltas]
    )


def _select(layers: Sequence[Any], rows: torch.Tensor) -> None:
    """Keep these rows of a cache's layers, each where it lies."""
    for layer in layers:
        keys = getattr(layer, "keys", None)
        layer.batch_select_indices(rows if keys is None else rows.to(keys.device))


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
