"""The subject of a worker, in memory once: on transformers for attacks, and there or in vLLM for
speech, never in both.

    stage = Stage(outline, config, options)
    stage.engine.activations(…)         # loads it on transformers
    # with --engine vllm: lets go of it there, and opens it in vLLM
    stage.speaker.generate(…)

So attacks and speech of a group go in two passes, and the two need no room beside each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from auditgap import models
from auditgap.audits.latent.config import LatentConfig, RunOptions
from auditgap.audits.latent.ranked import RankedEngine
from auditgap.engines import Serving, Speaker
from auditgap.engines.batching import Packing
from auditgap.engines.hf import HFEngine


class Stage:
    """See the module. `packing` is of the attacks, `speaking` of the speech."""

    def __init__(self, outline: models.Outline, config: LatentConfig, options: RunOptions) -> None:
        self.outline, self.config, self.options = outline, config, options
        self.device = models.pick_device(options.device)
        self.packing = Packing.on(self.device, options.batch_tokens)
        self.in_vllm = options.engine == "vllm"
        self.shard = options.shard_of(outline.subject.name)
        self._engine: HFEngine | RankedEngine | None = None
        self._vllm: Any = None

    @property
    def engine(self) -> HFEngine | RankedEngine:
        """On transformers: hooks and gradients; in this process, or in its ranks' processes."""
        # ranks end themselves after a failure
        if self._engine is None or getattr(self._engine, "closed", False):
            self.close()
            how = {"dtype": self.config.dtype, "device": self.device, "shard": self.shard}
            if self.shard.kind == "tensor":
                self._engine = RankedEngine(
                    self.outline, batch_tokens=self.options.batch_tokens, **how
                )
            else:
                loaded = models.load(self.outline, **how)
                self._engine = HFEngine(
                    loaded, batch_tokens=self.options.batch_tokens, compile=self.config.compile
                )
        return self._engine

    @property
    def speaker(self) -> Speaker:
        """What speaks: the engine itself, or vLLM."""
        if not self.in_vllm:
            return self.engine
        return self.vllm

    @property
    def vllm(self) -> Any:
        """The vLLM engine, whose package this machine may lack."""
        if self._vllm is None or self._vllm.closed:  # it ends itself after a failure
            self.close()
            self._vllm = self.serving.open(self.outline.subject.name)
        return self._vllm

    @property
    def serving(self) -> Serving:
        options, config = self.options, self.config
        return Serving(
            engine="vllm",
            dtype=config.dtype,
            device=options.device,
            chat_template=config.chat_template,
            tensor_parallel=options.tensor_parallel,
            gpu_memory=options.gpu_memory,
            max_model_len=options.max_model_len,
        )

    @contextmanager
    def on_transformers(self) -> Iterator[None]:
        """While open, speech is on transformers too: for what asks between one attack and the
        next."""
        before, self.in_vllm = self.in_vllm, False
        try:
            yield
        finally:
            self.in_vllm = before

    def speaking_packs(self, lengths: list[int]) -> list[list[int]]:
        """Packs of speech; vLLM makes up its own batches, so a pack is only what is remembered
        together."""
        return self.packing.speaking_packs(lengths, 8 if self.in_vllm else 1)

    def close(self) -> None:
        """Let go of the subject, wherever it is; what asks for it again loads it again."""
        holders = self._engine, self._vllm
        self._engine = self._vllm = None
        for holder in holders:
            if holder is not None:
                holder.close()
