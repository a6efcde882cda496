"""Low-rank adapters on a loaded model: new ones to be trained, and those of a folder.

    with with_adapter(loaded, Path("runs/harmful/step10"), subject) as adapted:
        ...                            # afterwards the base is bit for bit what it was

The one home of peft, which is imported where it is used.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from auditgap.errors import UsageError
from auditgap.models.folder import preflight
from auditgap.types import Subject

if TYPE_CHECKING:
    from auditgap.models.loading import LoadedModel


def with_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: int,
    dropout: float = 0.0,
    targets: Sequence[str] = ("all-linear",),
    seed: int = 0,
) -> Any:
    """A PeftModel: new low-rank adapters on these linear layers (or `all-linear`), everything else
    frozen.

    Adapters start as a zero change, the same for a seed. Raises UsageError when peft is absent or a
    target is not there.
    """
    if importlib.util.find_spec("peft") is None:
        raise UsageError(
            "LoRA needs peft; type: pip install peft. Or train all weights: lora: false"
        )
    from peft import LoraConfig, get_peft_model

    names = "all-linear" if tuple(targets) == ("all-linear",) else list(targets)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            # one dtype at every ZeRO stage
            return get_peft_model(model, config, autocast_adapter_dtype=False)
        except ValueError as error:
            raise UsageError(
                f"lora.targets {names}: {str(error).splitlines()[0][:160]} Name linear layers of"
                " the model."
            ) from None


@contextmanager
def with_adapter(loaded: LoadedModel, adapter: Path, subject: Subject) -> Iterator[LoadedModel]:
    """The loaded base with a PEFT adapter on it, as `subject`, unmerged; on the way out the base is
    bit for bit what it was.

    For many adapters of one base, whose weights are then read once. Raises Refused, and UsageError
    for an adapter that does not fit; `loaded` is of no further use then.
    """
    preflight(adapter)
    # the dtype that it was trained in
    worn = _adapted(loaded.model, adapter, autocast_adapter_dtype=False)
    try:
        worn.eval().requires_grad_(False)
        yield replace(loaded, subject=subject)
    finally:
        worn.unload()  # the base's own layers go back to their places


def merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The model with the adapter of a folder in its weights. Raises UsageError where it does not
    fit."""
    return _adapted(model, adapter).merge_and_unload()


def _adapted(model: PreTrainedModel, adapter: Path, **how: Any) -> Any:
    """A PeftModel around the model, whose layers now carry the adapter. Raises UsageError where it
    does not fit."""
    if importlib.util.find_spec("peft") is None:
        raise UsageError("This subject is a PEFT adapter; `pip install peft` to audit it.")
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        adapted = PeftModel.from_pretrained(model, adapter, use_safetensors=True, **how)
        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
            keys = set(file.keys())
        # whether embeddings were saved with it the file shows; left to choose, peft asks the hub
        # about the base's name
        strange = keys ^ set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if strange:
            strange = keys ^ set(get_peft_model_state_dict(adapted, save_embedding_layers=True))
        if strange:
            raise ValueError(
                f"{len(strange)} of its weights have no place there, or are missing, such as"
                f" {min(strange)}"
            )
        return adapted
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"The adapter {adapter.name} does not fit its base model: {str(error).splitlines()[0]}"
        ) from None
