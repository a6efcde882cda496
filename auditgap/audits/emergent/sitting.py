"""The options of a stage of a study that is there: read, and held against the study's config.

read_options(Path("em.yaml"), {"device": "cpu"}, store.run["config"]).device     # "cpu"
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auditgap.audits.emergent.config import EmergentConfig, EmergentOptions
from auditgap.config import build, merged
from auditgap.errors import UsageError, did_you_mean


def read_options(
    file: Path | None, flags: Mapping[str, Any], study: Mapping[str, Any]
) -> EmergentOptions:
    """The options of a stage of a study, whose config is `study` (run.json's, from `em build`).

    A file may hold the study's keys too, so that one serves all stages. Raises UsageError where one
    differs, for an unknown key, and as `Audit.read` does.
    """
    values = merged(file, flags, section="em")
    known = {*EmergentConfig.model_fields, *EmergentOptions.model_fields}
    for key in values:
        if key not in known:
            raise UsageError(f"Unknown option {key!r}.{did_you_mean(str(key), known)}")
    there = {key: value for key, value in study.items() if key in EmergentConfig.model_fields}
    asked = {key: value for key, value in values.items() if key in there}
    again = build({**there, **asked}, EmergentConfig)[0].model_dump(mode="json") if asked else {}
    for key in asked:
        # `auto` was resolved when it was built
        if again[key] != there[key] and again[key] != "auto":
            raise UsageError(
                f"{key!r} belongs to the study, where it is {_short(there[key])};"
                f" {_short(again[key])} came. For another study, auditgap em build with another"
                " --out."
            )
    return build(
        {k: v for k, v in values.items() if k in EmergentOptions.model_fields}, EmergentOptions
    )[0]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
