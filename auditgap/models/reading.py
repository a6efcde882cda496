"""JSON files of a model's folder."""

from __future__ import annotations

import json
from pathlib import Path

from auditgap.errors import UsageError
from auditgap.types import Document


def read_object(path: Path) -> Document:
    """A JSON object from a model folder. Raises UsageError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
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
