"""The behavioural audit from end to end: plan, open the folder, ask, judge, reduce; and judging
again what a run has said.

    folder, outcome = run(config, options)
    # subject, kind, source, n, refusal, compliance, broken, unscored, with intervals
    folder.path / "behaviour.csv"
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from auditgap import models, sweep
from auditgap.audits.behaviour.config import BehaviourConfig, BehaviourOptions
from auditgap.audits.behaviour.measure import Answers, grade, joined, judged
from auditgap.audits.behaviour.plan import ATTACK, AskCell, BehaviourPlan, prepare
from auditgap.audits.behaviour.rows import Split
from auditgap.audits.behaviour.worker import BehaviourWorker, closing_judge
from auditgap.audits.latent.run import safe_name
from auditgap.data import PromptSet
from auditgap.engines import Serving
from auditgap.judges import members_of
from auditgap.judges.card_cache import cards_of
from auditgap.models.provenance import command, provenance
from auditgap.report import behaviour as tables
from auditgap.report import correction, page
from auditgap.store import RunFolder, files
from auditgap.store.remote import Place, local
from auditgap.store.tables import rows_of
from auditgap.sweep import Outcome, Progress
from auditgap.types import Prompt, Subject


def about(
    config: Any,
    sets: Mapping[Split, PromptSet],
    outlines: Sequence[models.Outline],
    device: str = "auto",
) -> dict[str, Any]:
    """The `info` of a run folder of an `Asking`."""
    return {
        **provenance(outlines, dtype=config.dtype),
        "prompts": {
            split: {"name": s.name, "n": len(s), **s.provenance} for split, s in sets.items()
        },
        "judge_cards": cards_of(config.judge, device=device),
        "warnings": [],
    }


def run(
    config: BehaviourConfig,
    options: BehaviourOptions,
    *,
    plan: BehaviourPlan | None = None,
    progress: Callable[[], Progress] | None = None,
) -> tuple[RunFolder, Outcome]:
    """Run what is missing of the audit and reduce it. The same call again resumes. Raises
    UsageError, Refused, Interrupted."""
    if plan is None:
        config, plan = prepare(config, options)
    store = RunFolder.open(
        options.out or f"runs/behaviour-{files.folder_name(plan.config.models[0])}",
        config={
            "audit": "behaviour",
            **plan.config.model_dump(mode="json"),
            "subjects": {s.name: s.fingerprint for s in plan.subjects},
            "prompt_set": plan.suite.digest,
            "scorers": plan.scorers,
        },
        info=_info(plan, options),
        break_lock=options.break_lock,
    )
    store.warnings += plan.warnings
    with store.lock():
        store.plan(plan.cells)
        shown = None if progress is None else progress()
        make = partial(BehaviourWorker, plan, options, store)
        outcome = sweep.local.run(
            plan.groups, make, store, progress=shown, retry_failed=options.retry_failed
        )
        reduce(store, allow_raw=options.allow_raw)
    return store, outcome


def _info(plan: BehaviourPlan, options: BehaviourOptions) -> dict[str, Any]:
    known = provenance(plan.outlines, dtype=plan.config.dtype)
    if not plan.outlines:
        known["subjects"] = [
            {"name": s.name, "fingerprint": s.fingerprint, "endpoint": True} for s in plan.subjects
        ]
    return {
        **known,
        "prompts": {"name": plan.config.suite, "n": len(plan.suite), **plan.suite.manifest},
        "judge_cards": cards_of(
            plan.config.judge, device=options.device, serving=options.judge_serving(plan.config)
        ),
        "warnings": list(plan.warnings),
    }


def reduce(store: RunFolder, *, allow_raw: bool = False) -> None:
    """The finished cells' rows as `behaviour.parquet|csv|md`, and the report. Deterministic, and
    safe on a partial run."""
    table = tables.behaviour_table(store.rows([ATTACK]), correction.of_runs([store]))
    for form in ("parquet", "csv", "md"):
        store.write_table(f"behaviour.{form}", table)
    page.write([store], allow_raw=allow_raw)


def lost(store: RunFolder) -> tuple[float, str]:
    """The share of prompts that no subject's answer could be had to, whatever the judge, and the
    commonest reason."""
    rows = store.rows([ATTACK])
    if not len(rows):
        return 0.0, ""
    never = rows[rows["refused"].isna()]
    return len(never) / len(rows), "" if never.empty else str(never["unscored"].mode()[0])


def unscored_share(store: RunFolder) -> float | None:
    """The share of answers that the judge gave no verdict on; what was never said is not the
    judge's. None: no answers."""
    rows = store.rows([ATTACK])
    if not len(rows):
        return None
    said = rows[rows["refused"].notna()]
    return float(said["complied"].isna().mean()) if len(said) else None


def regrade(
    folder: Place, *, judge: str, serving: Serving | None = None, max_unscored: float = 0.2
) -> RunFolder:
    """Judge a run's stored answers again, without asking; returns the new folder in DIR/grades/.
    The same call resumes.

    Coherence and lengths stay; verdicts are new, and so are the cells' keys. Raises UsageError: no
    such judge, no answers; AuditgapError when the judge's endpoint left more than `max_unscored` of
    the answers at hand without a reply.
    """
    old = RunFolder.load(folder)
    names = {s["fingerprint"]: s["name"] for s in old.run["info"]["subjects"]}
    place = old.at("grades", safe_name(judge))
    journals = local(place) / "scratch" / "journals"
    with closing_judge(judge, serving, journals) as made:
        scorers = {**old.run["config"]["scorers"], "judge": made.describe()}
        endpoint = serving.base_url if serving is not None and serving.engine == "openai" else None
        config = {
            **old.run["config"],
            "scorers": scorers,
            "judge": judge,
            "judge_endpoint": endpoint,
        }
        info = {**old.run["info"], "judge_cards": cards_of(made), "command": command()}
        new = RunFolder.open(place, config=config, info=info)
        records = [record for record in old.records() if record["description"]["attack"] == ATTACK]
        with new.lock():
            cells = [
                (record, _cell_again(record["description"], names, scorers)) for record in records
            ]
            new.plan([cell for _, cell in cells])
            left = [(record, cell) for record, cell in cells if not new.is_finished(cell.key)]
            # an ensemble opens one judge after the other at every call, so all is put to it at once
            for some in filter(None, [left] if members_of(made) else [[one] for one in left]):
                told = [_told(old, record["key"]) for record, _ in some]
                answers = joined([answers for answers, _ in told])
                given = iter(
                    judged(
                        answers,
                        [p for _, prompts in told for p in prompts],
                        made,
                        max_unscored=max_unscored,
                    )
                )
                for (record, cell), (answers, prompts) in zip(some, told, strict=True):
                    mine = [next(given) for _ in prompts]
                    measured = grade(
                        answers,
                        prompts,
                        mine,
                        subject=cell.subject.name,
                        kind=cell.settings["kind"],
                    )
                    info = {**record.get("info", {}), "graded_from": record["key"]}
                    new.write(cell, measured.rows, seconds=0.0, info=info)
            shutil.rmtree(journals, ignore_errors=True)
            reduce(new)
    return new


def _told(store: RunFolder, key: str) -> tuple[Answers, list[Prompt]]:
    """A cell's stored answers and the prompts that they answer."""
    rows = rows_of(store.generations(key), plain=True)
    return Answers.told(rows), [Prompt(row["prompt"], row["source"]) for row in rows]


def _cell_again(
    description: Mapping[str, Any], names: Mapping[str, str], scorers: Mapping[str, Any]
) -> AskCell:
    subject = Subject(names[description["subject"]], description["subject"])
    return AskCell(
        subject, None, None, ATTACK, description["prompts"], {**description["settings"], **scorers}
    )
