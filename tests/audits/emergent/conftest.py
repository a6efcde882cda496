"""The model that a file's studies fine-tune."""

from __future__ import annotations

from pathlib import Path

import pytest
import studies


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return studies.model(tmp_path_factory.mktemp("base") / "base")
