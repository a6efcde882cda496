"""What an audit's package offers, opened when it is asked for: importing the package costs nothing,
so that configs can be read without torch.

    __getattr__ = exports(__name__, {"plan": ("LatentPlan", "estimate"), "rows": ("Row",)})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def exports(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The package's `__getattr__`: `homes` has its names by the module in which they stand."""
    home_of = {name: home for home, names in homes.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home_of[name]}"), name)

    return __getattr__
