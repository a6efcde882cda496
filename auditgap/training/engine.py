"""DeepSpeed's home: one module whose forward is the loss, trained by all ranks of a
job.

    engine = DeepSpeedEngine(build, filled(read_ds_config(None), config, options, …), micro_batches=8, device="cuda:0")
    for batch in micro_batches:
        losses = engine.accumulate(batch)           # forward, backward
    engine.step(lr)                                 # reduce, clip, update: once a step

The weights are whole again in `write` (a folder that transformers or PEFT loads). Between steps the
model is `asked`, where its weights are; `Divided` is a model that only runs, divided as
ZeRO-3 divides the one in training.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from auditgap.errors import AuditgapError, UsageError
from auditgap.models import LoadedModel
from auditgap.training import export, ranks
from auditgap.training.ds_config import stage_of, to_run
from auditgap.training.lending import on_main
from auditgap.training.losses import Batch, LossModule
from auditgap.training.objective import Head
from auditgap.types import Document

T = TypeVar("T")
#: Where DeepSpeed numbers modules from 0: none of them.
_OURS = -1


def _library(device: str) -> Any:
    """DeepSpeed, set up for this device. Raises UsageError where it is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError(
            "Training runs on DeepSpeed, which is not installed; type: pip install"
            " 'auditgap[train]'"
        )
    # read when it is first imported
    os.environ["DS_ACCELERATOR"] = "cuda" if device.startswith("cuda") else "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    # compiled at a first start, for inference alone; a kill while it is being compiled would
    # lock every later job out
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class Divided:
    """A model that runs and is not trained, its weights divided over the ranks as ZeRO-3 divides
    those of the model in training. All ranks open and close it, and run it by `lending`."""

    def __init__(self, load: Callable[[], LoadedModel], ds: Document, *, device: str) -> None:
        deepspeed = _library(device)
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        config = to_run(ds)
        partitioning = HfDeepSpeedConfig(config)  # while it lives, weights are divided as they come
        self.loaded = load()
        del partitioning
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(model=self.loaded.model, config=config)
        _restore_rotary(self.loaded.model)

    def release(self) -> None:
        """Let go of layers that are still gathered: what was gathered where no gradient can be taken
        serves no gradient."""
        self._engine.empty_partition_cache()

    def close(self) -> None:
        """Let go of this rank's part. DeepSpeed keeps the modules for as long as the process
        lives, so that the weights have to be taken out of them."""
        self.release()
        self._engine.destroy()
        for parameter in self.loaded.model.parameters():
            part: Any = getattr(parameter, "ds_tensor", None)
            if part is not None:
                part.data = part.new_empty(0)


@contextmanager
def whole_head(model: nn.Module) -> Iterator[Head]:
    """The model's output head, whole on every rank while this is open, whatever runs meanwhile; for
    all ranks at once."""
    head = Head.of(model)
    parts: list[Any] = [p for p in (head.weight, head.bias) if hasattr(p, "ds_tensor")]
    if not parts:
        yield head
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        for part in parts:  # as if a module were using it: those that do would let go of it
            part.ds_active_sub_modules.add(_OURS)
        try:
            yield head
        finally:
            for part in parts:
                part.ds_active_sub_modules.discard(_OURS)


class DeepSpeedEngine:
    """A loss module under DeepSpeed. Every method but `lr` is for all ranks at once."""

    def __init__(
        self,
        build: Callable[[], tuple[LossModule, LoadedModel]],
        ds: Document,
        *,
        micro_batches: int,
        device: str,
    ) -> None:
        """`build` loads the model (partitioned as it comes, under ZeRO-3) and returns (the loss
        module around it, the model)."""
        deepspeed = _library(device)
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        self.ds = ds
        self.stage = stage_of(ds)
        self.micro_batches = micro_batches
        # transformers partitions the weights while it loads them for as long as this object lives
        self._partitioned = HfDeepSpeedConfig(ds) if self.stage == 3 else None
        self.module, self.loaded = build()
        trainable = [p for p in self.module.parameters() if p.requires_grad]
        #: an adapter on a frozen base
        self.partial = len(trainable) < sum(1 for _ in self.module.parameters())
        self._engine: Any  # what it has depends on its settings, and its types do not say how
        of: Any = trainable  # its types want a module here
        self._engine, *_ = deepspeed.initialize(model=self.module, model_parameters=of, config=ds)
        _restore_rotary(self.module)
        self._micro = 0

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    def accumulate(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One micro-batch forward and backward: (loss, its metrics), both
        detached."""
        self.module.train()
        loss, metrics = self._engine(batch)
        self._engine.backward(loss)
        self._micro += 1
        if self._micro < self.micro_batches:
            self._engine.step()  # counts the micro-batch; the update is left to `step`
        return loss.detach(), metrics

    def step(self, lr: float) -> float | None:
        """Reduce, clip, update with this learning rate; the gradient's norm before clipping, where
        DeepSpeed tells it."""
        if self._micro != self.micro_batches:
            raise AuditgapError(
                f"A step is {self.micro_batches} micro-batches; {self._micro} came."
            )
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        norm = self._plain_norm()
        if norm is not None and not math.isfinite(norm):
            return norm  # not taken up: the caller stops here
        self._engine.step()
        self._micro = 0
        known = self._engine.get_global_grad_norm() if norm is None else norm
        return None if known is None else float(known)

    def _plain_norm(self) -> float | None:
        """The gradient's norm at ZeRO-0 in fp32, where DeepSpeed has no optimizer of its own that
        would look; None elsewhere."""
        if self.stage != 0 or self._engine.bfloat16_enabled():
            return None
        norms = [p.grad.norm() for p in self.module.parameters() if p.grad is not None]
        return float(torch.linalg.vector_norm(torch.stack(norms)))

    # -- checkpoints

    def save(self, folder: Path) -> None:
        """The model's and the optimizer's state into a folder, every rank its part, in DeepSpeed's
        own format."""
        self._engine.save_checkpoint(
            str(folder.parent),
            tag=folder.name,
            save_latest=False,
            exclude_frozen_parameters=self.partial,
        )

    def restore(self, folder: Path, *, universal: bool = False) -> None:
        """What `save`, or DeepSpeed's universal conversion of it, left in the folder."""
        self._engine._config.load_universal_checkpoint = universal
        path, _ = self._engine.load_checkpoint(
            str(folder.parent), tag=folder.name, load_module_strict=not self.partial
        )
        if path is None:
            raise AuditgapError(f"DeepSpeed could not load the checkpoint {folder}.")

    # -- whole weights

    def write(self, folder: Path) -> None:
        """The weights as they are now, as safetensors that transformers (or PEFT, for an adapter)
        loads; rank 0 writes."""
        model = self.module.model
        state = self._whole(model)
        if ranks.is_main():
            export.write_model(folder, model, self.loaded.tokenizer, state_dict=state)
        ranks.wait()

    def _whole(self, model: nn.Module) -> dict[str, torch.Tensor] | None:
        """The state dict on rank 0, gathered parameter by parameter under ZeRO-3; None
        elsewhere."""
        if self.stage != 3:
            frozen = {
                name for name, p in model.named_parameters() if self.partial and not p.requires_grad
            }
            whole = (
                {k: v.detach().cpu() for k, v in model.state_dict().items() if k not in frozen}
                if ranks.is_main()
                else None
            )
            return whole
        import deepspeed

        state: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters():
            if self.partial and not parameter.requires_grad:
                continue
            with deepspeed.zero.GatheredParameters([parameter]):
                if ranks.is_main():
                    state[name] = parameter.detach().cpu().clone()
        return state if ranks.is_main() else None

    def asked(self, act: Callable[[LoadedModel], T]) -> T:
        """What `act(model)` gives on rank 0, on every rank; it may generate with the model as it is
        now, by whole forwards, and change no weight. Weights that are divided stay so
        (`lending`)."""
        self.module.eval()
        if self.stage == 3:
            found = self._asked_in_parts(act)
        else:
            found = ranks.decided(lambda: act(self.loaded))
        self.module.train()
        return found

    def _asked_in_parts(self, act: Callable[[LoadedModel], T]) -> T:
        from transformers.integrations.deepspeed import (
            set_hf_deepspeed_config,
            unset_hf_deepspeed_config,
        )

        unset_hf_deepspeed_config()  # a judge that is opened meanwhile is not to be divided
        try:
            with whole_head(self.loaded.model):
                return on_main(self.loaded.model, lambda: act(self.loaded))
        finally:
            set_hf_deepspeed_config(self._partitioned)
            # what was gathered where no gradient can be taken is not for the next step
            self._engine.empty_partition_cache()

    @contextmanager
    def written(self, folder: Path) -> Iterator[Path | None]:
        """`write` into `folder`, for as long as this is open: the folder on rank 0, None
        elsewhere."""
        ranks.only_main(lambda: shutil.rmtree(folder, ignore_errors=True))
        self.write(folder)
        try:
            yield folder if ranks.is_main() else None
        finally:
            if ranks.is_main():
                shutil.rmtree(folder, ignore_errors=True)
        ranks.wait()

    def close(self) -> None:
        self._engine.destroy()
        self._partitioned = None


def universal(folder: Path, target: Path, stage: int) -> None:
    """DeepSpeed's universal form of a checkpoint, which any number of ranks can load. Rank 0
    converts, the others wait.

    Raises UsageError when DeepSpeed cannot.
    """
    more = ["--inject_missing_state"] if stage in (1, 2) else []
    command = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--input_folder",
        str(folder),
        "--output_folder",
        str(target),
        "--num_extract_workers",
        "1",
        "--num_merge_workers",
        "1",
        *more,
    ]

    def convert() -> None:
        shutil.rmtree(target, ignore_errors=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_alone())
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UsageError(
                f"{folder.name} was written by another number of ranks and could not be converted"
                f" ({last[:200]}). Start as many ranks as wrote it."
            )

    ranks.only_main(convert)


def _alone() -> dict[str, str]:
    """The environment without what makes a process a rank."""
    ours = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "CROSS_RANK",
        "CROSS_SIZE",
    )
    return {k: v for k, v in os.environ.items() if k not in ours}


def _restore_rotary(model: nn.Module) -> None:
    """Rotary frequencies in fp32 again: loaded partitioned in bf16 they are rounded, and far
    positions blur."""
    for module in model.modules():
        rounded = [
            name
            for name, buffer in module.named_buffers(recurse=False)
            if name.endswith("inv_freq") and buffer.dtype != torch.float32
        ]
        if rounded:
            fresh = type(module)(module.config)
            for name in rounded:
                setattr(
                    module,
                    name,
                    getattr(fresh, name).to(getattr(module, name).device, torch.float32),
                )
