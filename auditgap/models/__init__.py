"""Open a model to be audited: look at it, load it, render its chat, find its blocks.

    subject = load("smollm2", dtype="float32")
    # the chat template's tokens, ready for generation
    subject.render(Prompt("What colour is the vault?")).ids

Every name ends as a local folder of safetensors (`folder.py`), and nothing in that folder can make
foreign code run.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from auditgap.errors import AuditgapError, UsageError, did_you_mean
from auditgap.models.chat import Chat, Conversation, Rendered, read_template
from auditgap.models.folder import (
    OPENING,
    PACKAGED,
    adapter_base,
    cache_dir,
    fingerprint,
    is_adapter,
    preflight,
    resolve,
)
from auditgap.models.shard import WHOLE, Shard, home, placed
from auditgap.types import Prompt, Site, Subject

__all__ = [
    "DTYPES",
    "OPENING",
    "PACKAGED",
    "WHOLE",
    "Chat",
    "Conversation",
    "LoadedModel",
    "Outline",
    "Rendered",
    "Shard",
    "cache_dir",
    "find_blocks",
    "fingerprint",
    "load",
    "outline",
    "parse_sites",
    "pick_device",
    "pick_dtype",
    "preflight",
    "quiet",
    "resolve",
    "with_adapter",
    "with_lora",
    "wrap",
]

#: A weight of a decoder block; a vision tower's blocks, which a causal LM does not read, are named
#: otherwise.
_BLOCK_KEY = re.compile(r"(model\.|transformer\.|gpt_neox\.|language_model\.)*(layers|h)\.\d+\.")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Outline:
    """What can be known of a subject before its weights are loaded: enough to plan, and to
    estimate, an audit."""

    subject: Subject
    folder: Path
    chat: Chat
    n_blocks: int
    width: int
    n_block_params: int  #: all parameters of the blocks
    n_head_params: int  #: of the output projection
    n_params: int
    #: token ids that end a completion, as `LoadedModel.stop_ids`
    stop_ids: frozenset[int] = frozenset()
    max_positions: int | None = None  #: tokens that it can attend to; None: not said


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
        return self.model.config.get_text_config().hidden_size

    @property
    def max_positions(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a completion: the generation config's and the tokenizer's."""
        return _stop_ids(getattr(self.model, "generation_config", None), self.tokenizer)

    def site(self, word: str) -> Site:
        """One site from its word: `embedding`, `mid` = block round(L/2), `last` = L−1, `block7` or
        `7`."""
        return parse_sites(word, self.n_blocks)[0]

    def render(self, prompt: Prompt) -> Rendered:
        return self.chat.render(prompt)


def _stop_ids(generation: Any, tokenizer: Any) -> frozenset[int]:
    ids = None if generation is None else generation.eos_token_id
    ids = [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return frozenset(ids)


def _generation_config(base: Path) -> Any:
    """What transformers would give the loaded model: generation_config.json, else what config.json
    says of generation."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(
            base, trust_remote_code=False, local_files_only=True
        )
    except OSError:
        return GenerationConfig.from_pretrained(
            base,
            "config.json",
            _from_model_config=True,
            trust_remote_code=False,
            local_files_only=True,
        )


def quiet() -> None:
    """No loading bars and no advice of transformers: a command says what it does itself."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def parse_sites(words: str, n_blocks: int) -> list[Site]:
    """Sites from `embedding,mid,last`, `all`, `stride:4` or `0,5,12`; without duplicates, in order
    of depth.

    Raises UsageError naming the valid range when a word is none of these.
    """
    found: set[Site] = set()
    for word in (w.strip() for w in str(words).split(",")):
        if word == "embedding":
            found.add(Site(-1))
        elif word == "mid":
            found.add(Site(min(n_blocks - 1, round(n_blocks / 2))))
        elif word == "last":
            found.add(Site(n_blocks - 1))
        elif word == "all":
            found.update(Site(i) for i in range(-1, n_blocks))
        elif (
            word.startswith("stride:")
            and word[7:].isascii()
            and word[7:].isdigit()
            and int(word[7:]) > 0
        ):
            found.update([Site(-1), *(Site(i) for i in range(0, n_blocks, int(word[7:])))])
        else:
            index = word.removeprefix("block")
            if not (index.isascii() and index.isdigit()) or int(index) >= n_blocks:
                raise UsageError(
                    "--layers takes embedding, mid, last, all, stride:N or block numbers 0 to"
                    f" {n_blocks - 1} (this model has {n_blocks} blocks); {word!r} came."
                    + did_you_mean(word, ["embedding", "mid", "last", "all"])
                )
            found.add(Site(int(index)))
    return sorted(found)


def outline(name: str, *, chat_template: str | None = None) -> Outline:
    """Resolve, look at and fingerprint a subject, without loading its weights.

    Raises Refused or UsageError as `preflight`, `resolve` and transformers' own reading of the
    config find cause to.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = resolve(name)
    preflight(folder)
    subject = Subject(name, fingerprint(folder))
    base = adapter_base(folder) if is_adapter(folder) else folder
    with _as_usage_error(name):
        config = AutoConfig.from_pretrained(
            base, trust_remote_code=False, local_files_only=True
        ).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(
            folder if (folder / "tokenizer_config.json").is_file() else base,
            trust_remote_code=False,
            local_files_only=True,
        )
        stop_ids = _stop_ids(_generation_config(base), tokenizer)
    n_params, n_embedding = _count_parameters(base)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    return Outline(
        subject,
        folder,
        Chat(name, tokenizer, read_template(chat_template)),
        config.num_hidden_layers,
        config.hidden_size,
        n_block_params=max(n_params - n_embedding * (1 if tied else 2), 0),
        n_head_params=n_embedding,
        n_params=n_params,
        stop_ids=stop_ids,
        max_positions=getattr(config, "max_position_embeddings", None),
    )


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
    from transformers import AutoModelForCausalLM

    seen = name if isinstance(name, Outline) else outline(name, chat_template=chat_template)
    device = pick_device(device)
    shard.check(seen)
    if shard.kind == "layers":  # a rank of `tensor` has one device, and knows which
        shard.check_devices(device)
    base = adapter_base(seen.folder) if is_adapter(seen.folder) else seen.folder
    with OPENING, _as_usage_error(seen.subject.name):
        opened: Any = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=pick_dtype(dtype, device),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **shard.loading(device),
        )
    model, found = opened
    _check_all_loaded(seen.subject.name, found, base)
    if base is not seen.folder:
        model = _with_adapter(model, seen.folder)
    n_rows, n_tokens = n_embeddings(model), len(seen.chat.tokenizer)
    if n_tokens > n_rows:
        raise UsageError(
            f"{seen.subject.name}: its tokenizer has {n_tokens} tokens, its embedding {n_rows};"
            " they do not belong together."
        )
    return wrap(
        placed(model, device, shard),
        seen.chat.tokenizer,
        seen.subject,
        chat_template=seen.chat.template,
    )


def n_embeddings(model: PreTrainedModel) -> int:
    """Rows of a model's input embedding."""
    embedding: Any = model.get_input_embeddings()
    return embedding.num_embeddings


def _check_all_loaded(name: str, found: dict[str, Any], folder: Path) -> None:
    """Raises UsageError when weights were missing (they would be random) or left over (they belong
    to another model)."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in found.get(what) or ())
        # a stray file's weights, or a buffer of an older release, change nothing
        if what == "unexpected_keys":
            keys = [
                key
                for key in keys
                if _BLOCK_KEY.match(key) and not key.endswith(("inv_freq", ".bias", ".masked_bias"))
            ]
        if keys:
            raise UsageError(
                f"{name}: the weights in {folder.name} do not fit its config.json ({len(keys)}"
                f" {what.replace('_', ' ')}, such as {keys[0][:80]}). Download the model again;"
                " what transformers would make of it is another model."
            )


@contextmanager
def _as_usage_error(name: str) -> Iterator[None]:
    try:
        yield
    except AuditgapError:
        raise
    except Exception as error:  # transformers and its validators raise of many kinds, all of them about this folder
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"transformers cannot open {name} as a causal LM with a tokenizer: {first}"
        ) from None


def _count_parameters(folder: Path) -> tuple[int, int]:
    """Parameters in all, and of the input embedding, from the headers of the safetensors files."""
    from safetensors import SafetensorError, safe_open

    total = embedding = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    size = math.prod(file.get_slice(key).get_shape())
                    total += size
                    if "embed" in key.rpartition(".")[0].rpartition(".")[2] and size > embedding:
                        embedding = size
        except (SafetensorError, OSError) as error:
            raise UsageError(
                f"{path} is not a readable safetensors file ({error}); download the model again."
            ) from None
    return total, embedding


def wrap(
    model: PreTrainedModel, tokenizer: Any, subject: Subject, *, chat_template: str | None = None
) -> LoadedModel:
    """A LoadedModel around a model and tokenizer already in memory (frozen, eval)."""
    model.eval().requires_grad_(False)
    # sdpa cannot cap attention logits, and a family that does so would be audited as another model
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    try:
        model.set_attn_implementation("eager" if capped else GROUPED_SDPA)
    except ValueError:  # a family that has no SDPA
        model.set_attn_implementation("eager")
    return LoadedModel(
        subject, model, Chat(subject.name, tokenizer, chat_template), find_blocks(model)
    )


def _grouped_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA, but on a CPU the shared key/value heads stay shared under a mask: five
    times faster decoding."""
    if query.device.type != "cpu":
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        is_causal=causal and attention_mask is None and query.shape[2] > 1,
    )
    return out.transpose(1, 2).contiguous(), None


GROUPED_SDPA = "auditgap_grouped_sdpa"
AttentionInterface.register(GROUPED_SDPA, _grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks: the first ModuleList whose length is the config's number of hidden
    layers."""
    n = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == n
            and len({type(m) for m in module}) == 1
        ):
            return module
    raise UsageError(
        f"{type(model).__name__} has no list of {n} alike blocks, so auditgap cannot place an edit"
        " in it."
    )


def pick_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    usable = device.split(":")[0] != "meta"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise UsageError(
            f"--device {device}: torch cannot use it here. Use auto, cpu, cuda or cuda:N."
        )
    return device


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    if dtype not in DTYPES:
        raise UsageError(
            f"--dtype must be auto, {', '.join(DTYPES)}; {dtype!r}"
            f" came.{did_you_mean(dtype, DTYPES)}"
        )
    return DTYPES[dtype]


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


def _with_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
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
