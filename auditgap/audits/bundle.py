"""A report that can be handed over: the page, its verdict table, the same for machines, and the
checksums of all of it.

    overall = write(folders, out=Path("runs/tuned"), criteria=Criteria(), title="Safety audit of ./tuned")
    # report.html · report.json (its schema: `schema()`) · verdicts.csv|md · figures/*.csv · SHA256SUMS (sha256sum -c SHA256SUMS)

A public copy, in `public/`, holds aggregates alone: no prompt, no completion, no id of one, no
path, no command, no address.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

import auditgap
from auditgap.audits import pages
from auditgap.report import frame, page
from auditgap.report.gather import ReportData
from auditgap.report.page import Copies
from auditgap.report.section import Section, answers, tables_of
from auditgap.report.text import clean, is_null, without_secrets
from auditgap.report.verdict_lines import Criteria, Line, table_of
from auditgap.report.verdicts import limits, overall, verdicts
from auditgap.store import RunFolder, files
from auditgap.store.tables import rows_of, to_csv, to_markdown
from auditgap.types import Document

SCHEMA = 1
#: What a public copy may say of the run besides its aggregates.
_PUBLIC_INFO = ("versions", "warnings", "judge_cards", "reward", "refused")
_PUBLIC_SUBJECT = (
    "name",
    "fingerprint",
    "dtype",
    "stored",
    "unpacked_from",
    "note",
    "n_blocks",
    "width",
    "parameters",
    "architecture",
)
_PATH = re.compile(
    r"(?<![\w:/.])(?:~|\.{1,2})?(?:/[^\s/'\",;:]+){2,}"  # /home/me/model, ../runs/x
    r"|(?<![\w:/.])(?:~|\.{1,2})/[^\s'\",;:]+"  # ./model
    r"|[A-Za-z]:\\[^\s'\",;]+"
)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\",;]+", re.IGNORECASE)
_NOT_SUMMED = re.compile(
    r"(?:^|/)(?:scratch|generations|journals)/|(?:^|/)\.|(?:^|/)lock\.json$|\.corrupt(?:/|$)|(?:^|/)SHA256SUMS$"
)


def write(
    folders: Sequence[RunFolder],
    *,
    out: Path,
    criteria: Criteria,
    missing: Mapping[str, str] | None = None,
    title: str,
    allow_raw: bool = False,
    public: bool = False,
    copies: Copies = Copies(),
) -> str:
    """Write the report of these folders into `out`, and with `public` a copy for publication into
    `out`/public.

    Returns the sum of the verdicts in one sentence. Raises DiskError.
    """
    report = pages.from_store(folders, allow_raw=allow_raw, title=title)
    lines = _write(report, Path(out), criteria, dict(missing or {}), copies, private=allow_raw)
    if public:
        _write(published(report), Path(out) / "public", criteria, _deep(missing or {}), copies)
    return overall(lines)


def _write(
    report: ReportData,
    home: Path,
    criteria: Criteria,
    missing: Mapping[str, str],
    copies: Copies,
    *,
    private: bool = False,
) -> list[Line]:
    parts = pages.by_table()
    lines = verdicts(report, parts, criteria, missing)
    report = replace(
        report,
        verdicts=tuple(lines),
        limits=tuple(limits(report, parts, missing)),
        criteria=criteria.model_dump(),
    )
    made = pages.audited(report)
    sections = frame.sections_of(report, made)
    page.write(sections, frame.frame_of(report, made), home, private=private, copies=copies)
    table = table_of(lines)
    files.write_bytes(home / "verdicts.csv", to_csv(table).encode("utf-8", "backslashreplace"))
    files.write_bytes(home / "verdicts.md", to_markdown(table).encode("utf-8", "backslashreplace"))
    files.write_document(home / "report.json", machine(report, sections))
    files.write_bytes(home / "SHA256SUMS", sums(home))
    return lines


def machine(report: ReportData, sections: Sequence[Section]) -> Document:
    """What the page of these sections shows, for programs: JSON by the schema of `schema()`; shares
    0–1, nothing rounded, null = not known."""
    lines: Sequence[Line] = report.verdicts
    tables = tables_of(sections)
    return _plain(
        {
            "schema": SCHEMA,
            "auditgap": auditgap.__version__,
            "title": report.title,
            "subjects": [without_secrets(subject) for subject in report.subjects],
            "answers": answers(sections),
            "overall": overall(lines),
            "verdicts": [line.describe() for line in lines],
            "criteria": dict(report.criteria),
            "limits": [{"word": word, "sentence": sentence} for word, sentence in report.limits],
            "tables": {name: _records(table) for name, table in tables.items()},
            "config": without_secrets(report.config),
            "judge_cards": [dict(card) for card in report.cards],
            "reward": report.reward,
            "status": (
                {**report.status, "last_write": str(report.status["last_write"])}
                if report.status.get("last_write")
                else {}
            ),
            "failures": dict(report.failures),
        }
    )


def schema() -> Document:
    """The JSON schema of report.json."""
    return json.loads(
        resources.files("auditgap.report")
        .joinpath("report.schema.json")
        .read_text(encoding="utf-8")
    )


def published(report: ReportData) -> ReportData:
    """The report with what may be published: aggregates. Paths lose their folders, addresses and
    raw text go."""
    shown = {field.name: _deep(getattr(report, field.name)) for field in fields(report)}
    return ReportData(
        **{
            **shown,
            "subjects": [
                {k: subject[k] for k in _PUBLIC_SUBJECT if k in subject}
                for subject in shown["subjects"]
            ],
            "config": {k: v for k, v in shown["config"].items() if not k.endswith("endpoint")},
            "info": {k: shown["info"][k] for k in _PUBLIC_INFO if k in shown["info"]},
            "exchanges": (),
            "n_exchanges": 0,
            "status": report.status,
            "corrections": {
                task: replace(c, judge=_unplaced(c.judge)) for task, c in report.corrections.items()
            },
            "failures": (
                {f"{len(report.failures)} cells": "failed; the full report has the causes"}
                if report.failures
                else {}
            ),
        }
    )


def _unplaced(words: str) -> str:
    """Without addresses, and with the last part of paths alone."""
    words = _ADDRESS.sub("[address]", clean(words))
    return _PATH.sub(lambda found: re.split(r"[/\\]", found.group().rstrip("/\\"))[-1], words)


def _deep(value: Any) -> Any:
    """All text in it, however deep, `_unplaced`."""
    if isinstance(value, str):
        return _unplaced(value)
    if isinstance(value, pd.DataFrame):
        words = [
            str(column) for column in value if not pd.api.types.is_numeric_dtype(value[column])
        ]
        return value.assign(**{column: value[column].map(_deep) for column in words})
    if isinstance(value, Mapping):
        return {_unplaced(str(k)): _deep(v) for k, v in without_secrets(value).items()}
    return [_deep(v) for v in value] if isinstance(value, (list, tuple)) else value


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [dict(row) for row in rows_of(table)]


def _plain(value: Any) -> Any:
    """JSON's own kinds: numpy's numbers unwrapped, nan and the like null, infinity as text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    value = value.item() if hasattr(value, "item") else value
    if is_null(value):
        return None
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return "inf" if value > 0 else "-inf"
    return value if isinstance(value, (bool, int, float, str)) else clean(str(value))


def sums(folder: Path) -> bytes:
    """Checksums of the folder's files as `sha256sum -c` reads them; without work under way, locks
    and raw text."""
    lines = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (
            path.is_file()
            and not path.is_symlink()
            and not _NOT_SUMMED.search(name)
            and "\n" not in name
            and "\\" not in name
        ):
            lines.append(f"{files.sha256(path.read_bytes())}  {name}\n")
    return "".join(lines).encode("utf-8", "surrogateescape")
