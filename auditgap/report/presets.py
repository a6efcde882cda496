"""What the presets say, choice by choice, and where two of them differ, with the reason: for a
terminal and for docs/presets.md.

    differences("paper-v1", "release")[0]
    -> {"choice": "lvs.layers", "paper-v1": "embedding,mid,last", "release": "all", "why": "its main sweep runs over …"}
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from auditgap import config
from auditgap.config import presets

#: Sections of a preset that are no settings of a command.
_TEXT = ("about", "why")
COMMANDS: Mapping[str, str] = {
    "lvs": "auditgap lvs",
    "evaluate": "auditgap evaluate",
    "probe": "auditgap probe",
    "sft-curve": "auditgap train harmful-sft",
    "dissociate": "auditgap train dissociate",
    "fixed": "what has no option",
}
ABSENT = "not set"
preset = lru_cache(config.preset)  #: read here and never changed


def choices(name: str) -> dict[str, str]:
    """Every choice of a preset by `section.key`, its value as one line. Raises UsageError."""
    found = preset(name)
    return {
        f"{section}.{key}": _line(value)
        for section, settings in found.items()
        if section not in _TEXT
        for key, value in settings.items()
    }


def _line(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_line(v)}" for key, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_line, value)) if value else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def why(name: str, choice: str) -> str:
    """A preset's reason for a choice; empty where it gives none."""
    return str(preset(name).get("why", {}).get(choice, ""))


def differences(first: str, second: str) -> list[dict[str, str]]:
    """A row a choice that differs: both values, and the second's reason (else the first's)."""
    one, two = choices(first), choices(second)
    # a section that only one of them has (a curve, a construction) is one difference, not twenty
    lone = {key.partition(".")[0] for key in one} ^ {key.partition(".")[0] for key in two}
    rows = [
        {"choice": section, first: _has(one, section), second: _has(two, section), "why": ""}
        for section in COMMANDS
        if section in lone
    ]
    for choice in [*one, *(c for c in two if c not in one)]:
        a, b = one.get(choice, ABSENT), two.get(choice, ABSENT)
        if a != b and choice.partition(".")[0] not in lone:
            rows.append(
                {
                    "choice": choice,
                    first: a,
                    second: b,
                    "why": why(second, choice) or why(first, choice),
                }
            )
    return rows


def _has(flat: Mapping[str, str], section: str) -> str:
    return "has settings" if any(key.startswith(f"{section}.") for key in flat) else ABSENT


def document() -> str:
    """docs/presets.md: every preset's choices with their reasons, and how they differ."""
    lines = [
        "# Presets",
        "",
        (
            "Written by `auditgap presets page`; a test holds it against the presets in"
            " `auditgap/presets/`."
        ),
        "",
        "    auditgap lvs ./base ./twin --config preset:paper-v1 --out runs/paper",
        "    auditgap ls presets",
        "    auditgap presets diff paper-v1 release",
        "",
        (
            "`--config preset:NAME` stands in place of a file; flags and `--set` win over it."
            " Models, triples and training data are yours to name. “Open” marks what the paper"
            " leaves open, with the value used here."
        ),
    ]
    for first, second in (("paper-v1", "release"), ("smoke", "standard"), ("laptop", "standard")):
        differ = _rows(("choice", first, second, "why"), differences(first, second))
        lines += ["", f"## {first} and {second}: the differences", "", *differ]
    for name in ("paper-v1", "release", "standard", "laptop", "smoke", "demo"):
        lines += ["", f"## {name}", "", " ".join(preset(name)["about"].split())]
        flat = choices(name)
        for section, command in COMMANDS.items():
            mine = [
                {
                    "choice": key.partition(".")[2],
                    "value": value,
                    "why": why(name, key) or _elsewhere(name, key),
                }
                for key, value in flat.items()
                if key.startswith(f"{section}.")
            ]
            if mine:
                title = command if section == "fixed" else f"`{command}`"
                lines += ["", f"### {name}: {title}", "", *_rows(("choice", "value", "why"), mine)]
    return "\n".join(lines) + "\n"


def _elsewhere(name: str, choice: str) -> str:
    """The release does not repeat what it has in common with the paper."""
    same = name == "release" and choices("paper-v1").get(choice) == choices(name).get(choice)
    return "as in paper-v1" if same else ""


def _rows(titles: tuple[str, ...], rows: list[dict[str, str]]) -> list[str]:
    def cell(value: str) -> str:
        return value.replace("|", "\\|").replace("<", "\\<")

    return [
        f"| {' | '.join(titles)} |",
        f"|{' --- |' * len(titles)}",
        *(f"| {' | '.join(cell(row[t]) for t in titles)} |" for row in rows),
    ]


def listed() -> list[dict[str, str]]:
    """A row a preset: its name, what it is, and for which commands."""
    rows = []
    for name in presets():
        found = preset(name)
        has = ", ".join(s for s in COMMANDS if s in found and s != "fixed")
        rows.append(
            {
                "name": name,
                "what": " ".join(str(found["about"]).split()).split(". ")[0].rstrip(".") + ".",
                "for": has,
            }
        )
    return rows
