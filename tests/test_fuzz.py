"""A sample of `make fuzz`: no byte of a finished run changes a number in silence."""

from __future__ import annotations

import fuzz
import pytest

from auditgap.store import files


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return fuzz.finished_run(tmp_path_factory.mktemp("fuzz") / "run")


def test_no_change_of_a_byte_is_silent(finished):
    outcome = fuzz.fuzz(finished, 100, seed=1)
    assert not outcome.silent and not outcome.crashed, outcome.silent + outcome.crashed
    assert outcome.said["refused"] + outcome.said["not whole"] >= 60, str(outcome)


def test_it_would_notice_a_reader_that_checks_nothing(finished, monkeypatch):
    monkeypatch.setattr(files, "_is_sum_of", lambda *_: True)
    assert fuzz.fuzz(finished, 84, seed=1).silent
