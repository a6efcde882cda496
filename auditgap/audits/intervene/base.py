"""The hidden states of a base at every site of an intervention audit, by prompt: what
`base_patching` puts into the subject.

    BaseStates(config, options, halves, store).at(Site(15))[prompt.id]       # [T, D]

The base is loaded once for all sites, alone, and its states stay in the run folder's scratch.
"""

from __future__ import annotations

import numpy as np
import torch

from auditgap import models
from auditgap.audits.intervene.config import InterveneConfig, InterveneOptions
from auditgap.audits.intervene.plan import Halves
from auditgap.engines.hf import HFEngine
from auditgap.errors import AuditgapError
from auditgap.store import RunFolder
from auditgap.types import Site, digest


class BaseStates:
    """See the module. Raises AuditgapError when the run was planned without a base."""

    def __init__(
        self, config: InterveneConfig, options: InterveneOptions, halves: Halves, store: RunFolder
    ) -> None:
        if config.base is None:
            raise AuditgapError("This run was planned without a base; use a new --out.")
        self.config, self.options, self.halves, self.store = config, options, halves, store
        self.outline = models.outline(
            config.base, chat_template=config.chat_template, thinking=config.thinking
        )
        self.names = {
            site: digest(
                [
                    self.outline.subject.fingerprint,
                    site.layer_index,
                    config.dtype,
                    halves.digest,
                    "base",
                ]
            )
            for site in models.parse_sites(config.layers, self.outline.n_blocks)
        }

    @property
    def are_known(self) -> bool:
        """Whether all sites' states are stored, so that the base need not be loaded."""
        return all(self.store.remembers(name) for name in self.names.values())

    def at(self, site: Site) -> dict[str, torch.Tensor]:
        """The states at a site by prompt id, each [T, D]."""
        if not self.are_known:
            self._compute()

        def torn() -> dict[str, np.ndarray]:
            raise AuditgapError(
                "The base's activations were lost on the way; the same command computes them again."
            )

        stored = self.store.remember(self.names[site], torn)
        return {name: torch.from_numpy(array) for name, array in stored.items()}

    def _compute(self) -> None:
        device = models.pick_device(self.options.device)
        loaded = models.load(self.outline, dtype=self.config.dtype, device=device)
        window = self.outline.max_positions
        with HFEngine(loaded, batch_tokens=self.options.batch_tokens) as engine:
            rendered = [
                r
                for r in map(engine.render, self.halves.asked)
                if window is None or len(r.ids) <= window
            ]
            for site, name in self.names.items():
                engine.self_test(site)
                states = engine.activations(rendered, site)
                arrays = {r.prompt.id: h.numpy() for r, h in zip(rendered, states, strict=True)}
                self.store.remember(name, lambda arrays=arrays: arrays)
