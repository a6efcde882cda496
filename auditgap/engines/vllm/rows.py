"""What an editor of vLLM's blocks knows: edits, the rows of a forward that they are on, and what has
been done to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from auditgap.engines.coded import Coded
from auditgap.types import Document


@dataclass(eq=False)
class PlacedEdit:
    """h ← h + shift − (h·read) write at each of its layers: `terms` [n, D], as they travelled, on the
    model's device, a row a position, the last for all behind it; `own`: of one without end, how many
    positions have rows of their own (0: one row is for all); and what of each request it has
    changed."""

    layers: frozenset[int]
    terms: Mapping[str, Coded]
    own: int = 0
    requests: dict[str, EditedRows] = field(default_factory=dict)


@dataclass(eq=False)
class EditedRows:
    """By position, from the edit's first one on: edited or not and, for an edit of one layer, of
    the positions that it has rows of their own for, ‖(h + δ) − h‖₂² and the ∞-norm. A position that
    is computed again overwrites itself."""

    rows: np.ndarray
    squares: torch.Tensor | None = None
    largest: torch.Tensor | None = None

    def measure(self, first: int, squares: torch.Tensor, largest: torch.Tensor) -> None:
        """Keep the sizes of positions first, first + 1, …, where they are to be known."""
        if self.squares is not None and self.largest is not None:
            n = max(0, min(len(squares), len(self.squares) - first))
            self.squares[first : first + n] = squares[:n]
            self.largest[first : first + n] = largest[:n]

    def describe(self) -> Document:
        """`rows`: how many positions were edited; `end`: the last of them and one."""
        where = self.rows.nonzero()[0]
        return {
            "rows": len(where),
            "end": int(where[-1]) + 1 if len(where) else 0,
            "l2": None if self.squares is None else self.squares.sum().sqrt().item(),
            "linf": None if self.largest is None else self.largest.max().item(),
        }


@dataclass(frozen=True, eq=False)
class Span:
    """Rows start…start + n of the batch are positions first…first + n of an edit, counted from its
    first one."""

    start: int
    first: int
    n: int
    edit: PlacedEdit
    edited: EditedRows


@dataclass(frozen=True, eq=False)
class Recorded:
    """Rows start…stop of the batch are a labelled request's, from position `first` on."""

    label: str
    start: int
    stop: int
    first: int


@dataclass(frozen=True, eq=False)
class LayerRows:
    """What is done at a layer: the spans, their rows [N] of the batch, and the terms [N, D]."""

    spans: Sequence[Span]
    rows: torch.Tensor
    terms: Mapping[str, torch.Tensor]


@dataclass(eq=False)
class Forward:
    """Who is who in a forward, worked out once; `called` are the layers whose edits were made."""

    spans: Sequence[Span] = ()
    recorded: Sequence[Recorded] = ()
    rows: dict[tuple[int, ...], LayerRows] = field(default_factory=dict)
    called: set[int] = field(default_factory=set)


def edited_states(h: torch.Tensor, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """h + shift − (h·read) write, [N, D] in fp32."""
    new = h
    if "read" in terms and "write" in terms:
        new = new - (h * terms["read"]).sum(1, keepdim=True) * terms["write"]
    return new + terms["shift"] if "shift" in terms else new


def term_of(span: Span, what: str, width: int, device: torch.device) -> torch.Tensor:
    """A term of the span's rows, [n, D]: 0 where its edit has none; behind its last row, that."""
    term = span.edit.terms.get(what)
    if term is None:
        return torch.zeros(1, width, device=device).expand(span.n, width)
    if len(term) == 1:
        return term.rows().expand(span.n, width)
    places = torch.arange(span.first, span.first + span.n, device=device)
    return term.rows(places.clamp(max=len(term) - 1))
