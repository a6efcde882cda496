"""`auditgap intervene` and `export-edits`: what steering, ablation, patching and their controls
open, and their directions.

    auditgap intervene smollm2 --interventions steering,ablation --layers mid --limit 48 --out runs/interventions
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from auditgap.cli.screen import err, given, interval, out, print_json, print_table, quiet
from auditgap.errors import PartlyFailed

Config = Annotated[
    Path | None, typer.Option("--config", help="YAML with any of these options; flags win.")
]

INTERVENE_EXAMPLES = (
    "Examples: auditgap intervene smollm2 --limit 48 --max-new-tokens 32 · auditgap intervene"
    " ./base ./tuned --interventions steering,ablation --layers stride:4 --out runs/pair · auditgap"
    " intervene --config steer.yaml --dry-run"
)


def intervene(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Hub ids, id@revision, folders, adapters, or smollm2."),
    ] = None,
    config: Config = None,
    interventions: Annotated[
        str | None, typer.Option(help="See `ls interventions` [all; base_patching with --base]")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="embedding,mid,last | all | stride:4 | 0,5,12 [mid]")
    ] = None,
    strengths: Annotated[
        str | None,
        typer.Option(
            help="Fractions of the mean activation norm; below 0: the other way [0.1,0.2,0.4]"
        ),
    ] = None,
    angles: Annotated[
        str | None, typer.Option(help="Degrees off the direction [0,15,30,45,60,75,90]")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="A name (see `ls prompts`) or a file of them [harmbench]")
    ] = None,
    control_prompts: Annotated[
        str | None, typer.Option("--control-prompts", help="Harmless ones, likewise [everyday]")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="A base whose activations `base_patching` puts into the models"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Use N of each set, chosen by hash; half is learned from [all]"),
    ] = None,
    draws: Annotated[
        int | None, typer.Option(help="Draws of each random control, a prompt [1]")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="See `ls judges`: builtin, refusal=MODEL, ensemble, … [builtin]"),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Greedy tokens a completion [64]")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16 [auto]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N [auto]")] = None,
    executor: Annotated[
        str | None, typer.Option(help="local (this process) or ray [local]")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Ray actors [as many as fit]")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of samples, halves and controls [0]")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other key of the config."),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--out", help="Its folder; the same command resumes [runs/interventions-MODEL]"
        ),
    ] = None,
    allow_raw: Annotated[
        bool | None,
        typer.Option("--allow-raw", help="Put prompts and completions into the report."),
    ] = None,
    break_lock: Annotated[
        bool | None, typer.Option("--break-lock", help="Take over a folder whose writer is dead.")
    ] = None,
    retry_failed: Annotated[
        bool | None, typer.Option("--retry-failed", help="Run cells again that failed before.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the cells and what they will take; run nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Steering, ablation, patching, turned directions and a universal edit, each next to a control
    as large that does not aim.

    Directions and searches see one half of the prompts; what is reported was measured on the other
    half.
    """
    quiet()
    from auditgap.audits import intervene as audit
    from auditgap.models import pick_device
    from auditgap.sweep import Progress
    from auditgap.sweep.progress import duration

    flags = given(
        set_,
        models=tuple(models or ()),
        interventions=interventions,
        layers=layers,
        strengths=strengths,
        angles=angles,
        prompts=prompts,
        control_prompts=control_prompts,
        base=base,
        limit=limit,
        draws=draws,
        judge=judge,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        device=device,
        executor=executor,
        workers=workers,
        seed=seed,
        out=to,
        allow_raw=allow_raw,
        break_lock=break_lock,
        retry_failed=retry_failed,
    )
    asked, options = audit.read_config(config, flags)
    asked, plan = audit.prepare(asked, options)
    seconds = audit.estimate(plan, pick_device(options.device))
    if dry_run:
        cells = [{"key": c.key, "cell": str(c), **c.describe()} for c in plan.cells]
        if as_json:
            told = {"completions": plan.completions, "seconds": seconds, "cells": cells}
            print_json({"config": asked.model_dump(mode="json"), **told})
            return
        print_table([{"cell": c["cell"], "key": c["key"]} for c in cells])
    halves = plan.halves
    said = Text(
        f"{len(plan.cells)} cells: learned from {len(halves.fit)} prompts ({halves.prompts.name})"
        f" and {len(halves.contrast)} control prompts ({halves.controls.name}), asked on"
        f" {len(halves.asked)}; {plan.completions} completions, about {duration(seconds)}."
        + (" Nothing was run." if dry_run else "")
    )
    (out if dry_run else err).print(said)
    if dry_run:
        return
    store, outcome = audit.run(asked, options, plan=plan, progress=lambda: Progress(console=err))
    for line in store.warnings:
        err.print(Text(f"Note: {line}"))
    _show(store)
    if outcome.failed:
        lines = "\n".join(f"  {key}: {cause}" for key, cause in sorted(outcome.failed.items())[:10])
        raise PartlyFailed(
            f"{len(outcome.failed)} cells failed, the others are in {store.path}:\n{lines}"
        )
    out.print(
        Text(f"Report: {store.path / 'report.html'}\nTable: {store.path / 'interventions.csv'}")
    )


def _show(store: Any) -> None:
    """The table, narrow enough for a terminal, and the sentences under it."""
    import pandas as pd

    from auditgap.report.intervene import reading

    table = pd.read_parquet(store.path / "interventions.parquet")
    several = table["subject"].nunique() > 1
    print_table(
        [
            {
                **({"subject": r["subject"]} if several else {}),
                "site": r["site"],
                "intervention": (
                    r["intervention"] + ("" if pd.isna(r["angle"]) else f" {r['angle']:g}°")
                ),
                "strength": f"{r['strength']:g}",
                "ASR": interval(r["asr"], r["asr_lo"], r["asr_hi"]),
                "control": interval(r["control_asr"], r["control_asr_lo"], r["control_asr_hi"]),
                "− control": (
                    ""
                    if pd.isna(r["difference"])
                    else interval(r["difference"], r["difference_lo"], r["difference_hi"])
                ),
                "n": r["n"] - r["n_unscored"],
                "broken": r["n_broken"],
            }
            for r in table.to_dict("records")
        ]
    )
    for line in reading(table):
        out.print(Text(" ".join(line.split())))  # a page's spaces are of many widths


EXPORT_EDITS_EXAMPLE = (
    "Example: auditgap export-edits runs/interventions --out directions.safetensors"
)


def export_edits(
    folder: Annotated[
        str, typer.Argument(help="A run folder of `intervene`, or of `lvs --keep-edits`.")
    ],
    to: Annotated[Path, typer.Option("--out", help="FILE.safetensors")],
    subject: Annotated[
        str | None, typer.Option(help="Which subject, where the run has several.")
    ] = None,
) -> None:
    """Write a run's directions and δ as one safetensors file, which any tool opens; names and
    metadata say what they are."""
    from auditgap.audits.edits import export_edits as export
    from auditgap.store import RunFolder

    names = export(RunFolder.load(folder), to, subject=subject)
    out.print(Text(f"{len(names)} tensors, {names[0]} to {names[-1]}.\nEdits: {to}"))
