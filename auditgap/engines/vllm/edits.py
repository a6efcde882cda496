"""Edits inside vLLM: a δ of its own for every request, at any decoder block, on the prompt's
positions only.

    # with ENVIRONMENT in os.environ before vllm is imported; `self_test` is a module of its own
    llm = LLM(model, **OPTIONS)
    self_test(llm, [-1, 15])                                     # refuses what cannot be edited
    llm.collective_rpc("edits_put", args=("a", 15, *pack(delta)))
    llm.generate([salted(ids)], SamplingParams(temperature=0, max_tokens=32, extra_args={EDIT: "a"}))
    # {"a": (l2, linf)}; raises unless all T rows were edited
    norms = settle(llm.collective_rpc("edits_stats"), {"a": 1})
    llm.collective_rpc("edits_clear")

`worker.EditExtension` becomes a base of vLLM's worker. Its hooks on the decoder blocks
(`editor.Editor`) learn from the runner which rows of the batch are which positions of which
request, so that edits of several sites, other requests, chunks of prompts and prompts computed
again after a preemption may share one batch. Layer −1 is what block 0 receives, after the family's
own scaling.

vLLM's blocks pass a stream on as two summands (hidden, residual), which the next norm adds. An
edited row is replaced by (0, h + δ), with h = hidden + residual rounded to the model's dtype and h
+ δ added in fp32 and rounded once: the same numbers as the engine on transformers. So an edit of
zero is itself the proof that nothing but the sum is read.

Tensor parallelism: hidden states are whole on every rank after a block, so every rank adds the same
δ. Pipeline and context parallelism cut the stream up, and are refused.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from auditgap.errors import AuditgapError
from auditgap.types import Document

#: Keys of `SamplingParams.extra_args`: the name of a request's edit; a label under which its hidden
#: states are recorded.
EDIT, RECORD = "auditgap_edit", "auditgap_record"
#: For os.environ, before vllm is imported: the other model runner keeps its batch elsewhere.
ENVIRONMENT: Mapping[str, str] = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
#: What LLM(…) needs beside the model. Compiled blocks would never call a hook.
OPTIONS: Mapping[str, Any] = {
    "worker_extension_cls": "auditgap.engines.vllm.worker.EditExtension",
    "enforce_eager": True,
}


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


def salted(ids: Sequence[int]) -> Document:
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
