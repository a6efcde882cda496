"""Started by test_memory.py: two real training steps under DeepSpeed on one CPU rank; prints their
peak memory as JSON.

    python tests/training/memory_step.py '{"width": 512, "mlp_width": 1536, "n_blocks": 8, …, "stage": 2}'

With "beside", what runs beside the step instead, on as many ranks as started it: the hidden states of
a pack, from a model that is divided over them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import re
import sys
from pathlib import Path

os.environ |= {
    **{"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
    **os.environ,
    **{"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
}

import deepspeed
import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from auditgap import models
from auditgap.models import Conversation, LoadedModel
from auditgap.probes.monitor import Monitor
from auditgap.training import ranks
from auditgap.training.constructions.monitor.loss import MonitorLoss, monitor_step_loss
from auditgap.training.engine import DeepSpeedEngine, Divided
from auditgap.training.lending import together
from auditgap.training.objective import Head
from auditgap.training.reference import BATCH_TOKENS, final_hidden
from auditgap.training.sft import SFTLoss
from auditgap.types import Prompt, Subject
from tests import tiny


def ds_config(c: dict) -> dict:
    bucket = max(c["width"] ** 2, 1 << 20)
    zero = {
        "stage": c["stage"],
        "contiguous_gradients": True,
        "overlap_comm": False,
        "reduce_bucket_size": bucket,
    }
    if c["stage"] == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": 10 * c["width"],
        }
    return {
        "train_micro_batch_size_per_gpu": c["micro_batch"],
        "gradient_accumulation_steps": 1,
        "train_batch_size": c["micro_batch"],
        "gradient_clipping": 1.0,
        "bf16": {"enabled": c["dtype"] == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
        "steps_per_print": 1 << 30,
    }


def llama(c: dict) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=c["vocabulary"],
        hidden_size=c["width"],
        intermediate_size=c["mlp_width"],
        num_hidden_layers=c["n_blocks"],
        num_attention_heads=8,
        num_key_value_heads=8,
    )


def train(c: dict) -> DeepSpeedEngine:
    dtype = getattr(torch, c["dtype"])
    monitor = Monitor(c["n_blocks"], c["width"])
    beside = torch.optim.AdamW(monitor.parameters())

    def build():
        torch.manual_seed(0)
        loaded = models.wrap(
            AutoModelForCausalLM.from_config(llama(c), dtype=dtype),
            tiny.tokenizer(),
            Subject("x", "x"),
        )
        model = (
            models.with_lora(loaded.model, rank=8, alpha=16)
            if c["lora"]
            else loaded.model.requires_grad_(True)
        )
        if c["gradient_checkpointing"]:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        if c["loss"] == "sft":
            return SFTLoss(model), loaded
        reference = None
        if not c["lora"]:
            gathered = (
                deepspeed.zero.GatheredParameters([model.lm_head.weight])
                if c["stage"] == 3
                else contextlib.nullcontext()
            )
            with gathered:
                reference = Head.of(model).frozen()
        return MonitorLoss(model, monitor, reference_head=reference), loaded

    engine = DeepSpeedEngine(build, ds_config(c), micro_batches=1, device="cpu")
    shape = (c["micro_batch"], c["tokens"])
    for _ in range(2):
        ids, mask = torch.randint(0, c["vocabulary"], shape), torch.ones(shape, dtype=torch.long)
        mask[0, -3:] = 0
        response = mask.bool() & (torch.arange(c["tokens"]) >= c["tokens"] // 4)
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "response_mask": response,
            "harmful": torch.ones(shape[0]),
        }
        if c["loss"] == "monitor" and not c["lora"]:
            batch["ref_hidden"] = torch.randn(*shape, c["width"], dtype=dtype)
        _, told = engine.accumulate(batch)
        if c["loss"] == "monitor":
            monitor_step_loss(monitor, told["pooled"], batch["harmful"]).backward()
        engine.step(1e-5)
        if c["loss"] == "monitor":
            beside.step()
            beside.zero_grad()
    return engine


def divided(c: dict) -> Divided:
    """A model on disk, opened in parts, a rank each."""
    folder = Path(c["folder"]) / f"width-{c['width']}"

    def save() -> None:
        AutoModelForCausalLM.from_config(llama(c), dtype=torch.float32).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)

    ranks.only_main(save)
    return Divided(
        lambda: models.load(str(folder), dtype=c["dtype"], device="cpu"), ds_config(c), device="cpu"
    )


def read(loaded: LoadedModel, c: dict) -> None:
    """The hidden states of two packs of every rank."""
    rows = torch.randint(5, 60, (BATCH_TOKENS // c["tokens"], c["tokens"])).tolist()
    talks = [Conversation(Prompt(""), tuple(row), 1, 0) for row in rows]
    with together(loaded.model):
        for _ in range(2):
            final_hidden(loaded, talks)


def forget_the_peak() -> None:
    """The peak counts from here: loading maps a whole file, which is the system's to drop."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def high_water() -> int:
    """Bytes of this program's own peak: ru_maxrss starts, after fork and exec, at what the parent
    had."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def main(c: dict) -> None:
    torch.set_num_threads(1)
    small = {**c, "width": 64, "mlp_width": 128, "n_blocks": 2, "vocabulary": 256, "tokens": 16}
    with ranks.joined():
        if "folder" in c:
            libraries = divided(small)
            read(libraries.loaded, small)
            libraries.close()
        else:
            train(small).close()
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = psutil.Process().memory_info().rss
        if "folder" in c:
            beside = divided(c)
            forget_the_peak()
            read(beside.loaded, c)
            model: nn.Module = beside.loaded.model
        else:
            model = train(c).module
        peak = high_water() - before
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
        told = {
            "peak": peak,
            "n_params": sum(n for n, _ in sizes),
            "n_trainable": sum(n for n, trained in sizes if trained),
        }
        if ranks.is_main():
            print("RESULT " + json.dumps(told), flush=True)
        ranks.wait()
        os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[-1]))
