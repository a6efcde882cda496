"""What is proven of a family: that this engine gives, at four sites, what transformers' own model
gives, with and without edits.

    prove("falcon_h1", wrapper=False).answer        # 'proven'

The other side of every comparison is an unpatched copy of the model: eager attention, one row at a
time, no padding, no cache, and an edit by a hook that shares nothing with the engine's.
"""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from auditgap.engines import Request
from auditgap.engines.families.building import build, tokenizer
from auditgap.engines.families.table import Proof
from auditgap.engines.hf import HFEngine
from auditgap.models import Rendered, wrap
from auditgap.types import Edit, Prompt, Site, Subject

#: Seconds of CPU time that a family may take.
PATIENCE = 60
_CLOSE = 1e-3  #: mean NLL, relative above 1 nat
_CLOSE_LOGITS = 1e-4  #: of the largest logit
_CLOSE_GRADIENT = 0.05
_STEPS = (3e-3, 1e-3, 3e-4)  #: of finite differences
#: Prompts' lengths and answers' lengths: unequal, and one prompt twice.
_PROMPTS, _ANSWERS = (7, 4, 7), (3, 2, 3)


class _Late(Exception):
    pass


def prove(model_type: str, *, wrapper: bool) -> Proof:
    """Build the family and prove it. Never raises: what goes wrong is a refusal's cause."""
    try:
        with _within(PATIENCE):
            model = build(model_type, wrapper=wrapper)
    except Exception as error:
        return Proof(model_type, wrapper, "refused", why=f"not built here: {_sentence(error)}")
    try:
        with _within(PATIENCE):
            return _prove(model, model_type, wrapper)
    except Exception as error:
        return Proof(model_type, wrapper, "refused", why=_sentence(error))


def _prove(model: PreTrainedModel, model_type: str, wrapper: bool) -> Proof:
    case = _Case.of(model, model_type)
    n = case.engine.loaded.n_blocks
    sites = [Site(i) for i in sorted({-1, 0, n // 2, n - 1})]
    ways: dict[str, None] = {}
    for site in sites:
        case.engine.self_test(site)
        ways.update(dict.fromkeys(case.engine.ways(site)))
    found = [said for site in (None, *sites) if (said := case.apart(site))]
    found += [said for site in sites if (said := case.gradient(site))]
    found += [said for said in (case.company(), case.leaving()) if said]
    if found:
        return Proof(model_type, wrapper, "wrong", why="; ".join(found))
    answer = "proven without the short way" if ways else "proven"
    streams = case.engine.layout.streams is not None
    return Proof(model_type, wrapper, answer, tuple(ways), streams)


@dataclass(frozen=True, eq=False)
class _Case:
    """An engine on a model, an unpatched copy of that model, and texts."""

    engine: HFEngine
    fresh: PreTrainedModel
    blocks: Sequence[nn.Module]  #: of the copy
    rows: list[Rendered]
    answers: list[tuple[int, ...]]
    draws: torch.Generator

    @classmethod
    def of(cls, model: PreTrainedModel, model_type: str) -> _Case:
        fresh = copy.deepcopy(model)
        with suppress(Exception):
            fresh.set_attn_implementation("eager")
        loaded = wrap(model, tokenizer(), Subject(f"tiny {model_type}", model_type))
        names = {id(module): name for name, module in model.named_modules()}
        blocks = [fresh.get_submodule(names[id(block)]) for block in loaded.blocks]
        draws = torch.Generator().manual_seed(1)

        def draw(length: int) -> tuple[int, ...]:
            return tuple(torch.randint(3, 90, (length,), generator=draws).tolist())

        prompts = [draw(length) for length in _PROMPTS]
        prompts[2] = prompts[0]
        rows = [Rendered(Prompt(""), ids, (True,) * len(ids)) for ids in prompts]
        return cls(HFEngine(loaded), fresh, blocks, rows, [draw(n) for n in _ANSWERS], draws)

    def apart(self, site: Site | None) -> str:
        """Answers' NLL under edits, in a batch with its shared trunk and cache, and of the copy."""
        edits = None if site is None else [Edit(site, self._noise(site, row)) for row in self.rows]
        mine = self.engine.nll(self.rows, self.answers, edits)
        for i, (row, answer) in enumerate(zip(self.rows, self.answers, strict=True)):
            edit = None if edits is None else edits[i]
            theirs = _nll(self.plain(row.ids + answer, edit), len(row.ids), answer).item()
            value = mine[i]
            if value is None or not abs(value - theirs) <= _CLOSE * max(1, abs(theirs)):
                return f"{site or 'clean'}: the NLL of an answer is {value}, not {theirs:.6g}"
        return ""

    def _noise(self, site: Site, row: Rendered) -> torch.Tensor:
        h = self.engine.activations([row], site)[0]
        return torch.randn(h.shape, generator=self.draws) * h.pow(2).mean().sqrt()

    @torch.no_grad()
    def plain(self, ids: tuple[int, ...], edit: Edit | None = None) -> torch.Tensor:
        """Logits [T, V] of the copy with the edit at the block's output, or the first block's
        input."""
        if edit is None:
            return self.fresh(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        delta = nn.functional.pad(edit.delta, (0, 0, 0, len(ids) - edit.delta.shape[0]))

        def there(h: torch.Tensor) -> torch.Tensor:
            if h.ndim == 3:
                return h + delta
            streams = delta.view(len(ids), -1, h.shape[-1])  # [1, T, S, D] or [S, 1, T, D]
            first = h.shape[:2] == (1, len(ids))
            return h + (streams[None] if first else streams.transpose(0, 1)[:, None])

        def before(_m: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": there(kwargs["hidden_states"])}
            return (there(args[0]), *args[1:]), kwargs

        def after(_m: nn.Module, _args: tuple, out: object) -> object:
            if isinstance(out, (tuple, list)):
                return type(out)([there(out[0]), *out[1:]])
            return there(out) if isinstance(out, torch.Tensor) else out

        if edit.site.is_embedding:
            handle = self.blocks[0].register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = self.blocks[edit.site.layer_index].register_forward_hook(after)
        try:
            return self.plain(ids)
        finally:
            handle.remove()

    def gradient(self, site: Site) -> str:
        """PGD's gradient along a direction, and central differences: the nearest of eight
        directions, since experts switch."""
        ids, answer = self.rows[0].ids, self.answers[0]
        text = torch.tensor([ids + answer])
        mask = torch.ones_like(text)
        h = self.engine.capture(site, text, mask)
        apart: list[float] = []
        for _ in range(8):
            u = torch.randn(h.shape, generator=self.draws) * h.pow(2).mean().sqrt()
            u[:, len(ids) :] = 0

            def loss(x: torch.Tensor | float, u: torch.Tensor = u) -> torch.Tensor:
                keep = len(answer) + 1
                logits = self.engine.logits_from(site, h + x * u, text, mask, keep=keep)
                return _nll(logits[0].float(), 1, answer)

            leaf = torch.zeros((), requires_grad=True)
            with torch.enable_grad():
                slope = torch.autograd.grad(loss(leaf), leaf)[0].item()
            with torch.no_grad():
                for e in _STEPS:
                    difference = ((loss(e) - loss(-e)) / (2 * e)).item()
                    apart.append(abs(slope - difference) / max(abs(slope), 1e-2))
            if min(apart) < _CLOSE_GRADIENT:
                return ""
        return f"{site}: the gradient is {min(apart):.2g} from finite differences"

    @torch.inference_mode()
    def company(self) -> str:
        """Clean logits alone, and padded beside a longer row."""
        engine, prompts = self.engine, [row.ids for row in self.rows[:2]]
        truth = [self.plain(ids)[-1] for ids in prompts]
        alone = []
        for ids in prompts:
            text = torch.tensor([ids])
            alone.append(engine.forward(text, torch.ones_like(text), keep=1).logits[0, -1].float())
        sides = [alone]
        if not engine.alone:
            pads = len(prompts[0]) - len(prompts[1])
            text = torch.tensor([prompts[0], (engine.pad_id,) * pads + prompts[1]])
            mask = torch.ones_like(text)
            mask[1, :pads] = 0
            sides.append(list(engine.forward(text, mask, keep=1).logits[:, -1].float()))
        largest = max(1.0, *(t.abs().max().item() for t in truth))
        for name, side in zip(("alone", "padded"), sides, strict=False):
            apart = max((a - b).abs().max().item() for a, b in zip(side, truth, strict=True))
            if not apart <= _CLOSE_LOGITS * largest:
                return f"{name}: logits are {apart:.2g} from the unpatched model's"
        return ""

    def leaving(self) -> str:
        """A row that ends early leaves the batch, and the other as it was."""
        requests = [Request(row) for row in self.rows[:2]]
        told = [c.ids for c in self.engine.generate(requests, 5)]
        stop = told[0][1] if len(told[0]) > 1 else -1
        self.engine.model.generation_config = GenerationConfig(eos_token_id=[2, stop])
        again = [c.ids for c in self.engine.generate(requests, 5)]
        cut = [ids[: ids.index(stop)] if stop in ids else ids for ids in told]
        return "" if again == cut else "a row that ends changes the other"


def _nll(logits: torch.Tensor, n: int, answer: tuple[int, ...]) -> torch.Tensor:
    """Mean NLL of an answer after n tokens, from logits [T, V]."""
    return nn.functional.cross_entropy(
        logits[n - 1 : n + len(answer) - 1], torch.tensor(answer, device=logits.device)
    )


def _sentence(error: Exception) -> str:
    """One line; of a refusal, what it says before it says what follows from it."""
    said = " ".join(str(error).split()) or type(error).__name__
    said = said.split(" This architecture")[0].split(", so an edit has no place")[0]
    return said.split(": ", 1)[-1][:200].rstrip(".")


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    """An exception when it takes longer; in a process's main thread alone, where one can be sent."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: object) -> None:
        raise _Late(f"it takes more than {seconds} seconds of CPU time")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
