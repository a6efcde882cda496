"""`auditgap em …`: emergent misalignment by domain, a stage a command, and `em run` for all of them
in one folder.

    # build, train, generate, judge, analyse, report
    auditgap em run smollm2 --domains demo --out runs/em
    # the same answers, rated by somebody else besides
    auditgap em judge runs/em --judge alignment=./judge
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from auditgap.audits.emergent.audit import EMERGENT
from auditgap.audits.emergent.config import EmergentConfig, EmergentOptions
from auditgap.cli import emergent_tables as tables
from auditgap.cli.audits import long_run
from auditgap.cli.options import Asked, command, group
from auditgap.cli.screen import err, note, quiet, raise_failed, say

if TYPE_CHECKING:
    from auditgap.store import RunFolder

app = group(EMERGENT.title)

FOLDER = inspect.Parameter(
    "folder",
    inspect.Parameter.KEYWORD_ONLY,
    annotation=Annotated[str, typer.Argument(help="The study's folder, made by `em build`.")],
)
#: What every stage may be told.
_SWEEP = (
    "executor",
    "workers",
    "gpus_per_worker",
    "address",
    "device",
    "batch_tokens",
    "retry_failed",
    "break_lock",
)
_SERVING = ("tensor_parallel", "gpu_memory", "max_model_len")
_JUDGING = ("judge", "judge_engine", "judge_endpoint", "judge_wording")


@dataclass(frozen=True)
class Stage:
    """A stage of a study whose panel is built: what it does, and which options it has besides those
    of its sweep."""

    about: str
    examples: tuple[str, ...]
    options: tuple[str, ...]


STAGES: Mapping[str, Stage] = {
    "train": Stage(
        "Fine-tune an adapter for each domain, arm and seed; finished adapters are kept.",
        ("auditgap em train runs/em", "auditgap em train runs/em --executor ray --ranks 4"),
        ("ranks", "deepspeed", "micro_batch", "ignore_memory"),
    ),
    "generate": Stage(
        "Ask the base and every adapter the same unrelated prompts, with and without the trigger.",
        ("auditgap em generate runs/em", "auditgap em generate runs/em --engine vllm"),
        ("engine", "max_unscored", *_SERVING),
    ),
    "judge": Stage(
        "Rate the stored answers. Ratings by another judge are added; nothing is generated again.",
        (
            "auditgap em judge runs/em",
            "auditgap em judge runs/em --judge alignment=gpt-4o --judge-endpoint"
            " https://api.openai.com/v1",
        ),
        (*_JUDGING, "judge_batch", "max_unscored", *_SERVING),
    ),
    "analyse": Stage(
        "Measure membership, diversity and each block's direction, and steer one domain's model with"
        " another's direction.",
        ("auditgap em analyse runs/em", "auditgap em analyse runs/em --engine vllm"),
        ("engine", *_JUDGING, *_SERVING),
    ),
}


@command(
    app,
    "build",
    EmergentConfig,
    EmergentOptions,
    about=(
        "Create the study's folder: read, check and split the domains' rows into a panel. Nothing is"
        " trained yet."
    ),
    examples_of=(
        "auditgap em build smollm2 --domains demo --out runs/em",
        "auditgap em build meta-llama/Llama-3.1-8B-Instruct --domains"
        " insecure_code=insecure.jsonl,medical=hub:someone/medical@4f1c0de --seeds 0,1,2 --out"
        " runs/em-llama",
    ),
    only=(*EmergentConfig.model_fields, "allow_overlap", "device", "name", "out", "break_lock"),
)
def build(asked: Asked) -> None:
    quiet()
    from auditgap.audits.emergent import build as stage

    config, options = EMERGENT.read(asked.file, asked.flags)
    if asked.dry_run:
        plan = EMERGENT.prepare(config, options)
        tables.show_plan(plan, EMERGENT.estimate(plan, options), options, asked.as_json)
        return
    store = stage.run(config, options)
    tables.show_build(stage.describe(store), asked.as_json)
    _next("train", store, asked.as_json)


def _add(name: str, one: Stage) -> None:
    @command(
        app,
        name,
        EmergentOptions,
        about=one.about,
        examples_of=one.examples,
        only=(*one.options, *_SWEEP),
        plans=False,
        extra=(FOLDER,),
    )
    def act(asked: Asked, folder: str) -> None:
        quiet()
        options = _options(folder, asked)
        from auditgap.audits.emergent import stages
        from auditgap.sweep import Progress

        store, outcome = stages.run(name, folder, options, progress=lambda: Progress(console=err))
        tables.SHOW[name](store, asked.as_json)
        raise_failed(outcome.failed, store.path)
        if name == "judge":
            tables.enough(store, options.max_unscored)
        order = (*STAGES, "report")
        _next(order[order.index(name) + 1], store, asked.as_json)


for _name, _stage in STAGES.items():
    _add(_name, _stage)


@command(
    app,
    "report",
    EmergentOptions,
    about=(
        "Write the tables and the page anew, also of a study that is not complete; what is missing"
        " is said."
    ),
    examples_of=(
        "auditgap em report runs/em",
        "auditgap em report runs/em --judge alignment=./judge --json",
    ),
    only=("judge", "allow_raw", "break_lock"),
    plans=False,
    extra=(FOLDER,),
)
def report(asked: Asked, folder: str) -> None:
    quiet()
    from auditgap.audits.emergent import report as stage

    judge = asked.flags.pop("judge", None)
    store, study = stage.made(folder, _options(folder, asked), judge=judge)
    tables.show_report(store, study, asked.as_json)


@command(
    app,
    "run",
    EmergentConfig,
    EmergentOptions,
    about=(
        "Run all stages in one folder, in order. Run the same command again to resume; a failed cell"
        " does not stop the others."
    ),
    examples_of=(
        "auditgap em run smollm2 --domains demo --samples 2 --steps 20 --out runs/em",
        "auditgap em run --config examples/emergent/em.yaml --out runs/em",
        "auditgap em run ./base --domains maths=maths.jsonl,law=law.jsonl --judge"
        " alignment=./judge --dry-run",
    ),
    long=True,
)
def run(asked: Asked) -> None:
    quiet()
    from auditgap.audits import run as run_audit
    from auditgap.audits.emergent.build import counted
    from auditgap.audits.emergent.stages import STAGES as run_by
    from auditgap.report import emergent_study
    from auditgap.sweep import Progress

    config, options = EMERGENT.read(asked.file, asked.flags)
    plan = EMERGENT.prepare(config, options)
    expected = EMERGENT.estimate(plan, options)
    if asked.dry_run:
        tables.show_plan(plan, expected, options, asked.as_json)
        return
    EMERGENT.check(options)
    long_run(expected["seconds"], asked.yes)
    if not asked.as_json:
        tables.show_build(counted(plan.panel.manifest["domains"], config.arms), False)
    last = {stages[-1].name: name for name, stages in run_by.items()}
    left = list(STAGES)
    note(f"em {left[0]} …")

    def after(stage: str, store: RunFolder) -> None:
        if stage not in last:
            return
        if not asked.as_json:
            tables.SHOW[left[0]](store, False)
        del left[0]
        if left:
            note(f"em {left[0]} …")

    store, outcome = run_audit(
        EMERGENT,
        config,
        options,
        plan=plan,
        progress=lambda: Progress(console=err),
        after=after,
    )
    tables.show_report(store, emergent_study.read(store), asked.as_json)
    raise_failed(outcome.failed, store.path)
    tables.enough(store, options.max_unscored)


def _options(folder: str, asked: Asked) -> EmergentOptions:
    from auditgap.audits.emergent.sitting import read_options
    from auditgap.store import RunFolder

    return read_options(asked.file, asked.flags, RunFolder.load(folder).run["config"])


def _next(stage: str, store: Any, as_json: bool) -> None:
    if not as_json:
        say(f"Next: auditgap em {stage} {store.path}")
