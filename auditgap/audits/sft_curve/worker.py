"""Runs one (subject, seed): has it trained, asks it every few steps, and keeps what it said as soon
as it has said it.

    def train(model_name, seed, evaluate):          # stands with whoever trains
        # the subject's own weights, or its last checkpoint
        loaded = …
        evaluate(0, loaded)
        for step in range(1, steps + 1):
            …
            if step % eval_every == 0 or step == steps:
                evaluate(step, loaded)

`evaluate` may be called again for a step that it has seen, and then gives the same shares without
asking again: a trainer that resumes from a checkpoint of step 10 calls it for step 10, in case the
kill came before it was done. Rank 0 alone asks and writes; where the weights are divided over ranks,
the others lend it theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from auditgap.audits.behaviour.answers import Answers
from auditgap.audits.behaviour.measure import Measured, grade, speak
from auditgap.audits.behaviour.rows import Split, rates
from auditgap.audits.sft_curve.config import SFTCurveOptions
from auditgap.audits.sft_curve.plan import CurvePlan
from auditgap.engines import Engine, Serving
from auditgap.engines.hf import HFEngine
from auditgap.errors import AuditgapError
from auditgap.judges import close_judge, load_judge
from auditgap.models import LoadedModel
from auditgap.store import RunFolder
from auditgap.sweep import Group
from auditgap.training import ranks
from auditgap.types import Cell, digest

Tick = Callable[[float], None]


class Evaluate(Protocol):
    """What a trainer calls after `step` optimizer steps (0: before the first), with the model as it
    stands."""

    def __call__(self, step: int, model: LoadedModel | Path) -> dict[str, float]:
        """Shares for a tracker, such as {"compliance": .25, "refusal": .5}; {} on other ranks.
        `model`: in place, or the folder of its adapter."""
        ...

    def missing(self) -> list[int]:
        """The steps that are wanted and of which nothing is remembered."""
        ...


class Train(Protocol):
    """Fine-tunes the named subject on the unsafe answers with this seed, calling `evaluate` as the
    module says."""

    def __call__(self, model_name: str, seed: int, evaluate: Evaluate) -> None: ...


class CurveWorker:
    """Trains and asks. `store` is None on ranks other than 0."""

    def __init__(
        self, plan: CurvePlan, options: SFTCurveOptions, train: Train, store: RunFolder | None
    ) -> None:
        self.plan, self.options, self.train, self.store = plan, options, train, store
        #: the subject that is being trained, as it was before, for adapters to be swapped in
        self.vllm: Any = None
        self.judge = None if store is None else load_judge(plan.config.judge, device=options.device)

    def close(self) -> None:
        """Let go of the judge's models; a further cell opens them again."""
        close_judge(self.judge)

    def run(self, group: Group, tick: Tick) -> None:
        """Compute and write every unfinished cell of the group."""
        for cell in group.cells:
            if self.store is None or not self.store.is_finished(cell.key):
                self._run(cell, tick)

    def _run(self, cell: Cell, tick: Tick) -> None:
        started = time.monotonic()
        outline = self.plan.outline(cell)
        evaluations = Evaluations(self, cell, tick)
        try:
            self.train(outline.subject.name, cell.settings["seed"], evaluations)
        finally:
            if self.vllm is not None:
                self.vllm.close()
                self.vllm = None
        if self.store is None:
            return
        measured = [evaluations.graded(step) for step in evaluations.done()]
        self.store.write(
            cell,
            [row for m in measured for row in m.rows],
            generations=[text for m in measured for text in m.texts],
            seconds=time.monotonic() - started,
            info={"ranks": ranks.world()},
        )
        self.store.forget(evaluations.names())

    @contextmanager
    def speaker(self, model: LoadedModel | Path, name: str) -> Iterator[Engine]:
        """The model as it stands: in place, in evaluation mode; or its adapter's folder, swapped
        into vLLM."""
        options, config = self.options, self.plan.config
        if isinstance(model, LoadedModel):
            with _resting(model.model):
                yield HFEngine(model, batch_tokens=options.batch_tokens)
            return
        if self.vllm is None:
            serving = Serving(
                engine="vllm",
                dtype=config.dtype,
                device=options.device,
                chat_template=config.chat_template,
                tensor_parallel=options.tensor_parallel,
                gpu_memory=options.gpu_memory,
                max_lora_rank=config.lora_r,
            )
            self.vllm = serving.open(name)
        self.vllm.use(model)
        yield self.vllm


@contextmanager
def _resting(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while open; afterwards every module is back in the mode that it was in
    itself."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Evaluations:
    """The `evaluate` that a trainer is handed, for one cell."""

    def __init__(self, worker: CurveWorker, cell: Cell, tick: Tick) -> None:
        self.worker, self.cell, self.tick = worker, cell, tick

    def __call__(self, step: int, model: LoadedModel | Path) -> dict[str, float]:
        """Ask the model as it stands, unless its answers at this step are remembered. See
        `Evaluate`."""
        config, store = self.worker.plan.config, self.worker.store
        if store is None:
            return {}
        step = int(step)
        if not 0 <= step <= config.steps:
            raise AuditgapError(f"Evaluation after step {step} of a curve of {config.steps} steps.")
        sets = {
            self._name(step, split): prompts for split, prompts in self.worker.plan.sets.items()
        }
        missing = {name: prompts for name, prompts in sets.items() if not store.remembers(name)}
        if missing:
            with self.worker.speaker(model, self.cell.subject.name) as engine:
                for name, prompts in missing.items():
                    store.remember(
                        name,
                        lambda prompts=prompts: speak(
                            engine, prompts.prompts, max_new_tokens=config.max_new_tokens
                        ).arrays(),
                    )
        self.tick(1.0)
        return self._shares(step)

    @property
    def _store(self) -> RunFolder:
        if self.worker.store is None:
            raise AuditgapError("Only rank 0 has a curve's folder.")
        return self.worker.store

    @property
    def _splits(self) -> tuple[Split, ...]:
        return tuple(self.worker.plan.sets)

    def _name(self, step: int, split: Split) -> str:
        """The name of a step's answers: by what they depend on, which is the cell and the
        prompts."""
        return digest([self.cell.key, step, split, self.worker.plan.sets[split].digest])

    def names(self) -> list[str]:
        """Of everything that may be remembered for this cell."""
        return [
            self._name(step, split)
            for step in range(self.worker.plan.config.steps + 1)
            for split in self._splits
        ]

    def missing(self) -> list[int]:
        """The config's steps of which nothing is remembered (rank 0; elsewhere [])."""
        if self.worker.store is None:
            return []
        known = [
            all(self.worker.store.remembers(self._name(s, split)) for split in self._splits)
            for s in self._wanted
        ]
        return [s for s, there in zip(self._wanted, known, strict=True) if not there]

    @property
    def _wanted(self) -> tuple[int, ...]:
        return self.worker.plan.config.evaluations

    def done(self) -> list[int]:
        """The steps that are remembered, this sitting's and earlier ones'.

        Raises AuditgapError when one of the config's is missing: a curve with a hole would look
        like a curve.
        """
        config = self.worker.plan.config
        steps = [
            s
            for s in range(config.steps + 1)
            if all(self._store.remembers(self._name(s, split)) for split in self._splits)
        ]
        missing = sorted(set(config.evaluations) - set(steps))
        if missing:
            raise AuditgapError(
                "Training came back without an evaluation after step"
                f" {', '.join(map(str, missing[:5]))}{' and others' if len(missing) > 5 else ''};"
                " the curve would have a hole."
            )
        return steps

    def graded(self, step: int) -> Measured:
        """A remembered step's answers, judged: the same rows every time."""
        judge = self.worker.judge
        if judge is None:
            raise AuditgapError("Only rank 0 judges a curve.")
        rows, texts = [], []
        for split, prompts in self.worker.plan.sets.items():
            measured = grade(
                Answers.of(self._store.remember(self._name(step, split), _torn)),
                prompts.prompts,
                judge,
                subject=self.cell.subject.name,
                kind=split,
                seed=self.cell.settings["seed"],
                step=step,
            )
            rows += measured.rows
            texts += measured.texts
        return Measured(rows, texts)

    def _shares(self, step: int) -> dict[str, float]:
        shares: dict[str, float] = {}
        for (_, _, _, split), found in rates(self.graded(step).rows).items():
            prefix = "" if split == "harmful" else f"{split}_"
            for name in ("compliance", "refusal", "broken"):
                value = getattr(found, name).estimate
                if value is not None:
                    shares[prefix + name] = value
        return shares


def _torn() -> dict[str, Any]:
    raise AuditgapError(
        "An evaluation's stored answers are torn and have been set aside; run the same command"
        " again."
    )
