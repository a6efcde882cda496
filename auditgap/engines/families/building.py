"""One tiny random model of a family, in the family's own mixture of blocks.

model = build("qwen3_next", wrapper=False)      # four blocks, width 64, milliseconds
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from auditgap.config import parse_yaml
from auditgap.types import Document

CAUSAL = tuple(sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
#: Types that transformers opens as image-text-to-text models alone.
WRAPPERS = tuple(
    sorted(set(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(CAUSAL))
)
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
_TOWERS = ("vision_config", "audio_config", "image_config")
#: As many blocks as the text has: the first list of the right length is then the wrong one.
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "depth": 4,
    "num_attention_heads": 2,
    "num_heads": 2,
    "embed_dim": 32,
    "out_hidden_size": 64,
}
#: Parameters above which a family's settings were not made small.
_LIMIT = {False: 20_000_000, True: 180_000_000}


def build(model_type: str, *, wrapper: bool) -> PreTrainedModel:
    """In fp32, eval. Raises what transformers raises, and RuntimeError where its settings are not
    small."""
    opener: Any = AutoModelForImageTextToText if wrapper else AutoModelForCausalLM
    with _without_tower(model_type):
        config = configured(model_type)
        with torch.device("meta"):
            n = sum(p.numel() for p in opener.from_config(config).parameters())
        if n > _LIMIT[wrapper]:
            raise RuntimeError(f"it has {n / 1e6:.0f} M parameters with these settings")
        torch.manual_seed(0)
        return opener.from_config(config, dtype=torch.float32).eval()


def configured(model_type: str) -> PreTrainedConfig:
    """The family's config with a small text decoder, and small towers where it has them."""
    default: Any = CONFIG_MAPPING[model_type]()
    text_type = _settings()["text_types"].get(model_type)
    owner = CONFIG_MAPPING[text_type]() if text_type else default.get_text_config(decoder=True)
    towers = {}
    for name in _TOWERS:
        own = getattr(default, name, None)
        if own is not None:
            small = {k: v for k, v in _TOWER.items() if isinstance(getattr(own, k, None), int)}
            kinds = {"layer_types": k[:4]} if (k := getattr(own, "layer_types", None)) else {}
            more = _settings()["towers"].get(model_type, {})
            towers[name] = {**own.to_dict(), **small, **kinds, **more}
    key = next((k for k in _TEXT_CONFIGS if getattr(default, k, None) is not None), None)
    if key is None:
        return CONFIG_MAPPING[model_type](**_shrunk(model_type, default), **towers)
    small = _shrunk(model_type, owner)
    rope = owner.to_dict().get("rope_parameters")
    if model_type not in CAUSAL and isinstance(rope, dict) and "rope_theta" in rope:
        sections = [2, 3, 3] if rope.get("partial_rotary_factor", 1) == 1 else [1, 1, 2]
        small.setdefault("rope_parameters", {**rope, "mrope_section": sections})
    return CONFIG_MAPPING[model_type](**{key: type(owner)(**small).to_dict(), **towers})


@functools.cache
def _settings() -> Document:
    return parse_yaml(Path(__file__).with_name("settings.yaml").read_text("utf-8"))


def _shrunk(model_type: str, owner: Any) -> Document:
    """The family's settings, small: those of `small` that it knows, blocks in its own mixture, then
    what is said of the type."""

    def knows(name: str) -> bool:
        try:
            return hasattr(owner, name) and not isinstance(
                getattr(type(owner), name, None), property
            )
        except Exception:
            return True  # an attribute that differs between layers

    kept = {k: v for k, v in _settings()["small"].items() if knows(k)}
    rotary = getattr(owner, "qk_rope_head_dim", None)
    if rotary and owner.to_dict().get("head_dim") == rotary:
        kept["head_dim"] = 8
    if getattr(owner, "kv_lora_rank", None) and "num_key_value_heads" in kept:
        kept["num_key_value_heads"] = 4  # latent attention has no shared heads
    for name in ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types"):
        kinds = list(dict.fromkeys(getattr(owner, name, None) or []))
        if kinds and knows(name) and name not in (owner.attribute_map or {}):
            kept[name] = (kinds * 4)[:4]
    per_type = _settings()["per_type"]
    own = per_type.get(model_type) or per_type.get(owner.model_type, {})
    return {k: v for k, v in {**kept, **own}.items() if v != "drop"}


@contextmanager
def _without_tower(model_type: str) -> Iterator[None]:
    """For families whose vision tower needs timm: text never runs through it, so it stays out."""
    if model_type not in _settings()["timm_towers"]:
        yield
        return
    name = f"transformers.models.{model_type}.modeling_{model_type}"
    module = vars(importlib.import_module(name))
    real = module["AutoModel"]

    class TextAlone:
        @staticmethod
        def from_config(config: PreTrainedConfig, **how: Any) -> torch.nn.Module:
            if any(word in config.model_type for word in ("vision", "audio", "timm")):
                return torch.nn.Identity()
            return real.from_config(config, **how)

    module["AutoModel"] = TextAlone
    try:
        yield
    finally:
        module["AutoModel"] = real


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a word: 0 is padding, 1 begins, 2 ends."""
    words = {f"w{i}": i for i in range(_settings()["small"]["vocab_size"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="w3"))
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )
