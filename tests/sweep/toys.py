"""Workers that compute nothing dear and can fail, hang or die on request; importable in Ray's
worker processes too."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import fields
from pathlib import Path

from auditgap.rows import Row
from auditgap.store import RunFolder
from auditgap.sweep import Group
from auditgap.types import Budget, Cell, Site, Subject


def cells(layer: int, n: int = 3) -> tuple[Cell, ...]:
    budgets = [Budget(0.01 * (i + 1), "rms") for i in range(n)]
    return tuple(
        Cell(Subject("toy", "f00d"), Site(layer), budget, "targeted", "5150") for budget in budgets
    )


def groups(n: int = 4) -> list[Group]:
    return [Group(f"block{i}", cells(i), work=3.0) for i in range(n)]


def open_folder(path: Path) -> RunFolder:
    return RunFolder.open(path, config={"steps": 1}, info={})


class Toy:
    """Writes one row a cell. `spells` says what goes wrong: {(layer, size of the budget): "raise" |
    "die" | …}."""

    def __init__(self, store: RunFolder, log: Path, spells: dict | None = None) -> None:
        self.store, self.log, self.spells = store, log, spells or {}
        self.note("made")

    def note(self, what: str) -> None:
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(f"{what} {os.getpid()} {os.environ.get('AUDITGAP_TEST_CLUSTER', '-')}\n")

    def run(self, group: Group, tick) -> None:
        for cell in group.cells:
            if self.store.is_finished(cell.key):
                continue
            deed = self.spells.get((cell.site.layer_index, round(cell.budget.size, 4)), "")
            self.note(f"{cell.site}/{cell.budget.size:g}")
            if deed == "raise":
                raise RuntimeError("no memory left\nsecond line")
            if deed == "fail":
                self.store.fail(cell, "its own cause")
                continue
            if deed == "forget":
                return
            if deed == "die" or (deed == "die once" and self.first_time(cell)):
                os.kill(os.getpid(), signal.SIGKILL)
            if deed == "die after writing" and self.first_time(cell):
                self.write(cell)
                os.kill(os.getpid(), signal.SIGKILL)
            if deed == "hang":
                time.sleep(120)
            while deed == "wait" and not self.log.with_suffix(".go").exists():
                time.sleep(0.05)
            self.write(cell)
            tick(1.0)

    def first_time(self, cell: Cell) -> bool:
        marker = self.log.with_suffix(f".{cell.key}")
        first = not marker.exists()
        marker.touch()
        return first

    def write(self, cell: Cell) -> None:
        rows = []
        for prompt in ("p0", "p1"):
            known = {
                "subject": cell.subject.name,
                "site": str(cell.site),
                "layer_index": cell.site.layer_index,
                "unit": cell.budget.unit,
                "eps": cell.budget.size,
                "attack": cell.attack,
                "draw": 0,
                "prompt_id": prompt,
                "n_prompt_tokens": 4,
                "n_new_tokens": 2,
                "lvs": cell.budget.size / 3,
            }
            rows.append(
                Row(**({f.name: None for f in fields(Row)} | {"flags": "", "unscored": ""} | known))
            )
        self.store.write(cell, rows, generations=[{"completion": "blue"}], seconds=0.01)


def counts(log: Path) -> dict[str, int]:
    """How often each thing was begun: {"made": 1, "block0/0.01": 1, …}."""
    found: dict[str, int] = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        found[line.split()[0]] = found.get(line.split()[0], 0) + 1
    return found


def digests(store: RunFolder) -> dict[str, str]:
    return {record["key"]: record["sha256"] for record in store.records()}
