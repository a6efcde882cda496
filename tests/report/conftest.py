"""The made-up run of `toy_runs` as a fixture, and a page of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from toy_runs import write_toy_run

from auditgap.store import RunFolder


@pytest.fixture(scope="session")
def toy_run() -> Callable[..., RunFolder]:
    """`toy_run(path, …)` writes a made-up run and returns its folder; see `write_toy_run`."""
    return write_toy_run


@pytest.fixture(scope="session")
def every_page(tmp_path_factory) -> dict[str, Path]:
    """A written page of every kind that there is, by its name; the models are folders where a path
    could end up in a title."""
    import every_page

    return every_page.write(tmp_path_factory.mktemp("every") / "pages")
