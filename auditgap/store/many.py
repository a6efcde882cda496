"""Work over many files, a few at a time: on threads, or in turn where threads would only take turns.

    for size in in_turn(lambda names: [len(read(name)) for name in names], names): ...

Results come in the order of the names, whatever ran when.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

THREADS = 4  #: that read files: on network storage it is the waiting that takes long

_T = TypeVar("_T")


def on_threads(work: Callable[[Sequence[str]], list[_T]], names: Sequence[str]) -> Iterator[_T]:
    """`work` of all names in their order, some at a time on several threads."""
    if len(names) <= 1:
        yield from work(names)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for done in pool.map(work, _parts(names)):
            yield from done


def in_turn(work: Callable[[Sequence[str]], list[_T]], names: Sequence[str]) -> Iterator[_T]:
    """The same of work that mostly computes in Python, where threads take turns and lose time: so
    on one, until it is seen to wait for the disk most of the time."""
    parts = _parts(names)
    for n, part in enumerate(parts, 1):
        start, computed = time.perf_counter(), time.thread_time()
        yield from work(part)
        if time.perf_counter() - start > 2 * (time.thread_time() - computed):
            yield from on_threads(work, names[n * len(parts[0]) :])
            return


def _parts(names: Sequence[str]) -> list[Sequence[str]]:
    return [names[i : i + 64] for i in range(0, len(names), 64)]
