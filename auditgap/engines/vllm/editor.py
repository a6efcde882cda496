"""Edits in vLLM's worker: hooks on the decoder blocks that edit each request's rows.

    editor = Editor(worker.model_runner)
    editor.put("a", [15], {"shift": Coded.of(delta)})   # for requests whose extra_args name the edit "a"
    editor.stats()["edits"]["a"]              # {request: {"rows", "end", "l2", "linf"}, …}

What the hooks read and write of the stream, and why: `auditgap.engines.vllm.edits`.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import nn

from auditgap.engines.coded import Coded
from auditgap.engines.vllm.edits import EDIT, RECORD, REQUEST, SPAN, TERMS, pack
from auditgap.engines.vllm.rows import (
    EditedRows,
    Forward,
    LayerRows,
    PlacedEdit,
    Recorded,
    Span,
    edited_states,
    term_of,
)
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


class Editor:
    """The hooks of one worker, and the edits that they apply."""

    def __init__(self, runner: Any) -> None:
        config = runner.model_config.hf_text_config
        self.runner = runner
        self.blocks = find_blocks(runner.get_model(), config.num_hidden_layers)
        self.width = config.hidden_size
        self.edits: dict[str, PlacedEdit] = {}
        self.handles: dict[int, list[Any]] = {}
        self.watched: set[int] = set()
        self.recorded: dict[tuple[str, int], dict[int, torch.Tensor]] = {}
        self.problem = ""
        self._context: Any = None  # a weak reference to what `_now` was made for
        self._now = Forward()

    # -- what is asked of it
    # -------------------------------------------------------------------------------------------

    def put(
        self,
        name: str,
        layers: Sequence[int],
        terms: Mapping[str, Coded],
        own: int = 0,
    ) -> None:
        for what, term in terms.items():
            if what not in TERMS or term.width != self.width:
                raise AuditgapError(
                    f"This model's stream is {self.width} wide, and an edit has {', '.join(TERMS)};"
                    f" {what} of shape {[len(term), term.width]} came."
                )
        for layer in layers:
            self._hook(layer)
        placed = {what: term.to(self.runner.device) for what, term in terms.items()}
        self.edits[name] = PlacedEdit(frozenset(layers), placed, own)

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
        self._count()
        return {
            "problem": self.problem,
            "edits": {
                name: {key: edited.describe() for key, edited in edit.requests.items()}
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
        wanted = self.watched.union(*(edit.layers for edit in self.edits.values()))
        for layer in set(self.handles) - wanted:
            for handle in self.handles.pop(layer):
                handle.remove()
        self._context, self._now = None, Forward()  # spans hold edits that may be gone

    def _changed(self, layer: int, values: list[Any]) -> list[Any] | None:
        """A block's inputs or outputs with this layer's edits in them; None when this batch has
        none."""
        here = self._rows_at(layer)
        if here is None:
            return None
        places = self._stream(values)
        # new tensors: vLLM reuses the old ones' memory
        parts = [values[i].clone(memory_format=torch.contiguous_format) for i in places]
        flat = [part.view(-1, self.width) for part in parts]
        needed = max(span.start + span.n for span in here.spans)
        if not flat or len(flat[0]) != parts[0].shape[-2] or len(flat[0]) < needed:
            self.problem = (
                f"at layer {layer} the stream has shapes {[tuple(p.shape) for p in parts]}, not one"
                " row a token"
            )
            return None
        h = reduce(torch.add, [part[here.rows] for part in flat])
        edited = edited_states(h.float(), here.terms).to(h.dtype)
        for part in flat[:-1]:
            part[here.rows] = 0
        flat[-1][here.rows] = edited
        self._note(layer, here.spans, edited.float() - h.float())
        for place, part in zip(places, parts, strict=True):
            values[place] = part
        return values

    def _rows_at(self, layer: int) -> LayerRows | None:
        """This forward's rows with an edit at the layer; an edit of many layers has them worked out
        once."""
        forward = self._this_forward()
        which = tuple(i for i, s in enumerate(forward.spans) if layer in s.edit.layers)
        if which and which not in forward.rows:
            spans, device = [forward.spans[i] for i in which], self.runner.device
            rows = np.concatenate([np.arange(s.start, s.start + s.n) for s in spans])
            terms = {
                what: torch.cat([term_of(s, what, self.width, device) for s in spans])
                for what in TERMS
                if any(what in s.edit.terms for s in spans)
            }
            forward.rows[which] = LayerRows(spans, torch.from_numpy(rows).to(device), terms)
        return forward.rows[which] if which else None

    def _read(self, layer: int, values: Sequence[Any]) -> None:
        """Record the stream of labelled requests; changes nothing."""
        if layer not in self.watched:
            return
        for one in self._this_forward().recorded:
            rows = [
                values[i].view(-1, self.width)[one.start : one.stop] for i in self._stream(values)
            ]
            self.recorded.setdefault((one.label, layer), {})[one.first] = (
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

    def _note(self, layer: int, spans: Sequence[Span], change: torch.Tensor) -> None:
        """That the layer's edits were made, and the sizes of those that are to be known."""
        if layer in self._now.called:
            self.problem = f"layer {layer} is run more than once in a forward"
        self._now.called.add(layer)
        if all(span.edited.squares is None for span in spans):
            return
        squares, largest, at = change.pow(2).sum(1), change.abs().amax(1), 0
        for span in spans:
            span.edited.measure(span.first, squares[at : at + span.n], largest[at : at + span.n])
            at += span.n

    def _count(self) -> None:
        """Count the last forward's rows: those that were edited at every layer of their edit."""
        for span in self._now.spans:
            if span.edit.layers <= self._now.called:
                span.edited.rows[span.first : span.first + span.n] = True
        self._now = Forward()

    # -- who is who in the batch
    # ---------------------------------------------------------------------------------------

    def _this_forward(self) -> Forward:
        """Its rows with an edit or a label; worked out once a forward."""
        from vllm.forward_context import get_forward_context, is_forward_context_available

        if not is_forward_context_available():
            return Forward()
        context = get_forward_context()
        if self._context is None or self._context() is not context:
            self._count()
            self._context = weakref.ref(context)
            # without: a trial run on stale requests
            if context.attn_metadata:
                self._now = Forward(*self._read_batch())
            if self._now.spans and context.ubatch_slices:
                self.problem, self._now = "the batch is cut into micro-batches", Forward()
        return self._now

    def _read_batch(self) -> tuple[list[Span], list[Recorded]]:
        batch, starts = self.runner.input_batch, self.runner.query_start_loc.np
        spans, recorded = [], []
        for i in range(batch.num_reqs):
            request = self.runner.requests[batch.req_ids[i]]
            extra = getattr(request.sampling_params, "extra_args", None) or {}
            start, stop = int(starts[i]), int(starts[i + 1])
            # decoded tokens are rows as the prompt's are, one a step, or several once they are
            # computed again
            computed = int(batch.num_computed_tokens_cpu[i])
            if extra.get(RECORD):
                recorded.append(Recorded(extra[RECORD], start, stop, computed))
            if extra.get(EDIT) is None:
                continue
            edit = self.edits.get(extra[EDIT])
            if edit is None:
                self.problem = f"a request named the edit {extra[EDIT]!r}, which is not there"
                continue
            first, last = extra[SPAN]
            here = max(first, computed)
            n = computed + stop - start - here
            if last is not None:
                n = min(n, last - here)
            rows = (edit.own or 1,) if last is None else (1, last - first)
            if any(len(term) not in rows for term in edit.terms.values()):
                end = first + rows[-1]
                self.problem = f"{extra[EDIT]!r} has not a row for each of {first} to {end}"
            elif n > 0:
                edited = self._edited_of(edit, request, first, last)
                spans.append(Span(start + here - computed, here - first, n, edit, edited))
        return spans, recorded

    def _edited_of(
        self, edit: PlacedEdit, request: Any, first: int, last: int | None
    ) -> EditedRows:
        """What is known of the request's rows under its edit."""
        params = request.sampling_params
        key = str((params.extra_args or {}).get(REQUEST, request.req_id))
        if key in edit.requests:
            return edit.requests[key]
        most = request.num_prompt_tokens + params.max_tokens - first
        n = most if last is None else last - first
        made = EditedRows(np.zeros(n, dtype=bool))
        own = edit.own if last is None else n
        if len(edit.layers) == 1 and own:
            made.squares = torch.zeros(own, dtype=torch.float32, device=self.runner.device)
            made.largest = torch.zeros_like(made.squares)
        edit.requests[key] = made
        return made
