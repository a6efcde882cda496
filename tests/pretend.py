"""A pretend CUDA device on the CPU: what stands on it is tagged by its storage, `.device` says cuda:0,
and what mixes it with the CPU, or makes the host wait for it, is counted.

    seen = Seen()
    with pretend(seen):
        engine = HFEngine(on_device(tiny.load("llama")), fitting=Fitting())
    assert not seen.problems
    seen.syncs      # {"tolist at engines/hooked.py": 8}

The branches that transformers and auditgap take on a GPU are those that run. It does not see what
autograd does on its own, and knows no kernels: a real device is another test.
"""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

_CUDA, _CPU = torch.device("cuda", 0), torch.device("cpu")
_DEVICE = torch.Tensor.device.__get__
_IS_CUDA, _IS_CPU = torch.Tensor.is_cuda.__get__, torch.Tensor.is_cpu.__get__
#: Operations that may have tensors of both: they copy, index by a small tensor, or only look.
_MIXES = (
    *("_to_copy", "copy_", "_copy_from", "index.Tensor", "index_put", "set_", "is_same_size"),
    *("_local_scalar_dense", "detach", "alias", "lift_fresh"),
)
#: Operations whose result's shape or value the host has to know.
_WAITS = {
    *("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal"),
    *("_unique2", "unique_dim", "unique_consecutive", "bincount"),
}
_MAKES = {
    *("tensor", "zeros", "ones", "full", "empty", "arange", "rand", "randn", "randint"),
    *("from_numpy", "as_tensor", "get_tensor"),
}
_tagged: dict[int, bool] = {}


@dataclass
class Seen:
    """What went wrong, and where the host waited, each with its place."""

    problems: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)

    def problem(self, what: str) -> None:
        self.problems[f"{what} at {_place()}"] += 1

    def sync(self, what: str) -> None:
        self.syncs[f"{what} at {_place()}"] += 1


def on_device(loaded: Any) -> Any:
    """A loaded model whose parameters and buffers stand on the device."""
    for tensor in (*loaded.model.parameters(), *loaded.model.buffers()):
        _tag(tensor)
    return loaded


@contextmanager
def pretend(seen: Seen) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(_Dispatch(seen))
        stack.enter_context(_Function(seen))
        yield


def _place() -> str:
    frames = [f for f in reversed(traceback.extract_stack()) if f.filename != __file__]
    ours = [f for f in frames if "/auditgap/" in f.filename]
    first = next(f for f in frames if "/torch/" not in f.filename)
    where = first if "/transformers/" in first.filename or not ours else ours[0]
    return "/".join(where.filename.split("/")[-2:])


def _key(tensor: torch.Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def _is_on(tensor: torch.Tensor) -> bool:
    return _tagged.get(_key(tensor) or 0, False)


def _tag(tensor: torch.Tensor, on: bool = True) -> None:
    key = _key(tensor)
    if key is None:
        return
    if not on:
        _tagged.pop(key, None)
    elif key not in _tagged:
        _tagged[key] = True
        weakref.finalize(tensor.untyped_storage(), _tagged.pop, key, None)


def _on_cuda(device: object) -> bool | None:
    """Whether a device that was asked for is the pretended one; None: it is no device, or meta."""
    if isinstance(device, torch.device):
        return None if device.type == "meta" else device.type == "cuda"
    if isinstance(device, str):
        return None if device == "meta" else device.startswith("cuda")
    return None


class _Dispatch(TorchDispatchMode):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, full = func._schema.name.split("::")[-1], str(func)
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        on = any(map(_is_on, tensors))
        off = [t for t in tensors if not _is_on(t) and t.dim()]
        if on:
            self._look(name, full, args, tensors, off)
        if "out_dtype" in kwargs or full.endswith("mm.dtype"):
            dtype = kwargs.get("out_dtype", args[2] if len(args) > 2 else None)
            out = args[0].to(dtype) @ args[1].to(dtype)
        else:
            out = func(*args, **kwargs)
        if name == "copy_":
            if _is_on(tensors[1]) and not _is_on(tensors[0]):
                self.seen.sync("copy to the host")
            return out
        given = {_key(t) for t in tensors}

        def mark(one: Any) -> Any:
            if isinstance(one, torch.Tensor) and _key(one) not in given:
                _tag(one, on)
            return one

        tree_map(mark, out)
        return out

    def _look(self, name: str, full: str, args: Any, tensors: list, off: list) -> None:
        if off and not any(word in full for word in _MIXES):
            self.seen.problem(f"{full} of both devices")
        if off and "index.Tensor" in full and not _is_on(tensors[0]):
            self.seen.problem("a CPU tensor indexed by one of the device")
        if name in _WAITS:
            self.seen.sync(name)
        if "index.Tensor" in full or "index_put" in full:
            index = [t for t in args[1] if isinstance(t, torch.Tensor)]
            if any(t.dtype in (torch.bool, torch.uint8) for t in index):
                self.seen.sync("an index of booleans")


class _Function(TorchFunctionMode):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == _DEVICE:
            real = func(*args)
            return _CUDA if real.type == "cpu" and _is_on(args[0]) else real
        if func == _IS_CUDA:
            return _is_on(args[0])
        if func == _IS_CPU:
            return not _is_on(args[0])
        name = (resolve_name(func) or getattr(func, "__name__", str(func))).split(".")[-1]
        is_on = bool(args) and isinstance(args[0], torch.Tensor) and _is_on(args[0])
        if name == "numpy" and is_on:
            self.seen.problem("numpy() of a tensor on the device")
        if name == "get_device":
            return 0 if is_on else -1
        if name == "tolist" and args[0].dim():
            if is_on:
                self.seen.sync("tolist")
            with _disable_current_modes():
                return func(*args, **kwargs)
        want = None
        if kwargs.get("device") is not None:
            want = _on_cuda(kwargs["device"])
            kwargs["device"] = kwargs["device"] if want is None else "cpu"
        if name == "to":
            want, args = _moved(want, args)
        if name in ("to", "cuda", "cpu"):
            return self._move(func, name, want, args, kwargs)
        generator = kwargs.get("generator")
        if generator is not None and want and generator.device.type == "cpu":
            self.seen.problem(f"{name} on the device by the CPU's generator")
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            if name == "__deepcopy__":  # copies the storage past every operation
                _tag(out, is_on)
            elif want is not None:
                _tag(out, want)
            elif name in _MAKES:
                _tag(out, False)
        return out

    def _move(self, func: Any, name: str, want: bool | None, args: Any, kwargs: Any) -> Any:
        if name != "to":
            want, func = name == "cuda", torch.Tensor.cpu
        was, out = _is_on(args[0]), func(*args, **kwargs)
        if want is None or want == was:
            return out
        if _key(out) == _key(args[0]):
            out = out.clone()
        _tag(out, want)
        if not want:
            self.seen.sync("copy to the host")
        return out


def _moved(want: bool | None, args: tuple[Any, ...]) -> tuple[bool | None, tuple[Any, ...]]:
    """Where `to` is asked to put its tensor, and its arguments as the CPU can follow them."""
    given = list(args)
    for i, one in enumerate(given[1:], 1):
        if isinstance(one, torch.Tensor):
            want = _is_on(one)
        elif (asked := _on_cuda(one)) is not None:
            want, given[i] = asked, _CPU
    return want, tuple(given)
