"""Puts the workers of `tests/sweep/toys.py` and the planted models of `tests/audits` on the
path."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
for folder in (TESTS, TESTS / "sweep", TESTS / "audits"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
