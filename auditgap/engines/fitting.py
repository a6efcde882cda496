"""How many tokens fit: measured on a first small batch, and remembered where memory ran out.

    fitting = Fitting(meter_of(device))
    fitting.run(("gradient", site), attack, rows, lengths)      # results in the order of the rows

Work of one kind (a gradient above one site, speech under edits at it) takes so many bytes a token.
On an accelerator its first batch is small and measured, and what is free then says how large the
others are. A batch that memory was too small for is parted, and no later one of its kind is as
large. Which rows run together changes no number.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

from auditgap.errors import AuditgapError
from auditgap.models import room

T = TypeVar("T")
R = TypeVar("R")

#: Set in a process that is one of several ranks of a model: none of them may part a batch that the
#: others do not.
LOCKSTEP = False
#: Tokens of a batch that is measured.
FIRST = 2048
#: Share of what is free that is planned with: blocks of other sizes leave gaps between them.
_USED = 0.8
#: What allocators and libraries say, in small letters, when there is too little memory.
_WORDS = (
    "out of memory",
    "_status_alloc_failed",  # cuBLAS, cuDNN, cuSOLVER, cuSPARSE
    "can't allocate memory",
    "not enough memory",
    "failed to allocate memory",
    "erroroutofmemory",
)


class OutOfMemory(AuditgapError):
    """Memory ran out on a rank that may not part its batch alone; all may, of `tokens` or more."""

    def __init__(self, tokens: int, rows: int) -> None:
        super().__init__(
            "A rank of a sharded model ran out of memory. Use a smaller --batch-tokens, or more"
            " ranks."
        )
        self.tokens, self.rows = tokens, rows


class Meter(Protocol):
    """What measures a batch."""

    def start(self) -> None:
        """A batch begins."""

    def fit(self, tokens: int) -> int:
        """How many tokens would fit, by the batch of so many that has just ended."""
        ...


class CUDAMeter:
    """The peaks of torch's allocator on a subject's GPUs."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = devices
        self._before: list[tuple[float, int]] = []

    def start(self) -> None:
        self._before = []
        for device in self.devices:
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)
            self._before.append((room.free_memory(str(device)), held))

    def fit(self, tokens: int) -> int:
        found = []
        for device, (free, held) in zip(self.devices, self._before, strict=True):
            taken = max(1, torch.cuda.max_memory_allocated(device) - held)
            found.append(int(_USED * free * tokens / taken))
        return max(1, min(found))


def meter_of(model: torch.nn.Module) -> Meter | None:
    """What measures a model's batches where it stands; None on a CPU, where a batch's size follows
    from its caches."""
    devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    return CUDAMeter(devices) if devices else None


class Fitting:
    """See the module. `least`: the smallest of all ranks' numbers, where a model has several."""

    def __init__(
        self,
        meter: Meter | None = None,
        *,
        most: int | None = None,
        least: Callable[[float], float] = lambda number: number,
    ) -> None:
        self.meter, self.most, self.least = meter, most, least
        self.limits: dict[Hashable, int] = {}  #: tokens of a batch, by kind of work
        self.n_out = 0  #: batches that memory was too small for

    def run(
        self,
        kind: Hashable,
        run: Callable[[Sequence[T]], list[R]],
        rows: Sequence[T],
        lengths: Sequence[int],
    ) -> list[R]:
        """`run(rows)` in batches that fit, one after the other; `lengths` are the rows' tokens.

        Raises AuditgapError when a single row does not fit; OutOfMemory in lockstep.
        """
        found: list[R] = []
        at = 0
        while at < len(rows):
            limit, measure = self._limit(kind)
            n = _how_many(lengths[at:], limit)
            tokens = n * max(lengths[at : at + n])
            if measure and self.meter is not None:
                self.meter.start()
            try:
                found += run(rows[at : at + n])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if LOCKSTEP:
                    raise OutOfMemory(tokens, n) from None
                if n == 1:
                    raise AuditgapError(
                        "Out of memory with a single row. Use a smaller --dtype (bfloat16), fewer"
                        " --max-new-tokens, shorter prompts, or a device with more memory."
                    ) from None
                self.n_out += 1
                self.limits[kind] = tokens // 2
            else:
                at += n
                if measure and self.meter is not None:
                    self.limits[kind] = int(self.least(self.meter.fit(tokens)))
                continue
            gc.collect()  # outside of `except`, whose traceback holds the batch
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return found

    def _limit(self, kind: Hashable) -> tuple[int | None, bool]:
        """Tokens that a batch of this kind may have now, and whether it is to be measured."""
        if (known := self.limits.get(kind)) is not None:
            return (known if self.most is None else min(known, self.most)), False
        if self.meter is None:
            return self.most, False
        return (FIRST if self.most is None else min(FIRST, self.most)), True


def _how_many(lengths: Sequence[int], limit: int | None) -> int:
    """How many of the next rows, padded to the longest, have at most so many tokens; one, if none."""
    if limit is None:
        return len(lengths)
    longest = 0
    for n, length in enumerate(lengths):
        longest = max(longest, length)
        if n and (n + 1) * longest > limit:
            return n
    return len(lengths)


def halving(run: Callable[[Sequence[T]], list[R]], rows: Sequence[T]) -> list[R]:
    """`run(rows)`, or parts of them one after the other when memory runs out; results stay in order.

    Raises as `Fitting.run`.
    """
    return Fitting().run(None, run, rows, [1] * len(rows))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, or a library that allocates for itself, had too little memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    said = str(error).lower()
    return should_reduce_batch_size(error) or any(word in said for word in _WORDS)
