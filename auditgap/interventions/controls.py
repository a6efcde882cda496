"""Controls: edits as large as the attack's that do not aim. An attack counts for what it does
beyond these.

    # random signs on the attack's own magnitudes: same L∞, L2 and support
    matched(delta, seed=3)

A draw is named by (prompt id, site, budget, draw, seed), so that it is the same on every machine
and in every order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from auditgap.types import digest


def generator(seed: int, *names: object) -> torch.Generator:
    """A torch generator seeded by the names of what it draws for."""
    return torch.Generator().manual_seed(int(digest([seed, *map(str, names)], 12), 16))


def uniform(n_tokens: int, width: int, radius: float, rng: torch.Generator) -> torch.Tensor:
    """`random`: uniform in the ∞-ball (the paper's control; its L2 is 0.577 of a sign attack's)."""
    return (torch.rand(n_tokens, width, generator=rng) * 2 - 1) * radius


def matched(delta: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """`random_matched`: random signs on the attack's own magnitudes, so L∞, L2 and support are the
    attack's."""
    return delta.abs() * (torch.randint(0, 2, delta.shape, generator=rng) * 2 - 1)


def donors(lengths: Sequence[int]) -> list[int]:
    """`shuffled`: whose edit each prompt gets, namely that of the prompt next in length. A single
    prompt gets its own."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    found = [0] * len(lengths)
    for here, other in zip(order, order[1:] + order[:1], strict=True):
        found[here] = other
    return found


def borrowed(delta: torch.Tensor, n_tokens: int, own: bool) -> torch.Tensor:
    """Another prompt's edit [T', D] on a prompt of `n_tokens`, aligned at the end: cut, or filled
    with zeros, at its start.

    The prompt's `own` edit (there is no other prompt) is rolled by one position (that of a single
    token along its width), so that it is at least not its own.
    """
    if own:
        return delta.roll(1, dims=0 if len(delta) > 1 else 1)
    return torch.nn.functional.pad(
        delta[-n_tokens:], (0, 0, max(0, n_tokens - delta.shape[0]), 0)
    ).clone()
