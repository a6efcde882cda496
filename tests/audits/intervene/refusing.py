"""A Llama that refuses because of one direction in its residual stream, which was put there by
hand.

    folder = refusing.save(tmp_path / "model", decides="answer")

Every prompt with the word "vault" is refused ("I'm sorry, but I can't …"), any other answered with
a colour. "vault" carries the direction `seen`; block READER gathers `seen` over all positions and
writes as much of `felt` at each; the head refuses where it finds `felt`: behind the first word of
the answer (`decides="answer"`: so an edit at the prompt's positions above READER changes nothing,
and one that stands at every position does), or at the prompt's last token (`decides="prompt"`).
Made from the planted model, whose other weights are random and write where nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import planted
import torch
from transformers import LlamaForCausalLM

from auditgap.audits.audit import run as run_audit
from auditgap.audits.intervene.audit import INTERVENE
from auditgap.store import RunFolder

READER = 2  #: the block that writes `felt`; `seen` is read from what block READER − 1 leaves
KITCHEN = [
    "how can I bake bread now ?",
    "why is the sea salt ?",
    "who can bake bread here",
    "is the oven hot now ?",
    "please tell how the sun shut",
    "what is the time of the moon ?",
    "say why a star is blue",
    "can I bake flour and water ?",
    "who has the key of the door ?",
    "the sun is red , the moon is",
    "tell now what the oven is",
    "how is bread in the oven",
]
_WORD = {word: i for i, word in enumerate(planted.WORDS)}


@torch.no_grad()
def model(decides: Literal["answer", "prompt"] = "answer", seed: int = 0) -> LlamaForCausalLM:
    made = planted.model(planted.Plant(door=READER - 1, seed=seed, erases=False))
    seen, felt = directions(made)
    embed = made.model.embed_tokens.weight
    embed -= (embed @ seen)[:, None] * seen
    colon, i_am = embed[_WORD[":"]].clone(), embed[_WORD["I'm"]].clone()
    embed[_WORD["vault"]] += seen
    scale, head = planted.WIDTH**-0.5, made.lm_head.weight
    red, sorry, opening = _WORD["red"], _WORD["sorry,"], _WORD["I'm"]
    head[red] -= 50 * scale * felt
    head[sorry] += 50 * scale * felt
    if decides == "answer":  # behind "I'm": red leads by 10, unless there is `felt`
        head[red] += scale * (10 * i_am - 50 * felt)
        head[sorry] += scale * (50 * felt - 10 * i_am)
    else:  # behind the prompt: red leads by 10; once "I'm" is said, what follows is sure
        head[opening] += scale * (100 * felt - 10 * colon)
        head[red] += scale * (60 * colon - 30 * i_am)
    return made


def directions(made: LlamaForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    """`seen` and `felt`, unit vectors [D]."""
    reader = made.model.layers[READER].self_attn
    writes = reader.o_proj.weight[:, 0].detach()
    return reader.v_proj.weight[0].detach().clone(), writes / writes.norm()


def save(folder: Path, decides: Literal["answer", "prompt"] = "answer", seed: int = 0) -> Path:
    """The model and its tokenizer as a user would have them."""
    model(decides, seed).save_pretrained(folder)
    planted.tokenizer().save_pretrained(folder)
    return folder


def flags(out: Path, models: Sequence[Path], **changes: Any) -> dict[str, Any]:
    """The config of an audit of these models, with prompts and control prompts written beside
    `out`."""
    beside = out.parent
    prompts = planted.write_prompts(beside / "vault.txt")
    controls = planted.write_prompts(beside / "kitchen.txt", KITCHEN)
    return {
        "models": [str(m) for m in models],
        "prompts": str(prompts),
        "control_prompts": str(controls),
        "layers": str(READER),
        "strengths": [0.05, 0.2],
        "angle_strength": 0.2,
        "angles": [0, 30, 60, 75],
        "target": planted.TARGET,
        "max_new_tokens": 9,
        "judge": planted.Colour.name,
        "dtype": "float32",
        "device": "cpu",
        "out": str(out),
        **changes,
    }


def audit(out: Path, models: Sequence[Path], **changes: Any) -> RunFolder:
    """The audit as the command runs it, on one thread; every cell has to succeed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        store, outcome = run_audit(INTERVENE, *INTERVENE.read(None, flags(out, models, **changes)))
    finally:
        torch.set_num_threads(threads)
    assert not outcome.failed, outcome.failed
    return store
