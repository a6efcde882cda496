"""Does one domain's direction move another domain's model? The transfer matrix: source directions,
added to target models.

    store, outcome = STAGE.run_in("runs/em", options)
    # RatingRows with source, steer (edit, control, clean), strength and block
    store.rows([STEERED])

    h ← h + strength · d        at block `steer_block` (or round(L/2)), at every position of prompt and answer
    h ← h − (h·v) v             the same, under `steer_by: ablate`; v = d / ‖d‖

d is the source's direction at that block with its own norm (`directions`), so that a strength of 1
is the distance between that model's misaligned and aligned answers. Targets and sources are the
adapters of the first seed, of arm `plain` where the study has it and else of `trigger`; they answer
the suite greedily, without the trigger. The control adds a random direction at a right angle to d,
of the same norm, drawn anew for each prompt and draw, so that one lucky direction does not stand
for all; that of an ablation takes as much, (h·v), off along such a direction. `clean` is the target as it is, once. A source without a direction is asked nothing: its
rows are unscored and say why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from auditgap.audits.emergent import direction_records, directions
from auditgap.audits.emergent.config import EmergentOptions
from auditgap.audits.emergent.inside import Inside, check_engine, common
from auditgap.audits.emergent.judge import keep_replies, opened_rater, rate_answers
from auditgap.audits.emergent.rows import ABLATE, STEERED
from auditgap.audits.emergent.stage import Adapter, StageCell, Study, StudyStage
from auditgap.audits.planning import chain_of
from auditgap.audits.session import failing_alone, from_arrays, to_arrays
from auditgap.data.em_prompts import KINDS
from auditgap.engines import Completion, Request, constant
from auditgap.engines.batching import SPEAKING_IN_MEMORY, Packing
from auditgap.engines.hf import HFEngine
from auditgap.engines.vllm import VLLMEngine
from auditgap.errors import UsageError
from auditgap.interventions import CONTROL, EDIT
from auditgap.interventions.controls import generator
from auditgap.interventions.directions import orthogonal, unit
from auditgap.judges.alignment import HABITS, Rater
from auditgap.models import Rendered, parse_sites, pick_device
from auditgap.store import files
from auditgap.sweep import Group
from auditgap.types import CLEAN, Cell, ConstantEdit, Exchange, Prompt, Site, Subject, digest


@dataclass(frozen=True, eq=False, slots=True)
class Asked:
    """One answer that is wanted: to a prompt, under an arm. `problem`: why it cannot be asked."""

    prompt: Prompt
    steer: str
    draw: int = 0
    problem: str = ""


def chosen(study: Study) -> list[Adapter]:
    """The adapters that are targets and sources: one a domain."""
    arm = "plain" if "plain" in study.config.arms else study.config.arms[0]
    return [a for a in study.adapters if a.arm == arm and a.seed == study.config.seeds[0]]


def plan(study: Study, options: EmergentOptions) -> list[Group]:
    """A group a target. In one process all are one group, which is asked whole before the judge's
    model is loaded.

    Raises UsageError when no direction was looked for yet, or `steer_block` is no block of the
    model.
    """
    c, base = study.config, study.base
    block = (
        parse_sites("mid", base.n_blocks)[0].layer_index if c.steer_block is None else c.steer_block
    )
    if block >= base.n_blocks:
        raise UsageError(
            f"steer_block is one of 0 to {base.n_blocks - 1}, the blocks of {c.model}; {block}"
            " came."
        )
    targets = chosen(study)
    sources = _sources(study, options, targets)
    rater = options.rater()
    shared = {
        **common(c, options, base),
        "judge_name": rater.name,
        "judge": digest(rater.describe()),
        "block": block,
        "max_new_tokens": c.max_new_tokens,
        "seed": c.seed,
    }
    groups = [_group(study, target, sources, shared) for target in targets]
    if options.executor == "local" and groups:
        return [
            Group(
                "steer",
                tuple(cell for g in groups for cell in g.cells),
                work=sum(g.work for g in groups),
            )
        ]
    return groups


def _sources(study: Study, options: EmergentOptions, targets: Sequence[Adapter]) -> dict[str, str]:
    """The cell of each domain's direction. Raises UsageError when none is finished."""
    made = {
        cell.settings["name"]: cell.key
        for group in directions.plan(study, options)
        for cell in group.cells
    }
    sources = {
        a.domain: made[a.name]
        for a in targets
        if a.name in made and study.store.is_finished(made[a.name])
    }
    if not sources:
        raise UsageError(
            f"{study.store.path} has no directions of {options.judge} yet. Run: auditgap em analyse"
            f" {study.store.path}"
        )
    return sources


def _group(
    study: Study, target: Adapter, sources: Mapping[str, str], shared: Mapping[str, Any]
) -> Group:
    """A target as it is, and under each source's direction."""
    c, subject = study.config, Subject(target.name, target.fingerprint)
    whose = {"name": target.name, **shared}
    every = [
        {**whose, "source": None},
        *(
            {
                **whose,
                "name": f"{target.name} {'without' if by == ABLATE else 'under'} {domain}",
                "source": domain,
                "direction": key,
                **({"by": ABLATE} if by == ABLATE else {"strength": c.steer_strength}),
                "draws": c.steer_draws,
            }
            for by in c.steer_by
            for domain, key in sources.items()
        ),
    ]
    prompts = study.store.run["config"]["prompt_set"]
    cells = tuple(
        StageCell(subject, None, None, STEERED, prompts, {**s, "target": target.name})
        for s in every
    )
    return Group(f"{target.name} · steer", cells, work=float(len(cells)))


@dataclass(frozen=True, eq=False, slots=True)
class Said:
    """What a cell's target answered; None where it was not asked. `names`: what the packs are
    remembered under."""

    asked: list[Asked]
    done: list[Completion | None]
    names: list[str]
    seconds: float


class SteerWorker:
    """Asks all cells of a group, remembering every pack, and then has the judge rate them: two
    models, one after the other."""

    def __init__(self, folder: str, options: EmergentOptions) -> None:
        self.inside = Inside(folder, options)
        self.store, self.options = self.inside.store, options
        self.prompts = [p for p in self.inside.study.prompts.prompts if p.source in KINDS]
        self._found: dict[str, direction_records.DirectionRecord] = {}

    def run(self, group: Group, tick: Callable[[float], None]) -> None:
        """Compute and write every unfinished cell. A cell that fails fails alone."""
        pending = [cell for cell in group.cells if not self.store.is_finished(cell.key)]
        said: dict[str, Said] = {}
        for cell in pending:
            with failing_alone(self.store, [cell]):
                said[cell.key] = self._speak(cell)
            tick(group.work / len(group.cells))
        if not said:
            return
        if self.options.judge != HABITS and self.options.judge_serving.engine != "openai":
            self.inside.close()  # the judge's model wants the memory
        # a batch a cell would take days
        with opened_rater(self.options.model_copy(update={"judge_batch": False})) as rater:
            for cell in pending:
                if cell.key in said:
                    with failing_alone(self.store, [cell]):
                        self._rate(cell, rater, said[cell.key])

    def close(self) -> None:
        self.inside.close()

    # -- speaking
    # ------------------------------------------------------------------------------------------------------

    def _speak(self, cell: Cell) -> Said:
        started, names = time.monotonic(), []
        engine = self.inside.speaker(self.inside.adapters[cell.settings["target"]])
        chain, answer = chain_of(cell), cell.settings["max_new_tokens"]
        new, window = chain + answer, self.inside.outline.max_positions
        if isinstance(engine, VLLMEngine):
            window = engine.window
        asked, along = self._asked(cell)
        rendered = [engine.render(one.prompt) for one in asked]
        asked = [
            (
                replace(one, problem="too_long")
                if window is not None and len(r.ids) + new > window and not one.problem
                else one
            )
            for one, r in zip(asked, rendered, strict=True)
        ]
        told = [i for i, one in enumerate(asked) if not one.problem]
        done: list[Completion | None] = [None] * len(asked)
        for pack in self._packs(engine, [len(rendered[i].ids) + new for i in told]):
            some = [told[p] for p in pack]
            names.append(digest([STEERED, cell.key, some]))

            def compute(some: Sequence[int] = some) -> dict[str, np.ndarray]:
                spoken = self._under(
                    engine, cell, [asked[i] for i in some], [rendered[i] for i in some], along
                )
                return to_arrays(spoken, [None] * len(spoken))

            arrays = self.store.remember(names[-1], compute)
            kept, _ = from_arrays(
                arrays,
                self.inside.outline.chat,
                [rendered[i] for i in some],
                (chain, answer) if chain else (0, 0),
            )
            for i, completion in zip(some, kept, strict=True):
                done[i] = completion
        return Said(asked, done, names, time.monotonic() - started)

    def _packs(self, engine: HFEngine | VLLMEngine, lengths: Sequence[int]) -> list[list[int]]:
        """What is asked and remembered together; vLLM forms its own batches."""
        if isinstance(engine, HFEngine):
            return engine.packing.speaking_packs(lengths)
        device = pick_device(self.options.device)
        return Packing.on(device, self.options.batch_tokens).speaking_packs(
            lengths, SPEAKING_IN_MEMORY
        )

    def _asked(self, cell: Cell) -> tuple[list[Asked], torch.Tensor | None]:
        """What the cell asks, and the direction [D] at its block, None where there is none."""
        s = cell.settings
        if s["source"] is None:
            return [Asked(prompt, CLEAN) for prompt in self.prompts], None
        if s["direction"] not in self._found:
            self._found |= {
                f.key: f for f in direction_records.read(self.store, keys=[s["direction"]])
            }
        found = self._found[s["direction"]]
        along = (
            None
            if found.direction is None
            else torch.from_numpy(found.direction[s["block"]].copy())
        )
        problem = (
            f"no direction: {found.reason}"
            if along is None
            else ""
            if bool(along.any())
            else "no direction: it is 0"
        )
        asked = [Asked(prompt, EDIT, problem=problem) for prompt in self.prompts]
        for draw in range(s["draws"]):
            asked += [Asked(prompt, CONTROL, draw, problem) for prompt in self.prompts]
        return asked, along

    def _under(
        self,
        engine: HFEngine | VLLMEngine,
        cell: Cell,
        asked: Sequence[Asked],
        rendered: Sequence[Rendered],
        along: torch.Tensor | None,
    ) -> list[Completion]:
        """The answers, greedy: under each one's edit, or as the target is."""
        s, new = cell.settings, cell.settings["max_new_tokens"] + chain_of(cell)
        if along is None:
            return engine.generate([Request(r) for r in rendered], new)
        edits = [edit_of(one, along, s) for one in asked]
        if isinstance(engine, VLLMEngine):
            return engine.generate_under(rendered, edits, new)
        return constant.generate(engine, rendered, edits, new)

    # -- rating
    # --------------------------------------------------------------------------------------------------------

    def _rate(self, cell: Cell, rater: Rater, said: Said) -> None:
        started, s = time.monotonic(), cell.settings
        journal = self.store.journals / f"{cell.key}.jsonl"
        keep_replies(rater, journal)  # so that none of an endpoint's is paid for twice
        target = self.inside.adapters[s["target"]]
        where = {
            "source": s["source"],
            "strength": s.get("strength"),
            "block": None if s["source"] is None else s["block"],
            "by": s.get("by"),
        }
        exchanges, texts = [], []
        for one, completion in zip(said.asked, said.done, strict=True):
            problem = one.problem or (
                "nonfinite_logits" if completion is None else completion.problem
            )
            facts = {
                "subject": target.name,
                "domain": target.domain,
                "arm": target.arm,
                "seed": target.seed,
                "prompt_id": one.prompt.id,
                "kind": one.prompt.source,
                "triggered": False,
                "draw": one.draw,
                "steer": one.steer,
                **where,
                **({"unscored": problem} if problem else {}),
            }
            exchanges.append(
                (
                    (
                        None
                        if problem or completion is None
                        else Exchange(one.prompt, completion.text)
                    ),
                    facts,
                )
            )
            if completion is not None:
                texts.append(
                    {
                        "prompt_id": one.prompt.id,
                        "kind": one.prompt.source,
                        "steer": one.steer,
                        "draw": one.draw,
                        "prompt": one.prompt.text,
                        "completion": completion.text,
                        "chain": completion.chain,
                        "ids": list(completion.ids),
                        "stopped": completion.stopped,
                    }
                )
        rows = rate_answers(rater, exchanges, max_unscored=self.options.max_unscored)
        seconds = said.seconds + time.monotonic() - started
        info = self.inside.speaker_info | {
            "n_without_direction": sum(one.problem.startswith("no direction") for one in said.asked)
        }
        self.store.write(cell, rows, generations=texts, seconds=seconds, info=info)
        self.store.forget(said.names)
        files.remove(journal)


def edit_of(one: Asked, along: torch.Tensor, settings: Mapping[str, Any]) -> ConstantEdit:
    """What stands at the cell's block while one question is answered; `along` [D] fp32."""
    site, aimed = (Site(settings["block"]),), shift(one, along, settings)
    if settings.get("by") == ABLATE:
        return ConstantEdit(site, read=unit(along), write=unit(aimed))
    return ConstantEdit(site, shift=settings["strength"] * aimed)


def shift(one: Asked, along: torch.Tensor, settings: Mapping[str, Any]) -> torch.Tensor:
    """What is added at strength 1, [D] fp32: the direction, or for a control a random one at a
    right angle to it, of its norm."""
    if one.steer == EDIT:
        return along
    rng = generator(
        settings["seed"], STEERED, settings["source"], settings["block"], one.prompt.id, one.draw
    )
    return along.norm() * orthogonal(unit(along), rng)


STAGE = StudyStage(name="steer", plan=plan, make=SteerWorker, first=check_engine)
