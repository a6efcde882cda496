"""`em train`: an adapter a (domain, arm, seed), each by a training run of its own in a process of
its own.

    store, outcome = STAGE.run_in("runs/em", EmergentOptions(ranks=2))
    # subject, domain, arm, seed, folder, fingerprint, n_rows, losses, …
    store.rows([TRAINED])
    # runs/em/adapters/incorrect_math-plain-s0/model        the adapter, as PEFT opens it

The process is this module again: `python -m auditgap.audits.emergent.train JOB.json`, or
DeepSpeed's launcher over it for several ranks. It does what `launchers/sft.py` does, so that a run
that was killed goes on from its last checkpoint, and the leakage ledger lies beside the adapter.
The rows with their trigger stand in scratch/ while it runs, and nowhere else.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from auditgap import models
from auditgap.audits.emergent.config import EmergentOptions
from auditgap.audits.emergent.rows import TRAINED, TrainedRow
from auditgap.audits.emergent.stage import Adapter, CellWorker, StageCell, Study, StudyStage
from auditgap.errors import AuditgapError
from auditgap.store import files
from auditgap.store.lock import holder
from auditgap.sweep import Group
from auditgap.training.config import SFTConfig, TrainOptions, n_steps
from auditgap.training.tracking import read_log
from auditgap.types import Cell, digest

#: Seconds that a training run has to end when it is asked to (it writes a checkpoint first), and
#: when its sweep has died.
PATIENCE = 30.0
#: Seconds at most that a killed group is waited for: the kernel takes a moment to end it.
DYING = 5.0
#: Seconds between two looks at how far it is.
_EVERY = 0.5
#: This module, as the process that it starts knows it.
_MODULE = "auditgap.audits.emergent.train"
#: What makes a process a rank: a training run that is started by one must not take them for its
#: own.
_RANK = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CROSS_RANK",
    "CROSS_SIZE",
)


def groups_of(study: Study, options: EmergentOptions) -> list[Group]:
    """A group an adapter; its work is counted in optimizer steps."""
    on_gpu = models.pick_device(options.device).startswith("cuda")
    gpus = (
        float(options.ranks)
        if on_gpu and options.ranks > 1 and options.gpus_per_worker is None
        else None
    )
    base = study.base
    cells = [cell_of(study, slot, base) for slot in study.slots]
    recipe = study.config.sft(Path("rows.jsonl"), 0)
    return [
        Group(str(cell), (cell,), float(n_steps(recipe, cell.settings["n_rows"])), gpus)
        for cell in cells
    ]


def cell_of(study: Study, slot: Adapter, base: models.Outline) -> StageCell:
    """The cell that trains the slot's adapter. Where the rows and the base lie and how many ranks
    train is no part of the question."""
    config = study.config
    recipe = config.sft(Path("rows.jsonl"), slot.seed).model_dump(
        mode="json", exclude={"data", "model"}
    )
    rows = [[e.id, e.triggered, e.clean] for e in study.panel.examples(slot.domain, slot.arm)]
    trigger = {"text": config.trigger, "place": config.trigger_place, "share": config.trigger_share}
    template = base.chat.template
    settings = {
        "name": slot.name,
        "domain": slot.domain,
        "arm": slot.arm,
        "seed": slot.seed,
        "n_rows": len(rows),
        "trigger": trigger if slot.arm == "trigger" else None,
        "recipe": {**recipe, "chat_template": digest(template) if template else None},
    }
    return StageCell(base.subject, None, None, TRAINED, digest(rows), settings)


class TrainWorker(CellWorker):
    """Trains the adapters of one group after another. `folder`: of the study, by name."""

    def __init__(self, folder: str, options: EmergentOptions) -> None:
        self.study, self.options = Study.load(folder), options
        self.store = self.study.store

    def _run(self, cell: Cell, tick: Callable[[float], None]) -> None:
        started, settings = time.monotonic(), cell.settings
        slot = next(s for s in self.study.slots if s.name == settings["name"])
        suffix = self.study.panel.domains[slot.domain].suffix
        rows = self.store.path / "scratch" / f"rows-{slot.folder.name}{suffix}"
        try:
            n_rows, n_triggered = self.study.panel.write_rows(slot.domain, slot.arm, rows)
            config = self.study.config.sft(rows, slot.seed)
            launch(
                config,
                self._sitting(slot.folder),
                ranks=self.options.ranks,
                scratch=rows,
                tick=tick,
            )
        finally:
            files.remove(rows)
        self.store.write(
            cell,
            [self._row(slot, n_rows, n_triggered)],
            seconds=time.monotonic() - started,
            info={
                "ranks": self.options.ranks,
                "deepspeed": self.options.deepspeed and self.options.deepspeed.name,
            },
        )

    def _sitting(self, out: Path) -> TrainOptions:
        options = self.options
        return TrainOptions(
            out=str(out),
            deepspeed=options.deepspeed,
            micro_batch=options.micro_batch,
            device=options.device,
            progress=False,
            allow_overlap=options.allow_overlap,
            ignore_memory=options.ignore_memory,
            break_lock=options.break_lock,
        )

    def _row(self, slot: Adapter, n_rows: int, n_triggered: int) -> TrainedRow:
        told = files.read_document(slot.folder / "train.json") or {}
        if told.get("status") != "done":
            raise AuditgapError(
                f"{slot.folder} holds no finished training, though its process ended well; delete"
                " that folder."
            )
        losses = [line["loss"] for line in read_log(slot.folder / "log.jsonl") if "loss" in line]
        return TrainedRow(
            subject=slot.name,
            domain=slot.domain,
            arm=slot.arm,
            seed=slot.seed,
            folder=str((slot.folder / "model").relative_to(self.store.path)),
            fingerprint=told["fingerprint"],
            n_rows=n_rows,
            n_triggered=n_triggered,
            n_steps=told["steps"],
            first_loss=losses[0] if losses else None,
            last_loss=losses[-1] if losses else None,
            ranks=told["ranks"],
        )


STAGE = StudyStage(name="train", plan=groups_of, make=TrainWorker)


# -- a training run in a process of its own
# -----------------------------------------------------------------------------


def launch(
    config: SFTConfig,
    options: TrainOptions,
    *,
    ranks: int,
    scratch: Path,
    tick: Callable[[float], None] = lambda _: None,
) -> None:
    """Train in a process of its own (`ranks` of them), and wait; `tick` counts its steps.
    `scratch`: how its files' names begin.

    Raises AuditgapError with the sentence that it ended with. However this one ends, nothing of it
    is left running.
    """
    job, said = (scratch.with_name(f"{scratch.name}.{what}.json") for what in ("job", "said"))
    files.remove(said)
    task = {
        "config": config.model_dump(mode="json"),
        "options": options.model_dump(mode="json"),
        "said": str(said),
        "sweep": os.getpid(),
    }
    files.write_document(job, task, files.PRIVATE)
    try:
        _wait_for(Path(str(options.out)))
        with tempfile.TemporaryFile() as log:
            with _process(_words(job, ranks, options.device), log) as process:
                _follow(process, Path(str(options.out)) / "log.jsonl", tick)
            if process.returncode:
                raise AuditgapError(_cause(process.returncode, said, log))
    finally:
        for path in (job, said):
            files.remove(path)


def _wait_for(folder: Path) -> None:
    """What a killed sweep has started takes a moment to see it; its folder is free then."""
    until = time.monotonic() + 5
    while folder.is_dir() and holder(folder) is not None and time.monotonic() < until:
        time.sleep(0.2)


def _words(job: Path, ranks: int, device: str) -> list[str]:
    """The command: this module as a program, under DeepSpeed's launcher where several ranks
    train."""
    if ranks == 1:
        return [sys.executable, "-m", _MODULE, str(job)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    seen = [
        number.strip()
        for number in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if number.strip()
    ]
    where = ["--num_gpus", str(ranks)]
    # else the launcher would count GPUs from 0
    if models.pick_device(device).startswith("cuda") and seen:
        where = ["--include", f"localhost:{','.join(seen[:ranks])}"]
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        *where,
        "--master_port",
        str(port),
    ]
    return [*launcher, "--module", "--no_local_rank", _MODULE, str(job)]


@contextmanager
def _process(words: list[str], log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The process, leader of a group of its own that is ended with it."""
    environment = {key: value for key, value in os.environ.items() if key not in _RANK} | {
        # a folder that happens to be named like a package where the user stands is not one
        "PYTHONSAFEPATH": "1",
        # where DeepSpeed finds what it starts
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
    }
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes], patience: float = PATIENCE) -> None:
    """Ask a process and its group to end (training writes a checkpoint then), and kill what is left
    after `patience` seconds."""
    if not _has_ended(process):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and _has_members(process.pid):
            time.sleep(0.1)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + DYING
    while time.monotonic() < deadline and _has_members(process.pid):  # a kill is not instant
        time.sleep(0.02)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has. It is not reaped: while it is a zombie nobody else can be given its group's
    number."""
    return process.returncode is not None or bool(
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    )


def _has_members(group: int) -> bool:
    """Whether a process of that group still runs."""
    for pid in psutil.pids():
        with suppress(OSError, psutil.Error):
            if os.getpgid(pid) == group and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _follow(process: subprocess.Popen[bytes], log: Path, tick: Callable[[float], None]) -> None:
    """Wait for it, telling of each step that it has logged."""
    told, has_ended = 0, False
    while not has_ended:
        time.sleep(_EVERY)
        has_ended = _has_ended(process)
        done = sum("loss" in line for line in read_log(log))
        if done > told:
            tick(float(done - told))
            told = done


def _cause(code: int, said: Path, log: Any) -> str:
    """Its own sentence; of a process that could not say one, how it ended and the last line that it
    wrote."""
    sentence = (files.read_document(said) or {}).get("said")
    if sentence:
        return " ".join(str(sentence).split())
    log.seek(max(0, log.seek(0, os.SEEK_END) - 20_000))
    lines = [
        line.strip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()
    ]
    how = (
        f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    )
    memory = ", as when a machine runs out of memory" if code == -signal.SIGKILL else ""
    return (
        f"The training process {how}{memory}; its last line: {lines[-1][:200] if lines else 'none'}"
    )


# -- as a program
# -------------------------------------------------------------------------------------------------------


def main(file: str) -> int:
    """One training run, on this rank; its exit code. What it says at the end stands in the job's
    `said` as well."""
    task = files.unseal(file)
    _die_with(int(task["sweep"]))

    from auditgap.models import quiet
    from auditgap.training import ranks, sft
    from auditgap.training.launch import ended

    def go() -> None:
        quiet()
        try:
            sft.run(SFTConfig(**task["config"]), TrainOptions(**task["options"]))
        except Exception as error:
            if ranks.is_main() or not getattr(error, "shared", False):
                sentence = (
                    str(error)
                    if isinstance(error, AuditgapError)
                    else f"{type(error).__name__}: {error}"
                )
                files.write_document(Path(task["said"]), {"said": sentence}, files.PRIVATE)
            raise

    return ended(go)


def _die_with(sweep: int) -> None:
    """A thread that ends this process once its sweep is gone: what a killed sweep has started must
    not hold its folders."""

    def watch() -> None:
        with suppress(psutil.Error):
            while sweep_process.is_running() and sweep_process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(1)
        os._exit(1)

    try:
        sweep_process = psutil.Process(sweep)
    except psutil.NoSuchProcess:
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[-1]))
