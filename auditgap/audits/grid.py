"""Many audits of one kind as one sweep: a grid of models, prompt sets and settings, planned, run
and reduced together.

    audit: lvs                     # or evaluate, probe, …: the default is lvs
    models:
      - smollm2
      - {name: ./tuned, dtype: bfloat16, gpus_per_worker: 0.5, layers: stride:4}
      # over 4 GPUs, which its worker then has
      - {name: ./large, shard: layers:4}
    prompts: [harmbench, mine.jsonl]
    budgets: {rms: [0.01, 0.03, 0.1], max: [0.001]}     # of lvs
    vary: {seed: [0, 1]}           # any other setting
    attacks: targeted,random_matched

    grid = make_grid(read_grid(Path("grid.yaml"), {"out": "runs/grid"}))
    outcome = run(grid, progress=Progress)

Models that are asked the same questions (prompts, dtype and all other settings) are a *case*: one
plain run folder, OUT/<words>-<hash>, with its own tables and report. All cases are swept together,
and OUT/<main table>.parquet is their tables below each other. A cell that several cases share, or
that an earlier form of the grid has finished, is computed once and adopted by the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd

from auditgap.audits.audit import Audit, Can, Plan
from auditgap.audits.axes import GridAxes
from auditgap.audits.options import AuditOptions, openai_for_endpoints
from auditgap.audits.sweeps import run_passes
from auditgap.audits.table import audit_of, named
from auditgap.config import Frozen, build, merged
from auditgap.errors import UsageError
from auditgap.store import RunFolder, cases_of, files, tables
from auditgap.store.remote import Place, local, outputs, within
from auditgap.sweep import Group, Outcome, Progress, Worker
from auditgap.types import Cell, Document, digest


@dataclass(frozen=True)
class GridGroup(Group):
    """A group and the case that it belongs to."""

    case: str = ""


@dataclass(frozen=True)
class Case:
    """Models that are asked the same questions: an audit of its own."""

    name: str  #: of its folder in OUT
    config: Any
    plan: Plan
    gpus: Mapping[str, float]  #: a worker's GPUs by the subject's name, where a model has its own

    def groups(self, groups: Iterable[Group]) -> list[GridGroup]:
        return [
            GridGroup(
                f"{group.name} · {self.name}",
                group.cells,
                group.work,
                self.gpus.get(group.cells[0].subject.name),
                self.name,
            )
            for group in groups
        ]


@dataclass(frozen=True)
class Grid:
    """The planned cases; `passes` is what is swept, each cell in one group only."""

    audit: Audit[Any, Any, Any]
    cases: tuple[Case, ...]
    options: AuditOptions
    passes: tuple[tuple[GridGroup, ...], ...]

    @property
    def groups(self) -> list[GridGroup]:
        return list(chain.from_iterable(self.passes))

    @property
    def cells(self) -> dict[str, Cell]:
        """Every cell once, by its key."""
        return {cell.key: cell for case in self.cases for cell in case.plan.cells}

    @property
    def folder(self) -> str:
        return self.options.out or "runs/grid"


@dataclass(frozen=True)
class GridConfig:
    """The configs that a grid's file stands for, each with its models' own GPUs, and the session's
    options."""

    audit: Audit[Any, Any, Any]
    configs: Sequence[tuple[Frozen, Mapping[str, float]]]
    options: AuditOptions


def axes_of(values: Mapping[str, Any]) -> tuple[Audit[Any, Any, Any], GridAxes, Document]:
    """The audit that a grid is of, what it spans, and the settings that all of it has. Raises
    UsageError."""
    audit = named(values.get("audit") or "lvs")
    audit.can_or_refuse(Can.GRID, "run it by itself, once for each configuration")
    keys = audit.axes.model_fields
    (axes,) = build({k: v for k, v in values.items() if k in keys}, audit.axes)
    return audit, axes, {k: v for k, v in values.items() if k not in keys}


def read_grid(file: Path | None, flags: Mapping[str, Any]) -> GridConfig:
    """A grid file with flags on top.

    Raises UsageError naming the key and what was wanted; Refused when foreign code is asked for.
    """
    audit, axes, shared = axes_of(merged(file, flags))
    if "models" in audit.config.model_fields and not axes.models:
        raise UsageError(
            "Which models? A grid names at least one, for example `models: [smollm2]`."
        )
    openai_for_endpoints(shared, audit.settings)
    gathered: dict[str, tuple[Document, list[str], dict[str, float]]] = {}
    options = None
    for own in axes.entries:
        settings = {**shared, **{k: v for k, v in own.items() if k not in axes.own}}
        for varied in axes.settings(shared):
            asked = {**settings, **varied}
            config, options = build(_of_models(asked, own.get("name")), audit.config, audit.options)
            same = digest(config.model_dump(mode="json", exclude={"models"}))
            _, names, gpus = gathered.setdefault(same, (asked, [], {}))
            if own:
                names.append(str(own["name"]))
                gpus |= _gpus(own)
    if options is None:
        raise UsageError(
            "Which prompts? A grid names at least one prompt set, for example `prompts:"
            " [harmbench]`."
        )
    configs = [
        (build(_of_models(asked, *dict.fromkeys(names)), audit.config, audit.options)[0], gpus)
        for asked, names, gpus in gathered.values()
    ]
    return GridConfig(audit, configs, axes.with_own(options))


def _of_models(asked: Document, *names: Any) -> Document:
    named = [name for name in names if name is not None]
    return {**asked, "models": tuple(named)} if named else asked


def _gpus(own: Document) -> dict[str, float]:
    """A worker's GPUs for a model that has its own. Raises UsageError."""
    if own.get("gpus_per_worker") is None:
        return {}
    (checked,) = build({"gpus_per_worker": own["gpus_per_worker"]}, AuditOptions)
    return {str(own["name"]): checked.gpus_per_worker or 0.0}


def repeated(file: Path | None, flags: Mapping[str, Any]) -> dict[str, int]:
    """What a grid file asks for more than once and gets once: {"budgets.rms: 0.001": 2} for `rms:
    [1e-3, 0.001]`."""
    values = merged(file, flags)
    asked = Counter(axes_of(values)[1].asked(values))
    return {f"{axis}: {' '.join(words)}": n for (axis, words), n in asked.items() if n > 1}


def make_grid(asked: GridConfig) -> Grid:
    """Plan every case. Groups are ordered by subject, the subject with the most work first, and its
    largest groups first.

    Raises UsageError or Refused for a model, prompt set or scorer that cannot serve.
    """
    audit = asked.audit
    plans = audit.prepare_all([config for config, _ in asked.configs], asked.options)
    cases = []
    for plan, (_, gpus) in zip(plans, asked.configs, strict=True):
        same = digest(plan.config.model_dump(mode="json"), 8)
        cases.append(Case(f"{audit.case_name(plan)}-{same}", plan.config, plan, gpus))
    by_case = [[case.groups(groups) for groups in case.plan.passes] for case in cases]
    passes = [_ordered([*chain(*some)]) for some in zip_longest(*by_case, fillvalue=[])]
    return Grid(audit, tuple(cases), asked.options, tuple(passes))


def _ordered(groups: Sequence[GridGroup]) -> tuple[GridGroup, ...]:
    """Each cell in the first group that has it; a subject's groups together, by case, the dear ones
    first."""
    seen: set[str] = set()
    once = []
    for group in groups:
        cells = tuple({cell.key: cell for cell in group.cells if cell.key not in seen}.values())
        seen |= {cell.key for cell in cells}
        if cells:
            once.append(
                replace(group, cells=cells, work=group.work * len(cells) / len(group.cells))
            )
    total: dict[str, float] = {}
    for group in once:
        total[group.subject] = total.get(group.subject, 0.0) + group.work
    place = {name: i for i, name in enumerate(dict.fromkeys(group.case for group in once))}
    return tuple(sorted(once, key=lambda g: (-total[g.subject], g.subject, place[g.case], -g.work)))


def order(grid: Grid) -> list[Document]:
    """The subjects as the sweep takes them up: groups and cells of each, share of all work, and a
    worker's GPUs if it has its own."""
    work = sum(group.work for group in grid.groups) or 1.0
    found: dict[str, Document] = {}
    # as the passes before it come first anyhow, the last one says the order
    for group in chain(*reversed(grid.passes)):
        empty = {
            "model": group.cells[0].subject.name,
            "groups": 0,
            "cells": 0,
            "work": 0.0,
            "GPUs": group.gpus,
        }
        one = found.setdefault(group.subject, empty)
        one["groups"] += 1
        one["cells"] += len(group.cells)
        one["work"] += group.work / work
    return list(found.values())


def cost(grid: Grid) -> list[tuple[Case, Document]]:
    """What each case will take on this machine, on one worker (see `Audit.estimate`); a cell that
    two cases share counts in both."""
    return [(case, grid.audit.estimate(case.plan, grid.options)) for case in grid.cases]


class GridWorker:
    """A worker of one case at a time; a group of another case swaps it."""

    def __init__(self, makers: Mapping[str, Callable[[], Worker]]) -> None:
        self.makers = makers
        self._case: str | None = None
        self._worker: Worker | None = None

    def run(self, group: Group, tick: Callable[[float], None]) -> None:
        if not isinstance(group, GridGroup):
            raise TypeError("A group of a grid knows its case.")
        if group.case != self._case:
            self.close()
        if self._worker is None:
            self._worker, self._case = self.makers[group.case](), group.case
        self._worker.run(group, tick)

    def close(self) -> None:
        getattr(self._worker, "close", lambda: None)()
        self._worker = self._case = None


class Folders:
    """The cases' run folders as the one that a sweep asks; a cell is in the folder of the first
    case that has it."""

    def __init__(self, out: Path, stores: Mapping[str, RunFolder], cases: Sequence[Case]) -> None:
        self.path, self.stores = out.absolute(), stores
        self._home: dict[str, RunFolder] = {}
        for case in cases:
            for cell in case.plan.cells:
                self._home.setdefault(cell.key, stores[case.name])

    def scan(self, keys: Iterable[str]) -> tuple[set[str], dict[str, dict[str, Any]]]:
        by_folder: dict[RunFolder, list[str]] = {}
        for key in keys:
            by_folder.setdefault(self._home[key], []).append(key)
        finished: set[str] = set()
        failed: dict[str, dict[str, Any]] = {}
        for store, some in by_folder.items():
            done, lost = store.scan(some)
            finished |= done
            failed |= lost
        return finished, failed

    def is_finished(self, key: str) -> bool:
        return self._home[key].is_finished(key)

    def failure(self, key: str) -> dict[str, Any] | None:
        return self._home[key].failure(key)

    def fail(self, cell: Cell, cause: str, *, retry: bool = False) -> None:
        self._home[cell.key].fail(cell, cause, retry=retry)

    def settle(self, keys: Iterable[str]) -> None:
        by_folder: dict[RunFolder, list[str]] = {}
        for key in keys:
            by_folder.setdefault(self._home[key], []).append(key)
        for store, some in by_folder.items():
            store.settle(some)


def run(grid: Grid, *, progress: Callable[[], Progress] | None = None) -> Outcome:
    """Run what is missing of the grid and reduce it. The same call again resumes, and so does a
    grid that has grown.

    Raises UsageError, Refused, Interrupted; cells that fail are in the outcome, with their causes.
    """
    audit, options, out = grid.audit, grid.options, grid.folder
    audit.check(options)
    here = local(out)
    stores = {
        case.name: audit.open(case.plan, options, within(out, case.name)) for case in grid.cases
    }
    with ExitStack() as locks:
        for store in stores.values():
            locks.enter_context(store.lock())
        for case in grid.cases:
            stores[case.name].plan(case.plan.cells)
            audit.begin(case.plan, stores[case.name])
        with files.disk_errors(here / "scratch"):
            (here / "scratch").mkdir(mode=files.PRIVATE_FOLDER, exist_ok=True)
        _share(grid, stores, out)
        makers = {c.name: audit.worker(c.plan, options, stores[c.name]) for c in grid.cases}
        outcome = run_passes(
            grid.passes,
            partial(GridWorker, makers),
            Folders(here, stores, grid.cases),
            options,
            progress,
            after_pass=lambda: _share(grid, stores, out),
        )
        for case in grid.cases:
            store = stores[case.name]
            # all are finished: nothing in scratch is wanted any more
            if not any(cell.key in outcome.failed for cell in case.plan.cells):
                store.forget()
            audit.reduce(store, allow_raw=options.allow_raw)
        write_table(out, stores)
    return outcome


def _share(grid: Grid, stores: Mapping[str, RunFolder], out: Place) -> None:
    """Every case adopts what it lacks and another folder of OUT has finished: of this grid, or of
    an earlier form of it."""
    opened = dict(_folders_of(out, stores))
    there = {name: set(store.keys()) for name, store in opened.items()}
    for case in grid.cases:
        for cell in case.plan.cells:
            if cell.key not in there[case.name]:
                others = (opened[name] for name, keys in there.items() if cell.key in keys)
                any(stores[case.name].adopt(other, cell.key) for other in others)


def _folders_of(out: Place, stores: Mapping[str, RunFolder]) -> Iterator[tuple[str, RunFolder]]:
    yield from stores.items()
    for name, place in cases_of(out).items():
        if name not in stores:
            yield name, RunFolder.load(place)


def write_table(out: Place, stores: Mapping[str, RunFolder]) -> Path | None:
    """OUT/<main table>.parquet and .csv: the cases' main tables, as they were reduced, below each
    other by the case's name; returns the CSV's path, None where no case has one. Raises
    DiskError."""
    frames, name = [], ""
    for case, store in sorted(stores.items(), key=itemgetter(0)):
        name = audit_of(store).main_table or name
        if (path := store.path / f"{name}.parquet").is_file():
            frame = tables.unseal(path)
            frame.insert(0, "case", case)
            frames.append(frame)
    if not frames:
        return None
    table = pd.concat([f for f in frames if len(f)] or frames[:1], ignore_index=True)
    with outputs(out) as here:
        files.write_bytes(here / f"{name}.parquet", tables.seal(table))
        csv = tables.to_csv(table).encode("utf-8", "backslashreplace")
        files.write_bytes(here / f"{name}.csv", csv)
    return here / f"{name}.csv"
