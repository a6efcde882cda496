"""Prove every family, and write the table and its page: `make families`."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import torch

from auditgap.engines.families.building import CAUSAL, WRAPPERS
from auditgap.engines.families.proof import prove
from auditgap.engines.families.table import Proof, store
from auditgap.models import quiet

_PAGE = Path(__file__).parents[3] / "docs" / "families.md"


def _prove(asked: tuple[str, bool]) -> Proof:
    model_type, wrapper = asked
    return prove(model_type, wrapper=wrapper)


def _begin() -> None:
    quiet()
    torch.set_num_threads(1)


def main() -> int:
    asked = [*((t, True) for t in WRAPPERS), *((t, False) for t in CAUSAL)]  # the slow ones first
    spawn = multiprocessing.get_context("spawn")
    proofs: list[Proof] = []
    with spawn.Pool(min(len(os.sched_getaffinity(0)), 8), _begin, maxtasksperchild=40) as pool:
        for proof in pool.imap_unordered(_prove, asked):
            proofs.append(proof)
            print(f"{len(proofs)}/{len(asked)} {proof.type}: {proof.answer}", flush=True)
    table = store(proofs)
    _PAGE.write_text(table.page(), encoding="utf-8")
    print(table.counts(wrapper=False), table.counts(wrapper=True))
    return 1 if any(proof.answer == "wrong" for proof in proofs) else 0


if __name__ == "__main__":
    sys.exit(main())
