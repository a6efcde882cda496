"""One rank of a subject that is sliced over several; `RankedEngine` starts it, and nothing else
does.

    # the connection, its parent, its scratch folder
    python -P -m auditgap.audits.rank 7 1234 /tmp/auditgap-k2

RANK and WORLD_SIZE say which it is. It reads its settings, says that it is there, and then does
what all ranks are told at the same time, each on its slices of the weights, until the connection
closes: `load` (form the group, open the model), `self_test`, `activations`, `attack`, `generate`,
`nll`. Every rank comes to the same results; rank 0 sends them. What goes wrong on one ends it,
since it is out of step with the others from there on.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import astuple
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from auditgap import models
from auditgap.audits.ranked import from_bytes, to_bytes
from auditgap.engines import Request, fitting
from auditgap.engines.child import die_with, end_without, receive, send
from auditgap.engines.fitting import Fitting, OutOfMemory, meter_of
from auditgap.engines.hf import HFEngine
from auditgap.interventions.pgd import PGD, Goal, attack
from auditgap.models import Chat, Outline, Rendered, Shard
from auditgap.models.door import open_tokenizer
from auditgap.training import ranks
from auditgap.types import Edit, Prompt, Site, Subject

_Tensors = dict[str, torch.Tensor]
_Answer = tuple[dict[str, Any], _Tensors]
#: Minutes that a rank waits for the others before it gives up; the parent ends it much sooner when
#: one has failed.
_PATIENCE = 30.0


class Rank:
    """The tasks, each from its message and tensors to an answer and tensors."""

    engine: HFEngine  #: once it is told to `load`

    def __init__(self, settings: Mapping[str, Any], stack: ExitStack) -> None:
        self.settings, self._stack = settings, stack

    def do(self, message: Mapping[str, Any], tensors: _Tensors) -> _Answer:
        tasks = {
            "load": self.load,
            "self_test": self.self_test,
            "activations": self.activations,
            "attack": self.attack,
            "generate": self.generate,
            "nll": self.nll,
        }
        return tasks[message["do"]](message, tensors)

    def load(self, message: Mapping[str, Any], _: _Tensors) -> _Answer:
        said = self.settings
        fitting.LOCKSTEP = True
        self._stack.enter_context(
            ranks.joined(timeout_minutes=_PATIENCE, meet=Path(message["meet"]))
        )
        folder = Path(said["folder"])
        models.preflight(folder)
        tokenizer = open_tokenizer(folder, said["name"])
        outline = Outline(  # the parent has looked at it, and hashed it, already
            Subject(said["name"], said["fingerprint"]),
            folder,
            Chat(said["name"], tokenizer, None),
            said["n_blocks"],
            said["width"],
            n_block_params=0,
            n_head_params=0,
            n_params=0,
        )
        loaded = models.load(
            outline,
            dtype=said["dtype"],
            device=ranks.device(said["device"]),
            shard=Shard.of(said["shard"]),
        )
        self.engine = HFEngine(
            loaded,
            batch_tokens=said["batch_tokens"],
            agreed=ranks.of_main,
            fitting=Fitting(meter_of(loaded.model), most=message["most"], least=ranks.lowest),
        )
        return {}, {}

    def self_test(self, message: Mapping[str, Any], _: _Tensors) -> _Answer:
        self.engine.self_test(Site(message["site"]))
        return {}, {}

    def activations(self, message: Mapping[str, Any], _: _Tensors) -> _Answer:
        found = self.engine.activations(
            [_rendered(ids) for ids in message["prompts"]], Site(message["site"])
        )
        return {}, {str(i): h for i, h in enumerate(found)}

    def attack(self, message: Mapping[str, Any], tensors: _Tensors) -> _Answer:
        goals = [
            Goal(
                _rendered(g["ids"]),
                tuple(g["target"]),
                tuple(g["radii"]),
                g["maximise"],
                tuple(tensors[f"{i}.{r}"] for r in range(len(g["radii"]))) if g["warm"] else None,
                g["span"] and tuple(g["span"]),
                g["goes_on"],
            )
            for i, g in enumerate(message["goals"])
        ]
        found = attack(
            self.engine, goals, Site(message["site"]), PGD(**message["pgd"]), score=message["score"]
        )
        numbers = [[[f.nll_clean, f.nll_edited, f.finite, f.curve] for f in row] for row in found]
        return {"found": numbers}, {
            f"{i}.{r}": f.delta for i, row in enumerate(found) for r, f in enumerate(row)
        }

    def generate(self, message: Mapping[str, Any], tensors: _Tensors) -> _Answer:
        edits = _edits([r["edit"] for r in message["requests"]], tensors)
        asked = [
            Request(_rendered(r["ids"]), edit, tuple(r["target"]))
            for r, edit in zip(message["requests"], edits, strict=True)
        ]
        return {
            "completions": [astuple(c)[1:] for c in self.engine.generate(asked, message["new"])]
        }, {}

    def nll(self, message: Mapping[str, Any], tensors: _Tensors) -> _Answer:
        edits = _edits([edit for _, _, edit in message["asked"]], tensors)
        prompts = [_rendered(ids) for ids, _, _ in message["asked"]]
        return {
            "nll": self.engine.nll(prompts, [answer for _, answer, _ in message["asked"]], edits)
        }, {}


def _rendered(ids: Sequence[int]) -> Rendered:
    """A prompt as the engine reads it: its tokens."""
    return Rendered(Prompt(""), tuple(ids), (True,) * len(ids))


def _edits(named: Sequence[Mapping[str, Any] | None], deltas: _Tensors) -> list[Edit | None]:
    made = {
        n["name"]: Edit(Site(n["site"]), deltas[n["name"]], n["goes_on"])
        for n in named
        if n is not None
    }
    return [None if n is None else made[n["name"]] for n in named]


def main(fd: int, parent: int, scratch: Path) -> None:
    """Serve the connection `fd` until it closes, or until something fails."""
    die_with(parent, scratch)
    models.quiet()
    connection = Connection(fd)
    with suppress(EOFError, OSError), ExitStack() as stack:
        settings, _ = receive(connection)
        rank = Rank(settings, stack)
        send(connection, {})
        while True:
            message, data = receive(connection)
            try:
                answer, tensors = rank.do(message, from_bytes(data))
            except Exception as error:
                traceback.print_exc()
                full = error if isinstance(error, OutOfMemory) else None
                about = {} if full is None else {"tokens": full.tokens, "rows": full.rows}
                send(connection, {"error": type(error).__name__, "said": str(error), **about})
                break
            send(connection, answer, to_bytes(tensors)) if ranks.is_main() else send(connection, {})
    sys.stdout.flush()
    time.sleep(0.1)  # a parent that was killed hangs up a moment before it is gone
    end_without(parent, scratch)
    os._exit(0)  # no farewell from the group, which would wait for the others


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
