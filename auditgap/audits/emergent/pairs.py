"""Settings that are names with something to each, as a mapping or in one word.

pairs("domains", "sums=sums.jsonl,law=hub:me/law@4f1c")     # {"sums": "sums.jsonl", …}
"""

from __future__ import annotations

from pathlib import Path

from auditgap.config import listed
from auditgap.errors import UsageError

#: In place of a mapping of domains: the demonstration panel that comes with the package.
DEMO = "demo"


def pairs(key: str, value: object) -> object:
    """The value as a mapping, where it is written otherwise; a domain may be called as its file is.
    Raises UsageError for a part without a name, and for a name that stands twice."""
    if key == "domains" and value in (DEMO, (DEMO,), [DEMO]):
        from auditgap.data.habits import HABITS

        return {name: f"{DEMO}:{name}" for name in HABITS}
    if not isinstance(value, (str, list, tuple)):
        return value
    found = {}
    for part in listed(value):
        name, is_pair, source = str(part).partition("=")
        file = str(part).partition("?")[0]
        if key == "domains" and "=" not in file and Path(file).suffix:  # called as its file is
            name, is_pair, source = Path(file).stem, "=", str(part)
        if name.strip() in found:
            raise UsageError(
                f"`{key}` has {name.strip()!r} twice; give each a name of its own: NAME={source}"
            )
        if not is_pair or not name.strip() or not source.strip():
            raise UsageError(
                f"`{key}` is NAME=FILE,NAME=FILE{', files' if key == 'domains' else ''} or a mapping;"
                f" {part!r} came. For example:"
                f" {key}=sums=sums.jsonl"
            )
        found[name.strip()] = source.strip()
    return found
