"""Edits in vLLM's worker: hooks on the decoder blocks that add each request's δ to its rows.

    editor = Editor(worker.model_runner)
    editor.put("a", 15, delta)          # for requests whose extra_args name the edit "a"
    editor.stats()["edits"]["a"]        # {"positions": T, "requests": [{"rows", "l2", "linf"}, …]}

What the hooks read and write of the stream, and why: `auditgap.engines.vllm.edits`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import nn

from auditgap.engines.vllm.edits import EDIT, RECORD, pack
from auditgap.errors import AuditgapError
from auditgap.types import Document


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


class Editor:
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

    def stats(self) -> Document:
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
