"""A command for each audit, from its config and options, and what a dry run shows of its plan.

    auditgap evaluate smollm2 --limit 50
    auditgap probe ./base ./twin --triples triples.jsonl --dry-run

An audit of another package becomes a command too: nothing here knows a particular one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from auditgap.audits import AUDITS, Audit
from auditgap.audits.latent.audit import DISTANCE, DISTANCE_TITLE
from auditgap.cli import show
from auditgap.cli.options import Asked, command
from auditgap.cli.screen import confirm, err, note, print_json, print_table, quiet, say
from auditgap.types import Document

PANEL = "Audits"


def add(app: typer.Typer, *, leave: set[str]) -> None:
    """Every audit's command but those in `leave`, and `distance`."""
    for audit in AUDITS.values():
        if audit.command not in leave:
            _add(app, audit)

    latent = AUDITS["latent"]

    @command(
        app,
        "distance",
        latent.config,
        latent.options,
        about=(
            f"{DISTANCE_TITLE}\n\nThe search starts at the smallest --eps, doubles it until the"
            " completion turns, then bisects."
        ),
        examples_of=("auditgap distance smollm2 --layers all --limit 32 --out runs/distance",),
        leave=("attacks", "draws", "distance"),
        panel=PANEL,
        judges=True,
        long=True,
    )
    def distance(asked: Asked) -> None:
        perform(latent, replace(asked, flags={**asked.flags, **DISTANCE}))


def _add(app: typer.Typer, audit: Audit) -> None:
    @command(
        app,
        audit.command,
        audit.config,
        audit.options,
        about=audit.title,
        examples_of=audit.examples,
        panel=PANEL,
        judges=True,
        long=True,
        fits=audit.name == "latent",
    )
    def act(asked: Asked) -> None:
        perform(audit, asked)


def perform(audit: Audit, asked: Asked) -> None:
    """Read, plan, and either show the plan or run it. Raises as `run` does, and PartlyFailed."""
    quiet()
    from auditgap.audits import run
    from auditgap.sweep import Progress

    config, options = audit.read(asked.file, asked.flags)
    if asked.seconds is not None:
        config, options = _fitted(audit, asked, asked.seconds, config, options)
    audit.check(options)
    plan = audit.prepare(config, options)
    expected = audit.estimate(plan, options)
    if asked.dry_run:
        show_plan(plan, expected, asked.as_json)
        return
    note(sentence(plan, expected))
    _memory(expected, options.device)
    long_run(expected.get("seconds", 0.0), asked.yes)
    store, outcome = run(audit, config, options, plan=plan, progress=lambda: Progress(console=err))
    show.finish(audit, store, outcome.failed, as_json=asked.as_json)
    if (most := getattr(options, "max_unscored", None)) is not None:
        show.enough(audit, store, most)
    if asked.fail_on is not None:
        from auditgap.audits.findings import findings_of, opened

        show.verdicts_hold(findings_of(opened(str(store.place))).lines, asked.fail_on)


def _fitted(
    audit: Audit, asked: Asked, budget: float, config: Any, options: Any
) -> tuple[Any, Any]:
    """The config and options that fit into the time asked for."""
    from auditgap.config import merged

    def read(changes: Document) -> tuple[Any, Any]:
        return audit.read(asked.file, {**asked.flags, **changes})

    def cost(changes: Document) -> tuple[float, int]:
        expected = audit.estimate(audit.prepare(*read(changes)), options)
        return expected["seconds"], expected["prompts"]

    own = set(merged(asked.file, asked.flags, audit.command))
    out = options.out or audit.folder(config)
    return read(within_time(budget, out, cost, own, dry=asked.dry_run))


def within_time(
    budget: float,
    out: str,
    cost: Callable[[Document], tuple[float, int]],
    own: set[str],
    *,
    dry: bool,
) -> Document:
    """The settings to change for `--time`, said in a sentence and, unless `dry`, kept beside the
    run."""
    from auditgap.audits import within
    from auditgap.store.remote import needs_disk

    needs_disk(out, "A run that is fitted to a time")
    fit = within.kept(Path(out), budget) or within.fitted(cost, budget, own)
    note(fit.sentence(budget))
    if not dry:
        within.keep(Path(out), budget, fit)
    return fit.changes


def long_run(seconds: float, yes: bool) -> None:
    """Ask before a run of many hours. Raises UsageError where nobody can be asked, typer.Exit after
    a no."""
    from auditgap.audits.within import LONG
    from auditgap.sweep.progress import duration

    if seconds > LONG:
        confirm(
            f"This is estimated to take up to {duration(seconds)} (--time 2h fits it to two hours)."
            " Begin?",
            yes,
        )


def show_plan(plan: Any, expected: Document, as_json: bool) -> None:
    """The groups of cells in their order, and what they will take; or all cells as JSON."""
    if as_json:
        counts = {key: expected[name] for name, key in KEYS.items() if name in expected}
        print_json(
            {
                "config": plan.config.model_dump(mode="json"),
                **counts,
                "cells": [{"key": c.key, "cell": str(c), **c.describe()} for c in plan.cells],
                "estimate": {k: v for k, v in expected.items() if k not in (*COUNTS, "judge")},
            }
        )
        return
    groups = [group for groups in plan.passes for group in groups]
    work = sum(group.work for group in groups)
    print_table(
        [
            {
                "group": group.name,
                "cells": len(group.cells),
                "attacks": ", ".join(dict.fromkeys(c.attack for c in group.cells)),
                **_sizes(group, any(c.budget for g in groups for c in g.cells)),
                "share": f"{group.work / max(work, 1):.0%}",
            }
            for group in groups
        ]
    )
    say(f"{sentence(plan, expected)} Nothing was run.")


#: Counts of an estimate that a plan's JSON has by a name of its own.
KEYS = {"prompts": "n_prompts", "completions": "completions"}
#: Of an estimate: what is counted and not measured.
COUNTS = ("prompts", "cells", "completions")


def _sizes(group: Any, budgets: bool) -> dict[str, str]:
    sizes = dict.fromkeys(f"{c.budget.size:g}" for c in group.cells if c.budget)
    return {"eps": ", ".join(sizes)} if budgets else {}


def sentence(plan: Any, expected: Document) -> str:
    """How much there is to do, as far as the audit can tell: "21 cells × 12 prompts. Up to about
    3 min on one worker like this machine, 0.1 GB of memory, 3 MB of disk."."""
    from auditgap.sweep.progress import computing

    n = len(plan.cells)
    said = f"{n} cell{'' if n == 1 else 's'}"
    if "prompts" in expected:
        name = getattr(getattr(plan, "prompts", None), "name", "")
        said += f" × {expected['prompts']} prompts{f' ({name})' if name else ''}"
    others = {
        name: value
        for name, value in expected.items()
        if name not in ("prompts", "cells", *MEASURED)
    }
    said = "; ".join((said, *(f"{name} {value}" for name, value in others.items())))
    measured = [f(expected[name]) for name, f in MEASURED.items() if f and name in expected]
    if "seconds" in expected:
        said = f"{said}. {computing(expected)}"
    return ", ".join((said, *measured)) + "."


#: How a measured part of an estimate is written; None: elsewhere, or not for people.
MEASURED: dict[str, Any] = {
    "seconds": None,
    "starting": None,
    "judging": None,
    "flops": None,
    "memory_bytes": lambda size: f"{size / 1e9:.1f} GB of memory",
    "disk_bytes": lambda size: f"{size / 1e6:.0f} MB of disk",
}


def _memory(expected: Document, device: str) -> None:
    """A warning where memory is likely to run out."""
    if "memory_bytes" not in expected:
        return
    from auditgap.models import pick_device
    from auditgap.models.room import free_memory

    free = free_memory(pick_device(device))
    if expected["memory_bytes"] > free:
        note(
            f"Note: {free / 1e9:.1f} GB are free. If memory runs out, batches are halved; else use"
            " --dtype bfloat16."
        )
