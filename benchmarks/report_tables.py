"""What does a report cost a cell? Reading the rows, making the tables, writing the page with its
figures.

    # milliseconds a cell, beside the figures (aim: 5)
    python benchmarks/report_tables.py --cells 960 --prompts 24

A cell is a site, a budget and an attack; its rows are made up, half of them with a drop. Prints one
line of JSON: resident MB before and at most while the tables are made, in a process of its own
(`--subjects` shares the cells out: memory is that of one subject), and medians of `--times` runs: wall and CPU time of `tables` (from the folder to the
report's data) and of `page` (sections, figures, HTML and the files beside it), in milliseconds a
cell.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import numpy as np
from grid_scaling import memory, no_fsync

from auditgap.audits import pages
from auditgap.rows import Row
from auditgap.store import RunFolder
from auditgap.sweep import Group
from auditgap.types import CLEAN, Budget, Cell, Site, Subject

ATTACKS = ("targeted", "untargeted", "random_matched", "benign")
SIZES = (0.01, 0.03, 0.1)
_T = TypeVar("_T")


def subjects(n_cells: int, n_subjects: int) -> list[Group]:
    """So many cells, shared out over so many subjects."""
    return [
        group
        for i in range(n_subjects)
        for group in groups(-(-n_cells // n_subjects), Subject(f"toy{i}", f"{i:024x}"))
    ]


def groups(n_cells: int, subject: Subject) -> list[Group]:
    """Cells of one subject: every attack at every size, site by site; and the clean one."""
    made = []
    per_site = len(ATTACKS) * len(SIZES)
    for i in range(-(-n_cells // per_site)):
        cells = [
            Cell(subject, Site(i - 1), Budget(size, "rms"), attack, "51", {})
            for size in SIZES
            for attack in ATTACKS
        ]
        made.append(Group(f"{subject.name} · {i}", tuple(cells)))
    return [Group("clean", (Cell(subject, None, None, CLEAN, "51", {}),)), *made]


def rows(cell: Cell, n: int, rng: np.random.Generator) -> list[Row]:
    """Made-up rows of `n` prompts."""
    empty = {field.name: None for field in fields(Row)}
    made = []
    for i in range(n):
        known = {
            "subject": cell.subject.name,
            "attack": cell.attack,
            "draw": 0,
            "prompt_id": f"p{i:04d}",
            "n_prompt_tokens": 20,
            "n_new_tokens": 128,
            "clean_reward": 1.0,
            "coherent": True,
            "verdict_clean": "safe" if i % 9 else "harmful",
            "flags": "",
            "unscored": "",
        }
        if cell.site is not None and cell.budget is not None:
            drop = float(rng.normal()) if rng.random() < 0.5 else 0.0
            known |= {
                "site": str(cell.site),
                "layer_index": cell.site.layer_index,
                "unit": cell.budget.unit,
                "eps": cell.budget.size,
                "edited_reward": 1.0 - drop,
                "lvs": max(0.0, drop),
                "lvs_rel": max(0.0, drop),
                "l2": 1.0,
                "relative_norm": 0.1,
                "nll_clean": 2.0,
                "nll_edited": 1.0,
                "verdict_edited": str(rng.choice(["safe", "harmful", "refusal", "broken"])),
            }
        made.append(Row(**{**empty, **known}))
    return made


def filled(folder: Path, n_cells: int, n_prompts: int, n_subjects: int) -> RunFolder:
    """A finished run of so many cells."""
    no_fsync()
    store, rng = (
        RunFolder.open(folder, config={"audit": "latent"}, info={}),
        np.random.default_rng(0),
    )
    with store.lock():
        made = subjects(n_cells, n_subjects)
        store.plan(cell for group in made for cell in group.cells)
        for group in made:
            for cell in group.cells:
                store.write(cell, rows(cell, n_prompts, rng), seconds=1.0)
            store.settle(cell.key for cell in group.cells)
    return store


def peak(path: Path) -> tuple[float, float]:
    """Resident MB before the report's data is read from the folder, and at most while it is."""
    before = memory()[0]
    pages.from_store([RunFolder.load(path)])
    return before, memory()[1]


def timed(work: Callable[[], _T]) -> tuple[_T, float, float]:
    """What `work` gives, and its seconds of wall and CPU time."""
    start, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=960)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--subjects", type=int, default=1, help="who share the cells")
    parser.add_argument("--times", type=int, default=3)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    n = 0
    with tempfile.TemporaryDirectory(prefix="report-tables-") as folder:
        path = filled(Path(folder) / "run", args.cells, args.prompts, args.subjects).path
        # in a process of its own: this one has written the cells
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            before, most = pool.submit(peak, path).result()
        for _ in range(args.times):
            report, *tables = timed(lambda: pages.from_store([RunFolder.load(path)]))
            _, *page = timed(lambda report=report: pages.write_report(report, path))
            n = len(report.lvs)
            for name, (wall, cpu) in (("tables", tables), ("page", page)):
                seconds.setdefault(f"{name}_ms_a_cell", []).append(wall)
                seconds.setdefault(f"{name}_cpu_ms_a_cell", []).append(cpu)
    found: dict[str, float] = {"mb_before": round(before), "mb_most": round(most)}
    found |= {name: round(1e3 * statistics.median(some) / n, 2) for name, some in seconds.items()}
    told = {"cells": n, "subjects": args.subjects, "prompts": args.prompts}
    print(json.dumps({**told, **found}))


if __name__ == "__main__":
    main()
