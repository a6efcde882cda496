"""How much faster does decoding become by a cache that grows in place (`engines.caches.Growing`)?

    python benchmarks/decoding.py --rows 64 --tokens 64

*theirs*: transformers' own layers, which copy all keys and values at every token, and again whenever a
row ends. *ours*: new tokens are written behind the others, and the last rows close the gaps. Both write
the same texts in turn, once with rows that all go on to the end and once with rows that end all along.
CPU seconds where there is no GPU, for a machine with other work; medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import DynamicCache

from auditgap import models
from auditgap.engines import hooked
from auditgap.engines.caches import growing
from auditgap.engines.hf import HFEngine


class Ending:
    """Greedy, but row r of n ends where `ends` says so: the first after an eighth of the steps."""

    def __init__(self, engine: HFEngine, rows: int, steps: int, *, ends: bool) -> None:
        self.stops = sorted(engine.loaded.stop_ids)
        self.last = [steps // 8 + r * steps // rows if ends else steps for r in range(rows)]
        self.step = 0

    def __call__(self, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        self.step += 1
        logits[:, self.stops] = -torch.finfo(logits.dtype).max
        over = torch.tensor([self.step > self.last[r] for r in rows], device=logits.device)
        return torch.where(over, self.stops[0], logits.argmax(-1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--times", type=int, default=3)
    given = parser.parse_args()
    engine = HFEngine(models.load(given.model, device=given.device, dtype=given.dtype))
    engine.check()
    ids = torch.randint(100, 1000, (given.rows, given.prompt), device=engine.device)
    mask = torch.ones_like(ids)
    clock = time.perf_counter if engine.device.type == "cuda" else time.process_time

    def seconds(*, ours: bool, ends: bool) -> tuple[float, list[list[int]]]:
        hooked.growing = growing if ours else lambda config: DynamicCache(config=config)
        with torch.inference_mode():
            cache = engine.new_cache()
            logits = engine.forward(ids, mask, keep=1, cache=cache).logits
            choose = Ending(engine, given.rows, given.tokens, ends=ends)
            began = clock()
            written = engine.decode(cache, logits, mask, given.tokens, choose)
        return clock() - began, [row.ids for row in written]

    for ends in (False, True):
        times: dict[bool, list[float]] = {True: [], False: []}
        texts = {}
        for _ in range(given.times):
            for ours in (False, True):
                took, texts[ours] = seconds(ours=ours, ends=ends)
                times[ours].append(took)
        theirs, ours = (statistics.median(times[way]) for way in (False, True))
        print(
            f"{'rows end all along' if ends else 'no row ends'}: theirs {theirs:.2f} s, ours"
            f" {ours:.2f} s, {theirs / ours:.2f} ×; the same texts: {texts[True] == texts[False]}"
        )


if __name__ == "__main__":
    main()
