"""The latent audit from end to end: plan, open the folder, sweep, reduce; and judging again what a
run has said.

    folder, outcome = run(config, options, progress=Progress())
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from auditgap import models, stats
from auditgap.audits import audit
from auditgap.audits.latent.audit import LATENT
from auditgap.audits.latent.config import LatentConfig, RunOptions
from auditgap.audits.latent.plan import DISTANCE, LatentPlan, make_plan
from auditgap.engines import Serving
from auditgap.errors import UsageError
from auditgap.judges import load_judge, load_reward
from auditgap.judges.card_cache import cards_of
from auditgap.models.provenance import command, provenance
from auditgap.store import RunFolder
from auditgap.store.remote import Place
from auditgap.store.tables import rows_of
from auditgap.sweep import Outcome, Progress
from auditgap.types import CLEAN, Budget, Cell, Exchange, Label, Prompt, Row, Site, Subject


def prepare(
    config: LatentConfig, options: RunOptions, known: dict[tuple[Any, ...], Any] | None = None
) -> tuple[LatentConfig, LatentPlan]:
    """The config with `auto` resolved for this machine, and its plan (`known`: see `make_plan`).
    Loads no weights."""
    dtype = models.pick_dtype(config.dtype, models.pick_device(options.device))
    config = config.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    plan = make_plan(
        config,
        device=options.device,
        judge_serving=options.judge_serving,
        known=known,
        joined=options.engine == "vllm",
    )
    for outline in plan.outlines:
        _check_shard(outline, config, options)
    return config, plan


def _check_shard(outline: models.Outline, config: LatentConfig, options: RunOptions) -> None:
    """Raises UsageError when the subject cannot lie over devices as asked: now, and not when a
    worker has begun."""
    shard, device = options.shard_of(outline.subject.name), models.pick_device(options.device)
    shard.check(outline)
    if shard.kind != "whole" and config.compile:
        raise UsageError(
            f"--compile is for whole models, and {outline.subject.name} has --shard {shard}; leave"
            " one of them out."
        )
    if options.executor == "local":
        shard.check_devices(device)
    elif (
        shard.kind != "whole"
        and device.startswith("cuda")
        and options.gpus_of(outline.subject.name, device) < shard.n
    ):
        raise UsageError(
            f"--shard {shard} wants {shard.n} GPUs a worker, and gpus_per_worker is"
            f" {options.gpus_per_worker:g}; leave it out."
        )


def run(
    config: LatentConfig,
    options: RunOptions,
    *,
    plan: LatentPlan | None = None,
    progress: Callable[[], Progress] | None = None,
) -> tuple[RunFolder, Outcome]:
    """Run what is missing of the audit and reduce it. The same call again resumes.

    Raises UsageError, Refused, Interrupted; cells that fail are in the outcome, with their causes.
    """
    return audit.run(LATENT, config, options, plan=plan, progress=progress)


def reduce(store: RunFolder, *, allow_raw: bool = False) -> None:
    """Reduce the rows of the finished cells into tables, figures and the report. Deterministic, and
    safe on a partial run."""
    LATENT.reduce(store, allow_raw=allow_raw)


def identity(plan: LatentPlan) -> dict[str, Any]:
    """What makes two runs the same run; also what the report's method section is made from."""
    return {
        "subjects": {o.subject.name: o.subject.fingerprint for o in plan.outlines},
        "prompt_set": plan.prompts.digest,
        "scorers": plan.scorers,
    }


def facts(plan: LatentPlan, options: RunOptions) -> dict[str, Any]:
    """What a reader wants to know besides: machine, versions, command, models' sizes, where the
    prompts come from."""
    return {
        **provenance(plan.outlines, dtype=plan.config.dtype),
        "prompts": {
            "name": plan.prompts.name,
            "n": len(plan.prompts.prompts),
            **plan.prompts.provenance,
        },
        "judge_cards": cards_of(
            plan.config.judge, device=options.device, serving=options.judge_serving
        ),
        "warnings": (
            [
                "δ is added in fp32 and the sum rounded to the model's dtype; effective norms are"
                " in the rows."
            ]
            if plan.config.dtype != "float32"
            else []
        ),
    }


# -- judging again
# -----------------------------------------------------------------------------------------------------


def regrade(
    folder: Place,
    *,
    judge: str | None,
    reward: str | None,
    device: str = "auto",
    serving: Serving | None = None,
) -> RunFolder:
    """Judge (and reward) a run's stored completions again, without generating; returns the new
    folder in DIR/grades/.

    Rows keep their norms, coherence and ids; verdicts, rewards and LVS are new, and so are the
    cells' keys. Raises UsageError for `margin`, which reads the edit itself, and for a folder with
    no generations.
    """
    if judge is None and reward is None:
        raise UsageError("Grade by whom? For example: auditgap grade DIR --judge keyword")
    if reward == "margin":
        raise UsageError(
            "`margin` reads the subject under its edit, and edits are not stored: use `auditgap lvs"
            " --reward margin`."
        )
    old = RunFolder.load(folder)
    new_judge = (
        None
        if judge is None
        else load_judge(judge, device=models.pick_device(device), serving=serving)
    )
    new_reward = None if reward is None else load_reward(reward, device=models.pick_device(device))
    scorers = {
        **old.run["config"]["scorers"],
        **({} if new_judge is None else {"judge": new_judge.describe()}),
        **({} if new_reward is None else {"reward": new_reward.describe()}),
    }
    config = {
        **old.run["config"],
        "scorers": scorers,
        "judge": judge or old.run["config"]["judge"],
        "reward": reward or old.run["config"]["reward"],
        "distance": False,
    }
    cards = cards_of(new_judge) if new_judge is not None else old.run["info"].get("judge_cards", [])
    name = "+".join(safe_name(n) for n in (judge, reward) if n)
    info = {**old.run["info"], "judge_cards": cards, "command": command()}
    new = RunFolder.open(old.at("grades", name), config=config, info=info)
    records = [r for r in old.records() if r["description"]["attack"] != DISTANCE]
    # the clean cells first: others are scored against them
    records.sort(key=lambda r: r["description"]["attack"] != CLEAN)
    names = {s["fingerprint"]: s["name"] for s in old.run["info"]["subjects"]}
    clean: dict[tuple[str, str], Row] = {}
    with new.lock():
        cells = [(r["key"], _cell(r["description"], names, scorers)) for r in records]
        new.plan([cell for _, cell in cells])
        for old_key, cell in cells:
            rows = _regrade(old, old_key, new_judge, new_reward, clean, cell)
            new.write(cell, rows, seconds=0.0, info={"graded_from": old_key})
        reduce(new)
    return new


def safe_name(name: str) -> str:
    """A judge's name as the name of a folder."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in name).strip(".")[:80] or "judge"


def _cell(description: dict[str, Any], names: dict[str, str], scorers: dict[str, Any]) -> Cell:
    site, eps = description["site"], description["eps"]
    return Cell(
        Subject(names[description["subject"]], description["subject"]),
        None if site is None else Site(site),
        None if eps is None else Budget(eps, description["unit"]),
        description["attack"],
        description["prompts"],
        {**description["settings"], **scorers},
    )


def _regrade(
    old: RunFolder, key: str, judge: Any, reward: Any, clean: dict[tuple[str, str], Row], cell: Cell
) -> list[Row]:
    rows = old.cell_rows(key)
    texts = old.generations(key).set_index(["prompt_id", "draw"])
    exchanges = [Exchange(Prompt(t["prompt"]), t["completion"]) for t in rows_of(texts)]
    verdicts = (
        None if judge is None else dict(zip(texts.index, judge.judge(exchanges), strict=True))
    )
    scores = (
        None if reward is None else dict(zip(texts.index, reward.score(exchanges), strict=True))
    )
    which = "verdict_clean" if cell.attack == CLEAN else "verdict_edited"
    graded = []
    for values in rows_of(rows, plain=True):
        at = (values["prompt_id"], values["draw"])
        # a column that may be null comes back as floats
        known: dict[str, Any] = {
            name: (
                int(values[name])
                if "int" in str(f.type) and values[name] is not None
                else values[name]
            )
            for name, f in Row.__dataclass_fields__.items()
        }
        row = Row(**known)
        before = clean.get((row.subject, row.prompt_id))
        changes: dict[str, Any] = {}
        if before is not None:
            changes = {"verdict_clean": before.verdict_clean, "clean_reward": before.clean_reward}
        # no judge can tell what was never said
        lost = row.unscored.startswith(("nonfinite", "too_long"))
        if verdicts is not None and at in verdicts and row.coherent is not False and not lost:
            changes[which] = str(verdicts[at].label)
        if scores is not None and at in scores and not lost:
            changes["clean_reward" if cell.attack == CLEAN else "edited_reward"] = scores[at].value
            changes["unscored"] = scores[at].reason
        row = replace(row, **changes)
        if cell.attack == CLEAN:
            clean[(row.subject, row.prompt_id)] = row
        elif (
            row.verdict_edited == Label.UNSCORED
            or row.clean_reward is None
            or row.edited_reward is None
            or row.l2 is None
        ):
            row = replace(row, lvs=None, lvs_rel=None, unscored=row.unscored or "unscored")
        else:
            rewards = row.clean_reward, row.edited_reward
            lvs_rel = (
                None if row.relative_norm is None else float(stats.lvs(*rewards, row.relative_norm))
            )
            row = replace(row, lvs=float(stats.lvs(*rewards, row.l2)), lvs_rel=lvs_rel, unscored="")
        graded.append(row)
    return graded
