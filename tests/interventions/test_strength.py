"""The certificate flags searches that planted masks defeat, and leaves honest ones alone.

A seeded sample; `python benchmarks/attack_strength.py` runs all families, sites and sizes.
"""

from __future__ import annotations

import statistics

import masks
import pytest
import tiny
import torch
from masks import MASKS, cells_of

from auditgap.errors import AuditgapError
from auditgap.interventions.pgd import attack
from auditgap.interventions.strength import (
    Certificate,
    Probe,
    certificate,
    certify,
    gradient_error,
)
from auditgap.types import Site

HONEST = ["cohere", "starcoder2", "stablelm", "phi"]
MASKED = ["cohere", "stablelm"]


def test_honest_models_are_not_called_masked():
    """At most one cell in twenty."""
    flags = [
        one.flags
        for family in HONEST
        for site in (Site(-1), Site(1), Site(tiny.N_BLOCKS - 1))
        for one in cells_of(masks.load(family), site, seed=0)
    ]
    assert len(flags) == 36 and sum(map(bool, flags)) <= 0.05 * len(flags), flags


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("family", MASKED)
def test_a_planted_mask_is_flagged(family, mask):
    loaded = masks.load(family)
    with masks.planted(loaded, mask, block=2):
        try:
            cells = cells_of(loaded, Site(0), seed=0)
        except AuditgapError as refused:  # some noise is too large for the engine's own self-test
            assert "Self-test failed" in str(refused) and mask.startswith("seeded noise")
        else:
            for one in cells:
                assert set(one.flags) & {"masked", "no_power"}, one


def probe(**changes: object) -> Probe:
    """A prompt on which all is well."""
    well = {
        "clean": 3.0,
        "found": 0.5,
        "corners": (2.9, 3.1, 2.8),
        "measured": (0.2, -0.1),
        "predicted": (0.2, -0.1),
        "first_measured": 0.3,
        "first_predicted": 0.3,
        "blind": (False,) * 10,
        "curve": (3.0, 1.0, 0.5),
        "longer": 0.49,
    }
    return Probe(**{**well, **changes})  # type: ignore[arg-type]


def of(*probes: Probe, last_block: bool = False, exact: bool = True) -> Certificate:
    return certificate(probes, last_block=last_block, exact=exact)


def test_nothing_stands_against_a_search_that_worked():
    found = of(probe(), probe())
    assert found.flags == () and found.n == 2 and found.curve == (3.0, 1.0, 0.5)
    assert found.describe()["flags"] == [] and found.describe()["unreached"] == 2


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"predicted": (0.0, 0.0)}, ("masked",)),
        ({"predicted": (-0.2, 0.1)}, ("masked",)),
        ({"blind": (True,) * 10}, ("masked",)),
        ({"blind": (True,) * 2 + (False,) * 8}, ("masked",)),
        ({"blind": (True,) + (False,) * 9}, ()),
        ({"corners": (0.4, 3.0)}, ("masked", "no_power")),
        ({"longer": 0.3}, ("not_converged",)),
        ({"longer": None}, ()),
        ({"found": 2.7, "curve": (3.0, 2.7)}, ("no_power",)),
        ({"found": 0.7}, ("cycles",)),
        ({"found": 3.0, "corners": (3.2,), "curve": ()}, ("no_power",)),
    ],
)
def test_what_each_flag_rests_on(changes, flags):
    changes = {"longer": None, **changes} if "found" in changes else changes
    assert of(probe(**changes), probe(**changes)).flags == flags


def test_one_prompt_in_four_may_not_be_beaten_by_chance():
    lucky, well = probe(corners=(0.5, 3.0)), probe()
    assert "masked" in of(lucky, well, well, well).flags
    assert "masked" not in of(lucky, well, well, well, well).flags


def test_at_the_last_block_one_position_has_a_gradient_and_that_is_no_mask():
    dark = probe(blind=(True,) * 9 + (False,))
    assert "masked" in of(dark).flags
    assert of(dark, last_block=True).flags == ()


def test_sixteen_bits_are_checked_along_the_first_step_only():
    coarse = {"predicted": (9.0, 9.0)}
    assert of(probe(**coarse), exact=False).flags == ("weaker_check",)
    wrong = of(probe(**coarse, first_measured=0.1), exact=False)
    assert wrong.flags == ("masked", "weaker_check") and wrong.gradient_error is None
    assert of(probe(first_predicted=0.0), exact=False).first_step is None


def test_a_model_in_16_bits_is_measured_in_32_and_is_as_it_was_afterwards():
    loaded = masks.load("olmo2", seed=1)
    plain = masks.cells_of(loaded, Site(1), 1)
    loaded.model.to(torch.bfloat16)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    for one, exact in zip(masks.cells_of(loaded, Site(1), 1), plain, strict=True):
        assert one.gradient_error is not None and "weaker_check" not in one.flags
        assert one.gradient_error == pytest.approx(exact.gradient_error, abs=0.05)
    for name, value in loaded.model.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])
    with masks.planted(loaded, "reversed gradient", block=2):
        assert all("masked" in one.flags for one in masks.cells_of(loaded, Site(1), 1))


def test_the_gradients_error():
    assert gradient_error([1.0, -2.0], [1.0, -2.0]) == 0
    assert gradient_error([1.0, -2.0], [0.0, 0.0]) == 1
    assert gradient_error([1.0, -2.0], [-1.0, 2.0]) == 2
    assert gradient_error([0.0], [0.0]) == 0 and gradient_error([0.0], [0.1]) == 1


def test_no_prompt_no_certificate():
    with pytest.raises(ValueError, match="at least one"):
        of()


def test_it_is_the_plain_measurement():
    """Batched against one prompt alone: the same numbers, whatever stands beside it."""
    loaded = masks.load("phi3", seed=3)
    engine, goals = masks.engine_of(loaded), masks.goals_of(loaded, Site(1), seed=3)
    found = attack(engine, goals, Site(1), masks.SEARCH)

    def measured(some: slice) -> list[Certificate]:
        return certify(engine, goals[some], found[some], Site(1), masks.SEARCH, longer=False)

    alone = [measured(slice(i, i + 1)) for i in range(len(goals))]
    for r, one in enumerate(measured(slice(None))):
        own = [single[r] for single in alone]
        assert one.n == len(goals)
        for name in ("drop", "random_drop"):
            median = statistics.median(getattr(s, name) for s in own)
            assert getattr(one, name) == pytest.approx(median, abs=1e-4)
        errors = [s.gradient_error for s in own]
        assert min(errors) - 1e-3 <= one.gradient_error <= max(errors) + 1e-3
