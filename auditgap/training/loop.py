"""Steps, one after the other, that survive what happens to a job: the loop that every kind of
training shares.

    trained = run(engine, task, config, options, store, tracker)

A *task* says what a row is and what goes on beside the model (`TrainingTask`); the loop takes care of
order, learning rate, logs, evaluations, checkpoints and resuming. The order of the
rows and the seed of a step are functions of its number, so a resumed run makes the steps that an
unbroken one would have made.
"""

from __future__ import annotations

import math
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import safetensors.torch
import torch

from auditgap.errors import GOODBYES, AuditgapError, Interrupted
from auditgap.store import files
from auditgap.sweep import Progress
from auditgap.training import checkpoints, manifest, ranks
from auditgap.training.config import TrainConfig, TrainOptions, learning_rate
from auditgap.training.engine import DeepSpeedEngine, universal
from auditgap.training.losses import Batch
from auditgap.training.rows import global_batch
from auditgap.training.tracking import Tracker
from auditgap.types import Document, digest

_COMPANION = "companion.safetensors"


class NonFinite(AuditgapError):
    """The loss or the gradient is not a number any more: training stopped before the weights took
    it up."""

    exit_code = 3


class TrainingTask(Protocol):
    """What one kind of training does beside the steps themselves."""

    @property
    def shown(self) -> Sequence[str]:
        """The numbers of a step that progress shows."""
        ...

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of every row."""
        ...

    def batch(self, rows: Sequence[int], device: torch.device) -> Batch:
        """The micro-batch of these rows, as the loss wants it."""
        ...

    def row_ids(self, rows: Sequence[int]) -> list[str]:
        """Their hashes: what a failure names."""
        ...

    def before_step(self, step: int) -> None:
        """Before the step's batches are made."""

    def after_backward(
        self, batch: Batch, metrics: Mapping[str, torch.Tensor], share: float
    ) -> dict[str, torch.Tensor]:
        """After a micro-batch's backward: what learns beside the model takes its gradients (×
        share). More to log, or {}."""
        ...

    def validate(self, step: int, values: Mapping[str, float]) -> None:
        """Before the update: AuditgapError when the step's numbers cannot be."""

    def after_step(self) -> None:
        """After the model's update: the same for what learns beside it."""

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold besides the model and its optimizer."""
        ...

    def restore(self, state: Mapping[str, torch.Tensor]) -> None: ...

    def evaluate(self, step: int, engine: DeepSpeedEngine) -> Document:
        """Numbers at this step, on all ranks at once; never twice for a step. {} when there are
        none."""
        ...


class BaseTask:
    """A task without anything beside the model; the rest is for a kind of training to add."""

    shown: Sequence[str] = ("loss", "nll", "kl")

    def before_step(self, step: int) -> None:
        return

    def after_backward(
        self, batch: Batch, metrics: Mapping[str, torch.Tensor], share: float
    ) -> dict[str, torch.Tensor]:
        return {}

    def validate(self, step: int, values: Mapping[str, float]) -> None:
        return

    def after_step(self) -> None:
        return

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        return

    def evaluate(self, step: int, engine: DeepSpeedEngine) -> Document:
        return {}


def run(
    engine: DeepSpeedEngine,
    task: TrainingTask,
    config: TrainConfig,
    options: TrainOptions,
    store: Path,
    tracker: Tracker | None,
    *,
    total: int,
) -> None:
    """Train to step `total`, from the last whole checkpoint in `store`/checkpoints if there is one.

    `store` is the run folder; rank 0 alone has a tracker. Raises NonFinite (exit code 3), Interrupted after SIGTERM or Ctrl-C
    (a checkpoint is written first), UsageError when a checkpoint cannot be read by this number of
    ranks or this ZeRO stage.
    """
    root = store / "checkpoints"
    start = _resume(engine, task, root, config)
    if tracker is not None:
        tracker.rewind(start)
    evaluations = _Evaluations(store / "evaluations.json", start)
    progress = Progress(noun="steps") if ranks.is_main() and options.progress else None
    with progress or nullcontext(), _asked_to_stop() as stop:
        if progress is not None:
            progress.begin(cells=total, done=start, failed=0)
        for step in range(start, total):
            if step % config.eval_every == 0 or step in config.eval_at:
                evaluations.run(step, task, engine, tracker)
            # dropout, the same again
            torch.manual_seed(config.seed * 1_000_003 + step * ranks.world() + ranks.rank())
            rate = learning_rate(config, step, total)
            values = _one_step(engine, task, config, options, step, rate, root)
            stopping = float(ranks.mean(torch.tensor([float(bool(stop))]))) > 0
            done = step + 1
            if tracker is not None:
                tracker.log(step, {**values, "lr": rate})
            if progress is not None:
                shown = [f"{name} {values[name]:.4g}" for name in task.shown if name in values]
                progress.update(done=done, failed=0, work=0.0, doing=", ".join(shown))
            if (done % options.save_every == 0 and done < total) or stopping:
                _save(engine, task, root, done, config, options)
            if stopping:
                raise ranks.shared(
                    Interrupted(
                        f"Stopped at step {done} of {total}; a checkpoint was written. The same"
                        " command goes on from it."
                    )
                )
        evaluations.run(total, task, engine, tracker)


def _one_step(
    engine: DeepSpeedEngine,
    task: TrainingTask,
    config: TrainConfig,
    options: TrainOptions,
    step: int,
    rate: float,
    root: Path,
) -> dict[str, float]:
    """One optimizer step; its metrics, averaged over its micro-batches and ranks. Raises NonFinite
    before the update."""
    task.before_step(step)
    rows = global_batch(step, len(task.lengths), config.batch, config.seed)
    # like lengths share a micro-batch: a step's loss is a mean over rows, so their order in it is
    # free
    rows = sorted(rows, key=lambda i: (task.lengths[i], i))
    metrics_of: dict[str, list[torch.Tensor]] = {}
    mine: list[int] = []
    for m in range(engine.micro_batches):
        at = (m * ranks.world() + ranks.rank()) * options.micro_batch
        portion = rows[at : at + options.micro_batch]
        mine += portion
        batch = task.batch(portion, engine.device)
        loss, metrics = engine.accumulate(batch)
        after_backward = task.after_backward(batch, metrics, 1.0 / engine.micro_batches)
        for name, value in {"loss": loss, **metrics, **after_backward}.items():
            if value.ndim == 0:
                metrics_of.setdefault(name, []).append(value.detach().float())
    values = _averaged(metrics_of)
    if not math.isfinite(values["loss"]):
        broken = not all(bool(torch.isfinite(value)) for value in metrics_of["loss"])
        raise _stopped(step, "the loss", task, mine if broken else [], root)
    task.validate(step, values)
    norm = engine.step(rate)
    if norm is not None and not math.isfinite(norm):
        raise _stopped(step, "the gradient", task, mine, root)
    task.after_step()
    return values if norm is None else {**values, "gradient_norm": norm}


def _averaged(metrics_of: Mapping[str, Sequence[torch.Tensor]]) -> dict[str, float]:
    """Means over micro-batches and ranks. Only the loss must be a number everywhere: others are not
    defined in every batch."""
    names = sorted(metrics_of)
    sums = torch.zeros(2, len(names), dtype=torch.float64)
    lowest = torch.full((len(names),), math.inf, dtype=torch.float64)
    for i, name in enumerate(names):
        values = torch.stack([value.cpu().double() for value in metrics_of[name]])
        counted = values if name == "loss" else values[torch.isfinite(values)]
        sums[:, i] = torch.stack(
            [counted.sum(), torch.tensor(float(len(counted)), dtype=torch.float64)]
        )
        lowest[i] = counted.min() if len(counted) else math.inf
    sums = torch.stack([ranks.mean(row) for row in sums])
    found = {name: float(sums[0, i] / sums[1, i]) for i, name in enumerate(names) if sums[1, i] > 0}
    return found | {
        name: ranks.lowest(float(lowest[i]))
        for i, name in enumerate(names)
        if name.endswith("_lowest")
    }


def _stopped(
    step: int, what: str, task: TrainingTask, mine: Sequence[int], root: Path
) -> NonFinite:
    suspects = sorted({row for rows in ranks.gathered(task.row_ids(mine)) for row in rows})
    known = checkpoints.steps(root)
    kept = (
        f"the last checkpoint is that of step {known[-1]}"
        if known
        else "no checkpoint had been written yet"
    )
    return ranks.shared(
        NonFinite(
            f"Step {step}: {what} is not a finite number, so training stopped; {kept}. Rows (by"
            f" hash): {', '.join(suspects[:16])}. Look at them, or lower lr or clip, then run the"
            " same command again."
        )
    )


# -- checkpoints


def _save(
    engine: DeepSpeedEngine,
    task: TrainingTask,
    root: Path,
    step: int,
    config: TrainConfig,
    options: TrainOptions,
) -> None:
    folder = ranks.decided(lambda: checkpoints.begin(root, step))
    engine.save(folder)

    def write_companion() -> None:
        data = safetensors.torch.save(
            {name: value.detach().cpu().contiguous() for name, value in task.state().items()}
        )
        files.write_bytes(folder / _COMPANION, data)

    ranks.only_main(write_companion)
    hashed = ranks.gathered(ranks.agree(lambda: manifest.hash_files(folder, _written(folder))))

    def finish() -> None:
        facts = {"stage": engine.stage, "config": digest(config.model_dump(mode="json"))}
        every = {name: fact for mine in hashed for name, fact in mine.items()}
        manifest.seal(folder, step=step, world=ranks.world(), facts=facts, files=every)
        checkpoints.point(root, step)
        checkpoints.rotate(root, keep=options.keep)

    ranks.only_main(finish)


def _written(folder: Path) -> list[Path]:
    """The files of a checkpoint that this rank wrote, by DeepSpeed's names for them: its part of the
    model and of the optimizer; rank 0 whatever has no number."""

    def writer(path: Path) -> int:
        number = re.search(r"pp_rank_(\d+)_", path.name)
        return int(number[1]) if number else 0

    return sorted(p for p in folder.rglob("*") if p.is_file() and writer(p) == ranks.rank())


def _resume(engine: DeepSpeedEngine, task: TrainingTask, root: Path, config: TrainConfig) -> int:
    """Load the newest whole checkpoint, whatever number of ranks wrote it; the steps that it holds,
    or 0."""
    found = ranks.decided(lambda: checkpoints.latest(root, say=ranks.say))
    if found is None:
        return 0
    ranks.only_main(lambda: _set_aside_after(root, found.step))
    source = found
    if found.stage != 0 or engine.stage != 0:
        source = ranks.decided(lambda: checkpoints.check_world(found, ranks.world(), engine.stage))
    if isinstance(source, Path):
        wrote = "1 rank" if found.world == 1 else f"{found.world} ranks"
        ranks.say(f"{found.folder.name} was written by {wrote}; converting it for {ranks.world()}.")
        twin = source
        universal(found.folder, twin, engine.stage)
        source = ranks.decided(lambda: checkpoints.adopt(twin))
    engine.restore(source.folder, universal=source.world == 0)
    state = safetensors.torch.load_file(found.folder / _COMPANION)
    task.restore(state)
    ranks.say(f"Resumed at step {found.step} from {found.folder.name}.")
    return found.step


def _set_aside_after(root: Path, step: int) -> None:
    """Newer checkpoints were passed over, so they are not whole; rotation, which looks at sizes
    alone, must not count them."""
    for later in checkpoints.steps(root):
        if later > step:
            files.set_aside(root / checkpoints.name_of(later))


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Filled when SIGTERM, SIGHUP or SIGINT comes, so that the step at hand is finished; a later Ctrl-C
    ends the process at once.

    Launchers send their ranks SIGTERM, more than once, for a Ctrl-C that the terminal has sent to
    the ranks already; so SIGTERM only ever asks, and a second SIGINT counts after two seconds.
    """
    came: list[int] = []
    first = 0.0

    def note(number: int, _frame: object) -> None:
        nonlocal first
        first = first or time.monotonic()
        if number == signal.SIGINT and time.monotonic() - first > 2:
            raise KeyboardInterrupt
        came.append(number)

    before = {}
    try:
        for number in (signal.SIGINT, *GOODBYES):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: whoever started it handles signals
        pass
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Evaluations:
    """What was evaluated at which step, kept beside the run so that no evaluation is made twice."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        known = ranks.decided(lambda: files.read_document(path)) or {}
        self.known = {int(step): values for step, values in known.items() if int(step) <= start}

    def run(
        self, step: int, task: TrainingTask, engine: DeepSpeedEngine, tracker: Tracker | None
    ) -> None:
        if step in self.known:
            return
        values = dict(task.evaluate(step, engine))
        if not values:
            return
        self.known[step] = values
        if tracker is not None:
            files.write_document(self.path, {str(k): v for k, v in sorted(self.known.items())})
            numbers = {
                f"eval/{k}": v
                for k, v in values.items()
                if isinstance(v, (int, float)) and not isinstance(v, bool)
            }
            tracker.log(step, numbers)
            ranks.say(f"step {step}: " + ", ".join(f"{k[5:]} {v:.3g}" for k, v in numbers.items()))
