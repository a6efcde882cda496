"""Edits inside vLLM: an edit of its own for every request, at any decoder blocks, on the positions
that the request says: the prompt's, the answer's as it is decoded, or all.

    # with ENVIRONMENT in os.environ before vllm is imported; `self_test` is a module of its own
    llm = LLM(model, **OPTIONS)
    self_test(llm, [-1, 15])                                     # refuses what cannot be edited
    llm.collective_rpc("edits_put", args=("a", [15], {"shift": pack(delta)}))
    asked = SamplingParams(temperature=0, max_tokens=32, extra_args=edited("a", 0, len(ids)))
    llm.generate([salted(ids)], asked)
    # {"a": (l2, linf)}; raises unless all T rows were edited
    norms = settle(llm.collective_rpc("edits_stats"), {"a": {"0": (len(ids), len(ids))}})
    llm.collective_rpc("edits_clear")

`worker.EditExtension` becomes a base of vLLM's worker. Its hooks on the decoder blocks
(`editor.Editor`) learn from the runner which rows of the batch are which positions of which
request, so that edits of several sites, other requests, chunks of prompts, decoding steps and what
is computed again after a preemption may share one batch. Layer −1 is what block 0 receives, after
the family's own scaling.

An edit is h ← h + shift − (h·read) write: a δ is a shift with a row a position, steering a shift of
one row, ablation reads and writes a direction; the last row stands for all positions behind it. A
position is a token's place in the request, whether it was in the prompt or has been decoded: an
edit of the positions [0, T) is on the prompt alone, even where decoded tokens are computed again
together with it; one of [0, ∞) is on all. A δ that goes on has `own` rows for the prompt's
positions, whose effective norms are told, and its last row on all behind them.

vLLM's blocks pass a stream on as two summands (hidden, residual), which the next norm adds. An
edited row is replaced by (0, h'), with h = hidden + residual rounded to the model's dtype and h'
computed in fp32 and rounded once: the same numbers as the engine on transformers. So an edit of
zero is itself the proof that nothing but the sum is read.

Tensor parallelism: hidden states are whole on every rank after a block, so every rank edits alike.
Pipeline and context parallelism cut the stream up, and are refused.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from auditgap.engines.coded import Coded
from auditgap.errors import AuditgapError
from auditgap.types import ConstantEdit, Document, Edit

#: Keys of `SamplingParams.extra_args`: the name of a request's edit; the positions [first, last)
#: that it is on (last None: all later ones); what the request is called where it is reported on; a
#: label under which its hidden states are recorded.
EDIT, SPAN, REQUEST, RECORD = (
    "auditgap_edit",
    "auditgap_span",
    "auditgap_request",
    "auditgap_record",
)
#: Parts of an edit, each [n, D]: a row a position, the last for all behind it.
TERMS = ("shift", "read", "write")
#: For os.environ, before vllm is imported: the other model runner keeps its batch elsewhere.
ENVIRONMENT: Mapping[str, str] = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
#: What LLM(…) needs beside the model. Compiled blocks would never call a hook.
OPTIONS: Mapping[str, Any] = {
    "worker_extension_cls": "auditgap.engines.vllm.worker.EditExtension",
    "enforce_eager": True,
}


def edited(name: str, first: int, last: int | None) -> Document:
    """The `extra_args` of a request under that edit at its positions [first, last)."""
    return {EDIT: name, SPAN: [first, last]}


def own_of(edit: Edit | ConstantEdit) -> int:
    """How many positions an edit without end has rows of their own for; 0: one row is for all."""
    return len(edit.delta) if isinstance(edit, Edit) else 0


def terms_of(edit: Edit | ConstantEdit) -> dict[str, torch.Tensor]:
    """What `edits_put` takes of an edit, each [n, D]."""
    if isinstance(edit, Edit):
        return {"shift": edit.delta}
    terms = {"shift": edit.shift, "read": edit.read, "write": edit.write}
    return {what: term[None] for what, term in terms.items() if term is not None}


def layers_of(edit: Edit | ConstantEdit) -> list[int]:
    sites = (edit.site,) if isinstance(edit, Edit) else edit.sites
    return [site.layer_index for site in sites]


def span_of(edit: Edit | ConstantEdit, n_prompt: int) -> tuple[int, int | None]:
    """The positions [first, last) that an edit is on where the prompt has so many tokens; None: to
    the end of what is decoded. Nothing else says where an edit is."""
    return 0, None if isinstance(edit, ConstantEdit) or edit.goes_on else n_prompt


def pack(rows: torch.Tensor | Coded) -> tuple[list[int], bytes]:
    """Rows [n, D] as (shape, bytes): [n, D] and their fp32; or, where a byte tells a row's K values
    apart, [n, D, K] and a byte a value, with the fp32 of each row's values behind them."""
    coded = rows if isinstance(rows, Coded) else coded_of(rows)
    codes, book = coded.codes.contiguous().numpy(), coded.book.contiguous().numpy()
    if not book.shape[1]:
        return list(codes.shape), codes.astype("<f4", copy=False).tobytes()
    return [*codes.shape, book.shape[1]], codes.tobytes() + book.astype("<f4", copy=False).tobytes()


def unpack(shape: Sequence[int], payload: bytes) -> Coded:
    """What `pack` was given, bit for bit. Raises AuditgapError when the bytes are not as many as the
    shape says, or name values that are not there."""
    n, width, values = [*shape, 0, 0, 0][:3]
    size = n * width * (1 if values else 4) + 4 * n * values
    if len(shape) not in (2, 3) or min(shape) < 1 or len(payload) != size:
        raise AuditgapError(
            "An edit is [n, D] in fp32, or [n, D, K] in bytes with K values a row; a shape of"
            f" {list(shape)} came with {len(payload)} bytes."
        )
    if not values:
        return Coded(_fp32(payload, n, width), torch.empty(n, 0))
    codes = torch.from_numpy(np.frombuffer(payload[: n * width], np.uint8).reshape(n, width).copy())
    if int(codes.max()) >= values:
        raise AuditgapError(f"An edit names the value {int(codes.max())} of {values}.")
    return Coded(codes, _fp32(payload[n * width :], n, values))


def coded_of(rows: torch.Tensor) -> Coded:
    """Rows [n, D], wherever and in whatever dtype they are, as they travel: by the byte, where that
    is less."""
    plain = rows.detach().to("cpu", torch.float32).contiguous()
    coded = Coded.of(plain)
    return coded if coded.nbytes < plain.nbytes else Coded(plain, plain.new_empty(len(plain), 0))


def _fp32(payload: bytes, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(payload, dtype="<f4").reshape(shape).copy())


def salted(ids: Sequence[int]) -> Document:
    """An edited request's prompt for `LLM.generate`, with a salt that nobody else has.

    The salt goes into the hash of the first cached block and so of all that follow: the request
    finds no block of another and leaves none that another could find. Needed wherever prefix
    caching is on.
    """
    return {"prompt_token_ids": list(ids), "cache_salt": uuid.uuid4().hex}


def settle(
    stats: Sequence[Mapping[str, Any]], wanted: Mapping[str, Mapping[str, tuple[int, int]]]
) -> dict[str, tuple[float | None, float | None]]:
    """Effective norms (‖(h + δ) − h‖₂, ∞-norm) of each edit, once it is certain that each arrived
    in full, at all of its layers.

    `stats` is what `edits_stats` returned, one a rank; `wanted`, by edit and request, how many
    positions were to be edited, from the edit's first one on, at least and at most. A norm is None
    where h was not finite, and of an edit that has no rows of its own. Raises AuditgapError when an edit missed a
    request, or a position of one, on any rank, or was on one that it was not to be on.
    """
    for rank, seen in enumerate(stats):
        if seen["problem"]:
            raise AuditgapError(
                f"vLLM's batch could not be read while edits were on: {seen['problem']}"
            )
        for name, requests in wanted.items():
            found = seen["edits"].get(name, {})
            for key, (least, most) in requests.items():
                told = found.get(key, {"rows": 0, "end": 0})
                if not least <= told["rows"] == told["end"] <= most:
                    raise AuditgapError(
                        f"Edit {name} was to change {least} positions of request {key} on rank"
                        f" {rank}; it changed {told['rows']}. Nothing of this batch can be used."
                    )
            if foreign := sorted(set(found) - set(requests)):
                raise AuditgapError(
                    f"Edit {name} changed requests that it was not asked for on rank {rank}"
                    f" ({', '.join(foreign)[:80]}). Nothing of this batch can be used."
                )
    first = {name: next(iter(found.values()), None) for name, found in stats[0]["edits"].items()}
    return {name: _norms(first.get(name)) for name in wanted}


def _norms(request: Mapping[str, Any] | None) -> tuple[float | None, float | None]:
    if request is None:  # nothing was fed that it was to be on
        return None, None
    l2, linf = (
        value if value is not None and np.isfinite(value) else None
        for value in (request["l2"], request["linf"])
    )
    return l2, linf
