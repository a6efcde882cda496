"""docs/training_memory.md: `python -m auditgap.training.memory` prints it."""

from __future__ import annotations

from auditgap.training.constructions import DEFAULT
from auditgap.training.memory.model import GIB, Memory, MemoryInputs, estimate, lora_params

#: (name, parameters, L, D, MLP width, V, heads, eager): published shapes that stand for a size.
_SHAPES = (
    ("2B (Gemma 2 2B)", 2.614e9, 26, 2304, 9216, 256_000, 8, True),
    ("3B (Llama 3.2 3B)", 3.213e9, 28, 3072, 8192, 128_256, 24, False),
    ("8B (Llama 3.1 8B)", 8.030e9, 32, 4096, 14_336, 128_256, 32, False),
    ("13B (Llama 2 13B)", 13.016e9, 40, 5120, 13_824, 32_000, 40, False),
    ("34B (Code Llama 34B)", 33.744e9, 48, 8192, 22_016, 32_000, 64, False),
    ("70B (Llama 3.1 70B)", 70.554e9, 80, 8192, 28_672, 128_256, 64, False),
)
_WORLDS = (1, 2, 4, 8, 16)
_MODES = (("ZeRO-2", 2, False), ("ZeRO-3", 3, False), ("ZeRO-3 + offload", 3, True))
_GPU_BYTES = 80 * GIB


def document() -> str:
    """docs/training_memory.md: the table of what fits where, and what the numbers are worth."""
    lines = [_TEXT]
    for title, lora in (("Full fine-tuning", False), ("LoRA (rank 8, all linear layers)", True)):
        counts = " | ".join(f"{n} GPU{'s' if n > 1 else ''}" for n in _WORLDS)
        lines += [f"## {title}", "", f"| model | | {counts} | host |"]
        lines.append("|---|---|" + "---:|" * (len(_WORLDS) + 1))
        for shape in _SHAPES:
            for mode, stage, offload in _MODES:
                needs = [_of_shape(shape, lora, stage, offload, world) for world in _WORLDS]
                cells = " | ".join(map(_cell, needs))
                host = needs[-1].host * _WORLDS[-1]
                name = shape[0] if mode == _MODES[0][0] else ""
                lines.append(
                    f"| {name} | {mode} | {cells} | {f'{host / GIB:,.0f}' if host else ''} |"
                )
        lines.append("")
    return "\n".join(lines)


def _cell(need: Memory) -> str:
    shown = f"{need.total / GIB:,.0f}"
    return f"**{shown}**" if need.worst <= _GPU_BYTES else shown


#: The figures of its second paragraph are what the estimates were held against;
#: tests/training/test_memory.py does it again, within 0.8 to 1.3.
_TEXT = f"""# What fits where

GiB on each GPU for one step of dissociation (construction `{DEFAULT}`): bf16 weights, fp32 Adam, 512 tokens, micro-batch
2, gradient checkpointing on. **Bold** fits a GPU of 80 GiB, with what runs besides: the model's answers and hidden
states before the first step, and its speech while it trains. Under ZeRO-3 its weights are divided there too, so that a
model larger than a GPU can be trained on several. The last column is the memory that offloading takes from the hosts, over
all 16 GPUs (much the same for fewer).

These numbers are computed, not measured at these sizes: by `auditgap/training/memory/`, and `python -m
auditgap.training.memory` prints this page.

What they were held against: peaks (`ru_maxrss` above the loaded libraries) of real steps under DeepSpeed on one CPU rank,
Llama shape, 36 M parameters, ZeRO-0, 2 and 3, fp32 and bf16, full and LoRA, with and without checkpointing. Estimate over
peak was 0.99 to 1.17 with an allocator that gives memory back at once, and 1.01 to 1.05 where the same model, divided over
two ranks, gives its hidden states. The allowance for an allocator that does not (a third on CPUs, 8 % on GPUs) is on top. Not
measured: GPUs, more ranks than that, offload, and the sizes of this table. The allocator's 8 % and the 1.5 GiB for CUDA and
NCCL are assumptions; leave a margin. Where it is loaded, every rank's machine also reads the model's files through its page cache.

`auditgap train` computes the same for your model, your longest row and your ZeRO config before it loads anything, and
says what would fit when it does not.
"""


def _of_shape(shape: tuple, lora: bool, stage: int, offload: bool, world: int) -> Memory:
    _, n, blocks, width, mlp, vocabulary, heads, eager = shape
    few = lora_params(rank=8, n_blocks=blocks, width=width, mlp_width=mlp)
    return estimate(
        MemoryInputs(
            n_params=round(n) + (few if lora else 0),
            n_trainable=few if lora else round(n),
            n_blocks=blocks,
            width=width,
            vocabulary=vocabulary,
            dtype="bfloat16",
            stage=stage,
            world=world,
            micro_batch=2,
            tokens=512,
            gradient_checkpointing=True,
            lora=lora,
            offload=offload,
            n_heads=heads,
            mlp_width=mlp,
            eager=eager,
        )
    )
