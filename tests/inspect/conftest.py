"""One thread for tiny models; `planted` of the audits' tests and the made-up run of the
report's."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS / "audits"))

from one_thread import one_thread  # noqa: E402, F401 - a fixture


@pytest.fixture(scope="session")
def toy_run() -> Callable:
    """`write_toy_run` of tests/report."""
    spec = importlib.util.spec_from_file_location(
        "report_conftest", TESTS / "report" / "conftest.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_toy_run
