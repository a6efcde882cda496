"""A judge measured on a gold set, as `auditgap judge eval` and `auditgap.judge_eval` ask for it.

card = run(read(None, {"judge": "builtin", "gold": "pyrit-refusal"}))
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auditgap.audits.options import openai_for_endpoints
from auditgap.audits.settings import JudgeEvalSettings
from auditgap.config import build, merged

if TYPE_CHECKING:
    from auditgap.judges.card import JudgeCard
    from auditgap.sweep import Progress

_NEEDS = {"judge": "Which judge? For example: auditgap judge eval builtin"}


def read(file: Path | None, values: Mapping[str, Any]) -> JudgeEvalSettings:
    """The file's values with those that were given on top. Raises UsageError."""
    asked = merged(file, values)
    openai_for_endpoints(asked, JudgeEvalSettings.model_fields)
    return build(asked, JudgeEvalSettings, needs=_NEEDS)[0]


def run(asked: JudgeEvalSettings, *, progress: Progress | None = None) -> JudgeCard:
    """The judge's card, kept for the runs that use it; with `out` it is written there too. Raises
    UsageError, DiskError."""
    from auditgap.engines import Serving
    from auditgap.judges import card_cache, close_judge, load_judge
    from auditgap.judges.gold import load_gold
    from auditgap.models import pick_device

    rows = load_gold(asked.gold)
    rows = rows if asked.limit is None else rows.first(asked.limit)
    serving = Serving(
        engine=asked.engine,
        base_url=asked.endpoint,
        device=asked.device,
        dtype=asked.dtype,
        thinking_tokens=asked.thinking_tokens,
    )
    judge = load_judge(asked.judge, device=pick_device(asked.device), serving=serving)
    try:
        out = None if asked.out is None else Path(asked.out)
        return card_cache.measure(judge, rows, inject=asked.injections, out=out, progress=progress)
    finally:
        close_judge(judge)
