"""The proof, before anything is measured, that this `vllm.LLM` can be edited.

    self_test(llm, [-1, 15])     # raises AuditgapError, which says at which layer and why

It runs in the child process, in two small batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from auditgap.engines.vllm.edits import EDIT, RECORD, pack, salted, settle, unpack
from auditgap.errors import AuditgapError
from auditgap.types import Document, Site

#: How far the same numbers may lie apart in other company: hidden states relative in norm,
#: log-probabilities in nats.
#: SmolLM2 in bfloat16 was seen at 0.004 and 0.08, its logits under the known δ at 1.8 and more.
TOLERANCE, TOLERANCE_LOW_PRECISION = (1e-3, 1e-3), (0.05, 0.3)


def self_test(llm: Any, layers: Sequence[int]) -> Document:
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
