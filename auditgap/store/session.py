"""What run.json says about the runs that fed a folder: one config for all, and a session a run.

A config that differs is refused field by field, so that one folder never mixes numbers of two
experiments:

    out was made with another config: steps: 10 in the folder, 20 now; attack.eps: 0.03 in the folder, 0.1 now. …
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from auditgap.errors import UsageError
from auditgap.store.files import Damaged, to_json, unseal
from auditgap.types import Document

SCHEMA = 2  #: of a run folder
OLDEST = 1  #: that is read: a folder a cell, and documents without a checksum
_KEEP = "Put the original file back, or use a new folder."

_ABSENT = object()


def read_run(path: Path, shown: str | Path) -> Document:
    """run.json of the folder that is `shown` as such. Raises Damaged, and UsageError for a schema
    that is not read."""
    run = unseal(path, required=False, advice=_KEEP)
    if not isinstance(run, dict) or not isinstance(run.get("config"), dict):
        raise Damaged(path, "it is no run's description", _KEEP)
    schema = run.get("schema")
    if not isinstance(schema, int):
        raise Damaged(path, "it says no schema", _KEEP)
    if schema > SCHEMA:
        raise UsageError(
            f"{shown} was written by a newer auditgap (schema {schema}; this one reads up to"
            f" {SCHEMA}). Upgrade: pip install -U auditgap"
        )
    if schema < OLDEST:
        raise UsageError(
            f"{shown} was written by an older auditgap (schema {schema}; this one reads {OLDEST} to"
            f" {SCHEMA}). Use the version that its run.json names, or a new folder."
        )
    return unseal(path, required=schema > OLDEST, advice=_KEEP)


def check_config(
    stored: Mapping[str, Any], config: Mapping[str, Any], folder: Path | str | None = None
) -> Document:
    """`config` as JSON gives it back. Raises UsageError when a `folder` is given whose `stored`
    config differs."""
    try:
        now = json.loads(to_json(dict(config)))
    except ValueError as error:
        raise UsageError(
            f"The config holds a number that is not finite ({error}). Give finite numbers."
        ) from error
    # what is not set is as good as absent: a setting that came with a later version ends no run
    old, new = (
        {name: value for name, value in _flat(told).items() if value is not None}
        for told in (stored, now)
    )
    if folder is not None and old != new:
        lines = [
            f"  {name}: {_show(old.get(name, _ABSENT))} in the folder,"
            f" {_show(new.get(name, _ABSENT))} now"
            for name in sorted({*old, *new})
            if old.get(name, _ABSENT) != new.get(name, _ABSENT)
        ]
        raise UsageError(
            f"{folder} was made with another config:\n"
            + "\n".join(lines)
            + "\nGo back to that config to resume, or choose another folder for this one."
        )
    return now


def joined_info(old: Mapping[str, Any], new: Mapping[str, Any]) -> Document:
    """`new` over `old`; warnings are gathered, each once."""
    info = {**old, **json.loads(to_json(dict(new)))}
    if "warnings" in old or "warnings" in new:
        info["warnings"] = list(dict.fromkeys([*old.get("warnings", []), *new.get("warnings", [])]))
    return info


def new_session(sessions: list[Document], info: Mapping[str, Any]) -> tuple[Document, list[str]]:
    """This run's entry for run.json, and a sentence for every version that is not what the session
    before had."""
    versions = {
        str(name): str(version) for name, version in dict(info.get("versions") or {}).items()
    }
    before = sessions[-1].get("versions", {}) if sessions else {}
    drift = [
        f"{name} was {before.get(name, 'absent')} when this folder was last written and is"
        f" {versions.get(name, 'absent')} now: later cells may differ in their last digits."
        for name in sorted({*versions, *before})
        if before and versions.get(name) != before.get(name)
    ]
    session = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "drift": drift,
    }
    if info.get("command"):
        session["command"] = str(info["command"])
    return session, drift


def _flat(value: Any, name: str = "") -> Document:
    """Nested mappings with dotted names: {"attack": {"eps": 0.03}} → {"attack.eps": 0.03}."""
    if not isinstance(value, Mapping) or (name and not value):
        return {name: value}
    flat: Document = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{name}.{key}" if name else str(key))
    return flat


def _show(value: Any) -> str:
    text = "absent" if value is _ABSENT else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:30]}…{text[-49:]}"  # paths differ at their ends
