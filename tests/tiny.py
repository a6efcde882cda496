"""Tiny random models of every family under test, and a word-level tokenizer with a chat template.
Built in milliseconds.

    loaded = tiny.load("gemma2")            # in memory
    folder = tiny.save("llama", tmp_path)   # on disk, as a user would name it
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BertConfig, BertModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from auditgap.engines import hooked
from auditgap.models import LoadedModel, wrap
from auditgap.types import Subject

#: family -> extra config; every one is 4 blocks, width 32, 4 heads (2 shared), vocabulary 96.
FAMILIES = {
    "llama": {},
    "gemma2": {"head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"head_dim": 8},
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
    "gpt_neox": {"rotary_pct": 0.25},
}
N_BLOCKS, WIDTH, VOCABULARY = 4, 32, 96
WORDS = (
    "<pad> <s> </s> <unk> user assistant system : . , ? ! \n Sure here is sorry I can not tell what"
    " the colour of vault red blue green never reveal a door key open shut please say now why how"
    " who bread bake water salt flour oven time sun moon star sea"
).split(" ")
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' : ' + m['content'] + ' \n ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


def tokenizer(chat_template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a word of WORDS, the rest of the vocabulary is w<i>; unknown words become <unk>."""
    vocabulary = {
        word: i for i, word in enumerate(WORDS + [f"w{i}" for i in range(len(WORDS), VOCABULARY)])
    }
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    made = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )
    made.chat_template = chat_template
    return made


def model(
    family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
) -> torch.nn.Module:
    """A random causal LM of the family, larger weights than usual so that activations and gradients
    are not tiny."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": N_BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **FAMILIES[family],
        **changes,
    }
    if family == "gpt_neox":
        settings.pop("num_key_value_heads")
    config = CONFIG_MAPPING[family](**settings)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def load(family: str = "llama", **changes: object) -> LoadedModel:
    return wrap(
        model(family, **changes),
        tokenizer(),
        Subject(f"tiny-{family}", f"tiny-{family}-{sorted(changes.items())}"),
    )


def save(
    family: str, folder: Path, *, chat_template: str | None = TEMPLATE, **changes: object
) -> Path:
    """The model and tokenizer as safetensors and JSON in `folder`."""
    model(family, **changes).save_pretrained(folder)
    tokenizer(chat_template).save_pretrained(folder)
    return folder


def encoder(folder: Path, seed: int = 0) -> Path:
    """A random BERT in the words of `tokenizer`, with a window of 64 tokens."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer(None).save_pretrained(folder)
    return folder


def broken_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on every new token's logits are no numbers, whoever asks for it."""
    told = hooked._told

    def broken(logits, token, ended, broken, top):
        return told(logits, token, torch.ones_like(ended), torch.ones_like(broken), top)

    monkeypatch.setattr(hooked, "_told", broken)
