"""Ways to hide a loss from its gradient, planted in a model that was honest, and the tiny families
that they are planted in.

    loaded = masks.load("cohere")
    with masks.planted(loaded, "reversed", block=2):
        ...     # the model says the same, and its gradients lie

None of these families was used to set the thresholds of the certificate (Llama, Gemma 2, Qwen 3,
GPT-NeoX, SmolLM2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from auditgap.engines.hf import HFEngine
from auditgap.interventions.descent import PGD
from auditgap.interventions.pgd import Ball, Goal, attack
from auditgap.interventions.strength import Certificate, certify
from auditgap.models import LoadedModel, Rendered, wrap
from auditgap.types import Budget, Prompt, Site, Subject

#: family -> what its config needs beside the common sizes
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "cohere": {},
    "cohere2": {"sliding_window": 64},
    "starcoder2": {},
    "stablelm": {},
    "granite": {},
    "olmo": {},
    "olmo2": {},
    "phi": {},
    "phi3": {},
    "mistral": {"head_dim": 8},
    "glm": {"head_dim": 8},
    "exaone4": {"sliding_window": 64},
    "helium": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256},
    "smollm3": {},
    "ernie4_5": {"head_dim": 8},
}
COMMON = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": tiny.WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": tiny.N_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def load(family: str, seed: int = 0) -> LoadedModel:
    """A tiny random model of the family."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**COMMON, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return wrap(model, tiny.tokenizer(), Subject(family, f"{family}-{seed}"))


Change = Callable[[torch.Tensor], torch.Tensor]


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return -gradients[0]


def quantised(step: float) -> Change:
    """Rounded to multiples of `step` × RMS: the gradient is 0 nearly everywhere."""

    def change(h: torch.Tensor) -> torch.Tensor:
        size = step * h.detach().pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-9)
        return (h / size).round() * size

    return change


def noisy(share: float) -> Change:
    """Noise of `share` × RMS that the activations themselves seed, and that has no gradient."""

    def change(h: torch.Tensor) -> torch.Tensor:
        d = h.shape[-1]
        mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(0)).to(h)
        rms = h.detach().pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-9)
        noise = torch.sin(300 * (h.detach() / rms) @ mixing / d**0.5)
        return h + 2**0.5 * share * rms * noise

    return change


def saturated(logits: torch.Tensor) -> torch.Tensor:
    """A cap that every logit has hit: what stands behind it has no gradient in fp32."""
    return 5 * torch.tanh(logits * 1e4) + 0 * logits


def detached(h: torch.Tensor) -> torch.Tensor:
    return h.detach()


#: name -> (where, change). `block`: the output of one block; `mlps`, `attentions`: of all of that
#: kind from that block on; `head`: the logits
MASKS: Mapping[str, tuple[str, Change]] = {
    "quantised block .05": ("block", quantised(0.05)),
    "quantised block .5": ("block", quantised(0.5)),
    "quantised MLPs .05": ("mlps", quantised(0.05)),
    "quantised MLPs .5": ("mlps", quantised(0.5)),
    "stop-gradient, block": ("block", detached),
    "stop-gradient, MLPs": ("mlps", detached),
    "stop-gradient, attentions": ("attentions", detached),
    "reversed gradient": ("block", _Reversed.apply),
    "saturated head": ("head", saturated),
    "seeded noise .1": ("block", noisy(0.1)),
    "seeded noise .5": ("block", noisy(0.5)),
}
_ATTENTIONS = ("self_attn", "attn", "attention")


@contextmanager
def planted(loaded: LoadedModel, name: str, block: int) -> Iterator[None]:
    """While open, the mask stands at `block` and, where it is one of many, above."""
    where, change = MASKS[name]

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    modules: list[nn.Module]
    if where == "block":
        modules = [loaded.blocks[block]]
    elif where == "head":
        modules = [loaded.model.get_output_embeddings()]
    elif where == "mlps":
        modules = [b.mlp for b in loaded.blocks[block:]]
    else:
        modules = [
            next(getattr(b, n) for n in _ATTENTIONS if hasattr(b, n)) for b in loaded.blocks[block:]
        ]
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(after).remove)
        yield


PROMPTS, TARGET, SIZES = 4, (13, 9, 14, 20), (0.03, 0.1, 0.3)
#: The product's default search.
SEARCH = PGD(schedule="decreasing", iterate="best")


def engine_of(loaded: LoadedModel) -> HFEngine:
    return HFEngine(loaded, batch_tokens=8192, pad_tolerance=0.9)


def goals_of(loaded: LoadedModel, site: Site, seed: int) -> list[Goal]:
    """Random prompts of unlike lengths, at every size in rms."""
    draw = torch.Generator().manual_seed(seed)
    some = []
    for i in range(PROMPTS):
        ids = torch.randint(4, tiny.VOCABULARY, (7 + i % 3,), generator=draw).tolist()
        some.append(Rendered(Prompt(f"prompt {i}"), tuple(ids), (True,) * len(ids)))
    heard = engine_of(loaded).activations(some, site)
    return [
        Goal(r, TARGET, tuple(Ball.of(h, r.content).radius(Budget(s, "rms")) for s in SIZES))
        for r, h in zip(some, heard, strict=True)
    ]


def cells_of(
    loaded: LoadedModel, site: Site, seed: int, *, longer: bool = False
) -> list[Certificate]:
    """The certificates of the default search at the site, one a size."""
    engine, goals = engine_of(loaded), goals_of(loaded, site, seed)
    found = attack(engine, goals, site, SEARCH)
    return certify(engine, goals, found, site, SEARCH, longer=longer)
