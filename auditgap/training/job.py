"""A training run and its folder: opened once by all ranks, checked before anything is loaded,
finished with a model folder.

    with opened(config, options, kind="sft") as job:
        job.check(lengths=lengths, footprint=FOOTPRINT)
        with job.engine(lambda loaded, model: SFTLoss(model)) as engine:
            job.train(engine, task, n_rows=len(rows))
            trained = job.finish(engine)

The folder holds, beside what every run folder holds: `checkpoints/` (resumed from, then deleted),
`log.jsonl` (one line a step), `evaluations.json`, `model/` (the result, with its model card) and
`train.json` (what came of it).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from auditgap import models
from auditgap.data.ledger import LeakageLedger
from auditgap.errors import UsageError
from auditgap.models import LoadedModel, Outline
from auditgap.models.provenance import provenance
from auditgap.models.weights import is_adapter
from auditgap.store import RunFolder, files
from auditgap.store.remote import needs_disk
from auditgap.training import loop, memory, ranks
from auditgap.training.card import Card
from auditgap.training.config import TrainConfig, TrainOptions, accumulation, n_steps
from auditgap.training.ds_config import filled, read_ds_config, stage_of
from auditgap.training.engine import DeepSpeedEngine
from auditgap.training.footprint import Footprint
from auditgap.training.losses import LossModule
from auditgap.training.tracking import Tracker, check_report_to
from auditgap.types import Document, digest


@dataclass(frozen=True)
class Trained:
    """What a training run left: `model` opens with transformers or PEFT, `summary` is
    train.json."""

    path: Path
    model: Path
    summary: Document


@dataclass
class Job:
    """One training run, on one rank. What it decides it decides on rank 0, for all."""

    config: TrainConfig
    options: TrainOptions
    kind: str
    path: Path
    outline: Outline
    dtype: str
    device: str
    ds: Document  #: the DeepSpeed config, without "auto"
    ledger: LeakageLedger = field(default_factory=LeakageLedger)
    facts: Document = field(default_factory=dict)
    #: its rows are of another file than when it was begun: `same_rows` shows whether they are the same
    other_file: bool = False
    total: int = 0  #: optimizer steps of the run, known once `train` is called

    @property
    def pad_id(self) -> int:
        """What stands where a row has ended; it is masked, so any id will do for a tokenizer
        without a pad token."""
        return self.outline.chat.tokenizer.pad_token_id or 0

    def about(self, facts: Document) -> None:
        """Facts for train.json: counts, hashes; never text."""
        self.facts.update(facts)

    def same_rows(self, ids: Sequence[str]) -> None:
        """Raises UsageError when the folder was begun with other rows: a file may change under the
        name that a recipe has."""

        def compare() -> None:
            path, now = self.path / "rows.json", {"digest": digest(list(ids)), "n": len(ids)}
            before = files.read_document(path)
            if before is None:
                files.write_document(path, now)
            elif before != now:
                raise UsageError(
                    f"{self.path} was begun with other rows ({before.get('n')} then, {now['n']}"
                    " now): a file that the recipe names has changed. Restore it, or choose"
                    " another --out."
                )

        ranks.only_main(compare)

    # -- before

    def check(self, *, lengths: Sequence[int], footprint: Footprint) -> None:
        """Everything that can be known to be wrong before weights are loaded. `lengths`: tokens of
        the rows; `footprint`: what the loss needs in memory.

        Raises UsageError: overlap of training and evaluation prompts, too little memory (with what
        would fit).
        """
        overlaps = ranks.decided(
            lambda: self.ledger.check(allow_overlap=self.options.allow_overlap)
        )
        if overlaps:
            self.facts["overlaps"] = overlaps
        ranks.only_main(lambda: self.ledger.save(self.path / "ledger.json"))
        ranks.agree(lambda: self._check_here(max(lengths), footprint))

    def _check_here(self, tokens: int, footprint: Footprint) -> None:
        """What one rank can find wrong: its memory, and packages that it lacks."""
        check_report_to(self.options.report_to)
        if self.config.lora is not None and is_adapter(self.outline.folder):
            raise UsageError(
                f"{self.outline.subject.name} is an adapter already, and an adapter on an adapter"
                " loads nowhere. Merge it first: auditgap export RUN FOLDER --merge, or train all"
                " weights: --set lora=false"
            )
        if not self.options.ignore_memory:
            memory.check_run(
                self.outline,
                self.config,
                self.options,
                stage=stage_of(self.ds),
                ds=self.ds,
                dtype=self.dtype,
                world=ranks.world(),
                tokens=tokens,
                device=self.device,
                footprint=footprint,
            )

    # -- the steps

    def load(self, outline: Outline | None = None) -> LoadedModel:
        """The model to be trained, or another one, as it came."""
        return models.load(outline or self.outline, dtype=self.dtype, device=self.device)

    @contextmanager
    def engine(
        self, construct: Callable[[LoadedModel, nn.Module], LossModule]
    ) -> Iterator[DeepSpeedEngine]:
        """The loss module that `construct(loaded, model)` makes, under DeepSpeed; `model` has the
        adapter if there is one."""

        def build() -> tuple[LossModule, LoadedModel]:
            loaded = self.load()
            lora = self.config.lora
            if lora is None:
                model = loaded.model.requires_grad_(True)
            else:
                model = models.with_lora(
                    loaded.model,
                    rank=lora.rank,
                    alpha=lora.alpha,
                    dropout=lora.dropout,
                    targets=lora.targets,
                    seed=self.config.seed,
                )
                model.peft_config["default"].base_model_name_or_path = self.outline.subject.name
            if self.config.gradient_checkpointing:
                model.gradient_checkpointing_enable(
                    gradient_checkpointing_kwargs={"use_reentrant": False}
                )
            return construct(loaded, model), loaded

        engine = DeepSpeedEngine(
            build,
            self.ds,
            micro_batches=accumulation(self.config, self.options, ranks.world()),
            device=self.device,
        )
        try:
            yield engine
        finally:
            if sys.exc_info()[0] is None:
                engine.close()

    def train(self, engine: DeepSpeedEngine, task: loop.TrainingTask, *, n_rows: int) -> None:
        self.total = n_steps(self.config, n_rows)
        tracker = (
            Tracker(
                self.options.report_to,
                folder=self.path,
                name=self.path.name,
                config=self.config.model_dump(mode="json"),
            )
            if ranks.is_main()
            else None
        )
        try:
            loop.run(engine, task, self.config, self.options, self.path, tracker, total=self.total)
        finally:
            if tracker is not None:
                tracker.close()

    # -- after

    def keep(self, engine: DeepSpeedEngine, name: str) -> None:
        """The weights as they are now in the folder `name` of the run, replacing what was there."""
        part = self.path / f".{name}.part"

        def begin() -> None:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()

        ranks.only_main(begin)
        engine.write(part)

        def place() -> None:
            final, old = self.path / name, self.path / f".{name}.old"
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():
                os.rename(final, old)
            os.rename(part, final)
            shutil.rmtree(old, ignore_errors=True)

        ranks.only_main(place)

    def finish(self, engine: DeepSpeedEngine, *, chosen: str = "last") -> Trained:
        """Write model/ (the weights now, or those kept under the name `chosen`) with its card, and
        train.json."""
        if chosen == "last":
            self.keep(engine, "model")

        def conclude() -> None:
            model = self.path / "model"
            # else a kill came after the rename, and model/ is whole
            if chosen != "last" and (self.path / chosen).exists():
                shutil.rmtree(model, ignore_errors=True)
                os.rename(self.path / chosen, model)
            evaluations = files.read_document(self.path / "evaluations.json") or {}
            summary = {
                "status": "done",
                "kind": self.kind,
                "steps": self.total,
                "base": self.outline.subject.name,
                "base_fingerprint": self.outline.subject.fingerprint,
                "dtype": self.dtype,
                "ranks": ranks.world(),
                "zero_stage": engine.stage,
                **self.facts,
                "evaluations": evaluations,
                "fingerprint": models.fingerprint(model),
            }
            whole = LeakageLedger.load(self.path / "ledger.json")
            if (self.outline.folder / "ledger.json").is_file():
                whole.merge(LeakageLedger.load(self.outline.folder / "ledger.json"))
            # an audit of it must know what it, and its base, were trained on
            whole.save(model / "ledger.json")
            card = Card(
                kind=self.kind,
                base=self.outline.subject.name,
                base_fingerprint=self.outline.subject.fingerprint,
                recipe=self.config.model_dump(mode="json"),
                figures=self.facts,
            )
            files.write_bytes(model / "README.md", card.text(model).encode())
            files.write_document(self.path / "train.json", summary)
            for path in (self.path / "checkpoints", *self.path.glob("best-*")):
                shutil.rmtree(path, ignore_errors=True)

        ranks.only_main(conclude)
        return self.trained()

    @property
    def is_done(self) -> bool:
        return ranks.decided(
            lambda: bool(
                (files.read_document(self.path / "train.json") or {}).get("status") == "done"
            )
        )

    def trained(self) -> Trained:
        return Trained(
            self.path, self.path / "model", files.read_document(self.path / "train.json") or {}
        )


@contextmanager
def opened(config: TrainConfig, options: TrainOptions, *, kind: str) -> Iterator[Job]:
    """Form the ranks, look at the model, open and lock the folder (rank 0), and hand out the job.

    Raises UsageError (a batch that does not divide and a DeepSpeed config that contradicts the
    recipe among it), Refused; a folder that was made with another recipe is refused field by field.
    Its model and its rows may have been moved: those are compared by what they hold.
    When a new folder's recipe turns out to be wrong before the first step, what was made in it is
    deleted, so that the mended recipe finds no other one there.
    """
    with ranks.joined(timeout_minutes=options.timeout_minutes), ExitStack() as stack:
        device = ranks.device(options.device)
        dtype = str(models.pick_dtype(config.dtype, device)).removeprefix("torch.")
        outline = ranks.agree(
            lambda: models.outline(config.model, chat_template=config.chat_template)
        )
        ds = ranks.agree(lambda: _ds_config(config, options, outline, dtype, device))
        needs_disk(options.out, "Training")
        out = Path(options.out or f"runs/{files.folder_name(config.model)}-{kind}").absolute()

        there: set[str] = set()

        def open_folder() -> tuple[bool, bool]:
            is_new = not (out / "run.json").exists()
            if out.is_dir():
                there.update(path.name for path in out.iterdir())
            asked = _identity(config, kind, outline, dtype)
            known = asked if is_new else _as_begun(asked, out)
            store = RunFolder.open(
                out,
                config=known,
                info=provenance([outline], dtype=dtype),
                break_lock=options.break_lock,
            )
            stack.enter_context(store.lock())
            return is_new, known.get("data") != asked.get("data")

        is_new, other_file = ranks.decided(open_folder)
        try:
            yield Job(config, options, kind, out, outline, dtype, device, ds, other_file=other_file)
        except UsageError:
            if is_new and ranks.is_main() and not (out / "log.jsonl").exists():
                _undo(out, there)
            raise


def _ds_config(
    config: TrainConfig, options: TrainOptions, outline: Outline, dtype: str, device: str
) -> Document:
    accumulation(config, options, ranks.world())
    return filled(
        read_ds_config(options.deepspeed),
        config,
        options,
        width=outline.width,
        dtype=dtype,
        device=device,
    )


def _undo(out: Path, there: Collection[str]) -> None:
    """Delete what was made in a folder that was opened for a recipe that could not be; the lock
    stays until it is let go."""
    for path in out.iterdir():
        if path.name not in (".lock", "lock.json", *there):
            files.remove(path)


def _identity(config: TrainConfig, kind: str, outline: Outline, dtype: str) -> Document:
    return {
        "training": kind,
        **config.model_dump(mode="json"),
        "dtype": dtype,
        "subjects": {outline.subject.name: outline.subject.fingerprint},
    }


def _as_begun(asked: Document, out: Path) -> Document:
    """The identity with the names that the folder at `out` has for the same things: a model of the
    same weights and, where the folder knows its rows, the file that they are in."""
    begun = RunFolder.load(out).run["config"]
    same = {}
    if list(begun.get("subjects", {}).values()) == list(asked["subjects"].values()):
        same |= {name: begun[name] for name in ("model", "subjects") if name in begun}
    if (out / "rows.json").is_file() and "data" in asked and "data" in begun:
        same["data"] = begun["data"]
    return {**asked, **same}
