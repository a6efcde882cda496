"""Edits in a quarter of their bytes, bit for bit.

    kept = Coded.of(delta)               # [T, D] fp32, on the CPU
    kept.rows()                          # the same bits
    Coded.read(kept.arrays("0.1"), "0.1")

A step of sign PGD moves every coordinate of a position by one of two amounts and clips it to the
ball. So after the ten steps of the default attack a position has some ninety different values,
however wide the model is (a dozen or two under the paper's constant steps), and each is stored as one byte
that says which. Rows with more than 256 values, as after twenty decreasing steps, stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

#: Values that one byte can tell apart.
_VALUES = 256
#: Coordinates of a row that are looked at first for the values that there are.
_SAMPLE = 512


@dataclass(frozen=True, eq=False, slots=True)
class Coded:
    """Rows [T, D]: `codes` says by the byte which of its row's values in `book` [T, K] each is; or
    `codes` is the fp32 rows themselves, and `book` has no column."""

    codes: torch.Tensor
    book: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor) -> Coded:
        """From fp32 rows [T, D] on the CPU."""
        bits = rows.contiguous().view(torch.int32)  # equal bits are equal values, -0 apart from 0
        for width in dict.fromkeys((min(_SAMPLE, bits.shape[1]), bits.shape[1])):
            book = _values(bits[:, :width])
            if book is None:
                break
            codes = torch.searchsorted(book, bits).clamp_(max=book.shape[1] - 1)
            if torch.equal(book.gather(1, codes), bits):
                return cls(codes.to(torch.uint8), book.view(torch.float32))
        return cls(rows, rows.new_empty(rows.shape[0], 0))

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def width(self) -> int:
        return self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.book.nbytes

    def to(self, device: torch.device) -> Coded:
        return Coded(self.codes.to(device), self.book.to(device))

    def rows(self, places: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Those [n, D] at these places in fp32, as they came; all [T, D] by default."""
        codes, book = self.codes[places], self.book[places]
        return book.gather(1, codes.long()) if book.shape[1] else codes

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """What is to be stored under that name; `read` takes it."""
        book = {f"{name}.book": self.book.numpy()} if self.book.shape[1] else {}
        return {name: self.codes.numpy(), **book}

    @classmethod
    def read(cls, arrays: Mapping[str, np.ndarray], name: str) -> Coded:
        """From `arrays`, or from plain fp32 rows."""
        codes = torch.from_numpy(arrays[name])
        book = arrays.get(f"{name}.book")
        if book is None:
            return cls(codes, codes.new_empty(codes.shape[0], 0))
        return cls(codes, torch.from_numpy(book))


def _values(bits: torch.Tensor) -> torch.Tensor | None:
    """The different values of each row [T, K], in order, the last repeated to the width of the
    longest; None: more than a byte can tell."""
    ordered = bits.sort(dim=1).values
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = is_new.cumsum(1) - 1
    width = int(place.max()) + 1 if place.numel() else 0
    if not 0 < width <= _VALUES:
        return None
    book = ordered[:, -1:].repeat(1, width)
    return book.scatter_(1, place, ordered)
