"""What strength certificates say for a verdict: nothing where nothing was looked at."""

from __future__ import annotations

from typing import get_args

import pandas as pd
import pytest

from auditgap.interventions.strength import Flag
from auditgap.report.strength import COLUMNS, FLAGS, evidence


def table(*rows):
    return pd.DataFrame(
        [
            {**dict.fromkeys(COLUMNS), "subject": "m", "unit": "rms", "eps": 0.1, **row}
            for row in rows
        ],
        columns=list(COLUMNS),
    )


def test_every_flag_that_a_certificate_raises_is_said():
    assert FLAGS.keys() == set(get_args(Flag))


@pytest.mark.parametrize("made", [table(), table({"eps": 0.2, "flags": ""})])
def test_without_a_certificate_at_the_budget_nothing_is_known(made):
    assert evidence(made, "m", 0.1, "rms") == {
        "masked": None,
        "not_converged": None,
        "no_power": None,
        "is_repeatable": None,
    }


def test_a_pass_repeats_itself_only_where_every_text_came_out_the_same():
    same, other = {"repeated": 60, "repeated_equal": 60}, {"repeated": 60, "repeated_equal": 59}

    def told(*rows):
        made = table(*({"flags": "", "gain": 0.0, **row} for row in rows))
        return evidence(made, "m", 0.1, "rms")["is_repeatable"]

    assert told(same, same) is True and told(same, other) is False
    assert told(same, {}) is None, "at one site nobody looked"


def test_one_flagged_site_counts_for_the_model():
    made = table({"site": "block0", "flags": ""}, {"site": "block1", "flags": "masked no_power"})
    found = evidence(made, "m", 0.1, "rms")
    assert found["masked"] is True and found["no_power"] is True


def test_convergence_is_known_only_where_every_site_was_searched_longer():
    searched = {"flags": "", "gain": 0.02, "gain_hi": 0.05, "searched": 12}
    not_searched = {"flags": "", "gain": None}
    assert evidence(table(searched), "m", 0.1, "rms")["not_converged"] is False
    assert evidence(table(searched, not_searched), "m", 0.1, "rms")["not_converged"] is None
    reached = {"flags": "", "searched": 0}  # every target was: there is nothing left to gain
    assert evidence(table(searched, reached), "m", 0.1, "rms")["not_converged"] is False
    flagged = {"flags": "not_converged", "gain": 0.4, "searched": 12}
    assert evidence(table(flagged, not_searched), "m", 0.1, "rms")["not_converged"] is True
    uneven = {**searched, "gain_hi": 0.11}
    assert evidence(table(uneven), "m", 0.1, "rms")["not_converged"] is True
