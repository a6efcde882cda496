"""plan.json: the cells that were planned, each settings once, sealed.

    write(path, entries);  read(path)      # [{"key", "cell", "description"}, …]

Cells differ in little and share long settings: so 100,000 cells take 30 MB, not 300.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from auditgap.store import files
from auditgap.store.files import Damaged
from auditgap.types import Document, digest

NAME = "plan.json"


def encode(entries: Iterable[Document]) -> bytes:
    """The file of these entries."""
    settings: Document = {}
    names: dict[int, str] = {}  # cells of a group share one object
    cells = []
    for entry in entries:
        shared = entry["description"]["settings"]
        if id(shared) not in names:
            names[id(shared)] = digest(shared, 16)
            settings.setdefault(names[id(shared)], shared)
        described = {**entry["description"], "settings": names[id(shared)]}
        cells.append({**entry, "description": described})
    return files.seal({"settings": settings, "cells": cells}, indent=None)


def read(path: Path, *, sealed: bool) -> list[Document]:
    """The entries; none where there is no plan. `sealed`: one without a checksum is damaged.

    Raises Damaged.
    """
    try:
        plan: Any = files.unseal(path, required=sealed)
        if isinstance(plan, list):  # as it was written at first, each cell with its own settings
            return plan
        for entry in plan["cells"]:
            entry["description"]["settings"] = plan["settings"][entry["description"]["settings"]]
        return plan["cells"]
    except FileNotFoundError:
        return []
    except (KeyError, TypeError):
        raise Damaged(path, "it is no plan") from None
