"""The base and its adapters as the stages that look inside them hold them: one copy of the weights,
adapters put on and off.

    with Inside("runs/em", options) as inside:
        engine = inside.engine(adapter)     # the base wearing that adapter
        engine = inside.engine(None)        # the base as it is
        speaker = inside.speaker(adapter)   # the same, or vLLM with that adapter
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from auditgap import models
from auditgap.audits.emergent.config import EmergentConfig, EmergentOptions
from auditgap.audits.emergent.stage import Adapter, CellWorker, Study
from auditgap.audits.planning import thought
from auditgap.engines.hf import HFEngine
from auditgap.engines.vllm import VLLMEngine
from auditgap.errors import AuditgapError, UsageError
from auditgap.types import Subject, digest


class Inside:
    """Loads the base when it is first needed and keeps it; whatever it wears is taken off before
    the next is put on."""

    def __init__(self, folder: str | Path, options: EmergentOptions) -> None:
        self.study, self.options = Study.load(folder), options
        self.store, self.config = self.study.store, self.study.config
        self.adapters = {adapter.name: adapter for adapter in self.study.adapters}
        self._stack = ExitStack()
        self._loaded: models.LoadedModel | None = None
        self._worn: str | None = None
        self._engine: HFEngine | None = None
        self._vllm: VLLMEngine | None = None

    @cached_property
    def outline(self) -> models.Outline:
        """Of the base."""
        return self.study.base

    def engine(self, adapter: Adapter | None) -> HFEngine:
        """The engine of that adapter, or (None) of the base. Raises UsageError where the adapter is
        not what was trained."""
        worn = "" if adapter is None else adapter.name
        if self._engine is not None and worn == self._worn:
            return self._engine
        self._remove_adapter()
        if self._loaded is None:
            self._loaded = models.load(
                self.outline, dtype=self.config.dtype, device=self.options.device
            )
        loaded = self._loaded
        if adapter is not None:
            self.check(adapter)
            try:
                subject = Subject(adapter.name, adapter.fingerprint)
                loaded = self._stack.enter_context(
                    models.with_adapter(loaded, adapter.folder, subject)
                )
            except BaseException:
                self._loaded = None  # some of its layers may be dressed already
                raise
        self._engine, self._worn = (
            HFEngine(replace(loaded), batch_tokens=self.options.batch_tokens),
            worn,
        )
        return self._engine

    def speaker(self, adapter: Adapter | None) -> HFEngine | VLLMEngine:
        """What answers as that adapter, or (None) as the base: the engine on transformers or, where
        the options say so, vLLM, which swaps adapters. Raises as `engine`."""
        if self.options.engine != "vllm":
            return self.engine(adapter)
        if adapter is not None:
            self.check(adapter)
        if self._vllm is None or self._vllm.closed:  # it ends itself after a failure
            self.close()
            made = self.options.serving(self.config).open(self.config.model)
            if not isinstance(made, VLLMEngine):
                raise AuditgapError(
                    f"An engine that can change adapters is wanted; {made.name} came."
                )
            self._vllm = made
        # where its base was when it was trained is no matter: it was checked against ours
        self._vllm.use(None if adapter is None else adapter.folder, is_ours=True)
        return self._vllm

    def check(self, adapter: Adapter) -> None:
        """Raises AuditgapError where the adapter is not the one that was trained on the study's
        base, wherever that lay then: an adapter's fingerprint counts its base's."""
        base = self.outline.subject.fingerprint
        if models.fingerprint(adapter.folder, base=base) != adapter.fingerprint:
            raise AuditgapError(
                f"The weights in {adapter.folder} are not those that `em train` left there for"
                f" {self.config.model}. Restore that folder from a copy, or build the study anew"
                " with another --out."
            )

    def _remove_adapter(self) -> None:
        if self._engine is not None:
            self._engine.close()  # lets go of the model that it was handed, not of ours
        self._engine = self._worn = None
        self._stack.close()

    def close(self) -> None:
        """Give the memory back; a further `engine` loads again."""
        self._remove_adapter()
        self._loaded = None
        if self._vllm is not None:
            self._vllm.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __enter__(self) -> Inside:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def info(self) -> dict[str, Any]:
        """What a cell's record says of where it was computed."""
        return {
            "device": models.pick_device(self.options.device),
            "threads": torch.get_num_threads(),
            "engine": "hf",
        }

    @property
    def speaker_info(self) -> dict[str, Any]:
        """The same of what the speaker said."""
        if self.options.engine != "vllm":
            return self.info
        return {"engine": "vllm", "vllm": self._vllm.version if self._vllm else None}


def check_engine(study: Study, options: EmergentOptions) -> None:
    """Raises UsageError for an engine that cannot serve adapters."""
    if options.engine == "openai":
        raise UsageError(
            "Adapters are weights on this machine, which no endpoint serves; em generate and em"
            " analyse take --engine hf or vllm. A model that was fine-tuned elsewhere is named by"
            " `remote` when the study is built."
        )


class InsideWorker(CellWorker):
    """Keeps the base loaded, for one cell after another."""

    def __init__(self, folder: str, options: EmergentOptions) -> None:
        self.inside = Inside(folder, options)
        self.store = self.inside.store

    def close(self) -> None:
        """Let go of the model; a further group loads it again."""
        self.inside.close()


def common(
    config: EmergentConfig, options: EmergentOptions, outline: models.Outline
) -> dict[str, Any]:
    """What stands in the settings of every cell that is computed inside a model."""
    dtype = models.pick_dtype(config.dtype, models.pick_device(options.device))
    template = outline.chat.template
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "chat_template": digest(template) if template else None,
        **thought(config, outline),
    }
