"""The behavioural audit from end to end: plan, open the folder, ask, judge, reduce; and judging
again what a run has said.

    folder, outcome = run(config, options)
    # subject, kind, source, n, refusal, compliance, broken, unscored, with intervals
    folder.path / "behaviour.csv"
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from typing import Any

from auditgap.audits import audit
from auditgap.audits.audit import Grading
from auditgap.audits.behaviour.audit import BEHAVIOUR
from auditgap.audits.behaviour.config import BehaviourConfig, BehaviourOptions
from auditgap.audits.behaviour.measure import Answers, grade, joined, judged
from auditgap.audits.behaviour.plan import ATTACK, AskCell, BehaviourPlan
from auditgap.audits.behaviour.worker import closing_judge
from auditgap.audits.latent.run import safe_name
from auditgap.errors import UsageError
from auditgap.judges import members_of
from auditgap.judges.card_cache import cards_of
from auditgap.models.provenance import command, provenance
from auditgap.store import RunFolder
from auditgap.store.remote import Place, local
from auditgap.store.tables import rows_of
from auditgap.sweep import Outcome, Progress
from auditgap.types import Document, Prompt, Subject


def run(
    config: BehaviourConfig,
    options: BehaviourOptions,
    *,
    plan: BehaviourPlan | None = None,
    progress: Callable[[], Progress] | None = None,
) -> tuple[RunFolder, Outcome]:
    """Run what is missing of the audit and reduce it. The same call again resumes. Raises
    UsageError, Refused, Interrupted."""
    return audit.run(BEHAVIOUR, config, options, plan=plan, progress=progress)


def facts(plan: BehaviourPlan, options: BehaviourOptions) -> Document:
    """What a reader wants to know besides: versions, models' sizes, where the prompts come from."""
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
    BEHAVIOUR.reduce(store, allow_raw=allow_raw)


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


def regrade(folder: Place, grading: Grading) -> RunFolder:
    """Judge a run's stored answers again, without asking; returns the new folder in DIR/grades/.
    The same call resumes.

    Coherence and lengths stay; verdicts are new, and so are the cells' keys. Raises UsageError: no
    such judge, no answers; AuditgapError when the judge's endpoint left more than `max_unscored` of
    the answers at hand without a reply.
    """
    judge, serving = grading.judge, grading.serving
    if judge is None or grading.reward is not None:
        raise UsageError(
            "A behavioural audit has verdicts and no rewards: auditgap grade DIR --judge keyword"
        )
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
                        max_unscored=grading.max_unscored,
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
