"""`auditgap status RUN --watch`: a run, a grid or a whole audit while it runs.

    auditgap status runs/tuned --watch

A table that is drawn again on a terminal, a line now and then where there is none. It reads the
folder and nothing else, so it works from any machine that can read it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auditgap.cli.screen import inert, out, say

if TYPE_CHECKING:
    from rich.table import Table

    from auditgap.store import RunFolder

#: Seconds between two looks.
EVERY = 5.0


def watch(folder: str, every: float = EVERY) -> None:
    """Show the folder until nothing is left of it, or nobody works on it. Raises UsageError for a
    folder that is none."""
    rows, over = look(folder)
    if not out.is_terminal:
        said = ""
        while True:
            if (now := "\n".join(map(line, rows))) != said:
                say(said := now)
            if over:
                return
            time.sleep(every)
            rows, over = look(folder)
    from rich.live import Live

    with Live(table(rows), console=out, auto_refresh=False) as live:
        while not over:
            time.sleep(every)
            rows, over = look(folder)
            live.update(table(rows), refresh=True)


def look(folder: str) -> tuple[list[dict[str, str]], bool]:
    """A row a part of what is in the folder, and whether nothing more is to be expected of it."""
    rows, left, at_work = [], 0, False
    for name, store in _stores(folder).items():
        if store is None:
            rows.append({"part": name, "cells": "not begun"})
            left += 1
            continue
        now = store.status()
        left += now.missing
        at_work |= now.running is not None
        rows.append({"part": name, **_row(store, now)})
    return rows, not left or not at_work


def _stores(folder: str) -> Mapping[str, RunFolder | None]:
    from auditgap.audits import whole
    from auditgap.store import RunFolder, cases_of

    if cases := cases_of(folder):
        return {name: RunFolder.load(case) for name, case in cases.items()}
    if whole.is_whole(Path(folder)):
        begun = {store.path.name: store for store in whole.stores(Path(folder))}
        return {**begun, **dict.fromkeys(whole.not_begun(Path(folder)))}
    return {Path(folder).name: RunFolder.load(folder)}


def _row(store: RunFolder, now: Any) -> dict[str, str]:
    from auditgap.sweep.progress import duration

    row = {"cells": f"{now.finished}/{now.planned}"}
    if now.eta_seconds:
        row["a minute"] = f"{60 * now.missing / now.eta_seconds:.2g}"
        row["left"] = f"about {duration(now.eta_seconds)}"
    if now.running:
        row["by"] = f"pid {now.running.get('pid')} on {now.running.get('host')}"
    if gap := _gap(store):
        row["gap so far"] = gap
    failures = [str(record.get("cause", "")) for record in store.failures().values()]
    if failures:
        row["failed"] = f"{len(failures)}: {failures[-1][:60]}"
    return row


def _gap(store: RunFolder) -> str:
    """The widest audit gap among the cells that are done; nothing where there is none."""
    if store.run.get("config", {}).get("audit") != "latent":
        return ""
    from auditgap.api import Result
    from auditgap.cli.screen import interval
    from auditgap.store.tables import rows_of

    gaps = rows_of(Result(store.path, {}).gaps.dropna(subset=["gap"]))
    if not gaps:
        return ""
    row = max(gaps, key=lambda one: one["gap"])
    return f"{interval(row['gap'], row['gap_lo'], row['gap_hi'])} at ε = {row['eps']:g}"


def line(row: Mapping[str, str]) -> str:
    """A row where there is no terminal."""
    words = [f"{name} {value}" for name, value in row.items() if name not in ("part", "cells")]
    return ", ".join((f"{row['part']}: {row['cells']}", *words))


def table(rows: list[dict[str, str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    columns = list(dict.fromkeys(name for row in rows for name in row))
    made = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        made.add_row(*(Text(inert(row.get(name, ""))) for name in columns))
    return made
