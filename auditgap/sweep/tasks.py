"""The groups of a sweep on Ray that wait for an actor.

    queue = Queue([Task(0, group, gpus=1.0)])
    queue.take(1.0, subject="f3a9…", held=Counter())     # a group of the subject that is loaded, if any

A free actor gets one of its own subject, else one of the subject with the most work waiting.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from auditgap.sweep.state import Group


@dataclass
class Task:
    """A group on its way, and what has happened to it. `number` names its meter."""

    number: int
    group: Group
    gpus: float
    deaths: int = 0
    lost_nodes: int = 0


class Queue:
    """The groups that wait, by what they need and whose they are; a group's place among its like is
    kept."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._waiting: dict[tuple[float, str], deque[Task]] = {}
        self._work: defaultdict[tuple[float, str], float] = defaultdict(float)
        self._n = 0
        for task in tasks:
            self.push(task)

    def __len__(self) -> int:
        return self._n

    def sizes(self) -> list[float]:
        """The GPUs that waiting groups ask for."""
        return sorted({gpus for gpus, _ in self._waiting})

    def push(self, task: Task) -> None:
        kind = (task.gpus, task.group.subject)
        self._waiting.setdefault(kind, deque()).append(task)
        self._work[kind] += task.group.work or 1.0
        self._n += 1

    def take(self, gpus: float, subject: str | None, held: Counter[str | None]) -> Task | None:
        """For an actor with so many GPUs: of its own subject, else of the one with most work for
        each actor that has it."""
        kinds = [kind for kind in self._waiting if kind[0] == gpus]
        if not kinds:
            return None
        kind = max(kinds, key=lambda k: (k[1] == subject, self._work[k] / (1 + held[k[1]])))
        task = self._waiting[kind].popleft()
        self._work[kind] -= task.group.work or 1.0
        self._n -= 1
        if not self._waiting[kind]:
            del self._waiting[kind], self._work[kind]
        return task
