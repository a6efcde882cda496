"""The engine on transformers: it answers, speaks under an edit, and scores.

    engine = HFEngine(models.load("smollm2"))
    clean = engine.generate([Request(engine.render(prompt))], max_new_tokens=32)

An edit acts on the prompt's positions at prefill only, and decoding reads it from the KV cache,
unless it goes on: then its last row stands at every new token too. The trunk below a site runs once a prompt and is shared by all of its budgets, attacks and draws. Where
edits go in: `auditgap.engines.hooked`.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from auditgap.engines import (
    Completion,
    Question,
    Reply,
    Request,
    Sampling,
    self_test,
    weights_identity,
)
from auditgap.engines.answers import check_length, completion_of, reply_of, to_ask
from auditgap.engines.batching import Packing, in_packs, left_pad, right_pad
from auditgap.engines.caches import TextCache, WholeText, select
from auditgap.engines.choosing import Greedy, Sampler, likeliest
from auditgap.engines.fitting import Fitting, meter_of
from auditgap.engines.hooked import HookedModel
from auditgap.engines.prefill import delta_of, finite, prefill
from auditgap.engines.tensors import add, token_nll
from auditgap.models import LoadedModel, Rendered
from auditgap.types import Document, Edit, Prompt, Site


class HFEngine(HookedModel):
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
        fitting: Fitting | None = None,
    ) -> None:
        super().__init__(loaded, compile=compile, agreed=agreed)
        self._packing = Packing.on(loaded.device.type, batch_tokens, pad_tolerance)
        #: how much of a pack runs at once, learned as it runs
        self.fitting = fitting or Fitting(meter_of(loaded.model))
        self._tested: set[Site] = set()
        self._checked = False

    def describe(self) -> Document:
        return weights_identity(self.loaded, self.loaded.dtype)

    def render(self, prompt: Prompt) -> Rendered:
        return self.loaded.render(prompt)

    def encode(self, text: str) -> tuple[int, ...]:
        return self.loaded.chat.encode(text)

    def self_test(self, site: Site) -> None:
        """Prove that a known δ arrives at the site, reaches the logits, and is the same by both
        ways of running.

        Raises AuditgapError when the model's blocks cannot be edited; nothing is measured with a
        hook that does not bite.
        """
        self.check()
        if site not in self._tested:
            self_test.settle(self, self_test.AT_A_SITE, site, str(site))
            self._tested.add(site)

    def check(self) -> None:
        """Prove, once, that this model answers as transformers' own does, alone and in a batch, in
        one go and token by token. Raises AuditgapError where it does not."""
        if not self._checked:
            self._checked = True  # it asks for packs itself
            try:
                self_test.settle(self, self_test.OF_THE_MODEL, Site(-1), "the model")
            except BaseException:
                self._checked = False
                raise

    def give_up(self, short_cut: self_test.ShortCut, site: Site) -> bool:
        """False where it was given up before."""
        before = self.ways(site)
        match short_cut:
            case "padding":
                self._packing = replace(self._packing, alone=True)
            case "several tokens":
                self.stepwise = True
            case "cache":
                self.cached = False
            case "trunk":
                self.short[site] = False
        return self.ways(site) != before

    def ways(self, site: Site) -> tuple[str, ...]:
        """What this family needs instead of the engine's short cuts; slower, and exact."""
        needs = {
            "a row at a time": self._packing.alone,
            "the whole text at each token": not self.cached,
            "answers token by token": self.stepwise and self.cached,
            "the whole model above the site": not self.short.get(site, True),
        }
        return tuple(what for what, needed in needs.items() if needed)

    @property
    def alone(self) -> bool:
        """Whether rows run one at a time."""
        return self._packing.alone

    @property
    def packing(self) -> Packing:
        """How rows run together."""
        self.check()
        return self._packing

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
            mine = [i for i, r in enumerate(requests) if _site(r.edit) == site]
            self._test(site, [requests[i].edit for i in mine])
            for pack in self.packing.speaking_packs(
                [len(requests[i].rendered.ids) + max_new_tokens for i in mine]
            ):
                rows = [mine[p] for p in pack]
                completions = self.fitting.run(
                    ("speaking", site),
                    lambda some, site=site: self._generate(
                        [requests[i] for i in some], site, max_new_tokens
                    ),
                    rows,
                    [len(requests[i].rendered.ids) + max_new_tokens for i in rows],
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
            [len(prompts[i]) + sampling.new_tokens for i in mine]
        ):
            rows = [mine[p] for p in pack]
            found = self.fitting.run(
                ("speaking", None),
                lambda some: self._ask(
                    [prompts[i] for i in some], [questions[i] for i in some], sampling
                ),
                rows,
                [len(prompts[i]) + sampling.new_tokens for i in rows],
            )
            for i, reply in zip(rows, found, strict=True):
                replies[i] = reply
        return replies

    @torch.inference_mode()
    def _ask(
        self, prompts: Sequence[tuple[int, ...]], questions: Sequence[Question], sampling: Sampling
    ) -> list[Reply]:
        ids, mask = left_pad(prompts, self.pad_id, self.device)
        cache = self.new_cache()
        logits = self.forward(ids, mask, keep=1, cache=cache).logits
        seeds = [q.seed(sampling.seed) for q in questions]
        choose = (
            Sampler(seeds, sampling.temperature, sampling.top_p)
            if sampling.temperature > 0
            else Greedy()
        )
        written = self.decode(
            cache, logits, mask, sampling.new_tokens, choose, sampling.top_logprobs
        )
        decode = self.loaded.tokenizer.decode
        return [
            (
                reply_of(
                    self.loaded.chat,
                    w.ids,
                    w.stopped,
                    sampling,
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
        cache, logits, effective = prefill(self, requests, site, ids, mask)
        target_nll: list[float | None] = [None] * len(requests)
        with self._going_on(requests, site, cache) as stay:
            if any(r.target for r in requests):
                # on a copy, so that the target's keys and values never stand in the completion's
                target_nll = self._answer_nll(
                    copy.deepcopy(cache), logits, mask, [r.target for r in requests]
                )
            written = self.decode(cache, logits, mask, max_new_tokens, Greedy(), stayed=stay)
        return [
            completion_of(self.loaded.chat, r.rendered, w.ids, w.stopped, w.finite, n, *e)
            for r, w, n, e in zip(requests, written, target_nll, effective, strict=True)
        ]

    @contextmanager
    def _going_on(
        self, requests: Sequence[Request], site: Site | None, cache: TextCache
    ) -> Iterator[Callable[[torch.Tensor], None] | None]:
        """While open, edits that go on stand at every token behind the prompts; gives what is told
        which rows stay."""
        if site is None or not any(_goes_on(r.edit) for r in requests):
            yield None
            return
        shift = torch.stack([delta_of(r.edit)[-1:] * _goes_on(r.edit) for r in requests])
        shift = shift.to(self.device)
        if isinstance(cache, WholeText):
            cache.behind = shift
            yield None
            return
        rows = torch.arange(len(requests), device=self.device)

        def stay(kept: torch.Tensor) -> None:
            nonlocal rows
            rows = kept

        with self.edited(site, lambda h: add(h, shift[rows])):
            yield stay

    def _test(self, site: Site | None, edits: Sequence[Edit | None]) -> None:
        """Prove that these edits arrive, those of tokens to come too. Raises AuditgapError."""
        if site is None:
            return
        self.self_test(site)
        if any(map(_goes_on, edits)):
            from auditgap.engines import constant

            constant.self_test(self, (site,))

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
            keys = [k for k, i in asked.items() if _site(edits[i]) == site]
            self._test(site, [edits[asked[k]] for k in keys])
            for pack in self.packing.speaking_packs([len(k[0]) + len(k[1]) for k in keys]):
                mine = [keys[p] for p in pack]
                values = self.fitting.run(
                    ("scoring", site),
                    lambda some, site=site: self._nll(
                        [Request(rendered[asked[k]], edits[asked[k]]) for k in some],
                        [k[1] for k in some],
                        site,
                    ),
                    mine,
                    [len(k[0]) + len(k[1]) for k in mine],
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
            source = [first.setdefault(r.rendered.ids, len(first)) for r in requests]
            unique, unique_mask = left_pad(list(first), self.pad_id, self.device)
            cache = self.new_cache()
            logits = self.forward(unique, unique_mask, keep=1, cache=cache).logits[source]
            select(cache, source)
            mask = unique_mask[source]
        else:
            ids, mask = left_pad([r.rendered.ids for r in requests], self.pad_id, self.device)
            cache, logits, _ = prefill(self, requests, site, ids, mask)
        with self._going_on(requests, site, cache):
            return self._answer_nll(cache, logits, mask, answers)

    def _answer_nll(
        self,
        cache: TextCache,
        logits: torch.Tensor,
        mask: torch.Tensor,
        answers: Sequence[Sequence[int]],
    ) -> list[float | None]:
        """Mean NLL of each answer after the prompt whose cache [B, …], last logits [B, 1, V] and
        mask [B, T] are given."""
        tokens, real = right_pad(answers, self.pad_id, self.device)
        nll = token_nll(logits, tokens[:, :1])
        if tokens.shape[1] > 1:
            whole = torch.cat([mask, real[:, :-1]], 1)
            parts = self.answer_logits(cache, tokens[:, :-1], whole)
            nll = torch.cat([nll, *(token_nll(part, tokens[:, at:]) for at, part in parts)], 1)
        return [finite(v) for v in ((nll * real).sum(1) / real.sum(1)).tolist()]


def _site(edit: Edit | None) -> Site | None:
    return None if edit is None else edit.site


def _goes_on(edit: Edit | None) -> bool:
    return edit is not None and edit.goes_on
