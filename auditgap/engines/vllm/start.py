"""What vLLM's process is started with, and what to say when it does not start."""

from __future__ import annotations

import os
import re
from pathlib import Path

import psutil
import torch

from auditgap.engines import Serving
from auditgap.engines.child import Failed
from auditgap.engines.vllm import adapters
from auditgap.engines.vllm.edits import ENVIRONMENT
from auditgap.errors import UsageError
from auditgap.models.weights import weights_files
from auditgap.types import Document

#: What the child's environment says besides the parent's.
_ENVIRONMENT = {
    **ENVIRONMENT,
    # the engine in the child itself, where its errors can be heard
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",  # the folder is here
    "TOKENIZERS_PARALLELISM": "false",
}
#: Seconds without a word, at the start and while it is asked, after which vLLM counts as hung and is
#: ended. An hour is more than anything that it does in one go: to read hundreds of GB of weights
#: from a network disk, to compile kernels, to prove edits at every block, to take a step of a model
#: that is too large for its machine. It says how far it is between steps.
SILENT_SECONDS = 3600.0
#: Requests that decode together.
TOGETHER = 256


def settings(
    serving: Serving,
    base: Path,
    dtype: torch.dtype,
    device: str,
    *,
    max_rank: int | None,
    lora: Path | None,
) -> Document:
    """What `process.Served` takes: the model, what of adapters it is made ready for (`max_rank`
    None: nothing), and the adapter that it begins with. Raises UsageError for a rank that no kernel
    has."""
    llm: Document = {
        "model": str(base),
        "dtype": str(dtype).removeprefix("torch."),
        "max_num_seqs": TOGETHER,
        "tensor_parallel_size": serving.tensor_parallel,
        "gpu_memory_utilization": serving.gpu_memory,
        # -1: the model's own, or what the memory has room for
        "max_model_len": serving.max_model_len or -1,
    }
    if max_rank is not None:
        llm |= {
            "enable_lora": True,
            "max_lora_rank": adapters.kernel_rank(max_rank),
            "max_loras": 1,
            "lora_target_modules": adapters.linear_layers(base),
        }
    if serving.tensor_parallel > 1:
        # never Ray's, which would start actors elsewhere
        llm["distributed_executor_backend"] = "mp"
    return {
        "llm": llm,
        "device": device.split(":")[0],
        "lora": None if lora is None else str(lora),
        "strays": strays(base),
    }


def strays(folder: Path) -> list[str]:
    """Names of the safetensors files beside the model's own, such as a copy in another layout. vLLM
    reads them all where no index says which; and where one is called `consolidated`, the config of
    that layout (params.json) instead of config.json."""
    own = set(weights_files(folder))
    return sorted(path.name for path in folder.glob("*.safetensors") if path not in own)


def environment(device: str) -> dict[str, str]:
    """What its environment says besides the parent's. Raises UsageError where that wants a model
    runner in which edits are not proven."""
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0") not in ("", "0"):
        raise UsageError(
            "VLLM_USE_V2_MODEL_RUNNER is set, and edits are proven in vLLM's first model runner"
            " alone: the second keeps its batch elsewhere and needs Triton, which vLLM's CPU build"
            " has not. Unset it, or use --engine hf."
        )
    found = {
        **_ENVIRONMENT,
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE") or _cache_gib(),
    }
    if ":" in device:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        index = int(device.split(":")[1])
        found["CUDA_VISIBLE_DEVICES"] = (
            seen[index] if index < len(seen) and seen[index] else str(index)
        )
    return found


def _cache_gib() -> str:
    """GiB of keys and values on a CPU, unless VLLM_CPU_KVCACHE_SPACE says otherwise: too few, and
    requests are given up halfway and begun again."""
    return str(min(8, max(1, int(psutil.virtual_memory().available / 4 / 2**30))))


def check_gpus(device: str, n: int) -> None:
    """Raises UsageError when a model cannot be spread over n GPUs here."""
    if n == 1 or not device.startswith("cuda"):
        return
    if ":" in device:
        raise UsageError(
            f"--device {device} is one GPU, and tensor_parallel {n} wants {n}; type --device cuda."
        )
    if torch.cuda.device_count() < n:
        raise UsageError(
            f"tensor_parallel {n} wants {n} GPUs, and {torch.cuda.device_count()} can be used here;"
            " ask for fewer, or let CUDA_VISIBLE_DEVICES (on Ray: --gpus-per-worker) name more."
        )


def telling_line(said: str) -> str:
    """The line of an error that tells most: pydantic puts it second."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = next(
        (line for line in lines if line.startswith("Value error, ")),
        lines[0] if lines else "no message",
    )
    return telling.removeprefix("Value error, ").removesuffix(".")[:300]


def why_not(model: str, serving: Serving, failed: Failed) -> str:
    """A sentence on why vLLM did not start, and what to type next."""
    said = failed.said
    derived = re.search(r"greater than the derived max_model_len \(\w+=(\d+)", said)
    if derived:
        return (
            f"max_model_len {serving.max_model_len} is more than the {derived[1]} positions that"
            f" {model} has; type that or less."
        )
    if "the vLLM that is installed runs on" in said:
        return (
            f"vLLM cannot open {model}: {said}. Type --device"
            f" {said.split(' runs on ')[1].split(',')[0]}, or install the other."
        )
    short = re.search(r"KV cache|cache blocks|emory (utilization|on node)|allocat", said)
    if short or failed.kind in ("OutOfMemoryError", "MemoryError"):
        return (
            f"vLLM has too little memory for {model}: {telling_line(said)}. Set max_model_len lower,"
            " another share of the GPU (gpu_memory) or, on a CPU, VLLM_CPU_KVCACHE_SPACE (GiB); or"
            " use --engine hf."
        )
    if re.search(r"not supported|[Uu]nsupported|[Aa]rchitecture", said):
        return f"vLLM does not know the architecture of {model}: {telling_line(said)}. Use --engine hf."
    return (
        f"vLLM cannot open {model} ({failed.kind}): {telling_line(said)}. Its log is {failed.log}."
        " --engine hf may."
    )
