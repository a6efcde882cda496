"""A subject in memory: its weights frozen, its tokenizer, its decoder blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from auditgap.errors import UsageError
from auditgap.models import attention
from auditgap.models.adapters import merged
from auditgap.models.blocks import find_blocks, n_embeddings, width_of
from auditgap.models.chat import Chat, Rendered
from auditgap.models.choices import parse_sites, pick_device, pick_dtype
from auditgap.models.door import as_usage_error
from auditgap.models.folder import OPENING, adapter_base
from auditgap.models.kernels import no_hub_kernels
from auditgap.models.outlines import Outline, outline, stop_ids_of
from auditgap.models.shard import WHOLE, Shard, home, placed
from auditgap.models.trying import check_all_loaded, opener
from auditgap.models.weights import check_opens, is_adapter, opening
from auditgap.types import Prompt, Site, Subject

no_hub_kernels()


@dataclass(eq=False)
class LoadedModel:
    """A causal LM in memory with its tokenizer and its decoder blocks."""

    subject: Subject
    model: PreTrainedModel
    chat: Chat
    blocks: nn.ModuleList

    @property
    def tokenizer(self) -> Any:
        return self.chat.tokenizer

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where token ids go and logits come from; a model over several devices carries everything
        else between them."""
        return home(self.model)

    @property
    def n_embeddings(self) -> int:
        """Rows of the input embedding: every token id is below it."""
        return n_embeddings(self.model)

    @property
    def width(self) -> int:
        return width_of(self.model.config.get_text_config())

    @property
    def max_positions(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a completion: the generation config's and the tokenizer's."""
        return stop_ids_of(getattr(self.model, "generation_config", None), self.tokenizer)

    def site(self, word: str) -> Site:
        """One site from its word: `embedding`, `mid` = block round(L/2), `last` = L−1, `block7` or
        `7`."""
        return parse_sites(word, self.n_blocks)[0]

    def render(self, prompt: Prompt) -> Rendered:
        return self.chat.render(prompt)


def quiet() -> None:
    """No loading bars and no advice of transformers: a command says what it does itself."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def load(
    name: str | Outline,
    *,
    dtype: str = "auto",
    device: str = "auto",
    chat_template: str | None = None,
    shard: Shard = WHOLE,
) -> LoadedModel:
    """Open a subject for auditing: weights frozen, eval mode. `dtype` auto is bfloat16 on a GPU and
    float32 on a CPU.

    A `shard` over `tensor` is for a process that is one of its ranks. Raises UsageError when the
    subject, or this machine, does not allow it.
    """
    seen = name if isinstance(name, Outline) else outline(name, chat_template=chat_template)
    device = pick_device(device)
    shard.check(seen)
    if shard.kind == "layers":  # a rank of `tensor` has one device, and knows which
        shard.check_devices(device)
    base = adapter_base(seen.folder) if is_adapter(seen.folder) else seen.folder
    check_opens(base)
    unpacked = opening(base)
    with OPENING, as_usage_error(seen.subject.name):
        opened: Any = opener(base).from_pretrained(
            base,
            dtype=pick_dtype(dtype, device),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **shard.loading(device),
            **unpacked,
        )
    model, found = opened
    check_all_loaded(seen.subject.name, found, base)
    if unpacked:
        _as_plain(model)
    n_tokens = len(seen.chat.tokenizer)
    if base is not seen.folder:
        model = merged(model, seen.folder, n_tokens)
    n_rows = n_embeddings(model)
    if n_tokens > n_rows:
        raise UsageError(
            f"{seen.subject.name}: its tokenizer has {n_tokens} tokens, its embedding {n_rows};"
            " they do not belong together."
        )
    loaded = wrap(placed(model, device, shard), seen.chat.tokenizer, seen.subject)
    return replace(loaded, chat=seen.chat)


def _as_plain(model: Any) -> None:
    """Weights that were unpacked are plain numbers: what is written of them does not say that they
    are packed."""
    model.hf_quantizer, model.is_quantized = None, False
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "quantization_config"):
            del config.quantization_config


def wrap(
    model: PreTrainedModel, tokenizer: Any, subject: Subject, *, chat_template: str | None = None
) -> LoadedModel:
    """A LoadedModel around a model and tokenizer already in memory (frozen, eval)."""
    model.eval().requires_grad_(False)
    attention.use(model)
    return LoadedModel(
        subject, model, Chat(subject.name, tokenizer, chat_template), find_blocks(model)
    )
