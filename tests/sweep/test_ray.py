"""The sweep on real Ray actors, in one small local cluster for the whole module: same files, real
deaths, no leftovers."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import toys
from rich.console import Console

from auditgap.errors import Refused, UsageError
from auditgap.store import DiskError, files
from auditgap.sweep import Group, Progress, local
from auditgap.sweep import ray as sweep_ray

pytest.importorskip("ray")

HERE = Path(__file__).parent
MODULE = f"module-{os.getpid()}"  #: marks the processes of this module's cluster


def ray_processes(folder: Path) -> dict[int, str]:
    """Pid and command of every other process that has a file open under a cluster's folder (its
    logs: each one has).

    Not by environment: Ray renames its processes over it.
    """
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if any(os.readlink(fd).startswith(f"{folder}/") for fd in (entry / "fd").iterdir()):
                    found[int(entry.name)] = (
                        (entry / "cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode(errors="replace")
                        .strip()
                    )
    return found


def left(folder: Path, seconds: float = 20, besides: str = "nothing") -> dict[int, str]:
    """Those that are still there after so many seconds, besides the ones named so."""
    deadline = time.monotonic() + seconds
    while True:
        found = {
            pid: command for pid, command in ray_processes(folder).items() if besides not in command
        }
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster():
    token_at_home = Path.home() / ".ray" / "auth_token"
    had_token = token_at_home.exists()
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(HERE))  # so that Ray's workers can import `toys`
    patch.setenv("AUDITGAP_TEST_CLUSTER", MODULE)
    for name in ("RAY_ADDRESS", "RAY_JOB_ID", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        patch.delenv(name, raising=False)
    with sweep_ray.cluster(cpus=2) as ray:
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert os.environ["RAY_AUTH_MODE"] == "token" and token.stat().st_mode & 0o777 == 0o600
        assert len(ray_processes(token.parent)) > 4, (
            "the oracle below sees the cluster while it is up"
        )
        yield ray
    assert not left(token.parent) and not ray.is_initialized()
    assert not token.parent.exists() and "RAY_AUTH_MODE" not in os.environ
    assert token_at_home.exists() == had_token, (
        "no token is left for other clusters of this user to trip over"
    )
    patch.undo()


@pytest.fixture
def store(tmp_path):
    return toys.open_folder(tmp_path / "out")


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def run(groups, store, log, spells=None, **options):
    return sweep_ray.run(
        groups, lambda: toys.Toy(store, log, spells), store, **({"workers": 2} | options)
    )


def test_the_same_files_as_in_one_process(cluster, store, log, tmp_path):
    stream = io.StringIO()
    with store.lock():
        progress = Progress(console=Console(file=stream, width=200), every=0.0)
        outcome = run(toys.groups(5), store, log, progress=progress)
        assert (outcome.done, outcome.failed, outcome.skipped) == (15, {}, 0)
    begun = toys.counts(log)
    assert begun.pop("made") == 2, "two workers for five groups: each keeps its model"
    assert len(begun) == 15 and set(begun.values()) == {1}
    alone = toys.open_folder(tmp_path / "alone")
    local.run(toys.groups(5), lambda: toys.Toy(alone, tmp_path / "other"), alone)
    assert toys.digests(store) == toys.digests(alone) and len(toys.digests(store)) == 15
    pids = {line.split()[1] for line in log.read_text().splitlines()}
    assert len(pids) == 2 and str(os.getpid()) not in pids
    assert stream.getvalue().splitlines()[-1].startswith("15 of 15 cells done, took")
    assert not list((tmp_path / "out" / "scratch").iterdir())

    again = run(toys.groups(5), store, log)
    assert (again.done, again.skipped) == (0, 15) and toys.counts(log)["made"] == 2


def test_a_worker_killed_once_is_made_anew_and_nothing_is_done_twice(cluster, store, log, tmp_path):
    # the last: its group's last
    spells = {(0, 0.02): "die once", (1, 0.02): "die after writing", (2, 0.03): "die after writing"}
    outcome = run(toys.groups(3), store, log, spells)
    assert (outcome.done, outcome.failed) == (9, {})
    begun = toys.counts(log)
    assert begun.pop("block0/0.02") == 2, "tried again where it died"
    assert begun.pop("made") in (4, 5) and set(begun.values()) == {1}, (
        "and the cells written just before a death were kept"
    )
    attempts = {r["cell"]: r["attempts"] for r in store.records()}
    assert attempts[str(toys.cells(0)[1])] == 2 and attempts[str(toys.cells(0)[0])] == 1
    alone = toys.open_folder(tmp_path / "alone")
    local.run(toys.groups(3), lambda: toys.Toy(alone, tmp_path / "other"), alone)
    assert toys.digests(store) == toys.digests(alone)
    assert len(store.rows()) == 18 and store.failures() == {}


def test_poison_is_given_up_alone_after_so_many_deaths_and_the_others_finish(cluster, store, log):
    outcome = run(toys.groups(3), store, log, {(0, 0.02): "die"}, max_attempts=2)
    _, poison, after = (c.key for c in toys.cells(0))
    assert set(outcome.failed) == {poison} and outcome.done == 8, (
        "what shares a group with it is done without it"
    )
    assert "died 2 time(s)" in outcome.failed[poison]
    assert toys.counts(log)["block0/0.02"] == 2
    assert store.failures()[poison]["attempts"] == 2 and store.is_finished(after)

    again = run(toys.groups(3), store, log, {(0, 0.02): "die"})
    assert again.failed == outcome.failed and toys.counts(log)["block0/0.02"] == 2, (
        "not tried again unasked"
    )
    mended = run(toys.groups(3), store, log, retry_failed=True)
    assert (mended.done, mended.failed) == (1, {})


def test_a_worker_of_these_tests_is_one_that_ray_started_but_for_its_imports(cluster):
    """Forked from a process that has the libraries (tests/warm.py)."""

    def about() -> dict[str, object]:
        return {
            "raylet": Path(psutil.Process(os.getppid()).exe()).name,
            "warm": {"torch", "transformers"} <= set(sys.modules),
            "ours": [name for name in sys.modules if name.split(".")[0] == "auditgap"],
            "mark": os.environ["AUDITGAP_TEST_CLUSTER"],
            "mood": os.environ["MOOD"],
        }

    cluster.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    asked = cluster.remote(about).options(num_cpus=1, runtime_env={"env_vars": {"MOOD": "good"}})
    told = cluster.get(asked.remote())
    assert told == {
        "raylet": "raylet",
        "warm": "OMP_NUM_THREADS" in os.environ,
        "ours": [],
        "mark": MODULE,
        "mood": "good",
    }


def test_an_exception_is_final_and_its_worker_lives_on(cluster, store, log):
    outcome = run(toys.groups(3), store, log, {(0, 0.01): "raise", (1, 0.02): "fail"}, workers=1)
    assert outcome.failed == dict.fromkeys(
        (c.key for c in toys.cells(0)), "RuntimeError: no memory left"
    ) | {toys.cells(1)[1].key: "its own cause"}
    assert (
        toys.counts(log)["made"] == 1 and toys.counts(log)["block0/0.01"] == 1 and outcome.done == 5
    )


@pytest.mark.parametrize(
    "error", [UsageError("no such model"), Refused("a pickle"), DiskError("full")]
)
def test_what_making_a_worker_says_goes_through(cluster, store, error):
    def make():
        raise error

    with pytest.raises(type(error), match=str(error)):
        sweep_ray.run(toys.groups(2), make, store, workers=1)
    assert store.failures() == {}


def test_more_than_the_cluster_has_is_refused_before_anything_starts(cluster, store, log):
    with pytest.raises(UsageError, match=r"asks for 1 GPU.*has 0"):
        run(toys.groups(1), store, log, gpus_per_worker=1)
    with pytest.raises(UsageError, match=r"asks for 0.5 GPU.*largest node.*has 0"):
        run([Group("half", toys.cells(0), gpus=0.5)], store, log)
    with pytest.raises(UsageError, match=r"asks for 64 CPU.*has 2"):
        run(toys.groups(1), store, log, cpus_per_worker=64)
    assert not toys.counts(log)


class Patient(toys.Toy):
    """Does a fifth of its work, and the rest when somebody has seen that."""

    def run(self, group, tick):
        tick(0.6)
        deadline = time.monotonic() + 30
        while not self.log.with_suffix(".seen").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        super().run(group, lambda units: None)


def test_work_inside_a_group_is_seen_while_it_runs(cluster, store, log):
    class Watch(Progress):
        seen = ()

        def update(self, *, work, **rest):
            super().update(work=work, **rest)
            if 0 < work < 3.0:
                self.seen += (self.share,)
                log.with_suffix(".seen").touch()

    cluster.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    progress = Watch(console=Console(file=io.StringIO()))
    group = Group("slow", toys.cells(0), work=3.0)
    sweep_ray.run([group], lambda: Patient(store, log), store, workers=1, progress=progress)
    assert progress.seen and progress.seen[0] == pytest.approx(0.2)


DRIVER = """
from pathlib import Path
import sys, toys
from auditgap.errors import AuditgapError
from auditgap.sweep import ray as sweep_ray
out, log, spells = Path(sys.argv[1]), Path(sys.argv[2]), eval(sys.argv[3])
store = toys.open_folder(out)
with store.lock():
    try:
        print(sweep_ray.run(toys.groups(), lambda: toys.Toy(store, log, spells), store, workers=1))
    except AuditgapError as error:
        print(error)
        sys.exit(error.exit_code)
"""


@pytest.fixture
def drive(tmp_path, log):
    """Start a driver of its own process; whatever of it is left at the end is killed."""
    started = []
    # a driver that is killed cannot clean up after itself
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))

    def start(spells, out="out", **given):
        command = [sys.executable, "-c", DRIVER, str(tmp_path / out), str(log), repr(spells)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
        environment |= {"TMPDIR": str(folder)} | given
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    start.folder = folder
    yield start
    for process in started:
        process.kill()
        process.communicate()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_stopped_driver_leaves_no_process_and_the_same_run_does_the_rest(
    cluster, drive, tmp_path, log, number, code
):
    process = drive({(2, 0.02): "hang"})
    deadline = time.monotonic() + 60
    while (
        "block2/0.02" not in toys.counts(log)
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.05)
    running = ray_processes(drive.folder).values()
    assert {"gcs_server", "raylet", "ray::_Actor"} <= {
        Path(command.split()[0]).name.split(".")[0] for command in running
    }
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert number == signal.SIGKILL or ("same command" in out and "Traceback" not in err)
    if number == signal.SIGTERM:
        assert not left(drive.folder)
    else:  # Ray's two node agents take a minute to see that their node is gone; workers, with their models, do not
        assert not left(drive.folder, besides="Agent")
        for pid in ray_processes(drive.folder):
            os.kill(pid, signal.SIGKILL)

    store = toys.open_folder(tmp_path / "out")
    assert store.failures() == {}
    outcome = run(toys.groups(), store, log)
    assert (outcome.done, outcome.skipped, outcome.failed) == (5, 7, {})
    begun = toys.counts(log)
    del begun["made"]
    assert begun.pop("block2/0.02") == 2 and set(begun.values()) == {1}


@pytest.mark.parametrize("interrupts", [1, 2])
def test_ctrl_c_once_says_how_to_go_on_and_twice_ends_at_once(
    cluster, drive, tmp_path, log, interrupts
):
    """The driver is gone within seconds and its actors with it; the cluster, which is not its own,
    stays."""
    token = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
    process = drive(
        {(2, 0.02): "hang"}, RAY_ADDRESS=cluster.get_runtime_context().gcs_address, **token
    )
    deadline = time.monotonic() + 60
    while (
        "block2/0.02" not in toys.counts(log)
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.05)
    asked = time.monotonic()
    for _ in range(interrupts):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - asked < 40
    assert process.returncode in ((130,) if interrupts == 1 else (130, -signal.SIGINT)), out + err
    if interrupts == 1:
        assert "run the same command again to resume" in out and "Traceback" not in err
    assert not left(drive.folder)
    hanging = {int(line.split()[1]) for line in log.read_text().splitlines()}
    while any(map(files.alive, hanging)) and time.monotonic() - asked < 60:
        time.sleep(0.1)
    assert not any(map(files.alive, hanging)), "no actor outlives the driver"

    store = toys.open_folder(tmp_path / "out")
    assert store.failures() == {}
    with store.lock():
        outcome = local.run(toys.groups(), lambda: toys.Toy(store, log), store)
    assert (outcome.done, outcome.skipped, outcome.failed) == (5, 7, {})


def test_inside_a_job_it_joins_the_cluster_that_is_there(cluster, drive, log):
    address = cluster.get_runtime_context().gcs_address
    token = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
    process = drive({}, RAY_ADDRESS=address, AUDITGAP_TEST_CLUSTER="joined", **token)
    out, err = process.communicate(timeout=60)
    assert "Outcome(done=12, failed={}, skipped=0)" in out, err
    assert {line.split()[2] for line in log.read_text().splitlines()} == {MODULE}, (
        "the work was done by this cluster"
    )
    assert not ray_processes(drive.folder)
    assert cluster.is_initialized() and cluster.cluster_resources()["CPU"] == 2, (
        "and leaves it standing"
    )

    process = drive({}, "other", RAY_ADDRESS="127.0.0.1:1", **token)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "No Ray cluster answers" in out, err


def test_without_ray_there_is_a_sentence_and_the_rest_imports():
    code = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "ray": raise ModuleNotFoundError(name)
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "ray" else real(name, package)
sys.meta_path.insert(0, Hidden())
from auditgap import sweep
from auditgap.errors import UsageError
try:
    with sweep.ray.cluster(): pass
except UsageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "pip install 'ray[default]'" in done.stdout, done.stderr
    code = "import sys, auditgap.sweep; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
