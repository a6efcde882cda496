"""The configs of the commands, and the JSON schema of the YAML file that each takes.

json_schema("lvs")["properties"]["steps"]      # {"default": 10, "description": "PGD steps", …}
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from functools import partial

from auditgap.audits import AUDITS, Audit, Can
from auditgap.audits.settings import (
    CompareSettings,
    GradeSettings,
    JudgeEvalSettings,
    ReportSettings,
)
from auditgap.audits.whole_config import WholeSettings
from auditgap.config import Frozen, sentence
from auditgap.types import Document

_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(command: str) -> Document:
    """The schema of that command's file; nothing is required, as options may give it. Raises
    KeyError."""
    return {"$schema": _DRAFT, "title": f"auditgap {command}", **CONFIGS[command]()}


def commented(command: str) -> str:
    """A YAML file for that command: each setting with its help and its default, out of the way
    until it is wanted; only the model stands. Raises KeyError."""
    properties = dict(CONFIGS[command]()["properties"])
    nested = {key: properties.pop(key) for key in _sections(command, properties)}
    if command == "audit":  # the parts' own settings stand in their sections
        properties = {key: properties[key] for key in WholeSettings.model_fields}
    lines = [
        f"# Settings of `auditgap {command}`. A line that begins with # has no effect: take the #"
        " away to",
        f"# change what it says. What may stand where: auditgap schema {command}",
    ]
    for key, told in properties.items():
        lines += ["", *_setting(key, told)]
    for key, told in nested.items():
        lines += ["", f"# {key}:"]
        for name, inner in told.get("properties", {}).items():
            lines += [f"#   {line}" for line in _setting(name, inner, quiet=True)]
    return "\n".join(lines) + "\n"


def _sections(command: str, properties: Document) -> list[str]:
    return [k for k, told in properties.items() if command == "audit" and "properties" in told]


def _setting(key: str, told: Document, quiet: bool = False) -> list[str]:
    """A setting's help, and the line that would change it. `quiet`: the caller comments it out."""
    import yaml

    words = sentence(str(told.get("description", ""))).split()
    choices = f"One of: {', '.join(map(str, told['enum']))}." if told.get("enum") else ""
    about = " ".join((*words, choices)).strip()
    default = told.get("default")
    value = yaml.safe_dump(default, default_flow_style=True, allow_unicode=True, width=10**6)
    shown = f"{key}: {value.removesuffix('...' + chr(10)).strip()}"
    given = {"model": "model: smollm2", "models": "models: [smollm2]"}
    line = given[key] if key in given and not quiet else f"{'' if quiet else '# '}{shown}"
    return [*(f"# {text}" for text in textwrap.wrap(about, 96)), line]


def _schema(*kinds: type[Frozen]) -> Document:
    """The kinds' properties together."""
    properties: Document = {}
    definitions: Document = {}
    for kind in kinds:
        schema = kind.model_json_schema()
        properties |= schema.get("properties", {})
        definitions |= schema.get("$defs", {})
    made = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**made, "$defs": definitions} if definitions else made


def _whole() -> Document:
    """What is said for all parts, a section a part, and the criteria."""
    from auditgap.report.verdict_lines import Criteria

    parts = {a.command: _schema(a.config, a.options) for a in AUDITS.values() if Can.PART in a.can}
    shared = {key: value for part in parts.values() for key, value in part["properties"].items()}
    made = _schema(WholeSettings)
    made["properties"] = {
        **shared,
        **made["properties"],
        **parts,
        "criteria": Criteria.model_json_schema(),
    }
    return made


def _grid() -> Document:
    """What a grid spans, and any setting of the audits that can be a grid."""
    audits = [audit for audit in AUDITS.values() if Can.GRID in audit.can]
    kinds = [kind for audit in reversed(audits) for kind in (audit.config, audit.options)]
    latent = AUDITS["latent"]
    return _schema(*kinds, latent.config, latent.options, latent.axes)


def _training(name: str) -> Document:
    from auditgap.audits.probe.config import FitMonitorConfig, ProbeOptions
    from auditgap.training.config import DissociateConfig, SFTConfig, TrainOptions

    return _schema(
        *{
            "train dissociate": (DissociateConfig, TrainOptions),
            "train sft": (SFTConfig, TrainOptions),
            "train monitor": (FitMonitorConfig, ProbeOptions),
        }[name]
    )


def _audit(audit: Audit) -> Document:
    return _schema(audit.config, audit.options)


#: What makes the schema of each command that takes a config.
CONFIGS: Mapping[str, Callable[[], Document]] = {
    "audit": _whole,
    **{audit.command: partial(_audit, audit) for audit in AUDITS.values()},
    "grid": _grid,
    **{
        name: partial(_training, name)
        for name in ("train dissociate", "train sft", "train monitor")
    },
    "compare": partial(_schema, CompareSettings),
    "report": partial(_schema, ReportSettings),
    "grade": partial(_schema, GradeSettings),
    "judge eval": partial(_schema, JudgeEvalSettings),
}
