"""The DeepSpeed JSON: ZeRO stage, offload and buckets are its own, whatever says "auto" is filled from
the recipe, and what contradicts the recipe is refused.

    ds = filled(read_ds_config(Path("ds_configs/zero3.json")), config, options, width=4096, dtype="bfloat16", device="cuda:0")
    stage_of(ds)                            # 3
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auditgap.errors import UsageError
from auditgap.training import ranks
from auditgap.training.config import TrainConfig, TrainOptions, accumulation
from auditgap.types import Document

#: What DeepSpeed is asked for when no JSON is named: ds_configs/zero2.json, in words that need no
#: file.
DEFAULT: Document = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "data_types": {"grad_accum_dtype": "auto"},
    "communication_data_type": "auto",
    "zero_optimization": {"stage": 2, "contiguous_gradients": True, "overlap_comm": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True},
    },
}
#: What may differ from the recipe in no DeepSpeed config.
_RECIPES = (
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "train_batch_size",
    "gradient_clipping",
    "bf16.enabled",
    "data_types.grad_accum_dtype",
    "optimizer.params.lr",
    "optimizer.params.weight_decay",
)


def read_ds_config(file: Path | None) -> Document:
    """The JSON, or the default. Raises UsageError when it is no JSON object, or asks for no known
    ZeRO stage."""
    if file is None:
        return copy.deepcopy(DEFAULT)
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"--deepspeed-config {file}: no such file. For example: ds_configs/zero2.json"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"--deepspeed-config {file} is not readable JSON ({error}).") from None
    if not isinstance(config, dict):
        raise UsageError(
            f"--deepspeed-config {file} must hold an object, as ds_configs/zero2.json does."
        )
    for section in ("zero_optimization", "fp16", "bf16", "optimizer", "data_types"):
        if not isinstance(config.get(section, {}), dict):
            raise UsageError(
                f"--deepspeed-config {file}: {section} must be an object, as in"
                " ds_configs/zero2.json."
            )
    stage = stage_of(config)
    if stage not in (0, 1, 2, 3):
        raise UsageError(
            f"--deepspeed-config {file}: zero_optimization.stage must be 0, 1, 2 or 3; {stage!r}"
            " came."
        )
    if config.get("fp16", {}).get("enabled"):
        raise UsageError(
            f"--deepspeed-config {file}: fp16 is not used here (its loss scaling skips steps); use"
            " bf16."
        )
    return config


def stage_of(ds: Mapping[str, Any]) -> Any:
    return ds.get("zero_optimization", {}).get("stage", 0)


def filled(
    ds: Mapping[str, Any],
    config: TrainConfig,
    options: TrainOptions,
    *,
    width: int,
    dtype: str,
    device: str,
) -> Document:
    """The DeepSpeed config with every "auto" replaced by what the recipe says, and what it leaves
    out put in.

    Raises UsageError when a value in it contradicts the recipe, or an "auto" stands where nothing
    is known to fill it.
    """
    known = _known(config, options, width, dtype == "bfloat16", device.startswith("cuda"))
    known["data_types.grad_accum_dtype"] = _summed_in(ds, known)
    # a size or the optimizer that is left out would be DeepSpeed's own, and not what the recipe
    # says
    default = {key: value for key, value in DEFAULT.items() if key != "zero_optimization"}
    types = {**DEFAULT["data_types"], **ds.get("data_types", {})}
    done = _filled({**default, **ds, "data_types": types}, "", known)
    done.setdefault("steps_per_print", 1 << 30)
    if done.get("scheduler"):
        raise UsageError(
            "The DeepSpeed config has a scheduler; the schedule is the recipe's (schedule, warmup)."
            " Remove it there."
        )
    return done


def to_run(ds: Document) -> Document:
    """Of a filled config of ZeRO-3, what a model is divided by that runs and is not trained."""
    zero = {k: v for k, v in ds["zero_optimization"].items() if k != "offload_optimizer"}
    kept = {k: v for k, v in ds.items() if k in ("bf16", "steps_per_print")}
    return {**kept, "train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}


def _known(
    config: TrainConfig, options: TrainOptions, width: int, bf16: bool, on_gpu: bool
) -> Document:
    """What is put in the place of "auto", by its path in the JSON."""
    zero, params = "zero_optimization", "optimizer.params"
    return {
        "train_micro_batch_size_per_gpu": options.micro_batch,
        "gradient_accumulation_steps": accumulation(config, options, ranks.world()),
        "train_batch_size": config.batch,
        "gradient_clipping": config.clip,
        "bf16.enabled": bf16,
        "communication_data_type": "fp32",
        f"{params}.lr": config.lr,
        f"{params}.weight_decay": config.weight_decay,
        f"{params}.betas": [0.9, 0.999],
        f"{params}.eps": 1e-8,
        f"{params}.torch_adam": not on_gpu,
        f"{zero}.overlap_comm": on_gpu,
        f"{zero}.reduce_bucket_size": max(width * width, 1 << 20),
        f"{zero}.allgather_bucket_size": max(width * width, 1 << 20),
        f"{zero}.stage3_prefetch_bucket_size": max(width * width * 9 // 10, 1 << 16),
        f"{zero}.stage3_param_persistence_threshold": 10 * width,
        f"{zero}.offload_optimizer.pin_memory": on_gpu,
        f"{zero}.offload_param.pin_memory": on_gpu,
    }


def _summed_in(ds: Mapping[str, Any], known: Document) -> str:
    """The dtype in which gradients of micro-batches are summed. In fp32 the sum does not depend on
    how many ranks share the micro-batches; in bf16, DeepSpeed's default, every further one rounds.

    Raises UsageError where DeepSpeed could sum them in bf16 only.
    """
    if not known["bf16.enabled"] or stage_of(ds):
        return "fp32"
    if (n := known["gradient_accumulation_steps"]) > 1:
        raise UsageError(
            f"At ZeRO stage 0 DeepSpeed would add up the gradients of {n} micro-batches in bf16,"
            " which loses what is small. Set zero_optimization.stage to 1, 2 or 3 in the DeepSpeed"
            f" config, micro_batch to {n * known['train_micro_batch_size_per_gpu']}, or dtype to"
            " float32."
        )
    return "bf16"  # one micro-batch: there is nothing to add up


def _filled(value: Any, at: str, known: Document) -> Any:
    if isinstance(value, Mapping):
        return {
            key: _filled(inner, f"{at}.{key}" if at else key, known) for key, inner in value.items()
        }
    if value == "auto":
        if at not in known:
            raise UsageError(
                f'The DeepSpeed config says "auto" at {at}, which the recipe does not know.'
                " Give a value."
            )
        return known[at]
    if at in _RECIPES and value != known[at]:
        raise UsageError(
            f'The DeepSpeed config says {at} = {value}, the recipe {known[at]}. Write "auto"'
            " there, or change the recipe."
        )
    return value
