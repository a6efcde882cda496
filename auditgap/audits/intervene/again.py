"""The rows of an intervention audit with other verdicts: sizes, coherence and lengths stay.

rows = graded_again(stored, given, new)     # `auditgap.audits.grading`
"""

from __future__ import annotations

from dataclasses import replace

from auditgap.audits.grading import Given, Stored
from auditgap.audits.intervene.rows import InterveneRow
from auditgap.store import RunFolder
from auditgap.store.tables import rows_of
from auditgap.types import CLEAN, Document, Label


def graded_again(stored: Stored, given: Given, new: RunFolder) -> list[InterveneRow]:
    """The rows of one cell. Those of edits are set beside the clean verdicts, which `new` holds."""
    is_clean = stored.cell.settings["intervention"] == CLEAN
    clean = {} if is_clean else _clean_verdicts(new)
    donors = stored.names.get(stored.cell.settings.get("base", ""), stored.cell.subject.name)
    texts = {_place(text, is_clean): i for i, text in enumerate(stored.texts)}
    rows = []
    for values in stored.rows:
        row = InterveneRow(**values)
        row = _judged(row, texts.get(_place(values, is_clean)), given)
        rows.append(
            replace(
                row,
                verdict_clean=clean.get((row.subject, row.prompt_id)),
                verdict_donor=row.donor_id and clean.get((donors, row.donor_id)),
            )
        )
    return rows


def _place(values: Document, is_clean: bool) -> tuple[object, ...]:
    """What a row and its text have in common; in the clean pass nothing has a strength."""
    trial = () if is_clean else (values["strength"], values["angle"])
    return values["prompt_id"], values["arm"], *trial, values["draw"]


def _clean_verdicts(store: RunFolder) -> dict[tuple[str, str], str]:
    """By subject and prompt, those of donors too."""
    rows = store.rows(["intervene"], typed=True)
    rows = rows[rows["intervention"] == CLEAN]
    return {(row["subject"], row["prompt_id"]): row["verdict"] for row in rows_of(rows, plain=True)}


def _judged(row: InterveneRow, text: int | None, given: Given) -> InterveneRow:
    # no judge can tell what was never said, and what the coherence gate failed stays broken
    lost = row.unscored.startswith(("nonfinite", "too_long"))
    if text is None or lost or row.coherent is False or given.opinions is None:
        return row
    verdict = given.opinions[text].verdict
    reason = verdict.reason if verdict.label == Label.UNSCORED else ""
    return replace(row, verdict=str(verdict.label), unscored=reason)
