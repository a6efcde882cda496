"""How a subject that is too large for one device lies over several: its blocks in parts, or every
matrix in slices.

    # blocks 0…15 on cuda:0, 16…31 on cuda:1; one process
    shard = Shard.of("layers:2")
    models.load("meta-llama/Llama-3.1-70B-Instruct", shard=shard)
    # every matrix over 4 ranks, by transformers' tensor-parallel plan
    Shard.of("tensor:4")

`layers` suits every family, and one part works while the others wait. `tensor` lets all devices
work at once, for families that have a plan; it needs a process a device
(`auditgap.audits.ranked`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from auditgap.errors import UsageError
from auditgap.models.door import open_config
from auditgap.models.folder import adapter_base
from auditgap.models.weights import is_adapter
from auditgap.types import Document

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from auditgap.models import Outline

#: Share of a GPU's free memory that weights may take under `layers`; the rest is for activations.
_FOR_WEIGHTS = 0.8


@dataclass(frozen=True, slots=True)
class Shard:
    """`layers` or `tensor` over n devices, or `whole` on one."""

    kind: Literal["whole", "layers", "tensor"] = "whole"
    n: int = 1

    @classmethod
    def of(cls, word: str | None) -> Shard:
        """From `layers:2` or `tensor:4`; None and `whole` are a whole model. Raises UsageError for
        anything else."""
        if word in (None, "whole"):
            return WHOLE
        kind, _, n = str(word).partition(":")
        if (
            kind not in ("layers", "tensor")
            or not (n.isascii() and n.isdigit())
            or not 1 <= int(n) <= 64
        ):
            raise UsageError(
                "--shard takes layers:N (the blocks over N GPUs) or tensor:N (every matrix over"
                f" N); {str(word)[:40]!r} came. For example: --shard layers:2"
            )
        return cls(kind, int(n)) if int(n) > 1 else WHOLE  # type: ignore[arg-type]

    def __str__(self) -> str:
        return "whole" if self.kind == "whole" else f"{self.kind}:{self.n}"

    def check(self, seen: Outline) -> None:
        """Raises UsageError when this subject cannot lie so; reads its config, no weights."""
        name = seen.subject.name
        if self.kind == "whole":
            return
        if self.n > seen.n_blocks and self.kind == "layers":
            raise UsageError(
                f"--shard {self}: {name} has {seen.n_blocks} blocks, too few for {self.n} parts."
            )
        if self.kind == "layers":
            return
        if is_adapter(seen.folder):
            raise UsageError(
                f"--shard {self}: {name} is an adapter, and only whole models are cut into slices."
                f" Merge it into its base first (auditgap export), or use --shard layers:{self.n}."
            )
        config = _config(seen)
        if not getattr(config, "base_model_tp_plan", None):
            raise UsageError(
                f"--shard {self}: transformers has no tensor-parallel plan for {name}"
                f" ({config.model_type}). Use --shard layers:{self.n}."
            )
        heads = getattr(config, "num_attention_heads", self.n)
        for what, size in (
            ("attention heads", heads),
            ("key/value heads", getattr(config, "num_key_value_heads", None) or heads),
            ("tokens in its vocabulary", config.vocab_size),
        ):
            if size % self.n:
                raise UsageError(
                    f"--shard {self}: {name} has {size} {what}, which {self.n} ranks cannot share"
                    f" alike. Use a number of ranks that divides it, or --shard layers:{self.n}."
                )

    def check_devices(self, device: str) -> None:
        """Raises UsageError when there are not as many devices of this kind (`cuda`, `cuda:1`,
        `cpu`) in this process's sight."""
        if self.kind == "whole" or not device.startswith("cuda"):
            return
        if ":" in device:
            raise UsageError(
                f"--device {device} is one GPU, and --shard {self} wants {self.n}; type --device"
                " cuda."
            )
        if torch.cuda.device_count() < self.n:
            raise UsageError(
                f"--shard {self} wants {self.n} GPUs, and {torch.cuda.device_count()} can be used"
                " here; ask for fewer, or let CUDA_VISIBLE_DEVICES (on Ray: gpus_per_worker) name"
                " more."
            )

    def loading(self, device: str) -> Document:
        """What `from_pretrained` is told besides. A CPU is one device: there `layers` is made by
        `rehearsed` afterwards."""
        if self.kind == "tensor":
            from transformers.distributed.configuration_utils import DistributedConfig

            return {"distributed_config": DistributedConfig(tp_size=self.n)}
        if self.kind == "layers" and device.startswith("cuda"):
            free = {i: int(torch.cuda.mem_get_info(i)[0] * _FOR_WEIGHTS) for i in range(self.n)}
            return {"device_map": "balanced", "max_memory": free}
        return {}


WHOLE = Shard()


def placed(model: PreTrainedModel, device: str, shard: Shard) -> PreTrainedModel:
    """The model where it belongs: moved there when it is whole; when it lies over several devices
    it is there already.

    `layers` on a CPU is a rehearsal: all parts on the one device there is, under the hooks that
    would carry activations from one device to the next.
    """
    whole: Any = model  # what moves it says that it gives back any module
    if shard.kind == "layers" and not device.startswith("cuda"):
        from accelerate import dispatch_model

        skip = getattr(model, "_skip_keys_device_placement", None)
        # a word: accelerate compares it with "cpu", whatever its annotation says
        where: Any = device
        whole = dispatch_model(
            model, {"": device}, main_device=where, force_hooks=True, skip_keys=skip
        )
        return whole
    return whole.to(device) if shard.kind == "whole" else model


def home(model: nn.Module) -> torch.device:
    """Where a model's inputs go and its logits come from: the device of its first weight that is on
    one.

    Weights that accelerate keeps elsewhere until they are needed are `meta` tensors meanwhile.
    """
    return next(
        (p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu")
    )


def _config(seen: Outline) -> Any:
    base = adapter_base(seen.folder) if is_adapter(seen.folder) else seen.folder
    return open_config(base, seen.subject.name).get_text_config()
