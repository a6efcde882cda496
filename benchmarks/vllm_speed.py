"""How much faster is vLLM than transformers on the same questions and the same edits, in one run,
with the same answers?

    # SmolLM2, fp32, this CPU
    python benchmarks/vllm_speed.py
    python benchmarks/vllm_speed.py --model meta-llama/Llama-3.1-8B-Instruct --dtype bfloat16 --device cuda --judge

Two works, each in both engines in turn, medians over the repeats; opening a model is timed apart
and counts in no ratio:

- answers to N prompts: vLLM against a plain `model.generate` (left-padded, greedy) at the same
batch, `--batch` prompts at a
  time, and, where they are more, vLLM handed all of them at once; with --judge a verdict on each by
  the built-in judge besides;
- completions of M prompts under an edit each (random signs, sites taken in turn): vLLM against
`HFEngine.generate`.

Prints a table on stderr and JSON with seconds, ratios and the share of equal answers (fp32: all, or
nearly so).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from auditgap import models
from auditgap.data import load_prompts
from auditgap.engines import Request, Serving
from auditgap.engines.batching import left_pad
from auditgap.engines.hf import HFEngine
from auditgap.judges import load_judge
from auditgap.models import Rendered
from auditgap.types import Edit, Exchange, Prompt, Site


def main() -> None:
    options = parse()
    start = time.perf_counter()
    hf = HFEngine(models.load(options.model, dtype=options.dtype, device=options.device))
    opened = {"hf": time.perf_counter() - start}
    rendered = prompts(hf, options)
    edited = [
        Request(r, e)
        for r, e in zip(rendered, edits(hf, rendered[: options.edited], options), strict=False)
    ]
    clean = [Request(r) for r in rendered]

    def batched(items: Sequence[Any]) -> list[Sequence[Any]]:
        return [items[i : i + options.batch] for i in range(0, len(items), options.batch)]

    serving = Serving(
        engine="vllm",
        dtype=options.dtype,
        device=options.device,
        max_model_len=options.max_model_len,
    )
    start = time.perf_counter()
    with serving.open(options.model) as vllm:
        opened["vllm"] = time.perf_counter() - start
        works: dict[str, Callable[[], list[tuple[int, ...]]]] = {
            "answers, transformers": lambda: [
                a for some in batched(rendered) for a in plain(hf, some, options.new_tokens)
            ],
            "answers, vLLM": lambda: [
                c.ids for some in batched(clean) for c in vllm.generate(some, options.new_tokens)
            ],
            "answers at once, vLLM": lambda: [
                c.ids for c in vllm.generate(clean, options.new_tokens)
            ],
            "edited, transformers": lambda: [
                c.ids for c in hf.generate(edited, options.new_tokens)
            ],
            "edited, vLLM": lambda: [c.ids for c in vllm.generate(edited, options.new_tokens)],
        }
        if options.batch >= len(clean):
            del works["answers at once, vLLM"]
        for site in {r.edit.site for r in edited if r.edit is not None}:
            hf.self_test(site)
        # the first time pays for self-tests and kernels
        for work in ("answers, vLLM", "edited, vLLM"):
            works[work]()
        seconds, said = measure(works, options.repeats)
    if options.judge:
        judged = judging(hf, rendered, said["answers, vLLM"])
        for work in ("answers, transformers", "answers, vLLM", "answers at once, vLLM"):
            if work in seconds:
                seconds[work.replace("answers", "answers and verdicts")] = [
                    s + judged for s in seconds[work]
                ]
    print(json.dumps(summary(options, hf, rendered, seconds, said, opened), indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=256, help="answered without an edit")
    parser.add_argument("--edited", type=int, default=32, help="of these, answered under an edit")
    parser.add_argument("--batch", type=int, default=32, help="prompts at a time, in both engines")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument(
        "--set",
        default="harmbench",
        help="prompt set; repeated with a number in front where it is too short",
    )
    parser.add_argument(
        "--layers", default="embedding,mid,last", help="where the edits go, in turn"
    )
    parser.add_argument("--size", type=float, default=0.1, help="of an edit, over the RMS of h")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-model-len", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--judge", action="store_true", help="time the built-in judge on the answers too"
    )
    return parser.parse_args()


def prompts(engine: HFEngine, options: argparse.Namespace) -> list[Rendered]:
    """As many prompts as asked for, no two alike, so that no prefix cache can answer for
    another."""
    known = load_prompts(options.set).prompts
    wanted = [
        (
            known[i]
            if i < len(known)
            else Prompt(f"({i // len(known) + 1}) {known[i % len(known)].text}")
        )
        for i in range(options.prompts)
    ]
    return [engine.render(p) for p in wanted]


def edits(
    engine: HFEngine, rendered: Sequence[Rendered], options: argparse.Namespace
) -> list[Edit]:
    """Random signs of the given size, one a prompt, at the sites in turn."""
    sites: list[Site] = models.parse_sites(options.layers, engine.loaded.n_blocks)
    draw, made = torch.Generator().manual_seed(0), []
    for i, r in enumerate(rendered):
        site = sites[i % len(sites)]
        h = engine.activations([r], site)[0]
        rms = h[torch.tensor(r.content)].pow(2).mean().sqrt()
        made.append(Edit(site, options.size * rms * torch.randn(h.shape, generator=draw).sign()))
    return made


@torch.inference_mode()
def plain(engine: HFEngine, rendered: Sequence[Rendered], new_tokens: int) -> list[tuple[int, ...]]:
    """`model.generate` on all prompts as one left-padded batch."""
    ids, mask = left_pad([r.ids for r in rendered], engine.pad_id, engine.device)
    stops = sorted(engine.loaded.stop_ids)
    made = engine.model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=engine.pad_id,
        eos_token_id=stops,
    )[:, ids.shape[1] :].tolist()
    return [
        tuple(row[: next((i for i, t in enumerate(row) if t in stops), len(row))]) for row in made
    ]


def measure(
    works: dict[str, Callable[[], list[tuple[int, ...]]]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[tuple[int, ...]]]]:
    """Seconds of every repeat and the last answers of each work; the works take turns, so that a
    slow minute hits all."""
    seconds: dict[str, list[float]] = {}
    said: dict[str, list[tuple[int, ...]]] = {}
    for _ in range(repeats):
        for name, work in works.items():
            start = time.perf_counter()
            said[name] = work()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
            print(f"  {name:28s} {seconds[name][-1]:8.2f} s", file=sys.stderr, flush=True)
    return seconds, said


def judging(
    engine: HFEngine, rendered: Sequence[Rendered], answers: Sequence[Sequence[int]]
) -> float:
    """Seconds that the built-in judge takes over the answers; it is the same for both engines."""
    judge = load_judge("builtin", engine=engine, device=str(engine.device))
    texts = [engine.loaded.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    start = time.perf_counter()
    judge.judge([Exchange(r.prompt, text) for r, text in zip(rendered, texts, strict=True)])
    return time.perf_counter() - start


def summary(
    options: argparse.Namespace,
    engine: HFEngine,
    rendered: Sequence[Rendered],
    seconds: dict[str, list[float]],
    said: dict[str, list[tuple[int, ...]]],
    opened: dict[str, float],
) -> dict[str, Any]:
    took = {name: statistics.median(times) for name, times in seconds.items()}
    kinds = [k for k in ("answers", "answers and verdicts", "edited") if f"{k}, vLLM" in took]
    ratios = {k: took[f"{k}, transformers"] / took[f"{k}, vLLM"] for k in kinds}
    if "answers at once, vLLM" in took:
        ratios["answers at once"] = took["answers, transformers"] / took["answers at once, vLLM"]
    equal = {
        k: statistics.mean(
            a == b for a, b in zip(said[f"{k}, transformers"], said[f"{k}, vLLM"], strict=True)
        )
        for k in ("answers", "edited")
    }
    print(f"\n{'':22s}{'transformers':>14s}{'vLLM':>10s}{'ratio':>8s}", file=sys.stderr)
    for kind in kinds:
        row = (
            f"{took[f'{kind}, transformers']:12.2f} s{took[f'{kind}, vLLM']:8.2f}"
            f" s{ratios[kind]:8.2f}"
        )
        print(f"{kind:22s}{row}", file=sys.stderr)
    if "answers at once" in ratios:
        at_once = took["answers at once, vLLM"]
        print(
            f"answers at once, vLLM: {at_once:.2f} s, ratio {ratios['answers at once']:.2f}",
            file=sys.stderr,
        )
    cpu = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "machine": cpu if options.device == "cpu" else torch.cuda.get_device_name(),
        "model": options.model,
        "dtype": options.dtype,
        "torch": torch.__version__,
        "prompts": len(rendered),
        "edited": options.edited,
        "prompt_tokens": statistics.mean(len(r.ids) for r in rendered),
        "new_tokens": options.new_tokens,
        "batch": options.batch,
        "repeats": options.repeats,
        "opening_seconds": opened,
        "seconds": took,
        "all_seconds": seconds,
        "ratios": ratios,
        "equal_answers": equal,
    }


if __name__ == "__main__":
    main()
