"""The share flipped by each distance, with broken text as another way to end."""

import doctest
import importlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import CensoredData, binomtest, ecdf

from auditgap.errors import UsageError
from auditgap.stats.incidence import ENDINGS, incidence
from auditgap.stats.intervals import Interval


def test_the_example_in_the_docstring_is_true():
    # `auditgap.stats.incidence` is the function, once the package is imported
    result = doctest.testmod(importlib.import_module("auditgap.stats.incidence"))
    assert result.attempted and not result.failed


def test_aalen_johansen_by_hand():
    """Ten prompts: at 1 two flip, one breaks; at 2 one is censored; at 3 three flip; the rest hold
    out to 4."""
    sizes = [1, 1, 1, 2, 3, 3, 3, 4, 4, 4]
    endings = ["flipped"] * 2 + ["broken", "withstood"] + ["flipped"] * 3 + ["withstood"] * 3
    found = incidence(sizes, endings)
    assert found.distances.tolist() == [1, 2, 3, 4]
    # at 3: six are left of those 70 % that had not ended by then
    assert found.flipped == pytest.approx([0.2, 0.2, 0.2 + 0.7 * 3 / 6, 0.55])
    assert found.broken == pytest.approx([0.1] * 4)
    assert found.median.estimate == 3
    assert (found.n, found.n_flipped, found.n_broken, found.n_unscored) == (10, 5, 1, 0)


def test_without_broken_text_it_is_one_less_kaplan_meier():
    rng = np.random.default_rng(0)
    size, flipped = rng.integers(1, 8, 60), rng.random(60) < 0.6
    found = incidence(size, ["flipped" if f else "withstood" for f in flipped])
    survival = ecdf(CensoredData.right_censored(size, ~flipped)).sf
    assert found.flipped == pytest.approx(1 - survival.probabilities)


def test_without_censoring_the_share_is_the_count_and_its_interval_exact():
    found = incidence(
        [1.0] * 6 + [2.0] * 4 + [4.0] * 10, ["flipped"] * 6 + ["broken"] * 4 + ["withstood"] * 10
    )
    expected = binomtest(6, 20).proportion_ci(method="exact")
    assert found.flipped[-1] == pytest.approx(0.3)
    assert (found.lo[-1], found.hi[-1]) == (
        pytest.approx(expected.low, abs=1e-6),
        pytest.approx(expected.high, abs=1e-6),
    )


def test_broken_prompts_are_not_withstood_ones():
    """Half break at once, the rest flip: Kaplan–Meier would say that all flip."""
    found = incidence([1.0] * 10 + [2.0] * 10, ["broken"] * 10 + ["flipped"] * 10)
    assert found.flipped[-1] == pytest.approx(0.5)
    assert found.median.estimate == 2.0 and found.median.hi is None


def test_nothing_flipped_is_not_certainty_and_nothing_at_all_is_no_curve():
    never = incidence([1.0] * 24, ["withstood"] * 24)
    assert never.median == Interval() and never.hi[0] == pytest.approx(1 - 0.025 ** (1 / 24))
    nothing = incidence([None, 1.0], ["flipped", None])
    assert nothing.n == 0 and nothing.n_unscored == 2 and nothing.median == Interval()


@pytest.mark.parametrize(
    ("sizes", "endings", "says"),
    [
        ([0.0], ["flipped"], "not at risk"),
        ([1.0], ["lost"], "'lost'"),
        ([1.0, 2.0], ["flipped"], "one each"),
    ],
)
def test_what_cannot_be_is_refused(sizes, endings, says):
    with pytest.raises(UsageError, match=says):
        incidence(sizes, endings)


searches = st.lists(st.tuples(st.integers(1, 6), st.sampled_from(ENDINGS)), min_size=1, max_size=40)


@given(searches)
def test_the_band_is_ordered_and_rises(data):
    found = incidence(*zip(*data, strict=True))
    assert not np.isnan([found.flipped, found.lo, found.hi]).any()
    assert (found.lo <= found.flipped + 1e-9).all() and (found.flipped <= found.hi + 1e-9).all()
    assert (found.hi - found.lo > 1e-6).all()
    for curve in (found.flipped, found.broken, found.lo, found.hi):
        assert (np.diff(curve) >= -1e-12).all()
    assert (found.flipped + found.broken <= 1 + 1e-9).all()
    ends = [v for v in (found.median.lo, found.median.estimate, found.median.hi) if v is not None]
    assert ends == sorted(ends)
