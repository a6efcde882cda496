"""One thread for tiny models; `planted` of the audits' tests and the made-up run of the
report's."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_runs import write_toy_run

TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS / "audits"))

from one_thread import one_thread  # noqa: E402, F401 - a fixture


@pytest.fixture(scope="session")
def toy_run() -> Callable:
    """`write_toy_run` of `toy_runs`."""
    return write_toy_run
