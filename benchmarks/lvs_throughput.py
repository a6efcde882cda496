"""How much faster is the engine than the plain way, on the same cells, in one run, with the same
answers?

    python benchmarks/lvs_throughput.py                                  # SmolLM2 on this CPU
    python benchmarks/lvs_throughput.py --dtype bfloat16 --skip-plain    # the engine alone
    python benchmarks/lvs_throughput.py --model random-8b --device cuda --dtype bfloat16

Prints seconds and ratios (pairs of runs taken in turn, medians), how far the δ and the texts agree,
and the achieved FLOP/s over the machine's matmul rate. Useful FLOPs only: padding, masked logits
and recomputation count as waste.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from plain import peer_attack, plain_attack, plain_generate

from auditgap import models
from auditgap.audits.timing import matmul_rate
from auditgap.engines import Request
from auditgap.engines.hf import HFEngine
from auditgap.interventions.pgd import PGD, Ball, Goal, attack
from auditgap.models import Rendered
from auditgap.types import Budget, Edit, Prompt, Site, Subject

SIZES = (0.01, 0.03, 0.1)
STEPS = 10
#: What an audit searches with by default; the ways beside it are the paper's attack.
DEFAULT = PGD(steps=STEPS, schedule="decreasing", iterate="best")


def main() -> None:
    options = parse()
    loaded, rendered, target = load(options)
    engine = HFEngine(loaded, batch_tokens=options.batch_tokens, compile=options.compile)
    sites = [Site(-1), Site(round(loaded.n_blocks / 2)), Site(loaded.n_blocks - 1)]
    for site in sites:
        engine.self_test(site)
    radii = {
        s: [radii_of(h, r) for h, r in zip(engine.activations(rendered, s), rendered, strict=True)]
        for s in sites
    }
    rate = matmul_rate(loaded.dtype, options.device)
    cpu = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if options.device != "cpu" else cpu
    result: dict[str, Any] = {
        "machine": machine,
        "model": options.model,
        "dtype": options.dtype,
        "torch": torch.__version__,
        "prompts": len(rendered),
        "tokens": [len(r.ids) for r in rendered],
        "sites": [str(s) for s in sites],
        "eps": SIZES,
        "new_tokens": options.new_tokens,
        "matmul_gflops": rate / 1e9,
    }
    seconds: dict[str, list[float]] = {}
    found: dict[str, Any] = {}
    for repeat in range(options.repeats):
        for name, work in ways(options, engine, rendered, target, sites, radii).items():
            if name.startswith("plain") and (options.skip_plain or repeat >= options.plain_repeats):
                continue
            rates = [matmul_rate(loaded.dtype, options.device)]
            took, found[name] = timed(lambda work=work: work(found), options.device)
            rates.append(matmul_rate(loaded.dtype, options.device))
            seconds.setdefault(name, []).append(took)
            result.setdefault("matmul_gflops_beside", {}).setdefault(name, []).append(
                statistics.mean(rates) / 1e9
            )
            print(
                f"  {name:24s} {took:8.2f} s   matmul beside it {statistics.mean(rates) / 1e9:,.0f}"
                " GFLOP/s",
                flush=True,
            )
    result["seconds"] = {name: statistics.median(times) for name, times in seconds.items()}
    took = result["seconds"]
    beside = {n: statistics.median(v) * 1e9 for n, v in result["matmul_gflops_beside"].items()}
    for site in sites[:2]:
        useful = pgd_flops(loaded, rendered, len(target), site)
        key = f"engine pgd {site}"
        result[f"{site}_gflops"] = useful / took[key] / 1e9
        result[f"{site}_share_of_matmul"] = useful / took[key] / beside[key]
    totals = {
        way: sum(took.get(f"{way} pgd {s}", 0.0) for s in sites)
        for way in ("engine", "default", "plain", "peer")
    }
    result["pgd_seconds"] = totals
    result["default_ratio_to_paper"] = totals["default"] / totals["engine"]
    if not options.skip_peer:
        result["pgd_ratio_to_peer"] = totals["peer"] / totals["engine"]
    if not options.skip_plain:
        result["pgd_ratio_to_plain"] = totals["plain"] / totals["engine"]
        result["generation_ratio_to_plain"] = took["plain generation"] / took["engine generation"]
        grid = {way: totals[way] + took[f"{way} generation"] for way in ("plain", "engine")}
        result["grid_ratio_to_plain"] = grid["plain"] / grid["engine"]
        result["agreement"] = agreement(found, sites)
    print(json.dumps(result, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="smollm2",
        help="a model to audit, or random-8b (Llama 8B shapes, random weights)",
    )
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-tokens", type=int, default=None)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the blocks that PGD runs"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain-repeats", type=int, default=1, help="the plain way takes minutes")
    parser.add_argument("--skip-plain", action="store_true")
    parser.add_argument("--skip-peer", action="store_true")
    return parser.parse_args()


def load(options: argparse.Namespace) -> tuple[models.LoadedModel, list[Rendered], tuple[int, ...]]:
    """The model, its rendered prompts and the target's token ids."""
    if options.model == "random-8b":
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            rope_theta=500000.0,
            max_position_embeddings=8192,
            pad_token_id=0,
        )
        torch.manual_seed(0)
        with torch.device(options.device):
            model = LlamaForCausalLM._from_config(config, dtype=models.DTYPES[options.dtype])
        loaded = models.wrap(model, _NoTokenizer(), Subject("random-8b", "random-8b"))
        rng = torch.Generator().manual_seed(0)
        rendered = []
        for n in range(options.prompts):
            length = 56 + 4 * (n % 5)  # what benchmark prompts come to under an 8B chat template
            ids = tuple(torch.randint(1000, 100000, (length,), generator=rng).tolist())
            rendered.append(Rendered(Prompt(f"random {n}"), ids, (True,) * length))
        return loaded, rendered, (40914, 11, 1618, 374)
    from auditgap.data import load_prompts

    loaded = models.load(options.model, dtype=options.dtype, device=options.device)
    rendered = [loaded.render(p) for p in load_prompts("harmbench", limit=options.prompts).prompts]
    return (
        loaded,
        rendered,
        tuple(loaded.tokenizer("Sure, here is", add_special_tokens=False)["input_ids"]),
    )


class _NoTokenizer:
    """Random weights speak no language: completions are compared by their token ids."""

    pad_token_id, eos_token_id = 0, None

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))


def radii_of(h: torch.Tensor, rendered: Rendered) -> tuple[float, ...]:
    ball = Ball.of(h, rendered.content)
    return tuple(ball.radius(Budget(size, "rms")) for size in SIZES)


def ways(
    options: argparse.Namespace,
    engine: HFEngine,
    rendered: list[Rendered],
    target: tuple[int, ...],
    sites: list[Site],
    radii: dict[Site, list[tuple[float, ...]]],
) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """name -> work, in the order they run. Generation speaks under the engine's δ, so that texts
    can be compared."""
    model, blocks = engine.model, engine.blocks
    works: dict[str, Callable[[dict[str, Any]], Any]] = {}
    for site in sites:
        goals = [Goal(r, target, radius) for r, radius in zip(rendered, radii[site], strict=True)]
        works[f"engine pgd {site}"] = lambda _f, g=goals, s=site: [
            [f.delta for f in row] for row in attack(engine, g, s, PGD(steps=STEPS), score=False)
        ]
        works[f"default pgd {site}"] = lambda _f, g=goals, s=site: [
            [f.delta for f in row] for row in attack(engine, g, s, DEFAULT, score=False)
        ]
        if not options.skip_peer:
            works[f"peer pgd {site}"] = lambda _f, s=site: peer_attack(
                model, blocks, rendered, target, s, radii[s], engine.pad_id, STEPS
            )

        def plain(_f: dict[str, Any], s: Site = site) -> list[list[torch.Tensor]]:
            with eager(model):
                return [
                    [plain_attack(model, blocks, r, target, s, e, STEPS).cpu() for e in radius]
                    for r, radius in zip(rendered, radii[s], strict=True)
                ]

        works[f"plain pgd {site}"] = plain

    def requests(found: dict[str, Any]) -> list[Request]:
        return [
            Request(r, Edit(s, d))
            for s in sites
            for r, row in zip(rendered, found[f"engine pgd {s}"], strict=True)
            for d in row
        ]

    works["engine generation"] = lambda f: [
        c.ids for c in engine.generate(requests(f), options.new_tokens)
    ]

    def plain_generation(f: dict[str, Any]) -> list[tuple[int, ...]]:
        with eager(model):
            return [
                plain_generate(
                    model,
                    blocks,
                    q.rendered,
                    q.edit.site,
                    q.edit.delta.to(engine.device),
                    options.new_tokens,
                    engine.pad_id,
                )
                for q in requests(f)
            ]

    works["plain generation"] = plain_generation
    return works


class eager:
    """The attention that a plain implementation gets."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.before = model, model.config._attn_implementation

    def __enter__(self) -> None:
        self.model.set_attn_implementation("eager")

    def __exit__(self, *_: object) -> None:
        self.model.set_attn_implementation(self.before)


def timed(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    made = work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, made


def pgd_flops(loaded: models.LoadedModel, rendered: list[Rendered], k: int, site: Site) -> float:
    """Useful FLOPs of PGD at a site: blocks above it and the target's logits, forward and back.

    Matrix products of the linear layers only (attention's own are under 2 % at these lengths), and
    the first step, which every budget shares, counts once a prompt. The last block's MLP counts
    only where it is read.
    """
    per_token = sum(
        p.numel()
        for b in loaded.blocks[site.layer_index + 1 :]
        for p in b.parameters()
        if p.dim() == 2
    )
    head = loaded.model.get_output_embeddings().weight.numel()
    last_mlp = (
        sum(p.numel() for p in loaded.blocks[-1].mlp.parameters())
        if site.layer_index < loaded.n_blocks - 1
        else 0
    )
    total = 0.0
    for r in rendered:
        forward = 2 * (per_token * (len(r.ids) + k) + head * k - last_mlp * (len(r.ids) - 1))
        total += 2 * forward * (1 + (STEPS - 1) * len(SIZES))
    return total


def agreement(found: dict[str, Any], sites: list[Site]) -> dict[str, float]:
    """Largest relative difference of ‖δ‖₂, least share of equal signs, share of equal
    completions."""
    norms, signs = [], []
    for site in sites:
        for mine, theirs in zip(
            found[f"engine pgd {site}"], found[f"plain pgd {site}"], strict=True
        ):
            for a, b in zip(mine, theirs, strict=True):
                norms.append(abs(a.norm() - b.norm()).item() / max(b.norm().item(), 1e-30))
                signs.append((a.sign() == b.cpu().sign()).float().mean().item())
    texts = [
        a == b[: len(a)]
        for a, b in zip(found["engine generation"], found["plain generation"], strict=True)
    ]
    return {
        "l2_largest_relative_difference": max(norms),
        "signs_equal_least": min(signs),
        "completions_equal": sum(texts) / len(texts),
    }


if __name__ == "__main__":
    main()
