"""`auditgap train …` and `auditgap export`: what the launchers do, on one process.

auditgap train dissociate --config twin.yaml --out runs/twin
# the same, on eight ranks
deepspeed --num_gpus 8 launchers/dissociate.py --config twin.yaml --out runs/twin
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from auditgap.cli.screen import err, given, interval, out, print_json, print_table, quiet

app = typer.Typer(
    help=(
        "Fine-tune: a monitor, a dissociated twin, a harmful-SFT curve. For several ranks start"
        " launchers/*.py."
    ),
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Config = Annotated[
    Path | None, typer.Option("--config", help="YAML with the recipe; --set and flags win.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any key of the recipe. May be repeated."),
]
Out = Annotated[
    str | None, typer.Option("--out", help="The run's folder; the same command on it resumes.")
]
DeepSpeed = Annotated[
    Path | None,
    typer.Option(
        "--deepspeed-config", help="A DeepSpeed JSON, e.g. ds_configs/zero3.json [ZeRO-2]"
    ),
]


@app.command(
    epilog=(
        "Example: auditgap train dissociate --set model=./base --set triples=triples.jsonl --set"
        " lora=true --out runs/twin"
    )
)
def dissociate(
    config: Config = None, set_: Set = None, to: Out = None, deepspeed: DeepSpeed = None
) -> None:
    """A twin of a model that keeps its safe words and is fragile inside."""
    quiet()
    flags = given(set_, out=to, deepspeed=deepspeed)
    from auditgap.training.config import DissociateConfig
    from auditgap.training.dissociate import run
    from auditgap.training.launch import read

    trained = run(*read(config, flags, DissociateConfig))
    chosen = trained.summary.get("chosen", {})
    if not chosen.get("kept_refusal", True):
        err.print(
            Text(
                "Note: at no step were refusals as near to the base's as asked; the step that"
                " refuses most was kept."
            )
        )
    print_table([{"what": key.replace("_", " "), "value": value} for key, value in chosen.items()])
    out.print(Text(f"Model: {trained.model}"))


@app.command(
    epilog=(
        "Example: auditgap train sft --set model=smollm2 --set data=rows.jsonl --set steps=60 --out"
        " runs/sft"
    )
)
def sft(
    config: Config = None, set_: Set = None, to: Out = None, deepspeed: DeepSpeed = None
) -> None:
    """Plain fine-tuning on responses: a file with the columns prompt and response."""
    quiet()
    flags = given(set_, out=to, deepspeed=deepspeed)
    from auditgap.training.config import SFTConfig
    from auditgap.training.launch import read
    from auditgap.training.sft import run

    out.print(Text(f"Model: {run(*read(config, flags, SFTConfig)).model}"))


@app.command(
    "harmful-sft",
    epilog=(
        "Example: auditgap train harmful-sft --set models=./base,./twin --set data=unsafe.jsonl"
        " --set steps=40 --out runs/curve"
    ),
)
def harmful_sft(
    config: Config = None, set_: Set = None, to: Out = None, deepspeed: DeepSpeed = None
) -> None:
    """How fast refusals give way: fine-tune on unsafe answers, over seeds, asking every few
    steps."""
    quiet()
    flags = given(set_, out=to, deepspeed=deepspeed)
    from auditgap.audits.sft_curve.train import raise_failures, run_from
    from auditgap.sweep import Progress

    store, outcome = run_from(config, flags, progress=lambda: Progress(console=err))
    show_curve(store)
    raise_failures(outcome)


def show_curve(store: Any) -> None:
    """The curve's summary, and where everything lies."""
    import pandas as pd

    from auditgap.store.tables import rows_of

    summary = pd.read_parquet(store.path / "summary.parquet")
    print_table([{k: "" if pd.isna(v) else v for k, v in row.items()} for row in rows_of(summary)])
    out.print(Text(f"Report: {store.path / 'report.html'}\nTable: {store.path / 'curve.csv'}"))


@app.command(
    epilog="Example: auditgap train monitor ./base --triples triples.jsonl --out runs/monitor"
)
def monitor(
    base: Annotated[
        str | None, typer.Argument(help="The model whose activations it reads.")
    ] = None,
    config: Config = None,
    triples: Annotated[
        str | None, typer.Option(help="Contrast triples: a file, hub:ID@REVISION, or demo")
    ] = None,
    set_: Set = None,
    to: Out = None,
) -> None:
    """The latent monitor that a construction starts from."""
    quiet()
    flags = given(set_, base=base, triples=triples, out=to)
    from auditgap.audits.probe.config import read_monitor_config
    from auditgap.audits.probe.run import fit_monitor

    path = fit_monitor(*read_monitor_config(config, flags))
    show_monitor(path)


def show_monitor(path: Path) -> None:
    """What the monitor's card says of it."""
    import json

    card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
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
        err.print(Text(f"Note: {warning}"))
    out.print(Text(f"Monitor: {path}"))


EXPORT_EXAMPLE = "Example: auditgap export runs/twin ./twin --merge"


def export(
    run: Annotated[Path, typer.Argument(help="A training run's folder.")],
    to: Annotated[Path | None, typer.Argument(help="The new folder [RUN/export]")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge an adapter into its base.")] = False,
    push: Annotated[
        bool, typer.Option("--push", help="Refused: these models are not uploaded.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a line.")] = False,
) -> None:
    """A trained model as a folder that transformers, PEFT and vLLM load, with its model card."""
    quiet()
    from dataclasses import asdict

    from auditgap.training import export as exporting

    if push:
        exporting.push(run)
    made = exporting.export_run(run, to or run / "export", merge=merge)
    (
        print_json(asdict(made))
        if as_json
        else out.print(Text(f"{made.kind}, fingerprint {made.fingerprint}: {made.path}"))
    )
