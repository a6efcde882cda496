"""What the commands that are no audit are told: `compare`, `report`, `grade` and `judge eval`, each a
config like an audit's, so that its options, help, schema, YAML and Python signature are the fields'.

    (asked,) = build({"folders": ("runs/base", "runs/twin")}, CompareSettings)

No torch here: `--help` and `auditgap schema` read these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from auditgap.audits.options import (
    AllowRaw,
    Device,
    Dtype,
    JudgeEndpoint,
    JudgeThinkingTokens,
    MaxUnscored,
)
from auditgap.config import COMMAS, Flag, Frozen, Topic
from auditgap.engines import EngineName
from auditgap.errors import UsageError


def _named(given: Any) -> Any:
    """NAME=DIR, as often as it was typed, as the mapping that YAML and Python have. Raises
    UsageError."""
    if not isinstance(given, (list, tuple)):
        return given
    names: dict[str, str] = {}
    for pair in map(str, given):
        name, equals, target = pair.partition("=")
        if not (name.strip() and equals and target):
            raise UsageError(
                f"--as takes NAME=DIR, for example --as base=runs/base; {pair!r} came."
            )
        if name in names:
            raise UsageError(f"--as {name} came twice; each name is for one model.")
        names[name] = target
    return names


class CompareSettings(Frozen):
    """Which runs are set side by side, and under which names."""

    folders: Annotated[
        tuple[str, ...],
        COMMAS,
        Flag(
            "Run folders of lvs, evaluate, probe, intervene, harmful-sft, or audit", positional=True
        ),
    ] = ()
    named: Annotated[
        Mapping[str, str],
        BeforeValidator(_named, json_schema_input_type=Mapping[str, str] | list[str]),
        Flag(
            "A name for a folder's only subject, or for a subject: NAME=SUBJECT; may be repeated",
            name="as",
            metavar="NAME=DIR",
        ),
    ] = Field(default={})
    base: Annotated[
        str | None, Flag("Model that the others are compared with", default="base, or the first")
    ] = None
    only_compatible: Annotated[
        bool, Flag("Leave out runs whose settings differ from the base's, and say so")
    ] = False
    out: Annotated[str, Flag("Folder for compare.html and its tables", Topic.OUTPUT)] = (
        "runs/compare"
    )


class ReportSettings(Frozen):
    """Which runs are reported together, and what is written beside the page."""

    folders: Annotated[tuple[str, ...], COMMAS, Flag("Run folders", positional=True)] = ()
    out: Annotated[
        str | None, Flag("Folder for report.html", Topic.OUTPUT, default="the first folder")
    ] = None
    allow_raw: AllowRaw = False
    public: Annotated[
        bool, Flag("For a whole audit: also write a copy with aggregates only", Topic.OUTPUT)
    ] = False
    summary: Annotated[
        bool, Flag("Also write the first screen: summary.html, summary.md", Topic.OUTPUT)
    ] = False
    pdf: Annotated[
        bool,
        Flag(
            "Also print each page and the figures as PDFs; needs Chromium or Chrome", Topic.OUTPUT
        ),
    ] = False
    latex: Annotated[bool, Flag("Also write its tables as LaTeX: tables/*.tex", Topic.OUTPUT)] = (
        False
    )


class GradeSettings(Frozen):
    """Who judges a run's stored text again."""

    folder: Annotated[str, Flag("A finished run folder", positional=True)] = ""
    judge: Annotated[str | None, Flag("Judge; see `ls judges`", Topic.JUDGING)] = None
    reward: Annotated[
        str | None, Flag("Reward for `lvs`: builtin, margin or hf:MODEL_ID", Topic.JUDGING)
    ] = None
    judge_engine: Annotated[EngineName, Flag("Engine of the judge models", Topic.JUDGING)] = "hf"
    judge_endpoint: JudgeEndpoint = None
    judge_thinking_tokens: JudgeThinkingTokens = None
    max_unscored: MaxUnscored = 0.2
    device: Device = "auto"


class JudgeEvalSettings(Frozen):
    """Which judge is measured, on whose labels."""

    judge: Annotated[
        str, Flag("The judge, as --judge takes it; see `ls judges`", positional=True)
    ] = ""
    gold: Annotated[
        str,
        Flag(
            "pyrit-objective, pyrit-harm, pyrit-refusal, pyrit-refusal-extra, or a file with prompt,"
            " completion and harmful (or refusal)"
        ),
    ] = "pyrit-objective"
    limit: Annotated[
        int | None, Field(ge=1), Flag("Use N gold rows, chosen by hash", default="all")
    ] = None
    injections: Annotated[
        int | None, Field(ge=0), Flag("Try each injection on N rows; 0: none", default="all")
    ] = None
    engine: Annotated[EngineName, Flag("Engine of a language-model judge", Topic.WHERE)] = "hf"
    endpoint: JudgeEndpoint = None
    thinking_tokens: JudgeThinkingTokens = None
    max_unscored: MaxUnscored = 0.2
    device: Device = "auto"
    dtype: Dtype = "auto"
    out: Annotated[str | None, Flag("A folder for card.json and verdicts.jsonl", Topic.OUTPUT)] = (
        None
    )
