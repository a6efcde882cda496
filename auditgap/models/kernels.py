"""No compiled code from a hub: where the package `kernels` is installed, transformers fetches some
and runs it, for quantised weights, mixtures of experts and attention. Here it finds it absent."""

from __future__ import annotations

import sys


def _absent(*_: object, **__: object) -> bool:
    return False


def no_hub_kernels() -> None:
    """Have every module of transformers, those imported later too, find `kernels` not installed."""
    import transformers.integrations.hub_kernels
    import transformers.utils.import_utils  # noqa: F401 - looked up below

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "transformers" and "is_kernels_available" in vars(module):
            vars(module)["is_kernels_available"] = _absent
