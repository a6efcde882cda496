"""The proof, before anything is measured, that this `vllm.LLM` can be edited.

    self_test(llm, [-1, 15])               # the prompt's positions, layer by layer
    standing_self_test(llm, [-1, 0, 1])    # all positions, at these layers together

Both raise AuditgapError, which says where and why. They run in the child process, in two small
batches each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from auditgap.engines.vllm.edits import EDIT, RECORD, REQUEST, edited, pack, salted, settle, unpack
from auditgap.errors import AuditgapError
from auditgap.types import Document, Site

#: How far the same numbers may lie apart in other company: hidden states relative in norm,
#: log-probabilities in nats.
#: SmolLM2 in bfloat16 was seen at 0.004 and 0.08, its logits under the known δ at 1.8 and more.
TOLERANCE, TOLERANCE_LOW_PRECISION = (1e-3, 1e-3), (0.05, 0.3)
#: Tokens that are decoded, so that several steps are seen.
NEW = 3


def self_test(llm: Any, layers: Sequence[int]) -> Document:
    """Prove on this `vllm.LLM` that a known δ arrives at each layer (−1: the embedding), reaches
    the logits, and stays put.

    All in two batches: a clean one, and one with a known δ and a δ of zero for each layer beside an
    unedited request. The known δ must be read back behind the hook and be in all T rows; zeros and
    the neighbour must change nothing. Returns what `edits_open` said. Raises AuditgapError with the
    reason when this model cannot be edited inside vLLM.
    """
    opened = _opened(llm)
    layers = sorted(set(layers))
    draw, (first, second) = _prompts()
    neighbour = (second, {RECORD: "neighbour"})
    try:
        llm.collective_rpc("edits_watch", args=(layers,))
        clean = _run(llm, [(first, {RECORD: "clean"}), neighbour])
        deltas, asked = {}, [neighbour]
        for layer in layers:
            if layer not in clean[0].streams.get("clean", {}):
                raise AuditgapError(_sentence([layer], "the hook is never called"))
            h = clean[0].streams["clean"][layer][: len(first)]
            deltas[layer] = torch.randn(h.shape, generator=draw) * h.pow(2).mean().sqrt()
            for name, delta in (
                (f"known {layer}", deltas[layer]),
                (f"zero {layer}", torch.zeros_like(h)),
            ):
                llm.collective_rpc("edits_put", args=(name, [layer], {"shift": pack(delta)}))
                asked.append((first, {**edited(name, 0, len(first)), RECORD: name}))
        seen = _run(llm, asked)
        tolerance = _tolerance(opened)
        for before, after in zip(clean, seen, strict=True):
            for layer in layers:
                if problem := _problem(layer, deltas[layer], before, after, tolerance):
                    raise AuditgapError(_sentence([layer], problem))
        n = len(first), len(first)
        settle(
            llm.collective_rpc("edits_stats"),
            {extra[EDIT]: {extra[RECORD]: n} for _, extra in asked[1:]},
        )
    finally:
        llm.collective_rpc("edits_clear")
    return opened


def standing_self_test(llm: Any, layers: Sequence[int]) -> None:
    """Prove that an edit of all positions arrives at every one of these layers, on the prompt and
    on each decoded token, reaches the logits and stays put.

    In three batches: a clean one; one that decodes under an edit that replaces what the stream has
    along a direction by a known amount, and under an edit of zero, beside an unedited request; and
    one that is given the text that was written under the edit, whole, and must have the same hidden
    states and next token as decoding had. Raises AuditgapError with the reason.
    """
    opened = _opened(llm)
    layers = sorted(set(layers))
    draw, (first, second) = _prompts()
    direction = torch.randn(1, opened["width"], generator=draw)
    direction /= direction.norm()
    neighbour = (second, {RECORD: "neighbour"})
    try:
        llm.collective_rpc("edits_watch", args=(layers,))
        clean = _run(llm, [(first, {RECORD: "clean"}), neighbour])
        streams = clean[0].streams.get("clean", {})
        if missing := [layer for layer in layers if layer not in streams]:
            raise AuditgapError(_sentence(missing[:1], "the hook is never called"))
        # as long as the longest of what it is put into
        known = max(h.norm(dim=1).mean().item() for h in streams.values())
        terms = {"shift": known * direction, "read": direction, "write": direction}
        for name, some in (("known", terms), ("zero", {"shift": 0 * direction})):
            packed = {what: pack(term) for what, term in some.items()}
            llm.collective_rpc("edits_put", args=(name, layers, packed))
        under = ((first, {**edited(n, 0, None), RECORD: n}) for n in ("known", "zero"))
        decoded = _run(llm, [neighbour, *under])
        text = [*first, *decoded[0].ids["known"][:-1]]
        whole = _run(llm, [(text, {**edited("known", 0, None), RECORD: "whole"})], new=1)
        for seen in zip(clean, decoded, whole, strict=True):
            expected = known * direction[0]
            if problem := _standing_problem(layers, expected, *seen, _tolerance(opened)):
                raise AuditgapError(_sentence(layers, problem))
        n = len(text), len(text)
        wanted = {"known": {"known": n, "whole": n}, "zero": {"zero": n}}
        settle(llm.collective_rpc("edits_stats"), wanted)
    finally:
        llm.collective_rpc("edits_clear")


def _opened(llm: Any) -> Document:
    """What the workers say of themselves. Raises AuditgapError where one cannot be edited."""
    opened = llm.collective_rpc("edits_open")
    for told in opened:
        if told["problem"]:
            raise AuditgapError(f"vLLM cannot take edits here: {told['problem']}")
    return opened[0]


def _prompts() -> tuple[torch.Generator, list[list[int]]]:
    """A generator, and two prompts of tokens that every vocabulary has."""
    draw = torch.Generator().manual_seed(0)
    return draw, [torch.randint(4, 64, (n,), generator=draw).tolist() for n in (6, 5)]


def _tolerance(opened: Document) -> tuple[float, float]:
    return TOLERANCE if opened["dtype"] == "torch.float32" else TOLERANCE_LOW_PRECISION


@dataclass(frozen=True, eq=False)
class _Seen:
    """By label: the likeliest tokens with their log-probabilities (nats) at each new token, those
    new tokens, and by layer the stream [T, D] of one rank at every position that was fed."""

    tops: Mapping[str, Sequence[Mapping[int, float]]]
    ids: Mapping[str, list[int]]
    streams: Mapping[str, Mapping[int, torch.Tensor]]

    def alike(self, name: str, other: _Seen, its: str) -> tuple[int, float]:
        """How many positions of a request had the same tokens as its like in another batch had, and
        how far the next tokens' log-probabilities lie apart there at most, nats."""
        pairs = zip(self.ids[name], other.ids[its], strict=True)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        steps = min(same + 1, len(self.tops[name]))
        far = map(_distance, self.tops[name][:steps], other.tops[its][:steps])
        n_prompt = len(next(iter(self.streams[name].values()))) - len(self.ids[name]) + 1
        return n_prompt + min(same, steps - 1), max(far)


def _run(
    llm: Any, asked: Sequence[tuple[list[int], Mapping[str, Any]]], new: int = NEW
) -> list[_Seen]:
    """What labelled requests (token ids, extra arguments) gave, one batch of them, a rank each."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=new,
            ignore_eos=True,
            logprobs=5,
            extra_args={**extra, REQUEST: extra[RECORD]},
        )
        for _, extra in asked
    ]
    replies = llm.generate([salted(ids) for ids, _ in asked], params, use_tqdm=False)
    said = {
        extra[RECORD]: reply.outputs[0] for (_, extra), reply in zip(asked, replies, strict=True)
    }
    tops = {
        label: [{token: p.logprob for token, p in step.items()} for step in one.logprobs]
        for label, one in said.items()
    }
    ids = {label: list(one.token_ids) for label, one in said.items()}
    return [
        _Seen(
            tops,
            ids,
            {
                name: {int(layer): unpack(*h).rows() for layer, h in layers.items()}
                for name, layers in streams.items()
            },
        )
        for streams in llm.collective_rpc("edits_seen")
    ]


def _off(got: torch.Tensor | None, wanted: torch.Tensor, relative: float) -> bool:
    """Whether a stream is other than wanted, at the positions that are wanted."""
    if got is None or len(got) < len(wanted):
        return True
    return not bool((got[: len(wanted)] - wanted).norm() <= relative * wanted.norm())


def _problem(
    layer: int, delta: torch.Tensor, clean: _Seen, edited: _Seen, tolerance: tuple[float, float]
) -> str:
    """What is wrong with editing prompts at the layer; the empty string when nothing is."""
    known, zero = f"known {layer}", f"zero {layer}"
    n, (relative, nats) = len(delta), tolerance
    h, beside_h = (clean.streams[name][layer][:n] for name in ("clean", "neighbour"))

    def off(name: str, wanted: torch.Tensor) -> bool:
        return _off(edited.streams.get(name, {}).get(layer), wanted, relative)

    def apart(name: str, other: str) -> float:
        return _distance(edited.tops[name][0], clean.tops[other][0])

    by_zero, beside = apart(zero, "clean"), apart("neighbour", "neighbour")
    if off(known, h + delta):
        return "the edit did not arrive"
    if off(zero, h):
        return "an edit of zero changes the hidden states"
    if not by_zero <= nats:
        return _more_than_the_sum(by_zero)
    if off("neighbour", beside_h) or not beside <= nats:
        return "an edit changes the request beside it"
    if not apart(known, "clean") > 4 * max(by_zero, beside, 1e-6):
        return "the edit does not reach the logits"
    return ""


def _standing_problem(
    layers: Sequence[int],
    known: torch.Tensor,
    clean: _Seen,
    decoded: _Seen,
    whole: _Seen,
    tolerance: tuple[float, float],
) -> str:
    """What is wrong with editing all positions at the layers, where `known` [D] is what every
    stream is to have along its direction; the empty string when nothing is."""
    relative, nats = tolerance
    unedited = {
        name: clean.alike(plain, decoded, name)
        for name, plain in (("zero", "clean"), ("neighbour", "neighbour"))
    }

    def changed(name: str, plain: str, layer: int) -> bool:
        wanted = clean.streams[plain][layer][: unedited[name][0]]
        return _off(decoded.streams[name].get(layer), wanted, relative)

    for layer in layers:
        h, size = decoded.streams["known"].get(layer), known.norm()
        if h is None or len(h) != len(whole.streams["whole"][layer]):
            return "the hook is not called at every position"
        if changed("neighbour", "neighbour", layer):
            return "an edit changes the request beside it"
        if (h @ (known / size) - size).abs().max() > relative * h.norm(dim=1).max():
            return "the edit did not arrive at every position"
        if changed("zero", "clean", layer):
            return "an edit of zero changes the hidden states"
        if _off(h, whole.streams["whole"][layer], relative):
            return "decoding under the edit gives other hidden states than the whole text under it"
    under = _distance(decoded.tops["known"][-1], whole.tops["whole"][0])
    by_zero, beside = unedited["zero"][1], unedited["neighbour"][1]
    if not by_zero <= nats:
        return _more_than_the_sum(by_zero)
    if not beside <= nats:
        return "an edit changes the request beside it"
    if not under <= nats:
        return "decoding under the edit gives other logits than the whole text under it"
    moved = _distance(decoded.tops["known"][0], clean.tops["clean"][0])
    if not moved > 4 * max(by_zero, beside, under, 1e-6):
        return "the edit does not reach the logits"
    return ""


def _more_than_the_sum(nats: float) -> str:
    return (
        f"an edit of zero moves the logits by {nats:.2g} nats: the model reads more than the sum of"
        " its stream"
    )


def _sentence(layers: Sequence[int], problem: str) -> str:
    where = str(Site(layers[0])) if len(layers) == 1 else f"{len(layers)} sites together"
    return (
        f"Self-test failed at {where} inside vLLM: {problem}. Nothing was measured; use"
        " --engine hf for this model."
    )


def _distance(a: Mapping[int, float], b: Mapping[int, float]) -> float:
    """Largest difference of two lists of likeliest tokens, nats; a token that only one has counts
    from the other's last."""
    rest_a, rest_b = min(a.values()), min(b.values())
    return max(abs(a.get(t, rest_a) - b.get(t, rest_b)) for t in {*a, *b})
