"""Real training jobs for the tests: processes under every launcher, on free ports, with a time
limit, and none left behind.

    # Done(rc, out, err, seconds, left)
    done = run("deepspeed", 2, [LAUNCHERS / "sft.py", *sets(recipe), "--out", out])
    done = script("torchrun", 2, [{"kind": "sft", "values": {...}}], fault={"rank": 1, "batches": 6, "how": "kill"})

As a program (`python jobs.py SPEC.json`, under any launcher) it makes several trainings one after
another in the same ranks, which saves the seconds that processes need to start, and does itself
harm at the step where it is told to.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
LAUNCHERS = ROOT / "launchers"
#: What makes a process a rank, and must not be handed on by a test that is one.
_RANK = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CROSS_RANK",
    "CROSS_SIZE",
)
_MARK = "AUDITGAP_TEST_JOB"


@dataclass(frozen=True)
class Done:
    """How a job ended. `left`: processes of it that were still there five seconds later (ended by
    then)."""

    rc: int
    out: str
    err: str
    seconds: float
    left: list[str]
    ended: float = 0.0  #: when, by the clock

    @property
    def tail(self) -> str:
        return (
            f"exit code {self.rc} after {self.seconds:.0f}"
            f" s\n{self.out[-2000:]}\n{self.err[-4000:]}"
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _words(launcher: str, n: int) -> list[str]:
    python, port = sys.executable, str(free_port())
    if launcher == "python":
        return [python]
    if launcher == "auditgap":
        return [python, "-m", "auditgap"]
    if launcher == "deepspeed":
        return [str(Path(python).parent / "deepspeed"), "--num_gpus", str(n), "--master_port", port]
    if launcher == "torchrun":
        return [
            python,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(n),
            "--master_port",
            port,
        ]
    return [
        python,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--cpu",
        "--num_processes",
        str(n),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        port,
    ]


class Job:
    """A job that runs. Its processes carry a mark in their environment, so that all of them are
    found and ended."""

    def __init__(
        self, launcher: str | Sequence[str], n: int, words: Sequence[Any], **more: str
    ) -> None:
        """`launcher`: its name, or its words."""
        self.mark = uuid.uuid4().hex
        environment = {k: v for k, v in os.environ.items() if k not in _RANK}
        environment |= {
            _MARK: self.mark,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
            "PYTHONUNBUFFERED": "1",
            **more,
        }
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [*(_words(launcher, n) if isinstance(launcher, str) else launcher), *map(str, words)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if (
                    process.environ().get(_MARK) == self.mark
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def end(self, limit: float = 480.0) -> Done:
        try:
            out, err = self.process.communicate(timeout=limit)
            rc = self.process.returncode
        except subprocess.TimeoutExpired:
            for process in self.processes():
                process.kill()
            out, err = self.process.communicate(timeout=30)
            rc, err = -1, f"{err}\n[ended by the test after {limit:.0f} s]"
        seconds, ended = time.monotonic() - self.began, time.time()
        patience = time.monotonic() + 5
        while (left := self.processes()) and time.monotonic() < patience:
            time.sleep(0.2)
        names = [f"{p.pid}: {p.status()}" for p in left]
        for process in left:
            process.kill()
        return Done(rc, out, err, seconds, names, ended)


def nodes(launcher: str, n: int, words: Sequence[Any], folder: Path) -> list[Done]:
    """n nodes of one rank each, as if on a network: every node's launcher is started on its own, and
    they meet at the first one's address."""
    python, port = sys.executable, str(free_port())
    meet = ["--master_addr", "127.0.0.1", "--master_port", port]
    hosts = folder / "hostfile"
    hosts.write_text("".join(f"node-{i} slots=1\n" for i in range(n)), encoding="utf-8")
    each = {
        "deepspeed": [str(Path(python).parent / "deepspeed"), "--hostfile", str(hosts), "--no_ssh"],
        "torchrun": [
            *(python, "-m", "torch.distributed.run"),
            *("--nnodes", str(n), "--nproc_per_node", "1"),
        ],
    }[launcher]
    started = [Job([*each, "--node_rank", str(i), *meet], 1, words) for i in range(n)]
    return [job.end() for job in started]


def run(launcher: str, n: int, words: Sequence[Any], *, limit: float = 480.0, **more: str) -> Done:
    return Job(launcher, n, words, **more).end(limit)


def sets(values: Mapping[str, Any]) -> list[str]:
    """A recipe as --set words."""
    return [
        word for key, value in values.items() for word in ("--set", f"{key}={json.dumps(value)}")
    ]


def start_script(
    launcher: str,
    n: int,
    runs: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    fault: Mapping[str, Any] | None = None,
    **more: str,
) -> Job:
    """`runs`: {"kind", "values"}, and "stop_at" or "fails" for one that is to end by an error that
    all ranks share."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = folder / f"spec-{uuid.uuid4().hex[:8]}.json"
    spec.write_text(
        json.dumps({"runs": list(runs), "fault": dict(fault or {}), "facts": str(folder)}),
        encoding="utf-8",
    )
    return Job(launcher, n, [__file__, spec], **more)


def script(
    launcher: str,
    n: int,
    runs: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    limit: float = 240.0,
    **more: Any,
) -> Done:
    return start_script(launcher, n, runs, folder, **more).end(limit)


def log(folder: Path) -> list[dict[str, float]]:
    """The steps of a run's log.jsonl, in order; evaluations left out."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def curve(folder: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in log(folder)]


# ------------------------------------------------------------------ as a program


def train(kind: str, values: Mapping[str, Any], *, stop_at: int | None = None) -> Any:
    """One training in this process, by keys of the recipe and of the sitting; interrupted by the
    evaluation of `stop_at`."""
    from auditgap.errors import Interrupted
    from auditgap.training import dissociate, sft
    from auditgap.training.config import DissociateConfig, SFTConfig
    from auditgap.training.launch import read

    if kind != "sft":
        return dissociate.run(*read(None, dict(values), DissociateConfig))

    def stop(step: int, _loaded: Any) -> dict[str, float]:
        if step == stop_at:
            raise Interrupted(f"stopped at step {step}")
        return {}

    return sft.run(*read(None, dict(values), SFTConfig), evaluate=None if stop_at is None else stop)


def arm(fault: Mapping[str, Any], facts: Path) -> None:
    """Let this process meet a fault when it fetches a micro-batch after `batches` others: kill -9,
    SIGTERM, or an exception.

    `perturb`: this rank's monitor moves by a hair, as broken arithmetic would move it.
    """
    import torch

    from auditgap.training import ranks, sft
    from auditgap.training.constructions.monitor.task import MonitorTask

    if int(fault.get("rank", 0)) != ranks.rank():
        return
    for task in (sft._Task, MonitorTask):
        seen: list[int] = []

        def batch(
            self: Any,
            rows: Sequence[int],
            device: Any,
            original: Any = task.batch,
            seen: list[int] = seen,
        ) -> Any:
            seen.append(1)
            if len(seen) == fault["batches"] + 1:
                (facts / "fault-time").write_text(str(time.time()))
                if fault["how"] == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif fault["how"] == "term":
                    os.kill(os.getpid(), signal.SIGTERM)
                elif fault["how"] == "raise":
                    raise RuntimeError("the batch of the fault cannot be made")
                elif fault["how"] == "perturb":
                    with torch.no_grad():
                        next(self.monitor.parameters()).view(-1)[0] += 1e-3
            return original(self, rows, device)

        task.batch = batch


def watch_monitor() -> list[str]:
    """A list that grows by the digest of φ after every step."""
    import hashlib

    from auditgap.training.constructions.monitor.task import MonitorTask

    seen: list[str] = []
    original = MonitorTask.after_step

    def after_step(self: Any) -> None:
        original(self)
        phi = hashlib.sha256()
        for parameter in self.monitor.parameters():
            phi.update(parameter.detach().cpu().numpy().tobytes())
        seen.append(phi.hexdigest())

    MonitorTask.after_step = after_step
    return seen


def main(spec_file: str) -> int:
    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    import torch

    from auditgap.errors import Interrupted, UsageError
    from auditgap.models import quiet
    from auditgap.training import ranks
    from auditgap.training.launch import ended

    torch.set_num_threads(1)
    quiet()

    def go() -> None:
        phi = watch_monitor()
        with ranks.joined(timeout_minutes=2):
            for number, one in enumerate(spec["runs"]):
                phi.clear()
                if spec["fault"] and number == spec["fault"].get("run", 0):
                    arm(spec["fault"], Path(spec["facts"]))
                facts: dict[str, Any] = {}
                try:
                    train(one["kind"], one["values"], stop_at=one.get("stop_at"))
                except (Interrupted, UsageError) as error:
                    if not one.get("fails"):
                        raise
                    facts = {"error": str(error), "shared": getattr(error, "shared", False)}
                gc.collect()  # an engine that was left by an exception
                file = Path(spec["facts"]) / f"facts-{number}-{ranks.rank()}.json"
                file.write_text(json.dumps({"phi": phi, **facts}), encoding="utf-8")

    return ended(go)


if __name__ == "__main__":
    sys.exit(main(sys.argv[-1]))  # the deepspeed launcher puts --local_rank before it
