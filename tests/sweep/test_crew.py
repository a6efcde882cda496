"""Who works on what: the queue's choice, the room on the nodes, and nodes of a real cluster that
leave and join mid-run."""

from __future__ import annotations

import io
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import toys
from rich.console import Console

from auditgap.store import DiskError
from auditgap.sweep import Group, Progress, pool
from auditgap.sweep import ray as sweep_ray
from auditgap.sweep.tasks import Queue, Task
from auditgap.types import Budget, Cell, Site, Subject

HERE = Path(__file__).parent


def task(subject: str, work: float, gpus: float = 0.0, number: int = 0) -> Task:
    cell = Cell(Subject(subject, subject), Site(number), Budget(0.1, "rms"), "targeted", "51")
    return Task(number, Group(f"{subject} {number}", (cell,), work=work), gpus)


def test_an_actor_keeps_its_model_and_helps_the_neediest_at_the_end():
    queue = Queue(
        [task("a", 5.0, number=i) for i in range(4)] + [task("b", 1.0, number=i) for i in range(2)]
    )
    assert len(queue) == 6 and queue.sizes() == [0.0]
    first = queue.take(0.0, None, Counter())
    assert (first.group.subject, first.number) == ("a", 0), "most work waits for it"
    assert queue.take(0.0, "b", Counter(a=1, b=1)).group.subject == "b", (
        "what it has loaded, whatever else waits"
    )
    assert queue.take(0.0, None, Counter(a=20)).group.subject == "b", (
        "twenty have the other already"
    )
    assert queue.take(0.0, "b", Counter(a=1)).group.subject == "a", "its own are done: it helps"
    assert [queue.take(0.0, "a", Counter()).number for _ in range(2)] == [2, 3] and not queue
    assert queue.take(0.0, "a", Counter()) is None and queue.sizes() == []


def test_a_group_goes_to_an_actor_of_its_size():
    queue = Queue([task("a", 1.0, gpus=0.5), task("b", 9.0, gpus=2.0)])
    assert queue.sizes() == [0.5, 2.0]
    assert (
        queue.take(1.0, "a", Counter()) is None
        and queue.take(0.5, "b", Counter()).group.subject == "a"
    )


@pytest.mark.parametrize(
    ("nodes", "workers", "fits"),
    [
        ([(8, 2)], [(1, 0.5)] * 4, True),
        ([(8, 2)], [(1, 0.5)] * 5, False),
        ([(8, 1), (8, 1)], [(1, 0.6)] * 2, True),
        ([(8, 1), (8, 1)], [(1, 0.6)] * 3, False),  # two GPUs in all, but on no node is 0.6 left
        ([(8, 1), (8, 1)], [(1, 2)], False),
        ([(8, 1), (8, 4)], [(1, 1), (1, 4)], True),
        ([(2, 0)], [(1, 0)] * 3, False),
        ([], [(1, 0)], False),
    ],
)
def test_room_is_counted_node_by_node(nodes, workers, fits):
    assert pool._fits(nodes, workers) is fits


def test_a_model_larger_than_any_node_is_told_how_many_gpus_it_may_have():
    assert "--shard layers:2," in pool._over_nodes(4.0, 2.0)
    assert pool._over_nodes(1.0, 0.0) == pool._over_nodes(0.5, 0.0) == pool._over_nodes(4.0, 0.0)
    assert pool._over_nodes(4.0, 0.0) == "", "where there is none, fewer are no help"


@pytest.fixture
def nodes(monkeypatch):
    """A real cluster: a head with no CPU to give, and nodes that tests add and remove."""
    pytest.importorskip("ray")
    folder = Path(tempfile.mkdtemp(prefix="n-", dir="/tmp"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    ours = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PYTHONPATH": str(HERE),
        "RAY_TMPDIR": str(folder),
        # a lost node is found in some ten seconds, not in thirty
        "RAY_health_check_failure_threshold": "2",
    }
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    (folder / "ray").mkdir()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    import ray
    from ray.cluster_utils import Cluster

    from auditgap.sweep.cluster import _read_settings_again

    _read_settings_again()
    small = {"object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    cluster.add_one = lambda: cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    monkeypatch.undo()
    _read_settings_again()
    shutil.rmtree(folder, ignore_errors=True)


class Slow(toys.Toy):
    """Takes its time over a cell, and says on which node."""

    def run(self, group, tick):
        import ray

        with open(self.log.with_suffix(".nodes"), "a") as file:
            file.write(ray.get_runtime_context().get_node_id() + "\n")
        time.sleep(1.0)
        super().run(group, tick)


def begun_on(log: Path) -> list[str]:
    path = log.with_suffix(".nodes")
    return path.read_text().split() if path.exists() else []


class Mover(Progress):
    """Has nodes come and go while the sweep is under way: the sweep calls it every second."""

    def __init__(self, nodes, log: Path) -> None:
        super().__init__(console=Console(file=io.StringIO()))
        self.nodes, self.log = nodes, log
        self.first, self.joined, self.left = nodes.add_one(), False, False

    def update(self, **sums) -> None:
        super().update(**sums)
        places = len(set(begun_on(self.log)))
        if places and not self.joined:
            self.joined = bool(self.nodes.add_one())
        elif places == 2 and not self.left:
            self.nodes.remove_node(self.first, allow_graceful=False)
            self.left = True


def test_nodes_may_leave_and_join(nodes, tmp_path):
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    log, store = tmp_path / "log", toys.open_folder(tmp_path / "out")
    mover = Mover(nodes, log)
    outcome = sweep_ray.run(
        toys.groups(12),
        lambda: Slow(store, log),
        store,
        address=nodes.address,
        max_attempts=1,
        progress=mover,
    )
    assert (outcome.done, outcome.failed) == (36, {}), "a lost node is no attempt of a cell"
    assert mover.left and len(set(begun_on(log))) == 2, "the node that joined had work"
    assert store.failures() == {} and not list((tmp_path / "out" / "scratch").iterdir())
    assert os.environ["RAY_AUTH_MODE"] == "token"
    counts = toys.counts(log)
    del counts["made"]
    assert max(counts.values()) <= 2 and sum(n == 2 for n in counts.values()) <= 1, (
        "only the cell in flight was begun again"
    )


@pytest.fixture
def full(mounted, monkeypatch):
    """A real cluster of this process whose object store holds 80 MB, and spills to a disk that has
    next to no room."""
    ray = pytest.importorskip("ray")
    from auditgap.sweep import cluster as home

    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    with home._local_cluster_environment() as folder:
        home._read_settings_again()
        ray.init(
            num_cpus=2,
            object_store_memory=80_000_000,
            object_spilling_directory=str(mounted("8m")),
            include_dashboard=False,
            _temp_dir=f"{folder}/r",
            log_to_driver=False,
        )
        yield ray
        ray.shutdown()


class Heavy:
    """What makes a worker, and weighs more than half of the store."""

    def __init__(self, store, log: Path) -> None:
        self.store, self.log, self.ballast = store, log, os.urandom(60_000_000)

    def __call__(self) -> toys.Toy:
        return toys.Toy(self.store, self.log)


def test_a_full_object_store_is_a_sentence(full, tmp_path):
    """Ray's own, really full: of what is held already, there is no room for another worker's."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    log, store = tmp_path / "log", toys.open_folder(tmp_path / "out")
    with store.lock():
        sweep_ray.run(toys.groups(1), lambda: toys.Toy(store, log), store, workers=2)
        done = toys.digests(store)
        held = [full.put(os.urandom(25_000_000)) for _ in range(2)]
        with pytest.raises(
            DiskError, match=r"object store.*--object-store-memory.*same command"
        ) as error:
            sweep_ray.run(toys.groups(4), Heavy(store, log), store, workers=2)
        assert "\n" not in str(error.value) and len(done) == 3
        assert toys.digests(store).items() >= done.items(), "what was finished is there"
        del held
        outcome = sweep_ray.run(toys.groups(4), lambda: toys.Toy(store, log), store, workers=2)
    assert (outcome.done, outcome.skipped, outcome.failed) == (9, 3, {})
