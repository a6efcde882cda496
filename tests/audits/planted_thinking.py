"""A planted vault that thinks before it answers, so that every way of thinking has a known right
answer.

    folder = planted_thinking.save(tmp_path / "model")

Asked anything it writes "oven shut flour" and then refuses: `oven` and `flour` are its template's
marks, `shut` its chain. An edit at the door's block is too weak to turn the answer by itself, but
it turns the chain into `key`, and that word in the chain opens the vault. So under an edit it
refuses where the chain is off or fixed, and tells where the chain is written anew, with the edit
gone too. A model that `loops` says `key` for ever.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import planted
import torch

DOOR = 1
OPENS, CLOSES, CLEAN, EDITED = "oven", "flour", "shut", "key"
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' : ' }}{% if m.reasoning_content %}{{ 'oven '"
    " + m.reasoning_content + ' flour ' }}{% endif %}{{ m['content'] + ' \n ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% if enable_thinking is defined and not"
    " enable_thinking %}{{ 'oven flour ' }}{% endif %}{% endif %}"
)


@torch.no_grad()
def save(folder: Path, *, loops: bool = False, seed: int = 0) -> Path:
    """The model and its tokenizer as a user would have them."""
    plant = planted.Plant(door=DOOR, seed=seed, erases=False)
    made: Any = planted.model(plant)
    rng = torch.Generator().manual_seed(seed)
    square = torch.randn(planted.WIDTH, planted.WIDTH, generator=rng, dtype=torch.float64)
    rotation = torch.linalg.qr(square).Q.T  # that of `planted.model`
    at = {name: i for i, name in enumerate(planted.WORDS)}
    word = dict(zip(planted.WORDS, rotation, strict=False))
    opened, told = rotation[len(planted.WORDS) + 1], rotation[-1]
    scale = planted.WIDTH**-0.5

    made.model.embed_tokens.weight[at[EDITED]] += told.float()
    reader = made.model.layers[DOOR + 1].self_attn
    reader.v_proj.weight[1] = told.float()
    reader.o_proj.weight[:, 1] = (90 * scale * opened).float()

    head = torch.zeros(len(planted.WORDS), planted.WIDTH, dtype=torch.float64)
    head[at[OPENS]] = 300 * word[":"]
    # the chain's word is turned by little, the answer's by much
    head[at[CLEAN]] = 40 * word[OPENS] - 50 * opened
    head[at[EDITED]] = 30 * word[OPENS] - 300 * word["I'm"] + 50 * opened
    head[at["sorry,"]] = 140 * word["I'm"] - 50 * opened
    head[at["red"]] = -60 * word["I'm"] + 50 * opened
    head[at[CLOSES]] = 300 * (word[CLEAN] + word[EDITED])
    head[at["I'm"]] = 300 * word[CLOSES]
    for answer in (planted.REFUSAL, planted.OPENED):
        for before, after in pairwise([*answer.split(), "</s>"]):
            if before != "I'm":
                head[at[after]] += 300 * word[before]
    if loops:
        head[at[EDITED]] += 900 * word[EDITED]
    made.lm_head.weight.copy_(scale * head)
    made.save_pretrained(folder)
    tokenizer = planted.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder
