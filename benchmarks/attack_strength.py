"""Does the attack find what is known to be there, and does its certificate say when it cannot?

    python benchmarks/attack_strength.py                     # all, some minutes on two cores
    python benchmarks/attack_strength.py --only honest

*honest*: tiny random models of families that set no threshold, every site, three sizes; a flag
`masked` or `no_power` is false. *masked*: every planted mask at two blocks and three sizes of a few
of them; no flag is a miss, unless the engine refuses the model. Prints JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from auditgap.errors import AuditgapError
from auditgap.stats import wilson
from auditgap.types import Site

FALSE = {"masked", "no_power"}
SITES = [Site(i) for i in range(-1, 4)]  # the embedding and each of the tiny models' blocks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["honest", "masked"])
    parser.add_argument("--longer", action="store_true", help="with the search of 4 × the steps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tests = Path(__file__).parents[1] / "tests"
    sys.path[:0] = [str(tests), str(tests / "interventions")]
    masks = importlib.import_module("masks")
    result: dict[str, Any] = {}
    started = time.perf_counter()
    if options.only != "masked":
        result["honest"] = honest(masks, options.seed, options.longer)
    if options.only != "honest":
        result["masked"] = masked(masks, options.seed)
    print(json.dumps({**result, "seconds": round(time.perf_counter() - started)}, indent=2))


def honest(masks: ModuleType, seed: int, longer: bool) -> dict[str, Any]:
    flags: Counter[str] = Counter()
    cells, alarmed, errors = 0, [], []
    for family in masks.FAMILIES:
        loaded = masks.load(family, seed)
        for site in SITES:
            for size, one in zip(
                masks.SIZES, masks.cells_of(loaded, site, seed, longer=longer), strict=True
            ):
                cells += 1
                errors.append(one.gradient_error)
                flags.update(one.flags)
                if FALSE & set(one.flags):
                    alarmed.append([family, str(site), size, one.describe()])
        print(f"  {family}: {len(alarmed)} alarms in {cells} cells", file=sys.stderr, flush=True)
    found = wilson(len(alarmed), cells)
    return {
        "families": len(masks.FAMILIES),
        "cells": cells,
        "false": len(alarmed),
        "share": [len(alarmed) / cells, found.lo, found.hi],
        "flags": flags,
        "largest_error": max(errors),
        "alarmed": alarmed,
    }


def masked(masks: ModuleType, seed: int) -> dict[str, Any]:
    caught: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    cells: Counter[str] = Counter()
    missed = []
    for family in list(masks.FAMILIES)[::3]:
        loaded = masks.load(family, seed)
        for name in masks.MASKS:
            for site, block in ((Site(-1), 1), (Site(0), 2), (Site(1), 3)):
                cells[name] += len(masks.SIZES)
                try:
                    with masks.planted(loaded, name, block):
                        found = masks.cells_of(loaded, site, seed)
                except AuditgapError:  # the engine's self-test: nothing is measured on such a model
                    refused[name] += len(masks.SIZES)
                    continue
                for size, one in zip(masks.SIZES, found, strict=True):
                    caught[name] += bool(FALSE & set(one.flags))
                    if not FALSE & set(one.flags):
                        missed.append([name, family, str(site), size, one.describe()])
        print(
            f"  {family}: {caught.total()} + {refused.total()} refused of {cells.total()} flagged",
            file=sys.stderr,
            flush=True,
        )
    stopped = caught.total() + refused.total()
    share = wilson(stopped, cells.total())
    return {
        "cells": cells.total(),
        "flagged": caught.total(),
        "refused": refused.total(),
        "share": [stopped / cells.total(), share.lo, share.hi],
        "by_mask": {name: [caught[name], refused[name], cells[name]] for name in cells},
        "missed": missed,
    }


if __name__ == "__main__":
    main()
