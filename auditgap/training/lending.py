"""Running a model whose weights are divided over ranks (ZeRO-3) beside the training step: to answer,
to be read, to speak while it trains.

    # on rank 0, which runs as many forwards as it likes; the others lend it their weights
    answers = on_main(loaded.model, lambda: engine.generate(requests, 32))

DeepSpeed gathers each layer as it runs, and a gathering takes all ranks. So each forward is announced;
a rank that has nothing (more) to run keeps the others company, with one token, for as long as any of
them runs. What a rank runs is then its own affair, and its numbers are those of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from auditgap.engines import fitting
from auditgap.errors import AuditgapError
from auditgap.training import ranks

T = TypeVar("T")
#: What a rank is about to run: nothing, the decoder alone, the model with its head.
_NOTHING, _DECODER, _MODEL = range(3)
_CUT_OFF = "A forward of a model in parts was cut off, which the other ranks run to its end."


def is_divided(model: nn.Module) -> bool:
    """Whether DeepSpeed keeps the weights in parts, a rank each."""
    return any(hasattr(parameter, "ds_tensor") for parameter in model.parameters())


def on_main(model: nn.Module, act: Callable[[], T]) -> T:
    """What `act`, which runs the model, gives on rank 0, on every rank; an AuditgapError of it is
    raised on every rank, said once. Raises as `together`."""
    if not is_divided(model):
        return ranks.decided(act)

    def lent() -> list[T]:
        with together(model):
            return [act()] if ranks.is_main() else []

    found = ranks.agree(lent)
    return ranks.decided(lambda: found[0])


@contextmanager
def together(model: Any) -> Iterator[None]:
    """While open, every rank runs the causal LM `model`, or its decoder, as often as it likes, by
    whole forwards; on the way out it waits for the others.

    All ranks open it at once; where the weights are whole it does nothing. Raises AuditgapError
    where memory runs out on this rank, which could not part its batch in the middle of a forward,
    and for a forward that was cut off, which the others cannot know of.
    """
    if not is_divided(model):
        yield
        return
    inside: list[int] = []  # what runs now: the model, and its decoder in it

    def begins(what: int) -> Callable[..., None]:
        def before(*_: object) -> None:
            if inside not in ([], [_MODEL]) or inside == [what]:
                raise AuditgapError(_CUT_OFF)
            if not inside:
                ranks.highest(what)
            inside.append(what)

        return before

    def ends(*_: object) -> None:
        inside.pop()

    decoder = model.get_decoder()
    handles = [
        handle
        for module, what in ((decoder, _DECODER), (model, _MODEL))
        for handle in (
            module.register_forward_pre_hook(begins(what), prepend=True),
            module.register_forward_hook(ends),
        )
    ]
    lockstep, fitting.LOCKSTEP = fitting.LOCKSTEP, True
    try:
        try:
            yield
        finally:
            fitting.LOCKSTEP = lockstep
            for handle in handles:
                handle.remove()
        if inside:
            raise AuditgapError(_CUT_OFF)
    except AuditgapError as error:
        if not inside:  # between forwards: the others can be told
            _keep_company(model, decoder)
        if isinstance(error, fitting.OutOfMemory):
            raise AuditgapError(
                "A rank ran out of memory where the model runs beside the training step. Start more"
                " ranks, or set max_tokens lower."
            ) from None
        raise
    _keep_company(model, decoder)


@torch.no_grad()
def _keep_company(model: nn.Module, decoder: nn.Module) -> None:
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    while what := ranks.highest(_NOTHING):
        (model if what == _MODEL else decoder)(input_ids=ids, use_cache=False)
