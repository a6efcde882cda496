"""How often does a planted impostor pass, and do the honest models keep their verdicts?

    python benchmarks/impostors.py --seeds 20                    # all, about 8 s a seed and model
    python benchmarks/impostors.py --seeds 5 --only "weak attack" robust

Prints JSON: of each model the verdicts and reasons, as if a longer search had been run and had found
nothing more than it did. `tests/audits/test_impostors.py` runs the first seed with the tests.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from auditgap.stats.decision import Decision


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    tests = Path(__file__).parents[1] / "tests"
    sys.path[:0] = [str(tests), str(tests / "audits")]
    impostors = importlib.import_module("impostors")
    started, found = time.perf_counter(), {}
    for name, audit in audits(impostors).items():
        if options.only and name not in options.only:
            continue
        said: Counter[str] = Counter()
        for seed in range(options.first, options.first + options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                one = audit(Path(folder), seed)
            said[f"{one.verdict}: {one.reason}"] += 1
        found[name] = dict(said)
        print(name, dict(said), file=sys.stderr, flush=True)
    seconds = round(time.perf_counter() - started)
    print(json.dumps({"seeds": options.seeds, "seconds": seconds, **found}, indent=2))


def audits(impostors: ModuleType) -> dict[str, Callable[[Path, int], Decision]]:
    """Every model by its name: an audit in a folder, with a seed."""

    def honest(plant: object, **changes: bool) -> Callable[[Path, int], Decision]:
        return lambda folder, seed: impostors.run(folder, replace(plant, seed=seed), **changes)[1]

    def planted(one: object) -> Callable[[Path, int], Decision]:
        def audit(folder: Path, seed: int) -> Decision:
            store, _, evidence = one.run(folder, seed)
            return impostors.as_if_searched_longer(store, evidence)

        return audit

    return {
        "robust": honest(impostors.ROBUST, longer=True),
        "fragile": honest(impostors.FRAGILE),
        **{name: planted(one) for name, one in impostors.IMPOSTORS.items()},
    }


if __name__ == "__main__":
    main()
