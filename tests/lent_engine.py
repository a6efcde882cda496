"""One vLLM engine that several audits of a model are given, since a start costs most of a minute.

with lent_engine.Lent("smollm2", max_lora_rank=8) as lent, pytest.MonkeyPatch.context() as patch:
    lent.to(patch)          # from here on each audit that opens vLLM gets this engine
    lent.opened             # the models that were asked for
"""

from __future__ import annotations

from typing import Any

import pytest

from auditgap.engines import Engine, Serving
from auditgap.engines.vllm import VLLMEngine


class Lent:
    """See the module. Whoever borrowed it may close it, and it stays open."""

    def __init__(self, model: str, **serving: Any) -> None:
        self.model, self.opened = model, []
        self.engine = VLLMEngine(
            model, Serving(engine="vllm", dtype="float32", device="cpu", **serving)
        )

    def to(self, patch: pytest.MonkeyPatch) -> None:
        opens = Serving.open

        def lend(serving: Serving, model: str) -> Engine:
            if serving.engine != "vllm":
                return opens(serving, model)
            assert model == self.model and serving.dtype == "float32"
            self.opened.append(model)
            return self.engine

        patch.setattr(Serving, "open", lend)
        patch.setattr(self.engine, "close", lambda: None)

    def __enter__(self) -> Lent:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()
