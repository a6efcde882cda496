"""auditgap.store.many: the same results in the same order, whichever way the work is done."""

import threading
import time
from collections.abc import Callable, Sequence

import pytest

from auditgap.store.many import in_turn, on_threads

NAMES = [f"{n:03}" for n in range(400)]


def noting(
    seen: set[int], seconds: float = 0.0
) -> Callable[[Sequence[str]], list[tuple[str, int]]]:
    """Work that waits so long for every part and notes on which thread it is done."""

    def work(names: Sequence[str]) -> list[tuple[str, int]]:
        seen.add(threading.get_ident())
        if seconds:
            time.sleep(seconds)
        return [(name, len(name)) for name in names if name != "007"]

    return work


@pytest.mark.parametrize("n", [0, 1, 64, 65, 400])
@pytest.mark.parametrize("seconds", [0.0, 0.02])
def test_every_way_gives_what_a_plain_loop_gives(n, seconds):
    wanted = noting(set())(NAMES[:n])
    for way in (in_turn, on_threads):
        assert list(way(noting(set(), seconds), NAMES[:n])) == wanted


def test_work_that_waits_goes_to_threads():
    seen: set[int] = set()
    list(in_turn(noting(seen, 0.02), NAMES))
    assert threading.get_ident() in seen and len(seen) > 1


def test_an_error_comes_through_and_ends_it():
    def work(names: Sequence[str]) -> list[str]:
        if "100" in names:
            raise ValueError("broken")
        return list(names)

    for way in (in_turn, on_threads):
        with pytest.raises(ValueError, match="broken"):
            list(way(work, NAMES))
