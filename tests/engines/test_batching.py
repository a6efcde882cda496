"""Packs, padding, positions, and halving when memory runs out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auditgap.engines.batching import left_pad, packs, positions, right_pad
from auditgap.engines.fitting import halving
from auditgap.errors import AuditgapError

CPU = torch.device("cpu")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 60), max_size=30),
    st.integers(1, 300),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.integers(1, 9),
)
def test_packs_keep_their_promises(lengths, batch_tokens, pad_tolerance, weight):
    found = packs(lengths, batch_tokens=batch_tokens, pad_tolerance=pad_tolerance, weight=weight)
    assert sorted(i for pack in found for i in pack) == list(range(len(lengths)))
    assert [lengths[i] for pack in found for i in pack] == sorted(lengths)
    for pack in found:
        widest = max(lengths[i] for i in pack)
        assert len(pack) == 1 or len(pack) * widest * weight <= batch_tokens
        assert 1 - sum(lengths[i] for i in pack) / (len(pack) * widest) <= pad_tolerance + 1e-12


def test_packs_waste_no_room():
    assert packs([10] * 8, batch_tokens=40) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert packs([10] * 8, batch_tokens=40, weight=2) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_padding():
    ids, mask = left_pad([[5, 6], [7]], 9, CPU)
    assert ids.tolist() == [[5, 6], [9, 7]] and mask.tolist() == [[1, 1], [0, 1]]
    ids, mask = right_pad([[5, 6], [7]], 9, CPU)
    assert ids.tolist() == [[5, 6], [7, 9]] and mask.tolist() == [[1, 1], [1, 0]]


def test_positions_count_real_tokens():
    assert positions(torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])).tolist() == [
        [0, 0, 0, 1, 2],
        [0, 1, 2, 3, 4],
    ]


class TestHalving:
    """`run` stands in for a device that holds `room` rows; the sizes it was asked for are kept."""

    def device(self, room: int, error: type[Exception] = torch.OutOfMemoryError):
        self.asked: list[int] = []

        def run(rows):
            self.asked.append(len(rows))
            if len(rows) > room:
                raise error("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return [10 * row for row in rows]

        return run

    @pytest.mark.parametrize("room", [1, 2, 3, 7, 8])
    @pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
    def test_results_stay_in_order(self, room, error):
        assert halving(self.device(room, error), list(range(8))) == [10 * i for i in range(8)]
        assert sum(n for n in self.asked if n <= room) == 8  # every row once

    def test_it_halves_no_further_than_needed(self):
        halving(self.device(4), list(range(8)))
        assert self.asked == [8, 4, 4]

    def test_the_cpu_allocator_is_understood(self):
        """torch says it in other words on a CPU."""
        with pytest.raises(RuntimeError) as caught:
            torch.empty(2**60)
        words = str(caught.value)

        def run(rows):
            if len(rows) > 1:
                raise RuntimeError(words)
            return list(rows)

        assert halving(run, [1, 2, 3]) == [1, 2, 3]

    def test_one_row_that_does_not_fit_is_said_with_advice(self):
        with pytest.raises(AuditgapError, match="--dtype") as caught:
            halving(self.device(0), [1, 2, 3])
        assert caught.value.exit_code == 2 and self.asked == [3, 1]

    def test_other_errors_go_through_at_once(self):
        with pytest.raises(RuntimeError, match="shape"):
            halving(lambda rows: (_ for _ in ()).throw(RuntimeError("shape mismatch")), [1, 2])
        with pytest.raises(KeyError):
            halving(lambda rows: {}[0], [1, 2])
