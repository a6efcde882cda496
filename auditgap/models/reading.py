"""JSON files of a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from auditgap.errors import UsageError
from auditgap.types import Document


def read_object(path: Path) -> Document:
    """A JSON object from a model folder. Raises UsageError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_constant)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, too
        said = f"{type(error).__name__}: {str(error)[:80]}"
        raise UsageError(
            f"{path} is not readable JSON ({said}); download the model again."
        ) from None
    if not isinstance(value, dict):
        raise UsageError(
            f"{path} holds a {type(value).__name__} where an object was wanted; download the model"
            " again."
        )
    return value


def _constant(word: str) -> Any:
    """An infinity, which families write as the end of a range, as JSON can say it; NaN says
    nothing."""
    if word == "NaN":
        raise ValueError("NaN stands for no number")
    return {"__float__": word}
