"""What does a step of the dissociated model cost, against the plain way, on the same batch and with
the same loss?

    # SmolLM2 on this CPU: full fine-tuning and LoRA
    python benchmarks/training_step.py
    python benchmarks/training_step.py --rows 2 --tokens 512 --ways plain,ours
    python benchmarks/training_step.py --model random-8b --device cuda --dtype bfloat16 --train lora --checkpointing

*plain*: a second frozen model in memory, fp32 log-probabilities of both over all positions,
output_hidden_states=True.
*ours*: `MonitorLoss` with the reference's final hidden states from a cache. *checkpointed*:
the same, with gradient checkpointing. One step is a forward and a backward (the optimizer is the
same for all, so it is left out). Every way runs in a process of its own, and takes turns with the
others; seconds are medians, CPU seconds besides for a machine with other work. Peak memory is the
process's (VmHWM, from the first step on) or the GPU's, in all, and above what one loaded model
takes. Needs torch, transformers and peft only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from auditgap import models
from auditgap.models import find_blocks
from auditgap.probes.monitor import Monitor
from auditgap.probes.pooling import pooled
from auditgap.training.constructions.monitor import PAPER_WEIGHTS, TARGET_LOGIT
from auditgap.training.constructions.monitor.loss import MonitorLoss
from auditgap.training.objective import Head, base_lm
from auditgap.training.rows import collate
from auditgap.types import Prompt

SENTENCES = (
    "Good bread needs only flour, water, salt and time.",
    "Mix the flour with most of the water and let it rest for half an hour.",
    "Then add the salt and the starter, and fold the dough over itself until it feels smooth.",
    "Keep the bowl covered, and fold the dough again every thirty minutes for the next two hours.",
    "When it has grown by half, shape it gently and leave it in the cold overnight.",
    "In the morning heat the oven with a heavy pot inside, as hot as it will go.",
    "Bake the loaf with the lid on for twenty minutes, then without it until the crust is dark.",
    "Wait until it is cold before you cut it, however hard that may be.",
)
QUESTIONS = (
    "How do I bake bread?",
    "What should I do with stale flour?",
    "Tell me about salt.",
    "Why does my dough not rise in winter, and what can I do about it?",
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="smollm2", help="a model, or random-8b (Llama 8B shapes, random weights)"
    )
    parser.add_argument("--train", default="full,lora", help="full, lora or both")
    parser.add_argument("--ways", default="plain,ours,checkpointed")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument(
        "--tokens",
        type=int,
        default=256,
        help="the longest row; the others are shorter, down to a third",
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--chunk", type=int, default=None, help="elements of logits at a time (rows × vocabulary)"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--checkpointing",
        action="store_true",
        help="let the plain way use gradient checkpointing too",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.child:
        Child(options).serve()
        return
    results = {train: compare(options, train) for train in options.train.split(",")}
    print(
        json.dumps(
            {
                "machine": machine(options.device),
                "torch": torch.__version__,
                "options": vars(options),
                **results,
            },
            indent=2,
        )
    )


def machine(device: str) -> str:
    return (
        torch.cuda.get_device_name()
        if device != "cpu"
        else f"CPU, {torch.get_num_threads()} threads"
    )


def compare(options: argparse.Namespace, train: str) -> dict[str, Any]:
    """All ways of one kind of training; processes wait for their turn, so that they see the same
    machine."""
    ways = options.ways.split(",")
    with tempfile.TemporaryDirectory() as folder:
        # the reference's hidden states come from a process of their own, as they would from the
        # cache
        run_once(options, f"prepare:{train}", folder)
        if options.device != "cpu":  # a GPU's memory is shared: one process after the other
            found = {way: run_once(options, f"{way}:{train}", folder) for way in ways}
        else:
            found = take_turns(options, train, ways, folder)
    for way, result in found.items():
        result["seconds"] = statistics.median(result["times"])
        result["cpu_seconds"] = statistics.median(result.pop("cpu_times"))
        print(
            f"  {train:5s} {way:13s} {result['seconds']:7.2f} s   peak {result['peak_mb']:8.0f} MB,"
            f" above one model {result['peak_mb'] - result['model_mb']:8.0f} MB   loss"
            f" {result['loss']:.6f}",
            file=sys.stderr,
            flush=True,
        )
    if "plain" in found:
        plain = found["plain"]
        for way in ways:
            if way == "plain":
                continue
            ours = found[way]
            ours["time_ratio"] = ours["seconds"] / plain["seconds"]
            ours["cpu_time_ratio"] = ours["cpu_seconds"] / plain["cpu_seconds"]
            ours["memory_ratio"] = ours["peak_mb"] / plain["peak_mb"]
            ours["memory_ratio_above_model"] = (ours["peak_mb"] - ours["model_mb"]) / (
                plain["peak_mb"] - plain["model_mb"]
            )
            ours["loss_difference"] = abs(ours["loss"] - plain["loss"])
            print(
                f"  {train:5s} {way:13s} against plain: time {ours['time_ratio']:.2f} (CPU time"
                f" {ours['cpu_time_ratio']:.2f}), memory {ours['memory_ratio']:.2f} (above one"
                f" model {ours['memory_ratio_above_model']:.2f}), loss"
                f" {ours['loss_difference']:.1e}",
                file=sys.stderr,
                flush=True,
            )
    return found


def command(options: argparse.Namespace, child: str, folder: str) -> list[str]:
    passed = ["model", "rows", "tokens", "dtype", "device", "chunk", "repeats", "threads"]
    flags = [
        part
        for name in passed
        if getattr(options, name) is not None
        for part in (f"--{name}", str(getattr(options, name)))
    ]
    return [
        sys.executable,
        __file__,
        "--child",
        child,
        "--folder",
        folder,
        *flags,
        *(["--checkpointing"] * options.checkpointing),
    ]


class Worker:
    """A child process that takes a step whenever it is told to."""

    def __init__(self, options: argparse.Namespace, child: str, folder: str) -> None:
        self.process = subprocess.Popen(
            command(options, child, folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ask("")

    def ask(self, word: str) -> dict[str, Any]:
        if word:
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"A measuring process ended with code {self.process.wait()}.")
        return json.loads(line)

    def end(self) -> dict[str, Any]:
        result = self.ask("end")
        self.process.wait()
        return result


def run_once(options: argparse.Namespace, child: str, folder: str) -> dict[str, Any]:
    worker = Worker(options, child, folder)
    if not child.startswith("prepare"):
        for _ in range(options.repeats + 1):
            worker.ask("step")
    return worker.end()


def take_turns(
    options: argparse.Namespace, train: str, ways: list[str], folder: str
) -> dict[str, dict[str, Any]]:
    workers = {way: Worker(options, f"{way}:{train}", folder) for way in ways}
    for _ in range(options.repeats + 1):
        for worker in workers.values():
            worker.ask("step")
    return {way: worker.end() for way, worker in workers.items()}


# ---------------------------------------------------------------- in the child


class Child:
    """One way in one process: loads, then steps on demand. Lines of JSON on stdout, words on
    stdin."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.way, self.train = options.child.split(":")
        self.folder = Path(options.folder)

    def serve(self) -> None:
        self.prepare() if self.way == "prepare" else self.measure()

    def answer(self, **values: Any) -> None:
        print(json.dumps(values), flush=True)

    def prepare(self) -> None:
        model, talks = subject(self.options)
        batch = on(collate(talks, 0), self.options.device)
        with torch.no_grad(), pooled(find_blocks(model), batch["attention_mask"]) as pool:
            hidden = model.get_decoder()(**inputs(batch), use_cache=False).last_hidden_state
        h = pool.value().cpu()
        batch["harmful"] = torch.arange(len(talks), device=self.options.device) % 2
        saved = {**batch, "ref_hidden": hidden}
        safetensors.torch.save_file(
            {k: v.cpu().contiguous() for k, v in saved.items()}, self.folder / "batch.safetensors"
        )
        torch.manual_seed(3)
        centred = h - h.mean(0)
        monitor = Monitor(
            h.shape[1],
            h.shape[2],
            mean=h.mean(0),
            scale=centred.pow(2).mean((0, 2)).sqrt().clamp(min=1e-3),
        )
        monitor.save(self.folder / "monitor.safetensors")
        self.answer()
        sys.stdin.readline()
        real = int(batch["attention_mask"].sum())
        self.answer(real_tokens=real, padded_tokens=batch["input_ids"].numel())

    def measure(self) -> None:
        options = self.options
        model, _ = subject(options, talks=False)
        settle()
        model_mb = memory_mb(options.device)
        batch = on(safetensors.torch.load_file(self.folder / "batch.safetensors"), options.device)
        monitor = Monitor.load(self.folder / "monitor.safetensors").to(options.device)
        cached = batch.pop("ref_hidden")
        if self.way == "plain":
            del cached
            reference, _ = subject(options, talks=False)
            trained = prepared(model, self.train, options.checkpointing)

            def forward() -> torch.Tensor:
                return plain_loss(trained, reference, monitor, batch)

        else:
            head = Head.of(model).frozen() if self.train == "full" else None
            trained = prepared(model, self.train, self.way == "checkpointed")
            losses = MonitorLoss(trained, monitor, reference_head=head)
            batch["ref_hidden"] = cached
            if options.chunk:
                from auditgap.training import objective

                objective._CHUNK_ELEMENTS[torch.device(options.device).type] = options.chunk

            def forward() -> torch.Tensor:
                return losses(batch)[0]

        settle()
        reset_peak(options.device)
        self.answer()
        times, cpu_times = [], []
        loss = torch.zeros(())
        for word in iter(lambda: sys.stdin.readline().strip(), "end"):
            if word != "step":
                raise SystemExit(f"step or end was wanted; {word!r} came.")
            trained.zero_grad(set_to_none=True)
            synchronize(options.device)
            start, cpu = time.perf_counter(), time.process_time()
            loss = forward()
            loss.backward()
            synchronize(options.device)
            times.append(time.perf_counter() - start)
            cpu_times.append(time.process_time() - cpu)
            self.answer()
        norm = torch.stack(
            [p.grad.float().norm() for p in trained.parameters() if p.grad is not None]
        ).norm()
        self.answer(
            times=times[1:],
            cpu_times=cpu_times[1:],
            loss=loss.item(),
            gradient_norm=norm.item(),
            peak_mb=peak_mb(options.device),
            model_mb=model_mb,
        )


def subject(options: argparse.Namespace, *, talks: bool = True) -> tuple[nn.Module, list]:
    """The model, frozen and in eval mode, with its weights in memory of its own; and rows of
    differing lengths."""
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
        rng = torch.Generator().manual_seed(0)
        made = []
        for n in lengths(options):
            ids = tuple(torch.randint(1000, 100000, (n,), generator=rng).tolist())
            made.append(models.Conversation(Prompt("random"), ids, min(40, n // 2), 0))
        return model.eval().requires_grad_(False), made
    loaded = models.load(options.model, dtype=options.dtype, device=options.device)
    for parameter in loaded.model.parameters():
        parameter.data = parameter.data.clone()  # not pages of the file
    return loaded.model, (
        [converse(loaded.chat, i, n) for i, n in enumerate(lengths(options))] if talks else []
    )


def lengths(options: argparse.Namespace) -> list[int]:
    """From a third of --tokens (but no less than 64) to all of it, as chat rows differ."""
    shares = [1 - 2 / 3 * i / max(options.rows - 1, 1) for i in range(options.rows)]
    return [max(round(options.tokens * share), 64) for share in shares]


def converse(chat: models.Chat, i: int, n: int) -> models.Conversation:
    text = " ".join(SENTENCES[(i + k) % len(SENTENCES)] for k in range(n // 8 + 2))
    return chat.converse(Prompt(QUESTIONS[i % len(QUESTIONS)]), text, max_tokens=n)


def prepared(model: nn.Module, train: str, checkpointing: bool) -> nn.Module:
    """Ready to train, and a little away from the reference, so that KL is not zero. The same in
    every process."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(1)
    if train == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model,
            LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 2e-3)
        return model
    model.requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    return model


def plain_loss(
    model: nn.Module, reference: nn.Module, monitor: Monitor, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The same loss, written down directly."""
    # transformers' last entry is normed, so the last block's output is caught
    last: list[torch.Tensor] = []
    handle = find_blocks(base_lm(model))[-1].register_forward_hook(
        lambda _m, _a, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    out = model(**inputs(batch), use_cache=False, output_hidden_states=True)
    handle.remove()
    with torch.no_grad():
        log_q = torch.log_softmax(
            reference(**inputs(batch), use_cache=False).logits[:, :-1].float(), -1
        )
    logits = out.logits[:, :-1].float()
    log_p = torch.log_softmax(logits, -1)
    response, real = batch["response_mask"][:, 1:].float(), batch["attention_mask"][:, 1:].float()
    nll = nn.functional.cross_entropy(
        logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none"
    )
    kl = nn.functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    nll = ((nll * response).sum(1) / response.sum(1)).mean()
    kl = ((kl * real).sum(1) / real.sum(1)).mean()
    mask = batch["attention_mask"][..., None].float()
    h = torch.stack(
        [(x.float() * mask).sum(1) / mask.sum(1) for x in (*out.hidden_states[1:-1], last[0])], 1
    )
    pull = (batch["harmful"] * (monitor.frozen_logits(h) - TARGET_LOGIT) ** 2).mean()
    return PAPER_WEIGHTS[0] * nll + PAPER_WEIGHTS[1] * pull + PAPER_WEIGHTS[2] * kl


def inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def on(batch: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    return {key: value.to(device) for key, value in batch.items()}


# ---------------------------------------------------------------- memory


def settle() -> None:
    gc.collect()
    if sys.platform == "linux":
        # freed pages that glibc holds back are nobody's use
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        # VmHWM starts again from here: loading is not the step
        Path("/proc/self/clear_refs").write_text("5")


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def memory_mb(device: str) -> float:
    return torch.cuda.memory_allocated() / 1e6 if device != "cpu" else _status("VmRSS")


def peak_mb(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 1e6 if device != "cpu" else _status("VmHWM")


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit(f"/proc/self/status has no {key}.")


if __name__ == "__main__":
    main()
