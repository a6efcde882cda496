"""A subject whose matrices are sliced over several ranks: an engine here, and a process a rank that
does the work.

    with RankedEngine(outline, Shard.of("tensor:2"), dtype="float32") as engine:
        engine.activations(rendered, Site(15));  attack(engine, goals, Site(15), PGD());  engine.generate(requests, 32)

It is told what `HFEngine` is told and answers the same. All ranks (`rank.py`) are given every task,
and do it on their own `HFEngine` in step with each other; rank 0 answers. This process is no rank:
it holds no weights and waits in no collective, so whatever becomes of a rank is seen at once. Then
all of them are ended, and the cause is what this raises.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import safetensors.torch
import torch

from auditgap.engines import Completion, Request
from auditgap.engines.answers import check_length, completion_of
from auditgap.engines.child import Child, Failed
from auditgap.engines.fitting import OutOfMemory
from auditgap.errors import AuditgapError, UsageError
from auditgap.interventions.pgd import PGD, AttackResult, Goal
from auditgap.models import Outline, Rendered, Shard, pick_device, pick_dtype
from auditgap.types import Edit, Prompt, Site

#: Seconds in which the rank that is the cause is told from those that only lost touch with it.
_GRACE = 2.0
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def to_bytes(tensors: Mapping[str, torch.Tensor]) -> list[bytes]:
    """Tensors by name as what travels behind a message; nothing for none."""
    return (
        [
            safetensors.torch.save(
                {name: t.detach().clone().contiguous() for name, t in tensors.items()}
            )
        ]
        if tensors
        else []
    )


def from_bytes(data: Sequence[bytes]) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(data[0]) if data else {}


class RankedEngine:
    """See the module. Its ranks are on this machine: a GPU each, or processes on its CPU."""

    name = "hf"

    def __init__(
        self,
        outline: Outline,
        shard: Shard,
        *,
        dtype: str = "auto",
        device: str = "auto",
        batch_tokens: int | None = None,
    ) -> None:
        """Raises UsageError where the subject has no tensor-parallel plan or the machine too few
        GPUs."""
        device = pick_device(device)
        shard.check(outline)
        shard.check_devices(device)
        self.outline, self.shard = outline, shard
        self._most: int | None = None  #: tokens of a batch, once memory was too small for more
        self._settings = {
            "name": outline.subject.name,
            "fingerprint": outline.subject.fingerprint,
            "folder": str(outline.folder),
            "n_blocks": outline.n_blocks,
            "width": outline.width,
            "shard": str(shard),
            "batch_tokens": batch_tokens,
            "dtype": str(pick_dtype(dtype, device)).removeprefix("torch."),
            "device": device,
        }
        self._common = {
            "WORLD_SIZE": str(shard.n),
            "GLOO_SOCKET_IFNAME": _LOOPBACK,
            "NCCL_SOCKET_IFNAME": _LOOPBACK,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if device == "cpu":
            threads = max(1, torch.get_num_threads() // shard.n)
            self._common |= {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
        self._start()

    def _start(self) -> None:
        """Start the ranks, each of which loads its part of the model."""
        self.closed = False
        self._children: list[Child] = []
        self._pool = ThreadPoolExecutor(self.shard.n)

        def start(rank: int) -> Child:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return Child("auditgap.audits.rank", self._settings, {**self._common, **own})

        starting = [self._pool.submit(start, rank) for rank in range(self.shard.n)]
        wait(starting)
        self._children = [s.result() for s in starting if s.exception() is None]
        if len(self._children) < self.shard.n:
            self.close()
            raise next(error for s in starting if (error := s.exception()) is not None)
        meet = str(self._children[0].log.parent / "meet")
        self._told("load", {"meet": meet, "most": self._most})

    @property
    def pids(self) -> list[int]:
        """The ranks' processes, in their order."""
        return [child.pid for child in self._children]

    def close(self) -> None:
        """End all ranks, also amid a task; a second call does nothing."""
        if self.closed:
            return
        self.closed = True
        for child in self._children:
            child.close()
        self._pool.shutdown()

    def __enter__(self) -> RankedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- as HFEngine
    # ---------------------------------------------------------------------------------------------------

    def render(self, prompt: Prompt) -> Rendered:
        return self.outline.chat.render(prompt)

    def self_test(self, site: Site) -> None:
        """As `HFEngine.self_test`, on all ranks."""
        self._tell("self_test", {"site": site.layer_index})

    def activations(self, rendered: Sequence[Rendered], site: Site) -> list[torch.Tensor]:
        """Each prompt's clean hidden states [T, D] at the site, fp32 on the CPU."""
        _, found = self._tell(
            "activations", {"prompts": [r.ids for r in rendered], "site": site.layer_index}
        )
        return [found[str(i)] for i in range(len(rendered))]

    def attack(
        self, goals: Sequence[Goal], site: Site, pgd: PGD, *, score: bool = True
    ) -> list[list[AttackResult]]:
        """`interventions.pgd.attack`, which calls this, where the model is."""
        asked = [
            {
                "ids": g.rendered.ids,
                "target": g.target,
                "radii": g.radii,
                "maximise": g.maximise,
                "warm": g.warm is not None,
                "span": g.span,
                "goes_on": g.goes_on,
            }
            for g in goals
        ]
        warm = {
            f"{i}.{r}": delta for i, g in enumerate(goals) for r, delta in enumerate(g.warm or ())
        }
        told, deltas = self._tell(
            "attack",
            {"goals": asked, "site": site.layer_index, "pgd": asdict(pgd), "score": score},
            warm,
        )
        return [
            [
                AttackResult(deltas[f"{i}.{r}"], clean, edited, finite, tuple(curve))
                for r, (clean, edited, finite, curve) in enumerate(row)
            ]
            for i, row in enumerate(told["found"])
        ]

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[Completion]:
        """Greedy completions, in order, each under its edit. Raises AuditgapError for an edit of
        another length than its prompt."""
        for request in requests:
            check_length(request.rendered, request.edit)
        names, deltas = _named([r.edit for r in requests])
        asked = [
            {"ids": r.rendered.ids, "target": r.target, "edit": name}
            for r, name in zip(requests, names, strict=True)
        ]
        told, _ = self._tell("generate", {"requests": asked, "new": max_new_tokens}, deltas)
        # a rank knows neither the template nor which prompts have a chain: it only spells tokens
        return [
            completion_of(self.outline.chat, r.rendered, ids, *values[:5])
            for r, (ids, *values) in zip(requests, told["completions"], strict=True)
        ]

    def nll(
        self,
        rendered: Sequence[Rendered],
        answers: Sequence[Sequence[int]],
        edits: Sequence[Edit | None] | None = None,
    ) -> list[float | None]:
        """Mean NLL (nats a token) of each answer after its prompt, under its edit if it has one;
        None as in `HFEngine`."""
        edits = [None] * len(answers) if edits is None else edits
        for one, edit in zip(rendered, edits, strict=True):
            check_length(one, edit)
        names, deltas = _named(edits)
        asked = [
            [r.ids, list(map(int, a)), name]
            for r, a, name in zip(rendered, answers, names, strict=True)
        ]
        return self._tell("nll", {"asked": asked}, deltas)[0]["nll"]

    # -- the ranks
    # -----------------------------------------------------------------------------------------------------

    def _tell(
        self, do: str, message: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Rank 0's answer when all have done it. Where memory is too small for a batch on one of
        them, all start again, and no batch is as large any more."""
        while True:
            try:
                return self._told(do, message, tensors)
            except OutOfMemory as full:
                if full.rows == 1:
                    raise
                self._most = full.tokens // 2
            self._start()

    def _told(
        self, do: str, message: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Rank 0's answer when all have done it. A rank that fails or dies ends all; raises what it
        died of."""
        if self.closed:
            raise AuditgapError("This engine is closed; open another.")
        data = to_bytes(tensors or {})
        lock = threading.Lock()
        first: list[int] = []

        def ask(rank: int) -> tuple[dict[str, Any], list[bytes]]:
            try:
                return self._children[rank].exchange({"do": do, **message}, data)
            except BaseException:
                with lock:
                    first.append(rank)
                raise

        asked = [self._pool.submit(ask, rank) for rank in range(self.shard.n)]
        cause: int | None = None
        try:
            wait(asked, return_when=FIRST_EXCEPTION)
            if first:
                wait(asked, timeout=_GRACE)
                died = [rank for rank in first if not isinstance(asked[rank].exception(), Failed)]
                cause = (died or first)[0]
                raise self._sentence(cause, asked[cause].exception())
            answer, found = asked[0].result()
            return answer, from_bytes(found)
        except BaseException:
            self._end(asked, cause)
            raise

    def _sentence(self, rank: int, error: BaseException | None) -> AuditgapError:
        """What to say of the rank that is the cause. Keeps its log where that says more."""
        where = f"Rank {rank} of {self.shard.n} ({self.outline.subject.name})"
        if not isinstance(error, Failed):
            return AuditgapError(f"{where}: {error}")
        if error.kind == OutOfMemory.__name__:
            return OutOfMemory(error.answer["tokens"], error.answer["rows"])
        if error.kind in ("UsageError", "AuditgapError"):  # a sentence that needs no log beside it
            return (UsageError if error.kind == "UsageError" else AuditgapError)(error.said)
        self._children[rank].close(keep_log=True)
        line = (error.said.strip().splitlines() or ["no message"])[0][:300].removesuffix(".")
        return AuditgapError(f"{where} failed ({error.kind}): {line}. Its log is {error.log}.")

    def _end(self, asked: Sequence[Future], cause: int | None) -> None:
        """End the ranks that still work, which may be waiting for each other, and then all; keeps
        the cause's log."""
        self.closed = True
        for child, future in zip(self._children, asked, strict=True):
            if not future.done():
                with suppress(ProcessLookupError, PermissionError):
                    # its thread, which waits for its answer, hears of it and closes it
                    os.killpg(child.pid, signal.SIGKILL)
        wait(asked)
        for rank, child in enumerate(self._children):
            child.close(patience=0.5)
            if rank != cause:
                shutil.rmtree(child.log.parent, ignore_errors=True)  # it was only killed
        self._pool.shutdown()


def _named(
    edits: Sequence[Edit | None],
) -> tuple[list[dict[str, Any] | None], dict[str, torch.Tensor]]:
    """Each edit as {"name", "site", "goes_on"} (None without one) and the δ by name; an edit that stands twice
    travels once."""
    numbers: dict[int, str] = {}
    deltas: dict[str, torch.Tensor] = {}
    for edit in edits:
        if edit is not None and id(edit) not in numbers:
            numbers[id(edit)] = str(len(numbers))
            deltas[numbers[id(edit)]] = edit.delta

    def told(edit: Edit) -> dict[str, Any]:
        site = edit.site.layer_index
        return {"name": numbers[id(edit)], "site": site, "goes_on": edit.goes_on}

    return [None if e is None else told(e) for e in edits], deltas
