"""Puts the helpers of this folder on the path, and makes one signed run for all tests of evidence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from signed_run import Signed, make


@pytest.fixture(scope="session")
def signed(tmp_path_factory) -> Signed:
    """A finished run of a tiny model that was planned, signed and attested; never to be changed."""
    return make(tmp_path_factory.mktemp("signed"))
