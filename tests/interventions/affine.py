"""A Llama whose logits are an affine function of what stands at any site, so that the best edit is
known: the NLL of a target is convex in it, and a convex problem in a box has one optimum.

    loaded = affine.load(seed=0)
    best = affine.least_nll(loaded, rendered, target, Site(1), radius=0.3)

Attention reads all positions alike (queries and keys are 0), the MLPs' gates are half open
(sigmoid(0)), and the norms divide by a constant (their ε is far larger than any activation).
"""

from __future__ import annotations

import torch
from scipy.optimize import minimize
from tiny import VOCABULARY, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from auditgap.engines.hf import HFEngine
from auditgap.interventions.pgd import Goal, Objective
from auditgap.models import LoadedModel, Rendered, wrap
from auditgap.types import Site, Subject

WIDTH, N_BLOCKS = 24, 3
EPSILON = 1e8
LOGIT_STD = 2.0  #: about that of a trained model: it is sure of little


@torch.no_grad()
def load(seed: int = 0, dtype: torch.dtype = torch.float32) -> LoadedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=N_BLOCKS,
        num_attention_heads=2,
        max_position_embeddings=128,
        hidden_act="sigmoid",
        rms_norm_eps=EPSILON,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("q_proj", "k_proj", "gate_proj")):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(EPSILON**0.5)
    tokens = torch.arange(4, VOCABULARY)[None]
    model.lm_head.weight *= LOGIT_STD / model(tokens).logits.std()
    return wrap(model.to(dtype=dtype), tokenizer(), Subject("affine", f"affine-{seed}"))


def least_nll(
    loaded: LoadedModel, rendered: Rendered, target: tuple[int, ...], site: Site, radius: float
) -> float:
    """The smallest NLL that an edit with ‖δ‖∞ ≤ radius can reach, by L-BFGS-B in fp64."""
    engine = HFEngine(loaded)
    objective = Objective(engine, [Goal(rendered, target, (radius,))], site)
    shape, one = objective.zero().shape, torch.zeros(1, dtype=torch.long)

    def value_and_gradient(flat):
        loss, slope = objective.gradient(torch.from_numpy(flat).view(shape), one)
        return loss.item(), slope.flatten().double().numpy()

    size = objective.zero().numel()
    found = minimize(
        value_and_gradient,
        torch.zeros(size, dtype=torch.float64).numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=[(-radius, radius)] * size,
        options={"maxiter": 200, "ftol": 1e-10},
    )
    return float(found.fun)
