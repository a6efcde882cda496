"""A subject in memory once: on transformers for attacks, and there or in vLLM for generation, never
in both.

    stage = Stage(outline, dtype="float32", device="cpu", vllm=Serving(engine="vllm"))
    stage.engine.activations(…)         # loads it on transformers
    # releases it there, and opens it in vLLM
    stage.speaker.generate(…)

So attacks and generation of a group run in two passes, and the two need no memory at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from auditgap import models
from auditgap.audits.ranked import RankedEngine
from auditgap.engines import Serving, Speaker
from auditgap.engines.batching import SPEAKING_IN_MEMORY, Packing
from auditgap.engines.hf import HFEngine
from auditgap.errors import UsageError
from auditgap.models import Shard, room
from auditgap.models.shard import WHOLE


class Stage:
    """See the module. `vllm`: what generates instead of transformers; None: transformers does. `share`:
    of a GPU, where several workers have one."""

    def __init__(
        self,
        outline: models.Outline,
        *,
        dtype: str,
        device: str,
        batch_tokens: int | None = None,
        shard: Shard = WHOLE,
        compile: bool = False,
        vllm: Serving | None = None,
        share: float = 1.0,
    ) -> None:
        if vllm is not None and outline.packing is not None:
            raise UsageError(
                f"{outline.subject.name} is quantised ({outline.packing}): attacks are on its"
                " weights unpacked, and vLLM would speak with them packed, as another model. Use"
                " --engine hf."
            )
        self.outline, self.dtype, self.shard = outline, dtype, shard
        self.device = models.pick_device(device)
        room.keep_to(share, self.device)
        self.batch_tokens, self.compile, self.serving = batch_tokens, compile, vllm
        self.packing = Packing.on(self.device, batch_tokens)
        self.in_vllm = vllm is not None
        self._engine: HFEngine | RankedEngine | None = None
        self._vllm: Any = None

    @property
    def engine(self) -> HFEngine | RankedEngine:
        """On transformers: hooks and gradients; in this process, or in its ranks' processes."""
        # ranks end themselves after a failure
        if self._engine is None or getattr(self._engine, "closed", False):
            self.close()
            how = {"dtype": self.dtype, "device": self.device, "shard": self.shard}
            if self.shard.kind == "tensor":
                self._engine = RankedEngine(self.outline, batch_tokens=self.batch_tokens, **how)
            else:
                self._engine = HFEngine(
                    models.load(self.outline, **how),
                    batch_tokens=self.batch_tokens,
                    compile=self.compile,
                )
        return self._engine

    @property
    def speaker(self) -> Speaker:
        """What generates: the engine itself, or vLLM."""
        return self.vllm if self.in_vllm else self.engine

    @property
    def vllm(self) -> Any:
        """The vLLM engine, whose package this machine may lack."""
        if self._vllm is None or self._vllm.closed:  # it ends itself after a failure
            if self.serving is None:
                raise ValueError("This stage was made without vLLM.")
            self.close()
            # told of thinking what the outline is, or it would part chain and answer otherwise
            serving = self.serving.model_copy(update={"thinking": self.outline.thinking})
            self._vllm = serving.open(self.outline.chat.name)
        return self._vllm

    @contextmanager
    def on_transformers(self) -> Iterator[None]:
        """While open, generation is on transformers too: for what alternates between attacks and
        generation."""
        before, self.in_vllm = self.in_vllm, False
        try:
            yield
        finally:
            self.in_vllm = before

    def speaking_packs(self, lengths: list[int]) -> list[list[int]]:
        """Packs of completions; vLLM forms its own batches, so there a pack is only what is
        remembered together."""
        return self.packing.speaking_packs(lengths, SPEAKING_IN_MEMORY if self.in_vllm else 0)

    def close(self) -> None:
        """Release the subject, wherever it is; the next use loads it again."""
        holders = self._engine, self._vllm
        self._engine = self._vllm = None
        for holder in holders:
            if holder is not None:
                holder.close()
