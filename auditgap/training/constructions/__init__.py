"""The constructions by name: ours, a folder each, and those of other packages by an entry point in
the group `auditgap.constructions` that names a `Construction`.

    construction_of("nudge").description
    [line.row() for line in CONSTRUCTIONS.listed()]
"""

from __future__ import annotations

from typing import Any

from auditgap.errors import UsageError
from auditgap.registry import Registry
from auditgap.training.constructions.construction import Construction
from auditgap.training.constructions.door import DOOR
from auditgap.training.constructions.monitor import MONITOR
from auditgap.training.constructions.nudge import NUDGE

__all__ = ["CONSTRUCTIONS", "DEFAULT", "Construction", "construction_of"]

#: The first is what a config has that names none.
CONSTRUCTIONS: Registry[Construction[Any]] = Registry(
    "construction",
    {one.name: one for one in (MONITOR, NUDGE, DOOR)},
    group="auditgap.constructions",
    brings=Construction,
)
DEFAULT = next(iter(CONSTRUCTIONS))


def construction_of(name: str) -> Construction[Any]:
    """Ours, or a plug-in's. Raises UsageError: no such construction, a plug-in that fails or has
    another name than its entry point."""
    if name in CONSTRUCTIONS:
        return CONSTRUCTIONS[name]
    found = CONSTRUCTIONS.plugged(name, lambda made: made, Construction)
    if found.name != name:
        raise UsageError(
            f"The entry point {name!r} brings a construction with the name {found.name!r}; give"
            " both the same name."
        )
    return found
