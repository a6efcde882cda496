"""What does a grid cost besides its cells? Planning, resuming, scheduling on Ray, the driver's
memory, and the actors' efficiency.

    # seconds to plan and to write the plan     (aim: 10)
    python benchmarks/grid_scaling.py plan --cells 100000
    # seconds to see which cells are finished (aim: 3), to read their rows (aim: 20), for a status,
    python benchmarks/grid_scaling.py scan --cells 100000 --merge        # and to merge two halves
    # milliseconds a cell of cells that do nothing  (aim: 20)
    python benchmarks/grid_scaling.py overhead --cells 10000
    # the driver's memory, a tenth of the cells and all
    python benchmarks/grid_scaling.py memory --cells 10000
    # busy share of actors on cells that sleep  (aim: 0.9)
    python benchmarks/grid_scaling.py efficiency --workers 4
    # real cells on tiny models, against one actor (aim: 1.5)
    python benchmarks/grid_scaling.py real --workers 2

Cells of `overhead`, `memory` and `efficiency` are stand-ins of known duration that write a real
row. Each command prints one line of JSON. `--fit` extrapolates a scaled-down run: what is linear in
the number of cells is given for 100,000 too. `scan` writes its cells without fsync, once, and keeps
them for the next time with --keep FOLDER.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from auditgap.rows import Row
from auditgap.store import RunFolder, files, merge, tables
from auditgap.store.cellfile import StoredCell
from auditgap.store.cells import CellFiles
from auditgap.sweep import Group, ray
from auditgap.sweep.state import SweepState
from auditgap.types import Budget, Cell, Site, Subject

#: As long as those of a real cell.
SETTINGS = {
    "dtype": "float32",
    "max_new_tokens": 128,
    "target": "Sure, here is",
    "steps": 10,
    "step_share": 0.25,
    "restarts": 1,
    "judge": {"name": "builtin", "weights": "0" * 64, "thresholds": [0.5] * 8},
    "reward": {"name": "builtin", "weights": "0" * 64},
    "coherence": {"nll": 2.0, "repetition": 0.5, "length": 3},
    "draws": 1,
    "untargeted_tokens": 16,
    "seed": 0,
}


#: About what a model says, and that no two cells say the same.
TEXT = "I can not help with that , but here is what I know of the colour of the vault . " * 4


def cells(n: int, *, in_group: int = 10) -> list[Group]:
    """Groups of ten cells each, of models with 32 sites."""
    groups = []
    for g in range(-(-n // in_group)):
        subject = Subject(f"model{g // 32}", f"f{g // 32:023d}")
        some = range(g * in_group, min(n, (g + 1) * in_group))
        sizes = [Budget(0.001 * (i % in_group + 1), "rms") for i in some]
        made = tuple(
            Cell(subject, Site(g % 32), size, "targeted", "51", SETTINGS) for size in sizes
        )
        groups.append(Group(f"{subject.name} · block{g % 32}", made, work=float(len(made))))
    return groups


def row(cell: Cell) -> Row:
    known = {
        "subject": cell.subject.name,
        "site": str(cell.site),
        "layer_index": cell.site.layer_index,
        "unit": cell.budget.unit,
        "eps": cell.budget.size,
        "attack": cell.attack,
        "draw": 0,
        "prompt_id": "p0",
        "n_prompt_tokens": 4,
        "n_new_tokens": 2,
        "flags": "",
        "unscored": "",
    }
    return Row(**({f.name: None for f in fields(Row)} | known))


class Sleeper:
    """Sleeps so many seconds a cell and writes it; notes when it was at work."""

    def __init__(self, store: RunFolder, seconds: float) -> None:
        self.store, self.seconds = store, seconds
        self.log = store.path / f"busy-{os.getpid()}.txt"

    def run(self, group: Group, tick: Any) -> None:
        start = time.time()
        for cell in group.cells:
            if self.seconds:
                time.sleep(self.seconds)
            self.store.write(cell, [row(cell)], seconds=self.seconds)
            tick(1.0)
        with open(self.log, "a", encoding="ascii") as file:
            file.write(f"{start} {time.time()}\n")


def open_folder(path: Path) -> RunFolder:
    return RunFolder.open(path, config={"benchmark": "grid_scaling"}, info={})


def memory() -> tuple[float, float]:
    """Resident MB now, and the most so far."""
    values = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text().splitlines()
        if ":" in line
    )
    return tuple(int(values[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))


def no_fsync() -> None:
    """Fill a folder fast: what is measured is reading it."""
    os.fsync = lambda descriptor: None
    files.sync_folder = lambda folder: None


def plan(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """`make_grid` on one tiny model (fingerprinting a large one takes as long as reading it), then
    writing plan.json."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import tiny

    from auditgap.audits.grid import make_grid, read_grid

    model = tiny.save("llama", folder / "model")
    (folder / "prompts.txt").write_text(
        "\n".join(f"what is the colour of the vault {w}" for w in ("red", "blue", "green"))
    )
    n_eps = max(1, args.cells // (5 * 5))
    values = {
        "models": str(model),
        "prompts": str(folder / "prompts.txt"),
        "layers": "all",
        "judge": "keyword",
        "reward": "margin",
        "eps": [round(0.0001 * (i + 1), 6) for i in range(n_eps)],
        "device": "cpu",
    }
    before, start, cpu = memory()[0], time.perf_counter(), time.process_time()
    grid = make_grid(read_grid(None, values))
    planned = time.perf_counter() - start
    keys = grid.cells
    store = open_folder(folder / "run")
    start = time.perf_counter()
    store.plan(keys.values())
    written, cpu = time.perf_counter() - start, time.process_time() - cpu
    start = time.perf_counter()
    n = len(store.planned())
    read = time.perf_counter() - start
    return {
        "cells": n,
        "plan_s": planned,
        "write_s": written,
        "read_s": read,
        "plan_and_write_cpu_s": cpu,
        "linear": ["plan_s", "write_s", "read_s", "plan_and_write_cpu_s", "mb"],
        "mb": (store.path / "plan.json").stat().st_size / 1e6,
        "rss_growth_kb_a_cell": (memory()[0] - before) * 1024 / n,
    }


def fill(store: RunFolder, groups: Sequence[Group]) -> None:
    """Every group as it stands when its sweep is over: a file of its rows, one of its texts."""
    there, cells = set(store.keys()), CellFiles(store.path)
    for group in groups:
        if all(cell.key in there for cell in group.cells):
            continue
        some = []
        for cell in group.cells:
            table = tables.rows_to_table([row(cell)], Row)
            texts = tables.mappings_to_table([{"prompt_id": "p0", "completion": TEXT + cell.key}])
            record = store._record(cell, "done") | {
                "sha256": tables.content_sha256(table),
                "n_rows": 1,
                "row_type": "Row",
                "seconds": 1.0,
                "generations": {"sha256": tables.content_sha256(texts), "n": 1},
                "edits": None,
                "info": {},
            }
            some.append(StoredCell(record, table, texts))
        cells.put(some)


def forget_pages() -> None:
    """As after a reboot, where that is allowed."""
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")


def scan(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every byte is read and checked each time, with the page cache dropped before and without."""
    no_fsync()
    folder = Path(args.keep) if args.keep else folder
    store = open_folder(folder / "run")
    groups = cells(args.cells)
    fill(store, groups)
    store.plan(cell for group in groups for cell in group.cells)
    keys = [cell.key for group in groups for cell in group.cells]
    found: dict[str, Any] = {"cells": args.cells, "files": len(os.listdir(store.path / "cells"))}
    size = sum(path.stat().st_size for path in store.path.glob("*/*.parquet"))
    found["mb"] = size / 1e6

    def measure(name: str, what: Callable[[], Any], wanted: Callable[[Any], bool]) -> None:
        before, start, cpu = memory()[0], time.perf_counter(), time.process_time()
        came = what()
        found[f"{name}_s"] = time.perf_counter() - start
        found[f"{name}_cpu_s"] = time.process_time() - cpu
        found[f"{name}_kb_a_cell"] = (memory()[0] - before) * 1024 / args.cells
        if not wanted(came):
            raise SystemExit(f"{name}: not all of {args.cells} cells were seen")

    for name in ("cold_scan", "scan"):
        if name == "cold_scan":
            forget_pages()
        measure(
            name,
            lambda: RunFolder.load(store.path).scan(keys),
            lambda came: len(came[0]) == args.cells,
        )
    measure(
        "resume",
        lambda: SweepState(groups, RunFolder.load(store.path)),
        lambda came: came.skipped == args.cells and not came.groups,
    )
    forget_pages()
    opened = RunFolder.load(store.path)
    measure("rows", opened.rows, lambda came: len(came) == args.cells)
    measure("status", opened.status, lambda came: came.finished == args.cells)
    if args.merge:
        half = [open_folder(folder / name) for name in ("half", "other")]
        for store, some in zip(half, (groups[::2], groups[1::2]), strict=True):
            fill(store, some)
            store.plan(cell for group in some for cell in group.cells)
        shutil.rmtree(folder / "merged", ignore_errors=True)
        measure(
            "merge",
            lambda: merge([store.path for store in half], folder / "merged"),
            lambda came: len(came.keys()) == args.cells,
        )
    return found | {"linear": [name for name in found if name.endswith("_s")] + ["mb"]}


def overhead(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The sweep's time less what the workers themselves were busy: one cell a group, the worst
    case."""
    store = open_folder(folder / "run")
    groups = cells(args.cells, in_group=1)
    with ray.cluster(cpus=args.workers):
        # actors' code is shipped
        ray.run(cells(args.workers), lambda: Sleeper(store, 0.0), store, workers=args.workers)
        start = time.perf_counter()
        ray.run(groups, lambda: Sleeper(store, 0.0), store, workers=args.workers)
        seconds = time.perf_counter() - start
    start = time.perf_counter()
    worker = Sleeper(open_folder(folder / "alone"), 0.0)
    for group in groups[:200]:
        worker.run(group, lambda units: None)
    alone = (time.perf_counter() - start) / len(groups[:200])
    return {
        "cells": args.cells,
        "ms_a_cell": 1e3 * seconds / args.cells,
        "ms_of_these_writing": 1e3 * alone,
    }


def driver_memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The driver's memory after a sweep over a tenth of the cells, and over all."""
    found = {}
    with ray.cluster(cpus=args.workers):
        for n in (args.cells // 10, args.cells):
            store = open_folder(folder / str(n))
            groups = cells(n)
            before = memory()[0]
            ray.run(groups, lambda store=store: Sleeper(store, 0.0), store, workers=args.workers)
            found[n] = {
                "rss_before_mb": before,
                "rss_after_mb": memory()[0],
                "kb_a_cell": (memory()[0] - before) * 1024 / n,
            }
    return {"cells": args.cells, "driver": found}


def efficiency(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Cells that sleep: their seconds over actors × time, from the first worker at work to the last
    one done."""
    store = open_folder(folder / "run")
    groups = cells(args.cells, in_group=4)
    with ray.cluster(cpus=args.workers):
        ray.run(groups, lambda: Sleeper(store, args.seconds), store, workers=args.workers)
    lines = [
        line for path in store.path.glob("busy-*.txt") for line in path.read_text().splitlines()
    ]
    spans = [tuple(map(float, line.split())) for line in lines]
    wall = max(end for _, end in spans) - min(start for start, _ in spans)
    share = args.cells * args.seconds / (args.workers * wall)
    return {"cells": args.cells, "actors": args.workers, "wall_s": wall, "efficiency": share}


def real(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The latent audit on a tiny model of 12 blocks: seconds on one actor over seconds on several,
    one thread each."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import tiny

    from auditgap.audits import grid

    model = tiny.save(
        "llama", folder / "model", num_hidden_layers=12, hidden_size=256, intermediate_size=512
    )
    words = tiny.WORDS[10:]
    prompts = "\n".join(" ".join(words[(i + j) % len(words)] for j in range(12)) for i in range(24))
    (folder / "prompts.txt").write_text(prompts)
    values = {
        "models": str(model),
        "prompts": str(folder / "prompts.txt"),
        "layers": "all",
        "judge": "keyword",
        "reward": "margin",
        "target": "Sure , here is",
        "max_new_tokens": 16,
        "executor": "ray",
        "device": "cpu",
        "attacks": "targeted,random_matched",
    }
    seconds = {}
    for workers in (1, args.workers):
        asked = {**values, "workers": workers, "out": str(folder / f"on{workers}")}
        start = time.perf_counter()
        with ray.cluster(cpus=workers):
            grid.run(grid.make_grid(grid.read_grid(None, asked)))
        seconds[workers] = time.perf_counter() - start
    return {"seconds": seconds, "ratio": seconds[1] / seconds[args.workers]}


WHAT = {
    "plan": plan,
    "scan": scan,
    "overhead": overhead,
    "memory": driver_memory,
    "efficiency": efficiency,
    "real": real,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--cells", type=int, default=400)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.25, help="a cell of `efficiency`")
    parser.add_argument("--merge", action="store_true", help="`scan` merges two halves too")
    parser.add_argument("--keep", help="a folder for the cells of `scan`")
    parser.add_argument(
        "--fit", action="store_true", help="give what is linear for 100,000 cells too"
    )
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="grid-scaling-"))
    try:
        found = WHAT[args.what](args, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    linear = found.pop("linear", [])
    if args.fit:
        found["at_100000"] = {name: found[name] * 100_000 / args.cells for name in linear}
    print(json.dumps({"what": args.what, **found}))


if __name__ == "__main__":
    main()
