"""`auditgap train …` and `auditgap export`: what the launchers do, on one process.

auditgap train dissociate --config twin.yaml --out runs/twin
# the same, on eight ranks
deepspeed --num_gpus 8 launchers/dissociate.py --config twin.yaml --out runs/twin
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from auditgap.audits import AUDITS
from auditgap.audits.probe.config import FitMonitorConfig, ProbeOptions, read_monitor_config
from auditgap.audits.sft_curve.config import SFTCurveConfig, SFTCurveOptions
from auditgap.cli.audits import perform
from auditgap.cli.options import AsJson, Asked, command, examples, group
from auditgap.cli.screen import answer, interval, note, print_json, print_table, quiet, say
from auditgap.errors import UsageError
from auditgap.report.exports import EXPORTS
from auditgap.training.config import DissociateConfig, SFTConfig, TrainOptions

app = group(
    "Fine-tune models: dissociated twins, harmful-SFT curves, monitors. To use several ranks, start"
    " launchers/*.py."
)

PANEL = "Training"


@command(
    app,
    "dissociate",
    DissociateConfig,
    TrainOptions,
    about="Train a dissociated twin: a model that keeps its refusals and is fragile inside.",
    examples_of=(
        "auditgap train dissociate --model ./base --triples triples.jsonl --set lora=true --out"
        " runs/twin",
    ),
    plans=False,
)
def dissociate(asked: Asked) -> None:
    quiet()
    from auditgap.training.dissociate import run
    from auditgap.training.launch import read

    trained = run(*read(asked.file, asked.flags, DissociateConfig))
    chosen = trained.summary.get("chosen", {})
    if asked.as_json:
        print_json({"model": str(trained.model), "chosen": chosen})
        return
    if not chosen.get("kept_refusal", True):
        note(
            "Note: at no step were refusals as near to the base's as asked; the step that refuses"
            " most was kept."
        )
    print_table([{"what": key.replace("_", " "), "value": value} for key, value in chosen.items()])
    say(f"Model: {trained.model}")


@command(
    app,
    "sft",
    SFTConfig,
    TrainOptions,
    about="Fine-tune on responses, from a file with the columns prompt and response.",
    examples_of=("auditgap train sft --model smollm2 --data rows.jsonl --steps 60 --out runs/sft",),
    plans=False,
)
def sft(asked: Asked) -> None:
    quiet()
    from auditgap.training.launch import read
    from auditgap.training.sft import run

    trained = run(*read(asked.file, asked.flags, SFTConfig))
    if asked.as_json:
        print_json({"model": str(trained.model)})
    else:
        say(f"Model: {trained.model}")


@command(
    app,
    "harmful-sft",
    SFTCurveConfig,
    SFTCurveOptions,
    about=(f"{AUDITS['sft_curve'].title} The same as `auditgap sft-curve`."),
    examples_of=(
        "auditgap train harmful-sft ./base ./twin --data unsafe.jsonl --steps 40 --out runs/curve",
    ),
)
def harmful_sft(asked: Asked) -> None:
    perform(AUDITS["sft_curve"], asked)


@command(
    app,
    "monitor",
    FitMonitorConfig,
    ProbeOptions,
    about="Fit the latent monitor that a construction starts from.",
    examples_of=("auditgap train monitor ./base --triples triples.jsonl --out runs/monitor",),
    leave=("name", "executor", "workers", "gpus_per_worker", "address"),
    plans=False,
)
def monitor(asked: Asked) -> None:
    quiet()
    from auditgap.audits.probe.monitor import fit_monitor

    show_monitor(fit_monitor(*read_monitor_config(asked.file, asked.flags)), asked.as_json)


def show_monitor(path: Path, as_json: bool) -> None:
    """What the monitor's card says of it."""
    from auditgap.store import files

    card = files.unseal(path.with_suffix(".json"), required=False)
    if as_json:
        print_json({"monitor": str(path), **card})
        return
    auroc = card["auroc"]
    rows = [
        {
            "probe": "monitor",
            "AUROC, held out": interval(auroc["estimate"], auroc["lo"], auroc["hi"]),
        }
    ]
    rows += [
        {"probe": v["what"], "AUROC, held out": interval(v["estimate"], v["lo"], v["hi"])}
        for v in card["baselines"].values()
    ]
    print_table(rows)
    for warning in card["warnings"]:
        note(f"Note: {warning}")
    say(f"Monitor: {path}")


EXPORT_EXAMPLES = (
    "auditgap export runs/twin ./twin --merge",
    "auditgap export runs/tuned tuned.sarif --format sarif",
)
#: The format that is no file: a trained model's folder.
MODEL = "model"


def add(app: typer.Typer) -> None:
    app.command("export", epilog=examples(EXPORT_EXAMPLES), rich_help_panel=PANEL)(export)


def export(
    run: Annotated[
        str, typer.Argument(help="A training run's folder, or with --format an audit's.")
    ],
    to: Annotated[
        Path | None,
        typer.Argument(help="The new folder or file", show_default="RUN/export, RUN/verdicts.…"),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="|".join((MODEL, *EXPORTS)),
            help="What is written: the trained model, or the verdicts of an audit in a format.",
            autocompletion=lambda: [MODEL, *EXPORTS],
        ),
    ] = MODEL,
    merge: Annotated[bool, typer.Option("--merge", help="Merge an adapter into its base.")] = False,
    push: Annotated[
        bool, typer.Option("--push", help="Refused: these models are not uploaded.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Export a trained model, with its model card, as a folder that transformers, PEFT and vLLM
    load; or the verdicts of an audit as a file that other tools read."""
    if form != MODEL:
        if merge or push:
            raise UsageError(f"--merge and --push are of a trained model, and --format is {form}.")
        return _export_verdicts(run, to, form, as_json)
    quiet()
    from dataclasses import asdict

    from auditgap.training import export as exporting

    if push:
        exporting.push(Path(run))
    made = exporting.export_run(Path(run), to or Path(run) / "export", merge=merge)
    (
        print_json(asdict(made))
        if as_json
        else say(f"{made.kind}, fingerprint {made.fingerprint}: {made.path}")
    )


def _export_verdicts(run: str, to: Path | None, form: str, as_json: bool) -> None:
    """The verdict table of an audit, in a format of `EXPORTS`."""
    from auditgap.audits.findings import findings_of, opened

    if form not in EXPORTS:
        raise EXPORTS.unknown(form, MODEL)
    if to is None and "://" in run:
        raise UsageError(
            f"Which file? For example: auditgap export {run} verdicts.sarif --format {form}"
        )
    found = findings_of(opened(run))
    path = EXPORTS[form].write(found, to or Path(run) / f"verdicts{EXPORTS[form].suffix}")
    answer(as_json, f"{found.sentence}\nVerdicts: {path}", verdicts=str(path), format=form)
