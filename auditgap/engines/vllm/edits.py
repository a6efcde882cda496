"""Edits inside vLLM: a δ of its own for every request, at any decoder block, on the prompt's
positions only.

    # with ENVIRONMENT in os.environ before vllm is imported
    llm = LLM(model, **OPTIONS)
    self_test(llm, [-1, 15])                                     # refuses what cannot be edited
    llm.collective_rpc("edits_put", args=("a", 15, *pack(delta)))
    llm.generate([salted(ids)], SamplingParams(temperature=0, max_tokens=32, extra_args={EDIT: "a"}))
    # {"a": (l2, linf)}; raises unless all T rows were edited
    norms = settle(llm.collective_rpc("edits_stats"), {"a": 1})
    llm.collective_rpc("edits_clear")

`EditExtension` becomes a base of vLLM's worker. Hooks on the decoder blocks learn from the runner
which rows of the batch are which positions of which request, so that edits of several sites, other
requests, chunks of prompts and prompts computed again after a preemption may share one batch. Layer
−1 is what block 0 receives, after the family's own scaling.

vLLM's blocks pass a stream on as two summands (hidden, residual), which the next norm adds. An
edited row is replaced by (0, h + δ), with h = hidden + residual rounded to the model's dtype and h
+ δ added in fp32 and rounded once: the same numbers as the engine on transformers. So an edit of
zero is itself the proof that nothing but the sum is read.

Tensor parallelism: hidden states are whole on every rank after a block, so every rank adds the same
δ. Pipeline and context parallelism cut the stream up, and are refused.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import nn

from auditgap.errors import AuditgapError
from auditgap.types import Site

#: Keys of `SamplingParams.extra_args`: the name of a request's edit; a label under which its hidden
#: states are recorded.
EDIT, RECORD = "auditgap_edit", "auditgap_record"
#: For os.environ, before vllm is imported: the other model runner keeps its batch elsewhere.
ENVIRONMENT: Mapping[str, str] = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
#: What LLM(…) needs beside the model. Compiled blocks would never call a hook.
OPTIONS: Mapping[str, Any] = {
    "worker_extension_cls": "auditgap.engines.vllm.edits.EditExtension",
    "enforce_eager": True,
}


# -- what the engine sends and reads
# ----------------------------------------------------------------------------------


def pack(delta: torch.Tensor) -> tuple[list[int], bytes]:
    """A δ [T, D] as (shape, fp32 bytes), the last arguments of `edits_put`."""
    array = np.ascontiguousarray(delta.detach().to("cpu", torch.float32).numpy(), dtype="<f4")
    return list(array.shape), array.tobytes()


def unpack(shape: Sequence[int], payload: bytes) -> torch.Tensor:
    """The fp32 tensor that `pack` was given. Raises AuditgapError when the bytes are not as many as
    the shape says."""
    if len(shape) != 2 or min(shape) < 1 or len(payload) != 4 * shape[0] * shape[1]:
        raise AuditgapError(
            f"An edit is [T, D] in fp32; a shape of {list(shape)} came with {len(payload)} bytes."
        )
    return torch.from_numpy(np.frombuffer(payload, dtype="<f4").reshape(shape).copy())


def salted(ids: Sequence[int]) -> dict[str, Any]:
    """An edited request's prompt for `LLM.generate`, with a salt that nobody else has.

    The salt goes into the hash of the first cached block and so of all that follow: the request
    finds no block of another and leaves none that another could find. Needed wherever prefix
    caching is on.
    """
    return {"prompt_token_ids": list(ids), "cache_salt": uuid.uuid4().hex}


def settle(
    stats: Sequence[Mapping[str, Any]], wanted: Mapping[str, int]
) -> dict[str, tuple[float | None, float | None]]:
    """Effective norms (‖(h + δ) − h‖₂, ∞-norm) of each edit, once it is certain that each arrived
    in full.

    `stats` is what `edits_stats` returned, one a rank; `wanted` the number of requests each edit
    was asked for. A norm is None where h was not finite. Raises AuditgapError when an edit missed a
    request, or a position of one, on any rank.
    """
    for rank, seen in enumerate(stats):
        if seen["problem"]:
            raise AuditgapError(
                f"vLLM's batch could not be read while edits were on: {seen['problem']}"
            )
        for name, n in wanted.items():
            edit = seen["edits"].get(name)
            rows = [] if edit is None else [r["rows"] for r in edit["requests"]]
            if edit is None or len(rows) != n or any(r != edit["positions"] for r in rows):
                raise AuditgapError(
                    f"Edit {name} was to change {edit['positions'] if edit else '?'} positions of"
                    f" {n} requests on rank {rank}; it changed {rows or 'none'}. Nothing of this"
                    " batch can be used."
                )
    return {name: _norms(stats[0]["edits"][name]["requests"][0]) for name in wanted}


def _norms(request: Mapping[str, Any]) -> tuple[float | None, float | None]:
    l2, linf = (value if np.isfinite(value) else None for value in (request["l2"], request["linf"]))
    return l2, linf


# -- in vLLM's worker
# --------------------------------------------------------------------------------------------------


class EditExtension:
    """What `collective_rpc` can call on every worker. Arguments and answers are plain numbers,
    words and bytes."""

    model_runner: Any  # the worker's own
    vllm_config: Any

    def edits_open(self) -> dict[str, Any]:
        """Look whether this worker can be edited: {"problem": a sentence or "", "blocks": L,
        "width": D, "dtype": …}."""
        problem = _unfit(self.model_runner, self.vllm_config)
        if problem:
            return {"problem": problem}
        try:
            self._edits = _Editor(self.model_runner)
        except AuditgapError as error:
            return {"problem": str(error)}
        editor = self._edits
        return {
            "problem": "",
            "blocks": len(editor.blocks),
            "width": editor.width,
            "dtype": str(editor.runner.dtype),
        }

    def edits_put(self, name: str, layer: int, shape: Sequence[int], payload: bytes) -> None:
        """Keep a δ [T, D] (see `pack`) for requests that name it, at a block's output or (−1) at
        what block 0 receives.

        It covers the positions 0…T−1 of a request, which may be longer. A name is a request's own,
        or shared by all requests on that prompt. Raises AuditgapError for a layer or width that the
        model has not.
        """
        self._editor().put(name, layer, unpack(shape, payload))

    def edits_drop(self, names: Sequence[str]) -> None:
        """Forget these edits and what is known of them; unknown names are none the worse."""
        self._editor().drop(names)

    def edits_clear(self) -> None:
        """Forget everything and take all hooks off; the model is as it was."""
        self._editor().clear()

    def edits_stats(self) -> dict[str, Any]:
        """{"problem": …, "edits": {name: {"positions": T, "requests": [{"rows", "l2", "linf"},
        …]}}}, see `settle`.

        `rows` counts positions that were edited, once each, however often a chunk was computed
        again.
        """
        return self._editor().stats()

    def edits_watch(self, layers: Sequence[int]) -> None:
        """From now on record the stream at these layers, edits included, on the prompts of requests
        with a RECORD label."""
        self._editor().watch(layers)

    def edits_seen(self) -> dict[str, dict[str, list[Any]]]:
        """{label: {layer: [shape, fp32 bytes]}} (see `pack`) of the stream since the last call."""
        return self._editor().seen()

    def _editor(self) -> _Editor:
        if not hasattr(self, "_edits"):
            raise AuditgapError("edits_open comes before every other call.")
        return self._edits


def _unfit(runner: Any, config: Any) -> str:
    """Why edits cannot be trusted under this runner and configuration; the empty string when they
    can."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    parallel = config.parallel_config
    if not isinstance(runner, GPUModelRunner):
        return (
            f"its model runner is {type(runner).__module__}.{type(runner).__name__}, which auditgap"
            " does not know; set VLLM_USE_V2_MODEL_RUNNER=0, or use --engine hf."
        )
    for what, size in (
        ("pipeline", parallel.pipeline_parallel_size),
        ("data", parallel.data_parallel_size),
        ("prefill context", getattr(parallel, "prefill_context_parallel_size", 1)),
    ):
        if size > 1:
            return (
                f"{what} parallelism is on ({size}); edits need every position and block on every"
                " rank: use tensor parallelism."
            )
    if config.speculative_config is not None:
        return "speculative decoding is on, whose draft model does not see the edits; leave it out."
    if config.compilation_config.mode:  # NONE is 0
        return "the model is compiled, and compiled blocks call no hook; give enforce_eager=True."
    return ""


def find_blocks(model: nn.Module, n: int) -> nn.ModuleList:
    """The one list of n modules (the decoder blocks) in a vLLM model's language model. Raises
    AuditgapError."""
    whole: Any = model
    inner: nn.Module = whole.get_language_model() if hasattr(whole, "get_language_model") else model
    found = [m for m in inner.modules() if isinstance(m, nn.ModuleList) and len(m) == n]
    outermost = [
        m for m in found if not any(m is not other and m in set(other.modules()) for other in found)
    ]
    if len(outermost) != 1:
        raise AuditgapError(
            f"{type(model).__name__} has {len(outermost)} lists of {n} blocks inside vLLM, so an"
            " edit has no certain place; use --engine hf."
        )
    return outermost[0]


@dataclass(eq=False)
class _Edit:
    """A δ [T, D] in fp32 on the model's device, and by request which of its positions it has
    changed, by how much."""

    layer: int
    delta: torch.Tensor
    touched: dict[str, _Touched] = field(default_factory=dict)


@dataclass(eq=False)
class _Touched:
    """By position: edited or not, ‖(h + δ) − h‖₂², ∞-norm. A position that is computed again
    overwrites itself."""

    rows: np.ndarray
    squares: torch.Tensor
    largest: torch.Tensor


@dataclass(frozen=True, eq=False)
class _Span:
    """Rows start…stop of the batch: a request's prompt from position `first` on, with its edit or
    label."""

    request: str
    start: int
    stop: int
    first: int
    edit: _Edit | None
    label: str | None


class _Editor:
    """The hooks of one worker, and the edits that they apply."""

    def __init__(self, runner: Any) -> None:
        config = runner.model_config.hf_text_config
        self.runner = runner
        self.blocks = find_blocks(runner.get_model(), config.num_hidden_layers)
        self.width = config.hidden_size
        self.edits: dict[str, _Edit] = {}
        self.handles: dict[int, list[Any]] = {}
        self.watched: set[int] = set()
        self.recorded: dict[tuple[str, int], dict[int, torch.Tensor]] = {}
        self.problem = ""
        self._forward: Any = None  # a weak reference to the forward that `_now` was made for
        self._now: list[_Span] = []

    # -- what is asked of it
    # -------------------------------------------------------------------------------------------

    def put(self, name: str, layer: int, delta: torch.Tensor) -> None:
        if delta.shape[1] != self.width:
            raise AuditgapError(
                f"This model's stream is {self.width} wide; an edit of shape {list(delta.shape)}"
                " came."
            )
        self._hook(layer)
        self.edits[name] = _Edit(layer, delta.to(self.runner.device))

    def drop(self, names: Sequence[str]) -> None:
        for name in names:
            self.edits.pop(name, None)
        self._unhook_idle()

    def clear(self) -> None:
        self.edits.clear()
        self.watched.clear()
        self.recorded.clear()
        self.problem = ""
        self._unhook_idle()

    def watch(self, layers: Sequence[int]) -> None:
        for layer in layers:
            self._hook(layer)
        self.watched = set(layers)
        self.recorded.clear()
        self._unhook_idle()

    def stats(self) -> dict[str, Any]:
        return {
            "problem": self.problem,
            "edits": {
                name: {
                    "positions": edit.delta.shape[0],
                    "requests": [
                        {
                            "rows": int(t.rows.sum()),
                            "l2": t.squares.sum().sqrt().item(),
                            "linf": t.largest.max().item(),
                        }
                        for t in edit.touched.values()
                    ],
                }
                for name, edit in self.edits.items()
            },
        }

    def seen(self) -> dict[str, dict[str, list[Any]]]:
        told: dict[str, dict[str, list[Any]]] = {}
        for (label, layer), chunks in self.recorded.items():
            told.setdefault(label, {})[str(layer)] = list(
                pack(torch.cat([chunks[first] for first in sorted(chunks)]))
            )
        self.recorded.clear()
        return told

    # -- hooks
    # ---------------------------------------------------------------------------------------------------------

    def _hook(self, layer: int) -> None:
        if not -1 <= layer < len(self.blocks):
            raise AuditgapError(
                f"This model has blocks 0 to {len(self.blocks) - 1}, and −1 for the embedding;"
                f" {layer} came."
            )
        if layer in self.handles:
            return

        def before(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            new = self._changed(layer, [*args, *kwargs.values()])
            return (
                None
                if new is None
                else (tuple(new[: len(args)]), dict(zip(kwargs, new[len(args) :], strict=True)))
            )

        def after(_module: nn.Module, _args: tuple, output: Any) -> Any:
            new = self._changed(layer, list(output) if isinstance(output, tuple) else [output])
            return new if new is None else tuple(new) if isinstance(output, tuple) else new[0]

        # each followed by one that reads what the model goes on with
        if layer < 0:
            on = self.blocks[0].register_forward_pre_hook
            self.handles[layer] = [
                on(before, with_kwargs=True),
                on(
                    lambda _m, args, kwargs: self._read(layer, [*args, *kwargs.values()]),
                    with_kwargs=True,
                ),
            ]
        else:
            on = self.blocks[layer].register_forward_hook
            self.handles[layer] = [
                on(after),
                on(
                    lambda _m, _a, output: self._read(
                        layer, output if isinstance(output, tuple) else [output]
                    )
                ),
            ]

    def _unhook_idle(self) -> None:
        for layer in set(self.handles) - {e.layer for e in self.edits.values()} - self.watched:
            for handle in self.handles.pop(layer):
                handle.remove()
        self._forward = None  # spans hold edits that may be gone

    def _changed(self, layer: int, values: list[Any]) -> list[Any] | None:
        """A block's inputs or outputs with this layer's edits in them; None when this batch has
        none."""
        spans = [(s, s.edit) for s in self._spans() if s.edit is not None and s.edit.layer == layer]
        if not spans:
            return None
        places = self._stream(values)
        # new tensors: vLLM reuses the old ones' memory
        parts = [values[i].clone(memory_format=torch.contiguous_format) for i in places]
        flat = [part.view(-1, self.width) for part in parts]
        if (
            not flat
            or len(flat[0]) != parts[0].shape[-2]
            or len(flat[0]) < max(s.stop for s, _ in spans)
        ):
            self.problem = (
                f"at layer {layer} the stream has shapes {[tuple(p.shape) for p in parts]}, not one"
                " row a token"
            )
            return None
        for span, edit in spans:
            delta = edit.delta[span.first :][: span.stop - span.start]
            rows = [part[span.start :][: len(delta)] for part in flat]
            h = reduce(torch.add, rows)
            edited = (h.float() + delta).to(h.dtype)
            self._note(span, edit, edited.float() - h.float())
            for part in rows:
                part.zero_()
            rows[-1].copy_(edited)
        for place, part in zip(places, parts, strict=True):
            values[place] = part
        return values

    def _read(self, layer: int, values: Sequence[Any]) -> None:
        """Record the stream of labelled requests; changes nothing."""
        if layer not in self.watched:
            return
        for span in self._spans():
            if span.label:
                rows = [
                    values[i].view(-1, self.width)[span.start : span.stop]
                    for i in self._stream(values)
                ]
                self.recorded.setdefault((span.label, layer), {})[span.first] = (
                    reduce(torch.add, rows).float().cpu()
                )

    def _stream(self, values: Sequence[Any]) -> list[int]:
        """Which of a block's inputs or outputs are the stream: hidden and, if it is carried apart,
        residual."""
        return [i for i, v in enumerate(values) if self._is_stream(v)][:2]

    def _is_stream(self, value: Any) -> bool:
        return (
            isinstance(value, torch.Tensor)
            and value.is_floating_point()
            and value.shape[-1] == self.width
        )

    def _note(self, span: _Span, edit: _Edit, change: torch.Tensor) -> None:
        if span.request not in edit.touched:
            n = len(edit.delta)
            zeros = torch.zeros(n, dtype=torch.float32, device=edit.delta.device)
            edit.touched[span.request] = _Touched(np.zeros(n, dtype=bool), zeros, zeros.clone())
        touched, where = edit.touched[span.request], slice(span.first, span.first + len(change))
        touched.rows[where] = True
        touched.squares[where] = change.pow(2).sum(1)
        touched.largest[where] = change.abs().amax(1)

    # -- who is who in the batch
    # ---------------------------------------------------------------------------------------

    def _spans(self) -> list[_Span]:
        """This forward's prompt rows with an edit or a label; worked out once a forward."""
        from vllm.forward_context import get_forward_context, is_forward_context_available

        if not is_forward_context_available():
            return []
        forward = get_forward_context()
        if self._forward is None or self._forward() is not forward:
            self._forward = weakref.ref(forward)
            # without: a trial run on stale requests
            self._now = self._read_batch() if forward.attn_metadata else []
            if self._now and forward.ubatch_slices:
                self.problem, self._now = "the batch is cut into micro-batches", []
        return self._now

    def _read_batch(self) -> list[_Span]:
        batch, starts, spans = self.runner.input_batch, self.runner.query_start_loc.np, []
        for i in range(batch.num_reqs):
            request = self.runner.requests[batch.req_ids[i]]
            extra = getattr(request.sampling_params, "extra_args", None) or {}
            name, label = extra.get(EDIT), extra.get(RECORD)
            edit = None if name is None else self.edits.get(name)
            if name is not None and edit is None:
                self.problem = f"a request named the edit {name!r}, which is not there"
            first, start, stop = (
                int(batch.num_computed_tokens_cpu[i]),
                int(starts[i]),
                int(starts[i + 1]),
            )
            # decoding reads an edit from the cache, so that only the prompt's rows are ever changed
            ends = request.num_prompt_tokens if label else len(edit.delta) if edit else 0
            stop = min(stop, start + min(ends, request.num_prompt_tokens) - first)
            if stop > start:
                spans.append(_Span(batch.req_ids[i], start, stop, first, edit, label))
        return spans


# -- the proof
# ---------------------------------------------------------------------------------------------------------

#: How far the same numbers may lie apart in other company: hidden states relative in norm,
#: log-probabilities in nats.
#: SmolLM2 in bfloat16 was seen at 0.004 and 0.08, its logits under the known δ at 1.8 and more.
TOLERANCE, TOLERANCE_LOW_PRECISION = (1e-3, 1e-3), (0.05, 0.3)


def self_test(llm: Any, layers: Sequence[int]) -> dict[str, Any]:
    """Prove on this `vllm.LLM` that a known δ arrives at each layer (−1: the embedding), reaches
    the logits, and stays put.

    All in two batches: a clean one, and one with a known δ and a δ of zero for each layer beside an
    unedited request. The known δ must be read back behind the hook and be in all T rows; zeros and
    the neighbour must change nothing. Returns what `edits_open` said. Raises AuditgapError with the
    reason when this model cannot be edited inside vLLM.
    """
    opened = llm.collective_rpc("edits_open")
    for told in opened:
        if told["problem"]:
            raise AuditgapError(f"vLLM cannot take edits here: {told['problem']}")
    layers = sorted(set(layers))
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.randint(4, 64, (n,), generator=draw).tolist() for n in (6, 5))
    neighbour = (second, {RECORD: "neighbour"})
    try:
        llm.collective_rpc("edits_watch", args=(layers,))
        clean = _run(llm, [(first, {RECORD: "clean"}), neighbour])
        deltas, asked = {}, [neighbour]
        for layer in layers:
            if layer not in clean[0].streams.get("clean", {}):
                raise AuditgapError(_sentence(layer, "the hook is never called"))
            h = clean[0].streams["clean"][layer]
            deltas[layer] = torch.randn(h.shape, generator=draw) * h.pow(2).mean().sqrt()
            for name, delta in (
                (f"known {layer}", deltas[layer]),
                (f"zero {layer}", torch.zeros_like(h)),
            ):
                llm.collective_rpc("edits_put", args=(name, layer, *pack(delta)))
                asked.append((first, {EDIT: name, RECORD: name}))
        edited = _run(llm, asked)
        tolerance = TOLERANCE if opened[0]["dtype"] == "torch.float32" else TOLERANCE_LOW_PRECISION
        for before, after in zip(clean, edited, strict=True):
            for layer in layers:
                if problem := _problem(layer, deltas[layer], before, after, tolerance):
                    raise AuditgapError(_sentence(layer, problem))
        settle(llm.collective_rpc("edits_stats"), {extra[EDIT]: 1 for _, extra in asked[1:]})
    finally:
        llm.collective_rpc("edits_clear")
    return opened[0]


@dataclass(frozen=True, eq=False)
class _Seen:
    """By label: the likeliest first tokens with their log-probabilities (nats), and by layer the
    stream [T, D] of one rank."""

    tops: Mapping[str, Mapping[int, float]]
    streams: Mapping[str, Mapping[int, torch.Tensor]]


def _run(llm: Any, asked: Sequence[tuple[list[int], dict[str, str]]]) -> list[_Seen]:
    """What labelled requests (token ids, extra arguments) gave, one batch of them, a rank each."""
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, logprobs=5, extra_args=e)
        for _, e in asked
    ]
    replies = llm.generate([salted(ids) for ids, _ in asked], params, use_tqdm=False)
    tops = {
        extra[RECORD]: {token: p.logprob for token, p in reply.outputs[0].logprobs[0].items()}
        for (_, extra), reply in zip(asked, replies, strict=True)
    }
    return [
        _Seen(
            tops,
            {
                name: {int(layer): unpack(*h) for layer, h in layers.items()}
                for name, layers in streams.items()
            },
        )
        for streams in llm.collective_rpc("edits_seen")
    ]


def _problem(
    layer: int, delta: torch.Tensor, clean: _Seen, edited: _Seen, tolerance: tuple[float, float]
) -> str:
    """What is wrong with editing at the layer; the empty string when nothing is."""
    known, zero = f"known {layer}", f"zero {layer}"
    h = clean.streams["clean"][layer]
    relative, nats = tolerance

    def off(name: str, wanted: torch.Tensor) -> bool:
        got = edited.streams.get(name, {}).get(layer)
        return (
            got is None
            or got.shape != wanted.shape
            or not bool((got - wanted).norm() <= relative * wanted.norm())
        )

    by_zero = _distance(edited.tops[zero], clean.tops["clean"])
    beside = _distance(edited.tops["neighbour"], clean.tops["neighbour"])
    if off(known, h + delta):
        return "the edit did not arrive"
    if off(zero, h):
        return "an edit of zero changes the hidden states"
    if not by_zero <= nats:
        return (
            f"an edit of zero moves the logits by {by_zero:.2g} nats: the model reads more than the"
            " sum of its stream"
        )
    if off("neighbour", clean.streams["neighbour"][layer]) or not beside <= nats:
        return "an edit changes the request beside it"
    if not _distance(edited.tops[known], clean.tops["clean"]) > 4 * max(by_zero, beside, 1e-6):
        return "the edit does not reach the logits"
    return ""


def _sentence(layer: int, problem: str) -> str:
    return (
        f"Self-test failed at {Site(layer)} inside vLLM: {problem}. Nothing was measured; use"
        " --engine hf for this model."
    )


def _distance(a: Mapping[int, float], b: Mapping[int, float]) -> float:
    """Largest difference of two lists of likeliest tokens, nats; a token that only one has counts
    from the other's last."""
    rest_a, rest_b = min(a.values()), min(b.values())
    return max(abs(a.get(t, rest_a) - b.get(t, rest_b)) for t in {*a, *b})
