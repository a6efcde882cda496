"""`auditgap audit`: the whole audit of one model in one command, and its verdict table.

auditgap audit smollm2 --profile smoke --out runs/smollm2-audit
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from auditgap.audits.whole_config import WholeSettings
from auditgap.cli import audits
from auditgap.cli import show as screen_show
from auditgap.cli.options import Asked, command
from auditgap.cli.screen import err, inert, note, print_json, print_table, quiet, say
from auditgap.errors import PartlyFailed
from auditgap.types import Document, in_mode, parted

EXAMPLES = (
    "auditgap audit smollm2 --profile smoke",
    "auditgap audit ./tuned --base ./base --triples triples.jsonl --sft-data unsafe.jsonl --judge"
    " ensemble --out runs/tuned",
    "auditgap audit ./tuned --set lvs.layers=all --set criteria.gap=0.05 --dry-run",
    "auditgap audit ./tuned --profile smoke --fail-on fail",
)


def add(app: typer.Typer) -> None:
    @command(
        app,
        "audit",
        WholeSettings,
        about=(
            "Run the whole audit: behaviour, the base's safety probe, latent attacks and harmful"
            " fine-tuning, in one report."
        ),
        examples_of=EXAMPLES,
        panel=audits.PANEL,
        judges=True,
        long=True,
        fits=True,
    )
    def audit(asked: Asked) -> None:
        perform(asked)


def perform(asked: Asked) -> None:
    """Read, plan, and either show the plan or run it. Raises PartlyFailed."""
    quiet()
    from auditgap.audits import whole
    from auditgap.sweep import Progress

    config, options = whole.read_config(asked.file, asked.flags)
    if asked.seconds is not None:
        out = str(whole.folder_of(config, options))
        config, options = _fitted(asked, asked.seconds, out)
    plan = whole.plan(config, options)
    if asked.dry_run:
        parts = [{"part": part.name, **part.describe()} for part in plan.parts]
        if asked.as_json:
            print_json({"parts": parts, "missing": dict(plan.missing)})
        else:
            _show_plan(parts, plan.missing)
        return
    for name, why in plan.missing.items():
        note(f"Not measured: {name}, because {why}.")
    audits.long_run(sum(part.describe().get("seconds", 0.0) for part in plan.parts), asked.yes)
    outcome = whole.run(
        config, options, planned=plan, progress=lambda: Progress(console=err), say=note
    )
    show(outcome.out, asked.as_json)
    if outcome.failed:
        lines = "\n".join(f"  {what}: {cause}" for what, cause in list(outcome.failed.items())[:10])
        raise PartlyFailed(
            f"Something failed; the rest is in {outcome.out}, and the same command tries"
            f" again:\n{lines}"
        )
    if asked.fail_on is not None:
        from auditgap.report.verdict_lines import Line

        lines = map(Line.read, whole.report_of(outcome.out)["verdicts"])
        screen_show.verdicts_hold(list(lines), asked.fail_on)


def _fitted(asked: Asked, budget: float, out: str) -> tuple[Any, Any]:
    """The audit and its options that fit into the time asked for."""
    from auditgap.audits import whole
    from auditgap.config import merged

    def read(changes: Document) -> tuple[Any, Any]:
        attack = {key: value for key, value in changes.items() if key != "limit"}
        limit = {"limit": changes["limit"]} if "limit" in changes else {}
        latent = {**attack, **(asked.flags.get("lvs") or {})}
        return whole.read_config(asked.file, {**asked.flags, **limit, "lvs": latent})

    def cost(changes: Document) -> tuple[float, int]:
        told = {part.name: part.describe() for part in whole.plan(*read(changes)).parts}
        seconds = sum(one.get("seconds", 0.0) for one in told.values())
        asked_of = told.get("lvs") or next(iter(told.values()))
        return seconds, asked_of.get("prompts", 0)

    own = merged(asked.file, asked.flags)
    known = {*own, *(own.get("lvs") or {})}
    return read(audits.within_time(budget, out, cost, known, dry=asked.dry_run))


def _show_plan(told: list[dict[str, Any]], missing: Any) -> None:
    from auditgap.sweep.progress import MEASURED_HERE, computing, duration

    for part in told:
        words = ", ".join(
            f"{name} {value}"
            for name, value in part.items()
            if name not in ("part", *audits.MEASURED)
        )
        time = f"; about {duration(part['seconds'])}" if "seconds" in part else ""
        say(f"{part['part']}: {words}{time}")
    for name, why in missing.items():
        say(f"{name}: not measured, because {why}")
    total = {k: sum(part.get(k, 0.0) for part in told) for k in MEASURED_HERE}
    if total["seconds"]:
        say(f"{computing(total)}. Nothing was run.")


def show(folder: Path, as_json: bool = False) -> None:
    """The verdict table of an audit's folder, and where everything lies."""
    from auditgap.audits import whole

    report = whole.report_of(folder)
    if as_json:
        print_json(report)
        return
    for answer in report.get("answers") or [report["title"]]:
        say(inert(answer))
    print_table(
        [
            {
                "line": in_mode(line["question"], parted(line["subject"])[1]),
                "verdict": line["answer"],
                "figure": line["figure"],
                "why": line["reason"],
            }
            for line in report["verdicts"]
        ]
    )
    say(
        f"{report['overall']}\nReport: {folder / 'report.html'}\nFor programs:"
        f" {folder / 'report.json'}"
    )
