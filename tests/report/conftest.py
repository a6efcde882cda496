"""The made-up run of `toy_runs` as a fixture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from toy_runs import write_toy_run

from auditgap.store import RunFolder


@pytest.fixture(scope="session")
def toy_run() -> Callable[..., RunFolder]:
    """`toy_run(path, …)` writes a made-up run and returns its folder; see `write_toy_run`."""
    return write_toy_run
