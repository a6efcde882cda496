"""The study's tables and page, of whatever is there: a run of 4 of 6 adapters has a page that says
so.

    store = run("runs/em", options)                                # the judge of most answers
    store = run("runs/em", options, judge="alignment=./judge")     # another one's ratings
    # runs/em/em_ranking.{parquet,csv,md}, em_trigger.…, report.html, figures/*.csv
"""

from __future__ import annotations

from pathlib import Path

from auditgap.audits import pages
from auditgap.audits.emergent import part
from auditgap.audits.emergent.config import EmergentOptions
from auditgap.errors import UsageError
from auditgap.report import emergent_study
from auditgap.store import RunFolder


def run(folder: str | Path, options: EmergentOptions, *, judge: str | None = None) -> RunFolder:
    """Write the tables and the page anew. Raises UsageError: no study, another writer, a judge who
    rated nothing here."""
    return made(folder, options, judge=judge)[0]


def made(
    folder: str | Path, options: EmergentOptions, *, judge: str | None = None
) -> tuple[RunFolder, emergent_study.Study]:
    """The same, with what the tables were made from. The panel is not opened: results may lie where
    its rows do not."""
    store = RunFolder.load(folder, break_lock=options.break_lock)
    if not emergent_study.is_study(store):
        raise UsageError(
            f"{folder} is no emergent-misalignment study. Make one: auditgap em build MODEL"
            " --domains … --out FOLDER"
        )
    with store.lock():
        return store, reduce(store, judge=judge, allow_raw=options.allow_raw)


def reduce(
    store: RunFolder, *, judge: str | None = None, allow_raw: bool = False
) -> emergent_study.Study:
    """Tables as `em_*` and the page from the finished cells. Deterministic, and safe on a partial
    run."""
    found = emergent_study.read(store, judge)
    for name, table in found.tables.items():
        for form in ("parquet", "csv", "md"):
            store.write_table(f"em_{name}.{form}", table)
    pages.write([store], allow_raw=allow_raw, read={"emergent": part.data_of([found])})
    return found
