"""Edits inside vLLM, of prompts and of every position, against the engine on transformers, fp32,
token for token; and every way in which they must say no.

vLLM runs in a process of its own (`served`), with the batch made as awkward as it gets: mixed
edits, chunks, preemptions.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from auditgap import models
from auditgap.engines import Completion, Request, constant
from auditgap.engines.coded import Coded
from auditgap.engines.hf import HFEngine
from auditgap.engines.vllm import process, wishes, worker
from auditgap.engines.vllm.editor import find_blocks
from auditgap.engines.vllm.edits import (
    ENVIRONMENT,
    OPTIONS,
    REQUEST,
    layers_of,
    own_of,
    pack,
    salted,
    settle,
    span_of,
    terms_of,
    unpack,
)
from auditgap.engines.vllm.edits import edited as under
from auditgap.engines.vllm.rows import EditedRows, PlacedEdit, Span, term_of
from auditgap.engines.vllm.self_test import self_test, standing_self_test
from auditgap.engines.vllm.worker import EditExtension
from auditgap.errors import AuditgapError
from auditgap.interventions.descent import PGD, LinfBall
from auditgap.models import Rendered
from auditgap.types import ConstantEdit, Edit, Prompt, Site

pytestmark = pytest.mark.minutes

#: vLLM's CPU kernels want heads of 32, 64, …
HEADS = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gpt_neox": {},  # by vLLM's transformers backend, whose streams are [1, N, D]
}
PROMPTS = [
    "What colour is the vault?",
    "Tell me how bread is baked, step by step, with salt and flour.",
    "Why is the sea blue?",
    "Who opens the door at noon, and with which key? Say it in one sentence.",
    "Name a star.",
    "What is the time now?",
    "Write two lines about the moon over a green sea.",
    "How do I shut an oven?",
]
real = pytest.mark.real


# -- vLLM in a process of its own
# --------------------------------------------------------------------------------------


class Breakable(EditExtension):
    """The extension, made to go wrong on demand: a self-test is worth what it catches."""

    def edits_break(self, how: str) -> None:
        self.how = how

    def edits_open(self) -> dict[str, Any]:
        if hasattr(self, "weight"):
            self.weight.remove()
        told = super().edits_open()
        editor, how = self._edits, getattr(self, "how", "")
        changed, read_batch = editor._changed, editor._read_batch
        if how == "uncalled":
            editor._hook = lambda layer: None
        elif how == "deaf":
            editor._changed = lambda layer, values: None
        elif how == "shifted":
            editor._read_batch = lambda: _with_spans(read_batch(), _shifted)
        elif how == "prefill only":
            editor._read_batch = lambda: _with_spans(read_batch(), _of_several)
        elif how == "spilling":  # the first row of the batch gets something too
            editor._changed = lambda layer, values: _spilt(changed(layer, values), editor.width)
        elif (
            how == "weighted"
        ):  # a family whose next block reads more than the sum of hidden and residual
            self.weight = editor.blocks[1].register_forward_pre_hook(
                lambda _m, args: (args[0], 2 * args[1], args[2])
            )
        elif how == "short":
            put = editor.put
            editor.put = lambda name, layers, terms, own: put(
                name, layers, {what: _without_last(term) for what, term in terms.items()}, own
            )
        return told

    def edits_hooks(self) -> int:
        """Hooks on the model's modules."""
        return sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.get_model().modules()
        )

    def edits_unfit(self, part: str, name: str, value: Any) -> str:
        """What would be said of this worker if its configuration were another; `part` "runner": if
        its runner were."""
        if part == "runner":
            from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Other

            return worker._unfit(Other.__new__(Other), self.vllm_config)
        config = copy.copy(self.vllm_config)
        changed = copy.copy(getattr(config, part)) if name else value
        if name:
            object.__setattr__(changed, name, value)
        object.__setattr__(config, part, changed)
        return worker._unfit(self.model_runner, config)


def _without_last(term: Coded) -> Coded:
    return Coded(term.codes[:-1], term.book[:-1])


def _with_spans(batch: tuple[list[Any], list[Any]], change: Callable[[Any], Any]) -> Any:
    spans, recorded = batch
    return [new for span in spans if (new := change(span)) is not None], recorded


def _shifted(span: Any) -> Any:
    return dataclasses.replace(span, n=span.n - 1, first=span.first + 1) if span.n > 1 else None


def _of_several(span: Any) -> Any:
    """What a hook does that lets decoding steps pass."""
    return span if span.n > 1 else None


def _spilt(values: list[Any] | None, width: int) -> list[Any] | None:
    for value in [
        v
        for v in values or []
        if isinstance(v, torch.Tensor) and v.is_floating_point() and v.shape[-1] == width
    ]:
        value.view(-1, width)[0] += 1.0
    return values


def _serve(
    connection: Any, folder: str, environment: dict[str, str], options: dict[str, Any]
) -> None:
    """The child: one LLM, and what the tests may ask of it."""
    os.environ.update(environment)
    os.environ.update(ENVIRONMENT)
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_HOST_IP="127.0.0.1",
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
    )
    from vllm import LLM

    llm = LLM(
        folder,
        **{
            **OPTIONS,
            "dtype": "float32",
            "max_model_len": 256,
            "skip_tokenizer_init": True,
            "disable_log_stats": False,
            "max_num_seqs": 8,
            "worker_extension_cls": f"{__name__}.Breakable",
            **options,
        },
    )
    does = {
        "speak": lambda *a: _speak(llm, *a),
        "score": lambda *a: _score(llm, *a),
        "self_test": lambda *a: self_test(llm, *a),
        "standing_self_test": lambda *a: standing_self_test(llm, *a),
        "rpc": lambda method, *a: llm.collective_rpc(method, args=a),
        "preemptions": lambda: sum(
            m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"
        ),
    }
    connection.send("ready")
    while (asked := connection.recv()) is not None:
        try:
            connection.send((True, does[asked[0]](*asked[1:])))
        except AuditgapError as error:
            connection.send((False, str(error)))
    llm.llm_engine.engine_core.shutdown()
    os._exit(0)


def _put(llm: Any, requests: Sequence[tuple[list[int], Any]]) -> list[dict[str, Any]]:
    """The extra arguments of each request: (ids, None) or (ids, (layers, packed terms, first, last,
    own))."""
    extra: list[dict[str, Any]] = [{REQUEST: i} for i in range(len(requests))]
    for i, (_, edit) in enumerate(requests):
        if edit is not None:
            layers, terms, first, last, own = edit
            llm.collective_rpc("edits_put", args=(str(i), layers, terms, own))
            extra[i] |= under(str(i), first, last)
    return extra


def _settled(llm: Any, requests: Sequence[Any], replies: Sequence[Any]) -> dict[str, Any]:
    """The effective norms, once every position that was fed is counted."""
    wishes, fed = [], []
    ahead = llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    for i, ((ids, edit), reply) in enumerate(zip(requests, replies, strict=True)):
        wishes.append({"edit": None if edit is None else [str(i), *edit[2:4]]})
        n = len(ids) + len(reply.outputs[0].token_ids) - 1
        fed.append((n, n + bool(ahead and reply.outputs[0].finish_reason == "stop")))
    return settle(llm.collective_rpc("edits_stats"), process._wanted(wishes, fed))


def _speak(llm: Any, requests: Sequence[Any], new: int, stops: list[int], salt: bool = True) -> Any:
    """(new token ids without the end of turn, effective norms) a request."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=new,
            stop_token_ids=stops,
            detokenize=False,
            ignore_eos=True,
            extra_args=extra,
        )
        for extra in _put(llm, requests)
    ]
    prompts = [
        salted(ids) if edit is not None and salt else {"prompt_token_ids": ids}
        for ids, edit in requests
    ]
    try:
        replies = llm.generate(prompts, params, use_tqdm=False)
        norms = _settled(llm, requests, replies)
    finally:
        llm.collective_rpc("edits_drop", args=([str(i) for i in range(len(requests))],))
    said = [[t for t in reply.outputs[0].token_ids if t not in stops] for reply in replies]
    return [(ids, norms.get(str(i))) for i, ids in enumerate(said)]


def _score(llm: Any, requests: Sequence[Any], n_prompts: list[int]) -> list[float]:
    """Mean NLL of what follows the first n tokens, a request."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False, extra_args=extra
        )
        for extra in _put(llm, requests)
    ]
    replies = llm.generate([salted(ids) for ids, _ in requests], params, use_tqdm=False)
    _settled(llm, requests, replies)
    llm.collective_rpc("edits_clear")
    found = []
    for reply, n in zip(replies, n_prompts, strict=True):
        rest = list(zip(reply.prompt_token_ids, reply.prompt_logprobs, strict=True))[n:]
        found.append(-sum(top[t].logprob for t, top in rest) / len(rest))
    return found


@contextmanager
def served(
    folder: Path, *, environment: dict[str, str] | None = None, **options: Any
) -> Iterator[Any]:
    """A function that asks the child, which is gone afterwards. Raises AuditgapError as the child
    does."""
    pytest.importorskip("vllm")
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    child = context.Process(target=_serve, args=(theirs, str(folder), environment or {}, options))
    child.start()
    theirs.close()

    def ask(*what: Any) -> Any:
        mine.send(what)
        if not mine.poll(240):
            raise TimeoutError(what[0])
        fine, answer = mine.recv()
        if not fine:
            raise AuditgapError(answer)
        return answer

    try:
        if not mine.poll(240) or mine.recv() != "ready":
            raise TimeoutError("vLLM did not start")
        ask("rpc", "edits_open")
        yield ask
        mine.send(None)
        child.join(20)
    finally:
        if child.is_alive():
            child.kill()
        child.join()


def asked(requests: Sequence[Request]) -> list[tuple[list[int], Any]]:
    return [
        (
            list(r.rendered.ids),
            None
            if r.edit is None
            else (
                layers_of(r.edit),
                {what: pack(term) for what, term in terms_of(r.edit).items()},
                *span_of(r.edit, len(r.rendered.ids)),
                own_of(r.edit),
            ),
        )
        for r in requests
    ]


@dataclass(frozen=True)
class GoesOn:
    """At this site, under a δ whose last row stands at every token behind the prompt too."""

    site: Site


def edited(
    engine: HFEngine,
    rendered: Sequence[Rendered],
    sites: Sequence[Site | GoesOn | tuple[Site, ...] | None],
    size: float,
) -> list[Request]:
    """A request a prompt: at a site, under a random δ of `size` × the RMS of the user's own tokens,
    every second one in quarters of it, as sign steps leave it; at several, or at one in a tuple,
    under an edit of every position, which steers and ablates."""
    draw, made = torch.Generator().manual_seed(7), []
    for r, where in zip(rendered, sites, strict=True):
        if where is None:
            made.append(Request(r))
            continue
        site = where[-1] if isinstance(where, tuple) else getattr(where, "site", where)
        h = engine.activations([r], site)[0]
        own = h[torch.tensor(r.content)]
        scale = size * own.pow(2).mean().sqrt()
        if not isinstance(where, tuple):
            delta = scale * (
                torch.randint(-8, 9, h.shape, generator=draw) / 4
                if len(made) % 2
                else torch.randn(h.shape, generator=draw)
            )
            edit: Any = Edit(site, delta, goes_on=isinstance(where, GoesOn))
        else:
            mean = own.mean(0) / own.mean(0).norm()
            shift = scale * torch.randn(h.shape[1], generator=draw) if len(where) == 1 else None
            edit = ConstantEdit(where, shift, mean, mean)
        made.append(Request(r, edit))
    return made


def spoken_by(engine: HFEngine, requests: Sequence[Request], new: int) -> list[Completion]:
    """What the engine on transformers says, whatever the edits are on."""
    done: dict[int, Completion] = {}
    for kind in (Edit, ConstantEdit, type(None)):
        some = [i for i, r in enumerate(requests) if isinstance(r.edit, kind)]
        mine = [requests[i] for i in some]
        said = (
            constant.generate(engine, [r.rendered for r in mine], [r.edit for r in mine], new)
            if kind is ConstantEdit
            else engine.generate(mine, new)
        )
        done.update(zip(some, said, strict=True))
    return [done[i] for i in range(len(requests))]


def same(spoken: Sequence[Any], wanted: Sequence[Any]) -> None:
    """Token for token, and the effective norms besides."""
    assert [tuple(ids) for ids, _ in spoken] == [c.ids for c in wanted]
    for (_, norms), c in zip(spoken, wanted, strict=True):
        assert (norms in (None, (None, None))) == (c.l2_effective is None)
        if c.l2_effective is not None:
            assert norms == pytest.approx((c.l2_effective, c.linf_effective), rel=1e-4)


# -- SmolLM2
# -----------------------------------------------------------------------------------------------------------

NEW = 24


@pytest.fixture(scope="module")
def hf() -> HFEngine:
    return HFEngine(models.load("smollm2", dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Any]:
    # blocks of 32 so that prompts fill some, which is what a prefix cache keeps
    with served(models.resolve("smollm2"), enable_prefix_caching=True, block_size=32) as ask:
        yield ask


@pytest.fixture(scope="module")
def mixed(hf: HFEngine) -> list[Request]:
    # at the last block only the last position counts
    sites = [None, Site(-1), None, Site(7), Site(15), None, Site(29), None]
    return edited(hf, [hf.render(Prompt(p)) for p in PROMPTS], sites, 1.0)


@pytest.fixture(scope="module")
def wanted(hf: HFEngine, mixed: list[Request]) -> Any:
    return hf.generate(mixed, NEW)


@real
def test_eight_mixed_requests_equal_the_engine_on_transformers(smollm2, hf, mixed, wanted):
    stops = sorted(hf.loaded.stop_ids)
    same(smollm2("speak", asked(mixed), NEW, stops), wanted)
    same([smollm2("speak", [one], NEW, stops)[0] for one in asked(mixed)], wanted)
    clean = hf.generate([Request(r.rendered) for r in mixed], NEW)
    changed = [a.ids != b.ids for a, b in zip(wanted, clean, strict=True)]
    assert [c for c, r in zip(changed, mixed, strict=True) if r.edit] == [True] * 4, (
        "these edits prove nothing"
    )


@real
def test_edits_of_every_position_equal_the_engine_on_transformers(smollm2, hf):
    """Steering at one site, ablation at all 31 and edits of the prompt alone, in one batch; each
    decoded token is edited and counted."""
    every = constant.sites_of(hf)
    sites = [(Site(15),), None, every, Site(15), (Site(-1),), None, every, (Site(29),)]
    requests = edited(hf, [hf.render(Prompt(p)) for p in PROMPTS], sites, 1.0)
    stops = sorted(hf.loaded.stop_ids)
    smollm2("standing_self_test", [15])
    smollm2("standing_self_test", [s.layer_index for s in every])
    wanted = spoken_by(hf, requests, NEW)
    same(smollm2("speak", asked(requests), NEW, stops), wanted)
    same(smollm2("speak", asked(requests[:1]), NEW, stops), wanted[:1])
    # the same edits on the prompt alone say other things, so that the decoded tokens' matter
    on_prompt = [
        (ids, edit and (*edit[:3], len(ids), 0))
        for ids, edit in asked(requests)
        if edit is None or edit[3] is None
    ]
    kept = [c for c, r in zip(wanted, requests, strict=True) if not isinstance(r.edit, Edit)]
    prompt_alone = smollm2("speak", on_prompt, NEW, stops)
    differ = [tuple(a) != c.ids for (a, _), c in zip(prompt_alone, kept, strict=True)]
    assert sum(differ) >= 3 and not differ[1]


@real
def test_an_edit_may_be_on_tokens_that_are_not_written_yet(smollm2, hf, mixed):
    """A δ of the first three tokens of an answer is that of the whole text with the same answer."""
    stops = sorted(hf.loaded.stop_ids)
    prompt = mixed[0].rendered
    n = len(prompt.ids)
    delta = torch.randn(3, hf.loaded.width, generator=torch.Generator().manual_seed(2))
    shift = {"shift": pack(delta)}
    ((said, norms),) = smollm2("speak", [(list(prompt.ids), ([15], shift, n, n + 3, 0))], 8, stops)
    assert norms[0] == pytest.approx(delta.norm().item(), rel=1e-4)
    assert said[:1] == list(hf.generate([Request(prompt)], 1)[0].ids)  # drawn before the edit
    text = Rendered(prompt.prompt, (*prompt.ids, *said[:3]), (*prompt.content, *[True] * 3))
    whole = Edit(Site(15), torch.cat([torch.zeros(n, hf.loaded.width), delta]))
    assert said[3:] == list(hf.generate([Request(text, whole)], 5)[0].ids)


@real
def test_scores_under_an_edit_that_covers_the_prompt_only(smollm2, hf, mixed):
    answers = [hf.encode("Sure, here is the colour of the vault: green.")] * len(mixed)
    wanted = hf.nll([r.rendered for r in mixed], answers, [r.edit for r in mixed])
    longer = [(ids + list(a), *rest) for (ids, *rest), a in zip(asked(mixed), answers, strict=True)]
    assert smollm2("score", longer, [len(r.rendered.ids) for r in mixed]) == pytest.approx(
        wanted, rel=1e-4
    )


@real
def test_an_edited_request_neither_reads_nor_leaves_cached_blocks(smollm2, hf):
    stops = sorted(hf.loaded.stop_ids)
    long = hf.render(Prompt(" ".join(PROMPTS[:6])))
    # shares no block with anything
    long = [long, Rendered(Prompt("backwards"), long.ids[::-1], long.content[::-1])]
    assert len(long[0].ids) > 64
    requests = edited(hf, long, [Site(7), Site(7)], 0.4)
    clean = [Request(r) for r in long]
    wanted, plain = hf.generate(requests, NEW), hf.generate(clean, NEW)
    assert [a.ids for a in wanted] != [b.ids for b in plain]
    same(smollm2("speak", asked(requests[:1]), NEW, stops), wanted[:1])
    same(smollm2("speak", asked(clean[:1]), NEW, stops), plain[:1])  # after the edited one
    # after the clean one, whose blocks are there
    same(smollm2("speak", asked(requests[:1]), NEW, stops), wanted[:1])
    # the same without a salt goes wrong both ways, so that the above could have failed
    smollm2("speak", asked(requests[1:]), NEW, stops, False)
    spoilt = smollm2("speak", asked(clean[1:]), NEW, stops)
    assert tuple(spoilt[0][0]) != plain[1].ids
    with pytest.raises(AuditgapError, match="was to change"):
        smollm2("speak", asked(requests[1:]), NEW, stops, False)


@real
def test_what_did_not_arrive_in_full_is_refused(smollm2, hf, mixed):
    stops = sorted(hf.loaded.stop_ids)
    (ids, (layers, terms, first, last, own)) = asked(mixed)[1]
    for span, wants in (((last + 3, own), last + 3), ((None, own - 1), last - 1), ((None, 0), 1)):
        with pytest.raises(AuditgapError, match=rf"has not a row for each of 0 to {wants}\b"):
            smollm2("speak", [(ids, (layers, terms, first, *span))], 4, stops)
        smollm2("rpc", "edits_clear")
    same(smollm2("speak", [(ids, None)], 4, stops), hf.generate([Request(mixed[1].rendered)], 4))


@real
def test_self_test_passes_and_leaves_the_model_as_it_was(smollm2, hf, mixed):
    smollm2("rpc", "edits_clear")
    longer = [([*ids, 5, 6, 7], None) for ids, _ in asked(mixed)[:1]]
    hooks, before = smollm2("rpc", "edits_hooks"), smollm2("score", longer, [len(longer[0][0]) - 3])
    told = smollm2("self_test", [-1, 0, 15, 29])
    assert told == {"problem": "", "blocks": 30, "width": 576, "dtype": "torch.float32"}
    smollm2("standing_self_test", [-1, 0, 29])
    assert smollm2("rpc", "edits_hooks") == hooks
    assert smollm2("score", longer, [len(longer[0][0]) - 3]) == before
    assert smollm2("rpc", "edits_stats") == [{"problem": "", "edits": {}}]


# -- tiny models of several families
# -----------------------------------------------------------------------------------


def save(family: str, folder: Path) -> Path:
    return tiny.save(family, folder, **HEADS, **FAMILIES[family])


@contextmanager
def tiny_served(
    family: str, folder: Path, dtype: str = "float32", **options: Any
) -> Iterator[tuple[Any, HFEngine]]:
    engine = HFEngine(
        models.load(str(save(family, folder)), dtype=dtype, device="cpu"), pad_tolerance=0.9
    )
    with served(folder, dtype=dtype, **options) as ask:
        yield ask, engine


def tiny_requests(engine: HFEngine, n: int = 12, size: float = 0.5) -> list[Request]:
    draw = torch.Generator().manual_seed(3)
    lengths = [int(x) for x in torch.randint(9, 60, (n,), generator=draw)]
    rendered = [
        Rendered(
            Prompt(f"{i}"),
            tuple(torch.randint(4, tiny.VOCABULARY, (length,), generator=draw).tolist()),
            (True,) * length,
        )
        for i, length in enumerate(lengths)
    ]
    every = constant.sites_of(engine)
    sites = [None, Site(-1), (Site(0),), GoesOn(Site(0)), Site(2), every, Site(3), (Site(2),)]
    sites = [*sites, GoesOn(Site(-1)), GoesOn(Site(3))] * n
    return edited(engine, rendered, sites[:n], size)


@real
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_and_preemptions_change_nothing(family, tmp_path):
    """24 tokens a step and a cache for about two and a half of the twelve requests: all are
    chunked, and some start over."""
    awkward = {
        "max_num_batched_tokens": 24,
        "block_size": 32,
        "num_gpu_blocks_override": 10,
        "max_model_len": 160,
    }
    with tiny_served(family, tmp_path, **awkward) as (ask, engine):
        requests = tiny_requests(engine)
        assert ask("self_test", [-1, 0, 2, 3])["blocks"] == tiny.N_BLOCKS
        ask("standing_self_test", [-1, 0, 1, 2, 3])
        spoken = ask("speak", asked(requests), 80, sorted(engine.loaded.stop_ids))
        same(spoken, spoken_by(engine, requests, 80))
        assert ask("preemptions") > 0


@real
def test_broken_hooks_and_unfit_workers_are_refused(tmp_path):
    with tiny_served("llama", tmp_path) as (ask, engine):
        for how, test, said in [
            ("uncalled", "self_test", "the hook is never called"),
            ("deaf", "self_test", "the edit did not arrive"),
            ("shifted", "self_test", "the edit did not arrive"),
            ("weighted", "self_test", "more than the sum of its stream"),
            ("spilling", "self_test", "an edit changes the request beside it"),
            ("short", "self_test", "did not arrive"),
            ("uncalled", "standing_self_test", "the hook is never called"),
            ("deaf", "standing_self_test", "the edit did not arrive at every position"),
            ("shifted", "standing_self_test", "the edit did not arrive at every position"),
            ("prefill only", "standing_self_test", "the edit did not arrive at every position"),
            ("weighted", "standing_self_test", "an edit of zero changes the hidden states"),
            ("spilling", "standing_self_test", "an edit changes the request beside it"),
        ]:
            ask("rpc", "edits_break", how)
            with pytest.raises(
                AuditgapError, match=f"Self-test failed at .* inside vLLM: .*{said}.*--engine hf"
            ):
                ask(test, [0, 2])
                pytest.fail(f"{how}, {test}")
        # a hook that lets decoding pass is refused while speaking too
        standing = asked(edited(engine, [tiny_requests(engine, 1)[0].rendered], [(Site(2),)], 0.5))
        ask("rpc", "edits_break", "prefill only")
        ask("rpc", "edits_open")
        n = len(standing[0][0])
        with pytest.raises(AuditgapError, match=rf"change {n + 3} positions .*; it changed {n}\."):
            ask("speak", standing, 4, [])
        ask("rpc", "edits_break", "")
        ask("self_test", [0, 2])
        ask("standing_self_test", [0, 2])
        for part, name, value, said in [
            (
                "runner",
                "",
                None,
                "vllm.v1.worker.gpu.model_runner.GPUModelRunner.*VLLM_USE_V2_MODEL_RUNNER=0",
            ),
            ("parallel_config", "pipeline_parallel_size", 2, "pipeline parallelism"),
            ("parallel_config", "data_parallel_size", 2, "data parallelism"),
            ("speculative_config", "", SimpleNamespace(), "speculative decoding"),
            ("compilation_config", "mode", 3, "enforce_eager=True"),
            ("compilation_config", "cudagraph_mode", SimpleNamespace(value=(2, 0)), "CUDA graphs"),
        ]:
            (problem,) = ask("rpc", "edits_unfit", part, name, value)
            with pytest.raises(AuditgapError, match=said):
                raise AuditgapError(problem)


@real
def test_bfloat16_rounds_once_as_the_engine_on_transformers_does(tmp_path):
    """At the embedding both read the same h, so that even an edit that half drowns in rounding has
    the same norms."""
    with tiny_served("llama", tmp_path, dtype="bfloat16") as (ask, engine):
        ask("self_test", [-1, 0, 2, 3])
        (request,) = edited(engine, [tiny_requests(engine, 1)[0].rendered], [Site(-1)], 5e-4)
        ((_, norms),) = ask("speak", asked([request]), 2, [])
        (completion,) = engine.generate([request], 2)
        assert norms == pytest.approx(
            (completion.l2_effective, completion.linf_effective), rel=1e-5
        )
        assert abs(norms[0] / request.edit.delta.norm().item() - 1) > 0.02, (
            "nothing was rounded here"
        )


@real
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="vLLM binds a core to each rank")
def test_two_ranks_add_the_same(tmp_path):
    cores = "|".join(str(core) for core in sorted(os.sched_getaffinity(0))[:2])
    ranks = {"tensor_parallel_size": 2, "environment": {"VLLM_CPU_OMP_THREADS_BIND": cores}}
    with tiny_served("llama", tmp_path, **ranks) as (ask, engine):
        requests = tiny_requests(engine, 8)
        assert len(ask("rpc", "edits_stats")) == 2
        ask("self_test", [-1, 0, 2, 3])
        ask("standing_self_test", [-1, 0, 1, 2, 3])
        same(
            ask("speak", asked(requests), 16, sorted(engine.loaded.stop_ids)),
            spoken_by(engine, requests, 16),
        )


# -- without vLLM
# ------------------------------------------------------------------------------------------------------


def test_an_edit_travels_as_bytes_bit_for_bit():
    delta = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    shape, payload = pack(delta.T.contiguous().T)
    assert json.loads(json.dumps(shape)) == [5, 3]
    assert torch.equal(unpack(shape, payload).rows(), delta)
    assert torch.equal(unpack(*pack(delta.bfloat16())).rows(), delta.bfloat16().float())
    for bad in ([5, 4], [15], [], [3, 5, 1], [5, 3, 0, 1], [-5, -3], [0, 3]):
        with pytest.raises(AuditgapError, match=r"An edit is \[n, D\] in fp32"):
            unpack(bad, payload)


def sign_steps(n: int, width: int, seed: int = 0) -> torch.Tensor:
    """Rows [n, D] as ten decreasing steps of the attack leave them, along random gradients."""
    drawn, pgd = torch.Generator().manual_seed(seed), PGD(steps=10, schedule="decreasing")
    ball = LinfBall(torch.full((1, 1, 1), 0.137), torch.ones(1, n, 1))
    delta = torch.zeros(1, n, width)
    for k in range(pgd.steps):
        delta = ball.step(delta, torch.randn(delta.shape, generator=drawn), pgd.share(k))
    return delta[0]


def test_an_edit_of_sign_steps_travels_by_the_byte_bit_for_bit():
    delta = sign_steps(9, 2048)
    delta[3, 5] = -0.0
    shape, payload = pack(delta)
    assert shape[:2] == [9, 2048] and len(payload) < 0.35 * delta.nbytes
    held = unpack(json.loads(json.dumps(shape)), payload)
    assert held.nbytes == len(payload)  # so it lies in the worker
    assert held.rows().numpy().tobytes() == delta.numpy().tobytes()
    wide, k = shape[1:]
    for bad in ([9, wide], [9, wide, k + 1], [9, wide + 4, k], [0, wide, k], [9, wide, 0]):
        with pytest.raises(AuditgapError, match=r"An edit is \[n, D\] in fp32, or \[n, D, K\]"):
            unpack(bad, payload)
    with pytest.raises(AuditgapError, match=f"names the value 255 of {k}"):
        unpack(shape, b"\xff" + payload[1:])


@pytest.mark.parametrize("delta", [sign_steps(6, 640), torch.randn(6, 640)], ids=["byte", "fp32"])
def test_rows_of_a_batch_are_those_of_the_plain_edit(delta):
    """The worker's rows, of codes or not, against the tensor that was sent."""
    edit = PlacedEdit(frozenset([1]), {"shift": unpack(*pack(delta))}, 6)
    for first, n in ((0, 6), (2, 3), (4, 5), (9, 2)):  # behind the last row, that
        span = Span(0, first, n, edit, EditedRows(np.zeros(20, dtype=bool)))
        places = torch.arange(first, first + n).clamp(max=5)
        assert torch.equal(term_of(span, "shift", 640, torch.device("cpu")), delta[places])
    one = PlacedEdit(frozenset([1]), {"shift": unpack(*pack(delta[:1]))})
    span = Span(0, 3, 4, one, EditedRows(np.zeros(20, dtype=bool)))
    assert torch.equal(term_of(span, "shift", 640, torch.device("cpu")), delta[:1].expand(4, -1))


def test_a_load_is_as_many_edits_as_travel_in_its_bytes(monkeypatch):
    deltas = [sign_steps(4, 2048, seed=i) for i in range(12)]
    edits = [Edit(Site(1), delta) for delta in deltas]
    monkeypatch.setattr(wishes, "_EDIT_BYTES", 4 * deltas[0].nbytes)  # of four plain ones
    asked = [edits[i // 2] for i in range(24)]  # two requests an edit
    parts = list(wishes.loads(asked))
    assert [i for part, _ in parts for i in part] == list(range(24))
    assert len(parts) == 1
    described, payloads = wishes.edits_message(asked, parts[0][1])
    assert len(described) == len(payloads) == 12
    for one, payload, delta in zip(described, payloads, deltas, strict=True):
        assert torch.equal(unpack(one["terms"]["shift"], payload).rows(), delta)
    plain = [Edit(Site(1), torch.randn(4, 2048)) for _ in range(12)]
    assert [len(part) for part, _ in wishes.loads(plain)] == [4, 4, 4]


def stats(
    *rows: int, l2: float | None = 2.0, problem: str = "", end: int | None = None
) -> dict[str, Any]:
    """Of an edit "a", which changed so many positions of the requests 0, 1, …"""
    requests = {
        str(i): {"rows": r, "end": r if end is None else end, "l2": l2, "linf": 1.0}
        for i, r in enumerate(rows)
    }
    return {"problem": problem, "edits": {"a": requests}}


def test_settling_wants_every_row_of_every_request_on_every_rank():
    one, two = {"0": (7, 7)}, {"0": (7, 7), "1": (7, 7)}
    assert settle([stats(7), stats(7)], {"a": one}) == {"a": (2.0, 1.0)}
    assert settle([stats(7, 7)], {"a": two}) == {"a": (2.0, 1.0)}
    assert settle([stats(7, 9)], {"a": {"0": (7, 7), "1": (8, 9)}}) == {"a": (2.0, 1.0)}
    assert settle([stats(7, l2=float("nan"))], {"a": one}) == {"a": (None, 1.0)}
    assert settle([stats(7, l2=None)], {"a": one}) == {"a": (None, 1.0)}
    assert settle([stats()], {"a": {"0": (0, 0)}}) == {"a": (None, None)}
    for bad, wanted in [
        ([stats(6)], one),
        ([stats(8)], one),
        ([stats(6, end=7)], one),
        ([stats(7, end=9)], one),
        ([stats(7)], two),
        ([stats()], one),
        ([stats(7), stats(6)], one),
    ]:
        with pytest.raises(AuditgapError, match="was to change 7 positions"):
            settle(bad, {"a": wanted})
    with pytest.raises(AuditgapError, match="changed requests that it was not asked for"):
        settle([stats(7, 7)], {"a": one})
    with pytest.raises(AuditgapError, match="was to change"):
        settle([stats(7)], {"b": one})
    with pytest.raises(AuditgapError, match="a request named"):
        settle([stats(7, problem="a request named the edit 'b', which is not there")], {"a": one})


def test_blocks_are_the_one_list_of_their_length():
    def layers(n: int) -> nn.ModuleList:
        return nn.ModuleList(nn.Linear(1, 1) for _ in range(n))

    model = nn.Module()
    model.tower, model.inner = nn.Module(), nn.Module()
    model.tower.blocks, model.inner.layers = layers(3), layers(4)
    assert find_blocks(model, 4) is model.inner.layers
    model.inner.layers[0].experts = layers(4)  # inside a block, so no rival
    assert find_blocks(model, 4) is model.inner.layers
    model.tower.blocks = layers(4)
    with pytest.raises(AuditgapError, match="2 lists of 4 blocks"):
        find_blocks(model, 4)
    model.get_language_model = lambda: model.inner  # what vLLM's models of several modalities have
    assert find_blocks(model, 4) is model.inner.layers
    with pytest.raises(AuditgapError, match="0 lists of 5 blocks"):
        find_blocks(model, 5)
