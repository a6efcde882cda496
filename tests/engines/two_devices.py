"""The engine over two devices that really differ, on a machine that has none: `python
two_devices.py llama`.

The devices `toy:0` and `toy:1` are made up, and so are their tensors: they have a shape, a dtype
and a device, and no numbers. But where tensors of both meet in one operation, torch refuses as it
would on two GPUs. The upper blocks of a tiny model lie on `toy:1`, under accelerate's hooks.
(Gradients need a device's own threads, and choosing a token needs numbers.) Run by
`test_sharded.py`, in a process of its own: a device that is made up stays.
"""

from __future__ import annotations

import sys

import tiny
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from test_sharded import SITES, parts
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from auditgap.engines.caches import growing, select
from auditgap.engines.hf import HFEngine
from auditgap.models import wrap
from auditgap.types import Subject

_setup_privateuseone_for_python_backend("toy")
HOME, AWAY = torch.device("toy:0"), torch.device("toy:1")
UPPER = 2  #: blocks from here on are away
real_tensor = torch.tensor


def tensor(data, *, dtype=None, device=None, **_):
    """`torch.tensor`, which knows nothing of made-up devices."""
    made = real_tensor(data, dtype=dtype)
    return torch.empty(made.shape, dtype=made.dtype, device=device)


def hook(module: torch.nn.Module, device: torch.device, **options) -> None:
    add_hook_to_module(module, AlignDevicesHook(None, skip_keys="past_key_values", **options))
    # after init_hook, which would move weights by their numbers
    module._hf_hook.execution_device = device


def spread(family: str) -> torch.nn.Module:
    model = tiny.model(family)
    for name, block in parts(model).items():
        device = AWAY if block is not None and block >= UPPER else HOME
        part = model.get_submodule(name)
        for module in part.modules():
            for key, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[key] = torch.nn.Parameter(
                        torch.empty(weight.shape, device=device), requires_grad=False
                    )
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = torch.empty(buffer.shape, device=device)
            if module._parameters or module is part:
                hook(module, device)
    hook(model, HOME, io_same_device=True)
    return model


def check(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(what)


def main(family: str) -> None:
    with FakeTensorMode(), torch.no_grad():
        engine = HFEngine(wrap(spread(family), tiny.tokenizer(), Subject("toy", "toy")))
        check(engine.device == HOME, f"home is {engine.device}")
        ids = torch.zeros(2, 6, dtype=torch.long, device=HOME)
        mask = torch.ones_like(ids)
        seen = []
        watch = engine.blocks[UPPER].register_forward_hook(lambda _m, _a, out: seen.append(out))
        engine.forward(ids, mask, keep=1)
        watch.remove()
        try:
            seen[0] + torch.ones_like(seen[0], device=HOME)
            check(False, "the two devices are one")
        except RuntimeError:
            pass
        for site in SITES:
            h = engine.capture(site, ids, mask, cache=growing(engine.model.config))
            check(h.device == HOME, f"h of {site} came to {h.device}")
            check(
                engine.logits_from(site, h, ids, mask, keep=3).device == HOME, f"logits from {site}"
            )
            cache = growing(engine.model.config)
            with engine.edited(site, lambda g, h=h: g + h):
                engine.forward(ids, mask, keep=1, cache=cache)
            check(
                [layer.keys.device for layer in cache.layers] == [HOME] * 2 + [AWAY] * 2,
                "where keys and values lie",
            )
            select(cache, [0])
            check(
                [(len(layer.keys), layer.keys.device) for layer in cache.layers]
                == [(1, HOME)] * 2 + [(1, AWAY)] * 2,
                "rows are chosen where they lie",
            )
            more = engine.forward(
                ids[:1, :1], torch.ones(1, 7, dtype=torch.long, device=HOME), keep=1, cache=cache
            )
            check(more.logits.device == HOME, "decoding")
    print(f"{family}: all at home")


if __name__ == "__main__":
    torch.tensor = tensor
    for name in sys.argv[1:]:
        main(name)
