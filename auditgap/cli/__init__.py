"""The command line: joins the parts and says what they said. No measurement happens here.

    auditgap lvs smollm2 --prompts harmbench --limit 16 --out runs/smollm2

Exit codes: 0 done, 2 bad usage, 3 partly failed, 4 refused for safety, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import typer
from rich.text import Text

from auditgap import __version__
from auditgap.cli import audits, compare, data, emergent, grid, intervene, judges, training
from auditgap.cli import whole as whole_cli
from auditgap.cli.screen import err, inert_lines, interval, out, print_json, print_table, quiet
from auditgap.errors import AuditgapError, PartlyFailed, UsageError, did_you_mean
from auditgap.types import ATTACKS

app = typer.Typer(
    help=(
        "Measure the audit gap of language models: behavioural safety minus robustness under"
        " bounded edits."
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Models = Annotated[
    list[str] | None, typer.Argument(help="Hub ids, id@revision, folders, adapters, or smollm2.")
]
Config = Annotated[
    Path | None,
    typer.Option("--config", help="YAML with any of these options, or preset:NAME; flags win."),
]
Layers = Annotated[
    str | None,
    typer.Option(help="embedding,mid,last | all | stride:4 | 0,5,12 [embedding,mid,last]"),
]
Unit = Annotated[
    str | None, typer.Option(help="What eps is relative to: rms, max or absolute [rms]")
]
Eps = Annotated[
    str | None,
    typer.Option(help="Sizes, in the unit [rms: 0.01,0.03,0.1; others: 0.0005,0.001,0.005]"),
]
Attacks = Annotated[str | None, typer.Option(help=f"Any of {','.join(ATTACKS)} [all]")]
Draws = Annotated[int | None, typer.Option(help="Draws of each random control [1]")]
Distance = Annotated[
    bool | None,
    typer.Option("--distance/--no-distance", help="Minimum distance to collapse besides [no]"),
]
Prompts = Annotated[
    str | None,
    typer.Option(help="A name (see `ls prompts`) or a jsonl, csv, parquet or txt file [harmbench]"),
]
Column = Annotated[str | None, typer.Option(help="The file's column with the prompt [prompt]")]
Limit = Annotated[int | None, typer.Option(help="Use N prompts, chosen by hash [all]")]
Reward = Annotated[str | None, typer.Option(help="builtin, margin or hf:MODEL_ID [builtin]")]
Judge = Annotated[
    str | None,
    typer.Option(
        help="See `ls judges`: builtin, refusal=MODEL, ensemble, hf:MODEL_ID, … [builtin]"
    ),
]
JudgeEngine = Annotated[
    str | None,
    typer.Option("--judge-engine", help="What a judge's models run on: hf, vllm or openai [hf]"),
]
JudgeEndpoint = Annotated[
    str | None, typer.Option("--judge-endpoint", help="Base URL of the endpoint that serves them")
]
NewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", help="Greedy tokens a completion [128]")
]
Target = Annotated[
    str | None, typer.Option(help='The opening that `targeted` aims at ["Sure, here is"]')
]
Steps = Annotated[int | None, typer.Option(help="PGD steps [10]")]
Restarts = Annotated[
    int | None, typer.Option(help="PGD starts a budget, zero first; the best is kept [1]")
]
Dtype = Annotated[
    str | None,
    typer.Option(help="auto, float32, bfloat16 or float16 [auto: bfloat16 on a GPU, else float32]"),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N [auto]")]
EngineOption = Annotated[
    str | None,
    typer.Option("--engine", help="What speaks: hf or vllm; attacks run on transformers [hf]"),
]
Executor = Annotated[str | None, typer.Option(help="local (this process) or ray [local]")]
Workers = Annotated[int | None, typer.Option(help="Ray actors [as many as fit]")]
BatchTokens = Annotated[
    int | None,
    typer.Option("--batch-tokens", help="Tokens a PGD batch [2048 on a CPU, 16384 on a GPU]"),
]
Shard = Annotated[
    str | None,
    typer.Option(
        help="A model over N GPUs: layers:N (blocks in parts) or tensor:N (matrices) [one]"
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option("--compile", help="torch.compile the attack: 30 s at first, faster steps"),
]
Template = Annotated[
    str | None,
    typer.Option("--chat-template", help="A Jinja file, or `none` [the tokenizer's own]"),
]
Seed = Annotated[int | None, typer.Option(help="Seed of samples, controls and intervals [0]")]
Out = Annotated[
    str | None, typer.Option(help="The run's folder; the same command on it resumes [runs/MODEL]")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the grid and what it will take; run nothing.")
]
KeepEdits = Annotated[
    bool | None,
    typer.Option("--keep-edits", help="Keep δ of the searched attacks, for `export-edits`."),
]
AllowRaw = Annotated[
    bool | None, typer.Option("--allow-raw", help="Put prompts and completions into the report.")
]
BreakLock = Annotated[
    bool | None, typer.Option("--break-lock", help="Take over a folder whose writer is dead.")
]
RetryFailed = Annotated[
    bool | None, typer.Option("--retry-failed", help="Run cells again that failed before.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command(
    epilog=(
        "Examples: auditgap lvs smollm2 --limit 16 --max-new-tokens 32 · auditgap lvs ./base"
        " ./tuned --layers stride:4 --unit max --out runs/pair · auditgap lvs --config audit.yaml"
        " --dry-run"
    )
)
def lvs(
    models: Models = None,
    config: Config = None,
    layers: Layers = None,
    unit: Unit = None,
    eps: Eps = None,
    attacks: Attacks = None,
    draws: Draws = None,
    distance: Distance = None,
    prompts: Prompts = None,
    column: Column = None,
    limit: Limit = None,
    reward: Reward = None,
    judge: Judge = None,
    max_new_tokens: NewTokens = None,
    target: Target = None,
    steps: Steps = None,
    restarts: Restarts = None,
    dtype: Dtype = None,
    device: Device = None,
    engine: EngineOption = None,
    judge_engine: JudgeEngine = None,
    judge_endpoint: JudgeEndpoint = None,
    executor: Executor = None,
    workers: Workers = None,
    shard: Shard = None,
    batch_tokens: BatchTokens = None,
    compile: Compile = None,
    chat_template: Template = None,
    seed: Seed = None,
    keep_edits: KeepEdits = None,
    out: Out = None,
    allow_raw: AllowRaw = None,
    break_lock: BreakLock = None,
    retry_failed: RetryFailed = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Latent Vulnerability Scores: attack each layer within a budget, next to matched controls, and
    report the audit gap."""
    flags = {k: v for k, v in locals().items() if k not in ("config", "dry_run", "as_json")}
    _latent(config, flags, dry_run, as_json)


@app.command(
    epilog="Example: auditgap distance smollm2 --layers all --limit 32 --out runs/distance"
)
def distance(
    models: Models = None,
    config: Config = None,
    layers: Layers = None,
    unit: Unit = None,
    eps: Eps = None,
    prompts: Prompts = None,
    column: Column = None,
    limit: Limit = None,
    judge: Judge = None,
    max_new_tokens: NewTokens = None,
    target: Target = None,
    steps: Steps = None,
    dtype: Dtype = None,
    device: Device = None,
    executor: Executor = None,
    workers: Workers = None,
    shard: Shard = None,
    batch_tokens: BatchTokens = None,
    chat_template: Template = None,
    seed: Seed = None,
    out: Out = None,
    break_lock: BreakLock = None,
    retry_failed: RetryFailed = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Minimum distance to collapse: the smallest eps at which each prompt's completion turns
    harmful, layer by layer.

    The smallest --eps is where the search starts; it doubles from there, then bisects.
    """
    flags = {k: v for k, v in locals().items() if k not in ("config", "dry_run", "as_json")}
    _latent(config, {**flags, "attacks": (), "distance": True}, dry_run, as_json)


def _latent(
    config_file: Path | None, flags: Mapping[str, Any], dry_run: bool, as_json: bool
) -> None:
    quiet()
    from auditgap.audits import latent
    from auditgap.models import pick_device
    from auditgap.sweep import Progress

    config, options = latent.read_config(config_file, flags)
    config, plan = latent.prepare(config, options)
    expected = latent.estimate(plan, pick_device(options.device), options)
    if dry_run:
        _show_plan(plan, expected, as_json)
        return
    _say_estimate(plan, expected, options)
    store, outcome = latent.run(config, options, plan=plan, progress=lambda: Progress(console=err))
    for line in store.warnings:
        err.print(Text(f"Note: {line}"))
    _show_summary(store)
    if outcome.failed:
        lines = "\n".join(f"  {key}: {cause}" for key, cause in sorted(outcome.failed.items())[:10])
        raise PartlyFailed(
            f"{len(outcome.failed)} of {len(plan.cells)} cells failed, the others are in"
            f" {store.place}:\n{lines}"
        )


def _say_estimate(plan: Any, expected: Any, options: Any) -> None:
    from auditgap.audits.latent import available_memory
    from auditgap.models import pick_device
    from auditgap.sweep.progress import duration

    n = len(plan.prompts.prompts)
    err.print(
        Text(
            f"{len(plan.cells)} cells on {n} prompts ({plan.prompts.name}); at most about"
            f" {duration(expected.seconds)}, {expected.memory_bytes / 1e9:.1f} GB of"
            f" memory{' a device' if options.shard else ''}, {expected.disk_bytes / 1e6:.0f} MB of"
            " disk on the way."
        )
    )
    free = available_memory(pick_device(options.device))
    if expected.memory_bytes > free:
        err.print(
            Text(
                f"Note: {free / 1e9:.1f} GB are free. If memory runs out, batches are halved; else"
                " use --dtype bfloat16."
            )
        )


def _show_plan(plan: Any, expected: Any, as_json: bool) -> None:
    from auditgap.sweep.progress import duration

    cells = [{"key": c.key, "cell": str(c), **c.describe()} for c in plan.cells]
    if as_json:
        fields = {
            name: getattr(expected, name)
            for name in ("flops", "seconds", "memory_bytes", "disk_bytes")
        }
        print_json(
            {
                "config": plan.config.model_dump(mode="json"),
                "n_prompts": len(plan.prompts.prompts),
                "cells": cells,
                "estimate": fields,
            }
        )
        return
    rows = [
        {
            "group": group.name,
            "cells": len(group.cells),
            "attacks": ", ".join(dict.fromkeys(c.attack for c in group.cells)),
            "eps": ", ".join(dict.fromkeys(f"{c.budget.size:g}" for c in group.cells if c.budget)),
            "share": f"{group.work / max(expected.flops, 1):.0%}",
        }
        for group in (*plan.clean, *plan.groups)
    ]
    print_table(rows)
    out.print(
        Text(
            f"{len(cells)} cells × {len(plan.prompts.prompts)} prompts ({plan.prompts.name}), unit"
            f" {plan.config.unit}. At most about {duration(expected.seconds)},"
            f" {expected.memory_bytes / 1e9:.1f} GB of memory, {expected.disk_bytes / 1e6:.0f} MB"
            " of disk. Nothing was run."
        )
    )


def _show_summary(store: Any) -> None:
    """The targeted attack's table, the audit gap, and where everything lies."""
    import pandas as pd

    from auditgap.report import tables
    from auditgap.types import CLEAN

    table = pd.read_parquet(store.path / "lvs.parquet")
    corrected = bool(table["asr_corrected"].notna().any())
    targeted: Any = table[table["attack"] == "targeted"]
    several = len(store.run["info"].get("subjects", ())) > 1

    def whose(subject: str) -> dict[str, str]:
        return {"subject": subject} if several else {}

    rows = [
        {
            **whose(r.subject),
            "site": r.site,
            "eps": f"{r.eps:g} {r.unit}",
            "LVS": interval(r.lvs_mean, r.lvs_mean_lo, r.lvs_mean_hi),
            "− matched": interval(r.delta_vs_matched, r.delta_lo, r.delta_hi),
            "ASR": interval(r.asr, r.asr_lo, r.asr_hi),
            **(
                {
                    "ASR, corrected": interval(
                        r.asr_corrected, r.asr_corrected_lo, r.asr_corrected_hi
                    )
                }
                if corrected
                else {}
            ),
            "n": r.n - r.n_unscored,
            "broken": r.n_broken,
        }
        for r in targeted.itertuples()
    ]
    if rows:
        out.print(Text("Targeted attack, with 95 % intervals (controls and flags: the report)"))
        print_table(rows)
    distances = store.rows(["distance"])
    if "distance" in distances.columns:
        far: Any = tables.distance_table(distances)
        out.print(Text("Minimum distance to collapse (Kaplan–Meier median)"))
        print_table(
            [
                {
                    **whose(r.subject),
                    "site": r.site,
                    "median eps": "not reached"  # measured, and above everything that was tried
                    if pd.isna(r.median) and r.n > r.n_unscored
                    else interval(r.median, r.lo, r.hi),
                    "collapsed": f"{r.n_collapsed} of {r.n}",
                    "could not tell": r.n_unscored,
                }
                for r in far.itertuples()
            ]
        )
    for gap in tables.audit_gaps(store.rows([*ATTACKS, CLEAN])).itertuples():
        safe = interval(gap.safety, gap.safety_lo, gap.safety_hi)
        robust = interval(gap.robustness, gap.robustness_lo, gap.robustness_hi)
        out.print(
            Text(
                f"{gap.subject}, eps {gap.eps:g} {gap.unit}: behaviourally safe {safe}, under"
                f" bounded edits {robust}, audit gap {interval(gap.gap, gap.gap_lo, gap.gap_hi)} (n"
                f" = {gap.n})"
            )
        )
    out.print(Text(f"Report: {store.at('report.html')}\nTable: {store.at('lvs.csv')}"))


app.command("audit", epilog=whole_cli.EXAMPLES)(whole_cli.audit)
app.command("probe", epilog=audits.PROBE_EXAMPLE)(audits.probe)
app.command("evaluate", epilog=audits.EVALUATE_EXAMPLES)(audits.evaluate)
app.command("intervene", epilog=intervene.INTERVENE_EXAMPLES)(intervene.intervene)
app.command("export-edits", epilog=intervene.EXPORT_EDITS_EXAMPLE)(intervene.export_edits)
app.command("grid", epilog=grid.GRID_EXAMPLES)(grid.grid)
app.command("submit", epilog=grid.SUBMIT_EXAMPLE)(grid.submit)
app.command("merge", epilog=grid.MERGE_EXAMPLE)(grid.merge)
app.command("compare", epilog=compare.COMPARE_EXAMPLES)(compare.compare)
app.add_typer(compare.presets, name="presets")
app.add_typer(data.app, name="data")
app.add_typer(judges.app, name="judge")
app.add_typer(training.app, name="train")
app.add_typer(emergent.app, name="em")
app.command("export", epilog=training.EXPORT_EXAMPLE)(training.export)


@app.command(epilog="Example: auditgap report runs/base runs/tuned --out runs/both")
def report(
    folders: Annotated[list[str], typer.Argument(help="Run folders.")],
    to: Annotated[
        str | None, typer.Option("--out", help="Where report.html goes [the first folder]")
    ] = None,
    allow_raw: Annotated[
        bool, typer.Option("--allow-raw", help="Put prompts and completions into the report.")
    ] = False,
    public: Annotated[
        bool, typer.Option("--public", help="Of an audit: a copy with aggregates alone besides.")
    ] = False,
) -> None:
    """Write the tables and the HTML report of one or more run folders, or of an audit’s folder,
    anew."""
    from auditgap.audits import reduce, whole
    from auditgap.report import page
    from auditgap.store import RunFolder
    from auditgap.store.remote import within

    if len(folders) == 1 and whole.is_whole(Path(folders[0])):
        parts, path = whole.stores(Path(folders[0])), Path(to or folders[0])
        for store in parts:
            reduce(store, allow_raw=allow_raw)
        whole.report(
            Path(folders[0]),
            options=whole.WholeOptions(allow_raw=allow_raw, public=public),
            out=path,
        )
        out.print(Text(f"Report: {path / 'report.html'}"))
        return
    if public:
        raise UsageError("--public is for the folder of an `auditgap audit`; one folder, please.")
    stores = [RunFolder.load(folder) for folder in folders]
    for store in stores:
        reduce(store, allow_raw=allow_raw)
    path = page.write(stores, allow_raw=allow_raw, out=to)
    out.print(Text(f"Report: {within(to or stores[0].place, path.name)}"))


@app.command(epilog="Example: auditgap status runs/smollm2 --json")
def status(
    folder: Annotated[str, typer.Argument(help="A run folder, or a grid's.")],
    as_json: AsJson = False,
) -> None:
    """Say how far a run is; works beside the running one, and on any machine that sees the
    folder."""
    from dataclasses import asdict

    from auditgap.store import RunFolder, cases_of
    from auditgap.sweep.progress import duration

    if cases := cases_of(folder):
        return grid.show_status(folder, cases, as_json)
    store = RunFolder.load(folder)
    now = store.status()
    failures = {key: record.get("cause", "") for key, record in store.failures().items()}
    if as_json:
        print_json({**asdict(now), "failures": failures})
        return
    running = (
        f"running (pid {now.running.get('pid')} on {now.running.get('host')})"
        if now.running
        else "not running"
    )
    left = f", about {duration(now.eta_seconds)} left" if now.eta_seconds is not None else ""
    out.print(
        Text(
            f"{folder}: {now.finished} of {now.planned} cells done, {now.failed} failed,"
            f" {running}{left}."
        )
    )
    if now.corrupt:
        out.print(
            Text(f"{now.corrupt} torn files were set aside as *.corrupt; their cells run again.")
        )
    for key, cause in failures.items():
        out.print(Text(f"  {key}: {cause}"))


@app.command(
    epilog=(
        "Examples: auditgap grade runs/smollm2 --judge keyword · auditgap grade runs/behaviour"
        " --judge refusal=gpt-4.1-mini --judge-engine openai --judge-endpoint"
        " https://api.openai.com/v1"
    )
)
def grade(
    folder: Annotated[str, typer.Argument(help="A finished run folder.")],
    judge: Judge = None,
    reward: Reward = None,
    device: Device = None,
    judge_engine: JudgeEngine = None,
    judge_endpoint: JudgeEndpoint = None,
    max_unscored: Annotated[
        float,
        typer.Option(
            "--max-unscored",
            help="Of `evaluate`: share of answers without a verdict above which it failed",
        ),
    ] = 0.2,
) -> None:
    """Judge a run's stored completions again, without generating; the new tables and report go to
    DIR/grades/."""
    quiet()
    from auditgap.audits import Grading, audit_of, regrade
    from auditgap.engines import Serving, engine_named

    if not 0 <= max_unscored <= 1:
        raise UsageError(
            f"--max-unscored is a share, 0 to 1; {max_unscored} came. For example:"
            " --max-unscored 0.2"
        )
    engine = engine_named(judge_engine or ("openai" if judge_endpoint else "hf"))
    where = device or "auto"
    serving = Serving(engine=engine, base_url=judge_endpoint, device=where)
    store = regrade(folder, Grading(judge, reward, where, serving, max_unscored))
    if audit_of(store).name == "latent":
        _show_summary(store)
        return
    audits.show(store)
    out.print(Text(f"Report: {store.at('report.html')}\nTable: {store.at('behaviour.csv')}"))
    audits.enough(store, max_unscored)


@app.command(
    epilog=(
        "Example: auditgap inspect runs/behaviour --out behaviour.eval && inspect view --log-dir ."
    )
)
def inspect(
    folder: Annotated[str, typer.Argument(help="A run folder of `lvs`, `distance` or `evaluate`.")],
    to: Annotated[
        Path | None,
        typer.Option("--out", help="FILE.eval or FILE.json [the folder's name .eval, in it]"),
    ] = None,
    subject: Annotated[
        str | None, typer.Option(help="Which subject, where the run has several: a log holds one.")
    ] = None,
    allow_raw: Annotated[
        bool, typer.Option("--allow-raw", help="Put prompts and completions into the log.")
    ] = False,
) -> None:
    """Write a run as a log of inspect_ai, which `inspect view` opens: a sample a prompt, our
    verdicts, rates and intervals."""
    from auditgap.inspect.export import write_log
    from auditgap.store import RunFolder

    store = RunFolder.load(folder)
    name = f"{Path(store.place).name}.eval"
    write_log(store, to or store.path / name, subject=subject, allow_raw=allow_raw)
    store.publish()
    out.print(Text(f"Log: {to or store.at(name)}"))


@app.command(
    "ls",
    epilog="Examples: auditgap ls prompts · auditgap ls layers smollm2 · auditgap ls judges --json",
)
def list_(
    what: Annotated[
        str,
        typer.Argument(
            help="judges, rewards, prompts, triples, attacks, interventions, presets or layers"
        ),
    ],
    model: Annotated[str | None, typer.Argument(help="The model, for layers.")] = None,
    as_json: AsJson = False,
) -> None:
    """List what can be named: judges, rewards, prompts, contrast triples, attacks, interventions,
    presets, or a MODEL's layers."""
    kinds = {
        "judges": _judges,
        "rewards": _rewards,
        "prompts": _prompts,
        "triples": _triples,
        "attacks": _attacks,
        "interventions": _interventions,
        "presets": _presets,
        "layers": lambda: _layers(model),
    }
    if what not in kinds:
        raise UsageError(f"ls takes {', '.join(kinds)}; {what!r} came.{did_you_mean(what, kinds)}")
    rows = kinds[what]()
    print_json(rows) if as_json else print_table(rows)


def _judges() -> list[dict[str, Any]]:
    from auditgap.judges import judges as listed

    return [
        {"name": j.name, "what": j.description, "available": "yes" if j.available else j.problem}
        for j in listed()
    ]


def _rewards() -> list[dict[str, Any]]:
    from auditgap.judges import rewards

    return [
        {"name": r.name, "what": r.description, "available": "yes" if r.available else r.problem}
        for r in rewards()
    ]


def _prompts() -> list[dict[str, Any]]:
    from auditgap.data import prompt_sets

    return [
        {
            "name": p.name,
            "what": p.description,
            "licence": p.licence,
            "available": "yes" if p.available else p.problem,
        }
        for p in prompt_sets()
    ]


def _triples() -> list[dict[str, Any]]:
    from auditgap.data import TRIPLES

    return [
        {"name": name, "what": t.description, "licence": t.licence} for name, t in TRIPLES.items()
    ]


def _attacks() -> list[dict[str, Any]]:
    return [{"name": name, "what": what} for name, what in ATTACKS.items()]


def _interventions() -> list[dict[str, Any]]:
    from auditgap.interventions import interventions

    return [
        {"name": i.name, "what": i.description, "available": "yes" if i.available else i.problem}
        for i in interventions()
    ]


def _presets() -> list[dict[str, Any]]:
    from auditgap.report.presets import listed

    return listed()


def _layers(model: str | None) -> list[dict[str, Any]]:
    if model is None:
        raise UsageError("Layers of which model? For example: auditgap ls layers smollm2")
    quiet()
    from auditgap.models import outline, parse_sites

    n = outline(model).n_blocks
    words = {str(parse_sites(w, n)[0]): w for w in ("embedding", "mid", "last")}
    return [
        {
            "site": str(s),
            "layer_index": s.layer_index,
            "also": words.get(str(s), "") if str(s) != "embedding" else "",
        }
        for s in parse_sites("all", n)
    ]


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can do: versions, devices, speed, and which optional parts are
    installed."""
    import importlib.util
    import platform
    from importlib.metadata import version

    import psutil
    import torch

    from auditgap.audits.latent.plan import matmul_rate
    from auditgap.data import prompt_sets
    from auditgap.models import PACKAGED, pick_device

    device = pick_device("auto")
    rows = [
        {"check": "auditgap", "found": __version__},
        {"check": "python", "found": platform.python_version()},
        *(
            {"check": p, "found": version(p)}
            for p in ("torch", "transformers", "accelerate", "scikit-learn", "pyarrow")
        ),
        {
            "check": "device",
            "found": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        },
        {"check": "threads", "found": str(torch.get_num_threads())},
        {"check": "free memory", "found": f"{psutil.virtual_memory().available / 1e9:.1f} GB"},
        *(
            {
                "check": f"matmul {str(t).removeprefix('torch.')}",
                "found": f"{matmul_rate(t, device) / 1e9:,.0f} GFLOP/s",
            }
            for t in (torch.float32, torch.bfloat16)
        ),
        *(
            {
                "check": extra,
                "found": (
                    "yes" if importlib.util.find_spec(extra) else f"absent: pip install {extra}"
                ),
            }
            for extra in ("ray", "peft", "gguf", "deepspeed", "vllm")
        ),
        *(
            {"check": f"prompts {p.name}", "found": "yes" if p.available else p.problem}
            for p in prompt_sets()
        ),
        *(
            {
                "check": f"model {name}",
                "found": "yes" if importlib.util.find_spec(m.package) else f"absent: {m.install}",
            }
            for name, m in PACKAGED.items()
        ),
    ]
    print_json({r["check"]: r["found"] for r in rows}) if as_json else print_table(rows)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit()


def main(args: Sequence[str] | None = None) -> None:
    """The entry point: every error a user can mend is a sentence on stderr and an exit code, never
    a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if (again := getattr(stream, "reconfigure", None)) is not None:
            again(errors="replace")  # a terminal that cannot show ε still gets its table
    try:
        sys.exit(app(args, standalone_mode=False) or 0)
    except AuditgapError as error:
        err.print(Text(inert_lines(str(error))), style="red" if err.is_terminal else None)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        err.print("Interrupted. The same command resumes.")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if not callable(show := getattr(error, "show", None)):
            raise
        show()  # click's own usage errors; typer carries its own copy of their classes
        sys.exit(2)
