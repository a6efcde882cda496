"""Many latent audits as one sweep: a grid of models, prompt sets and budgets, planned, run and
reduced together.

    models:
      - smollm2
      - {name: ./tuned, dtype: bfloat16, gpus_per_worker: 0.5, layers: stride:4}
      # over 4 GPUs, which its worker then has
      - {name: ./large, shard: layers:4}
    prompts: [harmbench, mine.jsonl]
    budgets: {rms: [0.01, 0.03, 0.1], max: [0.001]}
    attacks: targeted,random_matched

    grid = make_grid(*read_grid(Path("grid.yaml"), {"out": "runs/grid"}));  outcome = run(grid, progress=Progress)

Models that are asked the same questions (prompts, unit, dtype and all other settings) are a *case*:
one plain run folder, OUT/<prompts>-<unit>-<dtype>-<hash>, with its own tables and report. All cases
are swept together, and OUT/lvs.parquet is their tables below each other. A cell that several cases
share, or that an earlier form of the grid has finished, is computed once and adopted by the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import BeforeValidator, ConfigDict, Field

from auditgap.audits.grading import safe_name
from auditgap.audits.latent.audit import LATENT
from auditgap.audits.latent.config import LatentConfig, RunOptions
from auditgap.audits.latent.plan import Estimate, LatentPlan, estimate, prepare
from auditgap.audits.latent.worker import LatentWorker
from auditgap.audits.sweeps import run_passes
from auditgap.config import Frozen, build, listed, merged
from auditgap.errors import UsageError
from auditgap.store import RunFolder, cases_of, files, tables
from auditgap.store.remote import Place, absolute, local, outputs, within
from auditgap.sweep import Group, Outcome, Progress
from auditgap.types import UNITS, Cell, digest

#: What a model may have of its own besides settings of the audit.
_OWN = ("name", "gpus_per_worker", "shard")


class GridAxes(Frozen):
    """What a grid spans; everything else in its file is as for `auditgap lvs`, and the same for all
    of it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    models: Annotated[tuple[Any, ...], BeforeValidator(listed)] = Field(min_length=1)
    prompts: Annotated[tuple[str, ...], BeforeValidator(listed)] = ("harmbench",)
    budgets: dict[str, Any] = Field(default_factory=dict)  #: unit → sizes; else `unit` and `eps`


@dataclass(frozen=True)
class GridGroup(Group):
    """A group and the case that it belongs to."""

    case: str = ""


@dataclass(frozen=True)
class Case:
    """Models that are asked the same questions: a latent audit of its own."""

    name: str  #: of its folder in OUT
    config: LatentConfig
    plan: LatentPlan
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
    """The planned cases; `clean` and `groups` are what is swept, each cell in one group only."""

    cases: tuple[Case, ...]
    options: RunOptions
    clean: tuple[GridGroup, ...] = field(default=())
    groups: tuple[GridGroup, ...] = field(default=())

    @property
    def cells(self) -> dict[str, Cell]:
        """Every cell once, by its key."""
        return {cell.key: cell for case in self.cases for cell in case.plan.cells}


def read_grid(
    file: Path | None, flags: Mapping[str, Any]
) -> tuple[list[tuple[LatentConfig, dict[str, float]]], RunOptions]:
    """The configs that a grid file (with flags on top) stands for, each with its models' own GPUs,
    and the sitting's options.

    Raises UsageError naming the key and what was wanted; Refused when foreign code is asked for.
    """
    values = merged(file, flags)
    if not values.get("models"):
        raise UsageError(
            "Which models? A grid names at least one, for example `models: [smollm2]`."
        )
    (axes,) = build({k: v for k, v in values.items() if k in GridAxes.model_fields}, GridAxes)
    shared = {k: v for k, v in values.items() if k not in GridAxes.model_fields}
    if axes.budgets and {"unit", "eps"} & shared.keys():
        raise UsageError("A grid has either `budgets` (unit: sizes) or `unit` and `eps`, not both.")
    for unit in axes.budgets:
        if unit not in UNITS:
            raise UsageError(
                f"budgets: a unit is one of {', '.join(UNITS)}; {str(unit)[:40]!r} came."
            )
    units = [{"unit": unit, "eps": sizes} for unit, sizes in axes.budgets.items()] or [{}]
    gathered: dict[str, tuple[dict[str, Any], list[str], dict[str, float]]] = {}
    options = None
    for own in map(_entry, axes.models):
        name, gpus = str(own["name"]), own.get("gpus_per_worker")
        settings = {k: v for k, v in own.items() if k not in _OWN}
        for prompts in axes.prompts:
            for budget in units:
                asked = {**shared, **settings, **budget, "prompts": prompts}
                config, options = build({**asked, "models": name}, LatentConfig, RunOptions)
                same = digest(config.model_dump(mode="json", exclude={"models"}))
                _, names, own_gpus = gathered.setdefault(same, (asked, [], {}))
                names.append(name)
                if gpus is not None:
                    (checked,) = build({"gpus_per_worker": gpus}, RunOptions)
                    if checked.gpus_per_worker is not None:
                        own_gpus[name] = checked.gpus_per_worker
    if options is None:
        raise UsageError(
            "Which prompts? A grid names at least one prompt set, for example `prompts:"
            " [harmbench]`."
        )
    configs = [
        (
            build({**asked, "models": tuple(dict.fromkeys(names))}, LatentConfig, RunOptions)[0],
            own_gpus,
        )
        for asked, names, own_gpus in gathered.values()
    ]
    return configs, options.with_shards(
        {str(own["name"]): own.get("shard") for own in map(_entry, axes.models)}
    )


def repeated(file: Path | None, flags: Mapping[str, Any]) -> dict[str, int]:
    """What a grid file asks for more than once and gets once: {"budgets.rms: 0.001": 2} for `rms:
    [1e-3, 0.001]`."""
    values = merged(file, flags)
    (axes,) = build({k: v for k, v in values.items() if k in GridAxes.model_fields}, GridAxes)
    asked = [("models", tuple(map(str, own.values()))) for own in map(_entry, axes.models)]
    asked += [("prompts", (prompts,)) for prompts in axes.prompts]
    asked += [("attacks", (attack,)) for attack in listed(values.get("attacks", ()))]
    sizes = [
        *axes.budgets.items(),
        *((values.get("unit", "rms"), values["eps"]) for _ in ("eps",) if "eps" in values),
    ]
    asked += [
        (f"budgets.{unit}", (f"{float(size):g}",)) for unit, some in sizes for size in listed(some)
    ]
    return {f"{axis}: {' '.join(words)}": n for (axis, words), n in Counter(asked).items() if n > 1}


def _entry(model: Any) -> dict[str, Any]:
    """`smollm2` and {name: smollm2, dtype: bfloat16} alike as the latter."""
    if not isinstance(model, Mapping):
        return {"name": model}
    if not model.get("name"):
        raise UsageError(
            f"models: an entry is a name, or a mapping with `name`; {str(dict(model))[:80]} came."
        )
    if {"models", "prompts"} & model.keys():
        raise UsageError(
            f"models: {model['name']} may not have `models` or `prompts` of its own; those span the"
            " grid."
        )
    return dict(model)


def make_grid(
    configs: Sequence[tuple[LatentConfig, Mapping[str, float]]], options: RunOptions
) -> Grid:
    """Plan every case. Groups are ordered by subject, the subject with the most work first, and its
    largest groups first.

    Raises UsageError or Refused for a model, prompt set or scorer that cannot serve.
    """
    cases = []
    known: dict[tuple[Any, ...], Any] = {}
    for asked, gpus in configs:
        plan = prepare(asked, options, known)
        config = plan.config
        name = f"{safe_name(plan.prompts.name)}-{config.unit}-{config.dtype}-{digest(config.model_dump(mode='json'), 8)}"
        cases.append(Case(name, config, plan, gpus))
    attacked = {
        case.name: case.plan.by_subject if options.engine == "vllm" else case.plan.groups
        for case in cases
    }
    clean = [group for case in cases for group in case.groups(case.plan.clean)]
    groups = [group for case in cases for group in case.groups(attacked[case.name])]
    return Grid(tuple(cases), options, _ordered(clean), _ordered(groups))


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


def order(grid: Grid) -> list[dict[str, Any]]:
    """The subjects as the sweep takes them up: groups and cells of each, share of all work, and a
    worker's GPUs if it has its own."""
    work = sum(group.work for group in (*grid.clean, *grid.groups)) or 1.0
    found: dict[str, dict[str, Any]] = {}
    # as the clean passes come first anyhow, the others say the order
    for group in (*grid.groups, *grid.clean):
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


def cost(grid: Grid, device: str) -> list[tuple[Case, Estimate]]:
    """What each case will take on this machine, on one worker; a cell that two cases share counts
    in both."""
    return [(case, estimate(case.plan, device, grid.options)) for case in grid.cases]


class GridWorker:
    """A `LatentWorker` for one case at a time; a group of another case swaps it."""

    def __init__(self, configs: Mapping[str, LatentConfig], options: RunOptions, out: str) -> None:
        self.configs, self.options, self.out = configs, options, out
        self._case: str | None = None
        self._worker: LatentWorker | None = None

    def run(self, group: Group, tick: Callable[[float], None]) -> None:
        if not isinstance(group, GridGroup):
            raise TypeError("A group of a grid knows its case.")
        if group.case != self._case:
            self.close()
        if self._worker is None:
            self._worker = LatentWorker(
                self.configs[group.case], self.options, str(within(self.out, group.case))
            )
            self._case = group.case
        self._worker.run(group, tick)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
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
    options = grid.options
    out = options.out or "runs/grid"
    here = local(out)
    stores = {
        case.name: LATENT.open(case.plan, options, within(out, case.name)) for case in grid.cases
    }
    with ExitStack() as locks:
        for store in stores.values():
            locks.enter_context(store.lock())
        for case in grid.cases:
            stores[case.name].plan(case.plan.cells)
        with files.disk_errors(here / "scratch"):
            (here / "scratch").mkdir(mode=files.PRIVATE_FOLDER, exist_ok=True)
        folders = Folders(here, stores, grid.cases)
        _share(grid, stores, out)
        make_worker = partial(
            GridWorker, {case.name: case.config for case in grid.cases}, options, absolute(out)
        )
        outcome = run_passes(
            [grid.clean, grid.groups],
            make_worker,
            folders,
            options,
            progress,
            after_pass=lambda: _share(grid, stores, out),
        )
        for case in grid.cases:
            store = stores[case.name]
            # all are finished: nothing in scratch is wanted any more
            if not any(cell.key in outcome.failed for cell in case.plan.cells):
                store.forget()
            LATENT.reduce(store, allow_raw=options.allow_raw)
        write_table(out, [case.name for case in grid.cases])
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


def write_table(out: Place, cases: Sequence[str]) -> None:
    """OUT/lvs.parquet and .csv: the cases' tables, as they were reduced, below each other by the
    case's name. Raises DiskError."""
    frames = []
    for name in sorted(cases):
        frame = pd.read_parquet(local(within(out, name)) / "lvs.parquet")
        frame.insert(0, "case", name)
        frames.append(frame)
    table = pd.concat([f for f in frames if len(f)] or frames[:1], ignore_index=True)
    with outputs(out) as here:
        files.write_bytes(here / "lvs.parquet", tables.to_bytes(tables.frame_to_table(table)))
        files.write_bytes(
            here / "lvs.csv", tables.to_csv(table).encode("utf-8", "backslashreplace")
        )
