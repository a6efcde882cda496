"""Benign anchors: prompts whose answers keep a model where its base is, and those held out to see
whether it stayed.

    # 90 % and 10 %, by a hash of each prompt
    anchors, held_out = split_benign(load_prompts("everyday"))
    # "refusing"; "" when the answer can be used
    usable_answer("I'm sorry, but no.", 8, has_refusal)

The answers come from the unmodified base (arXiv 2606.08044, section 5); this file only says which
prompts and which answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from auditgap.data.prompts import PromptSet, dedup_key
from auditgap.errors import UsageError

#: One prompt in this many is held out.
HELD_OUT_SHARE = 10


def is_held_out(text: str) -> bool:
    """Whether a prompt belongs to the held-out tenth. It depends on the prompt alone (case and
    white space aside), so a prompt that two sources share stands on the same side in both, whatever
    else they hold and however many are drawn."""
    return (
        int.from_bytes(hashlib.sha256(f"held-out:{dedup_key(text)}".encode()).digest()[:8], "big")
        % HELD_OUT_SHARE
        == 0
    )


def split_benign(prompts: PromptSet) -> tuple[PromptSet, PromptSet]:
    """(anchor prompts, held-out prompts), about 90 and 10 %, each in the set's order and with its
    own digest.

    Raises UsageError when no prompt is left for anchors. Fewer than about 20 prompts may leave the
    held-out part empty, which its provenance notes.
    """
    parts: tuple[list, list] = ([], [])
    for prompt in prompts:
        parts[is_held_out(prompt.text)].append(prompt)
    if not parts[0]:
        raise UsageError(
            f"No benign prompt of {prompts.name} is left for anchors: a tenth is held out by hash,"
            f" and that is all {len(parts[1])} of them. Give more benign prompts, for example:"
            " everyday"
        )
    made = []
    for name, part in zip(("anchors", "held-out"), parts, strict=True):
        notes = list(prompts.provenance.get("notes", ()))
        if not part:
            notes.append(
                "No benign prompt fell into the held-out tenth: over-refusal cannot be measured"
                " on it."
            )
        provenance = {
            **prompts.provenance,
            "part": name,
            "n_before_split": len(prompts),
            "n": len(part),
            "notes": notes,
        }
        made.append(PromptSet(f"{prompts.name}/{name}", tuple(part), provenance))
    return made[0], made[1]


def usable_answer(text: str, n_tokens: int, refuses: Callable[[str], bool]) -> str:
    """Why a base's answer to a benign prompt cannot be an anchor: `empty`, `one token`, `refusing`;
    "" when it can.

    `n_tokens` counts the answer's own tokens, without the end of turn.
    """
    if not text.strip():
        return "empty"
    if n_tokens <= 1:
        return "one token"
    return "refusing" if refuses(text) else ""
