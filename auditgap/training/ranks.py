"""The processes of a training job or of a sharded model: who they are, what one of them decides for
all, how they end together.

    # RANK and WORLD_SIZE as a launcher set them, else one process
    with ranks.joined(timeout_minutes=10):
        # rank 0 does it; an error there is every rank's error
        plan = ranks.decided(lambda: read_and_check())
        loss = ranks.mean(loss)

`deepspeed`, `accelerate launch` and `torchrun` all set the same variables, so none of them is asked
for here.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from auditgap.errors import AuditgapError, UsageError

_T = TypeVar("_T")
#: While rank 0 speaks or judges, the others wait in a group of their own, for hours if need be.
_PATIENCE = timedelta(hours=12)
_patient: Any = None
#: What gloo says when another rank is not there any more; NCCL has exceptions of its own.
_LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    return rank() == 0


def device(asked: str = "auto") -> str:
    """This rank's device: a GPU of its own where there are any, else the CPU."""
    from auditgap.models import pick_device

    picked = pick_device(asked)
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if picked == "cuda" else picked


@contextmanager
def joined(*, timeout_minutes: float = 10.0, meet: Path | None = None) -> Iterator[None]:
    """Form the process group; inside another `joined` this does nothing. Ranks find each other at
    MASTER_ADDR and MASTER_PORT, or through the file `meet`, which needs no port that a stranger
    could answer at.

    It is taken apart when the process ends and not before: DeepSpeed remembers it, so a second
    training in the same process needs the same one. A collective that waits longer than the timeout
    ends the job.
    """
    global _patient
    if _patient is not None:
        yield
        return
    if not dist.is_initialized():
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            here = int(os.environ.get("LOCAL_RANK", "0"))
            if here >= torch.cuda.device_count():
                raise UsageError(
                    f"This machine has {torch.cuda.device_count()} GPUs and a rank {here} was"
                    " started. Start as many as there are."
                )
            torch.cuda.set_device(here)
        where: dict[str, Any] = {}
        if world() == 1:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] - public, but not said to be
            where = {"store": store, "rank": 0, "world_size": 1}  # no port, nothing to inherit
        elif meet is not None:
            store = dist.FileStore(str(meet), world())  # pyright: ignore[reportPrivateImportUsage] - likewise
            where = {"store": store, "rank": rank(), "world_size": world()}
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes), **where)
        atexit.register(_leave)
    _patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
    unset = "LOCAL_RANK" not in os.environ
    # DeepSpeed asks for it; a process started later must not take it for its own
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        yield
    finally:
        _patient = None
        if unset:
            os.environ.pop("LOCAL_RANK", None)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def wait() -> None:
    """Until every rank is here, however long rank 0 takes."""
    if dist.is_initialized():
        dist.barrier(group=_patient)


def decided(act: Callable[[], _T]) -> _T:
    """What `act` gives on rank 0, on every rank. An AuditgapError of it is raised on every rank,
    said once."""
    said: list[Any] = [None, None]
    if is_main():
        try:
            said[0] = act()
        except AuditgapError as error:
            said[1] = error
    if world() > 1 and dist.is_initialized():
        dist.broadcast_object_list(said, src=0, group=_patient)
    if said[1] is not None:
        raise shared(said[1])
    return said[0]


_Error = TypeVar("_Error", bound=AuditgapError)


def shared(error: _Error) -> _Error:
    """An error that every rank raises, so that one of them can say it for all."""
    error.shared = True  # type: ignore[attr-defined]
    return error


def only_main(act: Callable[[], Any]) -> None:
    """`act` on rank 0 while the others wait; an AuditgapError of it ends them all."""

    def quiet() -> None:
        act()

    decided(quiet)


def agree(act: Callable[[], _T]) -> _T:
    """`act` on every rank; when it fails with an AuditgapError on any, every rank raises the first
    one's."""
    result, error = None, None
    try:
        result = act()
    except AuditgapError as raised:
        error = raised
    for other in gathered(error):
        if other is not None:
            raise shared(other)
    return result  # type: ignore[return-value]


def gathered(value: _T) -> list[_T]:
    """Every rank's value, in rank order, on every rank."""
    if world() == 1 or not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value, group=_patient)
    return found


def mean(values: torch.Tensor) -> torch.Tensor:
    """The mean over ranks of a tensor, in place (a CPU tensor too, on a GPU machine)."""
    if world() > 1:
        dist.all_reduce(values)
        values /= world()
    return values


def lowest(value: float) -> float:
    """The lowest of every rank's."""
    return min(gathered(value))


def highest(value: int) -> int:
    """The highest of every rank's, which are waited for however long they take."""
    if world() == 1 or not dist.is_initialized():
        return value
    one = torch.tensor(value)
    dist.all_reduce(one, op=dist.ReduceOp.MAX, group=_patient)
    return int(one)


def of_main(values: torch.Tensor) -> torch.Tensor:
    """Rank 0's tensor, on every rank; shapes and dtypes agree."""
    if world() > 1:
        values = values.contiguous()
        dist.broadcast(values, src=0)
    return values


def has_lost_one(error: BaseException) -> bool:
    """Whether an error is that of a rank whose company ended: a connection that another one's end
    closed, or a collective that it did not come to."""
    lost = (dist.DistBackendError, dist.DistNetworkError)
    return isinstance(error, lost) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)
    )


def say(line: str) -> None:
    """A line on stderr, from rank 0."""
    if is_main():
        print(line, file=sys.stderr, flush=True)
