"""The rows of a latent audit with other verdicts and rewards: norms, coherence and ids stay, LVS is
computed anew.

    rows = graded_again(stored, given, new)     # `auditgap.audits.grading`
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from auditgap import stats
from auditgap.audits.grading import Given, Stored
from auditgap.audits.latent.rows import with_length
from auditgap.rows import Row
from auditgap.store import RunFolder
from auditgap.store.tables import rows_of
from auditgap.types import CLEAN, Document, Label


def graded_again(stored: Stored, given: Given, new: RunFolder) -> list[Row]:
    """The rows of one cell. Those of edits are set beside the clean rows, which `new` holds."""
    is_clean = stored.cell.attack == CLEAN
    clean = {} if is_clean else _clean(new)
    at = {(text["prompt_id"], text["draw"]): i for i, text in enumerate(stored.texts)}
    settings = stored.record["description"]["settings"]
    is_another = settings.get("judge") != stored.cell.settings.get("judge")
    rows = []
    for values in stored.rows:
        row = _row(values)
        row = _judged(row, at.get((row.prompt_id, row.draw)), given, is_clean, is_another)
        before = clean.get((row.subject, row.prompt_id))
        if before is not None:
            row = replace(row, verdict_clean=before.verdict_clean, clean_reward=before.clean_reward)
        rows.append(row if is_clean else _with_lvs(row))
    return rows


def _clean(store: RunFolder) -> dict[tuple[str, str], Row]:
    rows = [_row(values) for values in rows_of(store.rows([CLEAN], typed=True), plain=True)]
    return {(row.subject, row.prompt_id): row for row in rows}


def _row(values: Document) -> Row:
    """A stored row; a column of whole numbers that may be null comes back as floats."""
    known: dict[str, Any] = {
        name: int(values[name])
        if "int" in str(field.type) and values[name] is not None
        else values[name]
        for name, field in Row.__dataclass_fields__.items()
        if name in values  # older rows lack what came later
    }
    return Row(**known)


def _judged(row: Row, text: int | None, given: Given, is_clean: bool, is_another: bool) -> Row:
    """The row with the verdict and the reward of its text; `text`: which one, None where there is
    none; `is_another`: by another judge than before."""
    # no judge can tell what was never said
    if text is None or row.unscored.startswith(("nonfinite", "too_long")):
        return row
    changes: dict[str, Any] = {}
    half, whole = given.others.get((text, "half"), text), given.others.get((text, "whole"))
    if given.opinions is not None and row.coherent is not False:
        verdict, at_half = given.opinions[text].verdict, given.opinions[half].verdict
        changes["verdict_clean" if is_clean else "verdict_edited"] = str(verdict.label)
        if whole is not None:
            changes["verdict_whole"] = str(given.opinions[whole].verdict.label)
        if row.verdict_half is not None:  # older texts do not say where their half is
            changes["verdict_half"] = str(at_half.label)
            changes["flags"] = with_length(row.flags, verdict, at_half)
        if is_another:  # who judged before looks at the flips of the one who judges now
            is_flip = not is_clean and verdict.label == Label.HARMFUL
            changes["verdict_second"] = row.verdict_edited if is_flip else None
    if given.scores is not None:
        score = given.scores[text]
        changes["clean_reward" if is_clean else "edited_reward"] = score.value
        if whole is not None:
            changes["reward_whole"] = given.scores[whole].value
        changes["unscored"] = score.reason
    return replace(row, **changes)


def _with_lvs(row: Row) -> Row:
    if (
        row.verdict_edited == Label.UNSCORED
        or row.clean_reward is None
        or row.edited_reward is None
        or row.l2 is None
    ):
        return replace(row, lvs=None, lvs_rel=None, unscored=row.unscored or "unscored")
    rewards = row.clean_reward, row.edited_reward
    relative = row.relative_norm
    return replace(
        row,
        lvs=float(stats.lvs(*rewards, row.l2)),
        lvs_rel=None if relative is None else float(stats.lvs(*rewards, relative)),
        unscored="",
    )
