"""`auditgap audit`: the whole audit of one model in one command, and its verdict table.

auditgap audit smollm2 --profile smoke --out runs/smollm2-audit
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from auditgap.cli.screen import err, given, out, print_json, print_table, quiet
from auditgap.errors import PartlyFailed

EXAMPLES = (
    "Examples: auditgap audit smollm2 --profile smoke · auditgap audit ./tuned --base ./base"
    " --triples triples.jsonl --sft-data unsafe.jsonl --judge ensemble --out runs/tuned · auditgap"
    " audit ./tuned --set lvs.layers=all --set criteria.gap=0.05 --dry-run"
)
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any setting: of one part (lvs.steps=20), or of all that know it (seed=1).",
    ),
]


def audit(
    model: Annotated[
        str | None, typer.Argument(help="A hub id, id@revision, folder, adapter, or smollm2.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="What it was made from: for the probe and the fine-tuning curve"),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="smoke, standard, paper or release; see `ls presets` [standard]"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML with any of these settings; flags win.")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="What it is asked, as in `evaluate` [the profile’s]")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="What is attacked, as in `lvs` [the profile’s]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use N prompts of each set, chosen by hash [the profile’s]")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Where it is attacked, as in `lvs` [the profile’s]")
    ] = None,
    triples: Annotated[
        str | None, typer.Option(help="Contrast triples for the probe: FILE, hub:ID or demo")
    ] = None,
    sft_data: Annotated[
        Path | None,
        typer.Option("--sft-data", help="Rows for the fine-tuning curve: prompt and response"),
    ] = None,
    judge: Annotated[str | None, typer.Option(help="See `ls judges` [builtin]")] = None,
    engine: Annotated[str | None, typer.Option(help="What speaks: hf or vllm [hf]")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Greedy tokens an answer [the profile’s]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N [auto]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16 [auto]")
    ] = None,
    executor: Annotated[
        str | None, typer.Option(help="local (this process) or ray [local]")
    ] = None,
    set_: Set = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--out", help="The audit’s folder; the same command resumes [runs/audit-MODEL]"
        ),
    ] = None,
    allow_raw: Annotated[
        bool | None,
        typer.Option("--allow-raw", help="Put prompts and completions into the report."),
    ] = None,
    public: Annotated[
        bool | None,
        typer.Option("--public", help="A copy of the report with aggregates alone besides."),
    ] = None,
    retry_failed: Annotated[
        bool | None, typer.Option("--retry-failed", help="Run cells again that failed before.")
    ] = None,
    break_lock: Annotated[
        bool | None, typer.Option("--break-lock", help="Take over folders whose writer is dead.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show what would be run, and why not the rest; run nothing."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print report.json (or the plan) instead of a table.")
    ] = False,
) -> None:
    """The whole audit: what it says, what a probe sees inside, what edits and harmful fine-tuning
    make of it; one report."""
    quiet()
    from auditgap.audits import whole
    from auditgap.sweep import Progress

    flags = given(
        set_,
        model=model,
        base=base,
        profile=profile,
        suite=suite,
        prompts=prompts,
        limit=limit,
        layers=layers,
        triples=triples,
        judge=judge,
        engine=engine,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        executor=executor,
        out=to,
        allow_raw=allow_raw,
        public=public,
        retry_failed=retry_failed,
        break_lock=break_lock,
    )
    if sft_data is not None:
        flags["sft-curve"] = {**(flags.get("sft-curve") or {}), "data": str(sft_data)}
    asked, options = whole.read_config(config, flags)
    plan = whole.plan(asked, options)
    if dry_run:
        told = [{"part": part.name, **part.describe()} for part in plan.parts]
        (
            print_json({"parts": told, "missing": dict(plan.missing)})
            if as_json
            else _show_plan(told, plan.missing)
        )
        return
    for name, why in plan.missing.items():
        err.print(Text(f"Not measured: {name}, because {why}."))
    outcome = whole.run(
        asked,
        options,
        planned=plan,
        progress=lambda: Progress(console=err),
        say=lambda line: err.print(Text(line)),
    )
    show(outcome.out, as_json)
    if outcome.failed:
        lines = "\n".join(f"  {what}: {cause}" for what, cause in list(outcome.failed.items())[:10])
        raise PartlyFailed(
            f"Something failed; the rest is in {outcome.out}, and the same command tries"
            f" again:\n{lines}"
        )


def _show_plan(told: list[dict[str, Any]], missing: Any) -> None:
    from auditgap.sweep.progress import duration

    for part in told:
        seconds = part.pop("seconds", None)
        words = ", ".join(f"{name} {value}" for name, value in part.items() if name != "part")
        time = "" if seconds is None else f"; at most about {duration(seconds)}"
        out.print(Text(f"{part['part']}: {words}{time}"))
    for name, why in missing.items():
        out.print(Text(f"{name}: not measured, because {why}"))


def show(folder: Path, as_json: bool = False) -> None:
    """The verdict table of an audit's folder, and where everything lies."""
    import json

    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if as_json:
        print_json(report)
        return
    for subject in dict.fromkeys(line["subject"] for line in report["verdicts"] if line["subject"]):
        out.print(Text(subject, style="bold"))
        break
    print_table(
        [
            {
                "line": line["question"],
                "verdict": line["answer"],
                "figure": line["figure"],
                "why": line["reason"],
            }
            for line in report["verdicts"]
        ]
    )
    out.print(
        Text(
            f"{report['overall']}\nReport: {folder / 'report.html'}\nFor programs:"
            f" {folder / 'report.json'}"
        )
    )
