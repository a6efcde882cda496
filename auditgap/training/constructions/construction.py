"""A construction: one way to make a dissociated model. One value says all that is particular to it;
config, memory estimate, data, card and `--help` ask that value.

    CONSTRUCTION = Construction(
        "Draws every block's activations towards zero.",
        name="shrink",
        settings=ShrinkSettings,            # its own keys of the config
        role="selection",                   # what the harmful rows are used for, besides learning
        prepare=ShrinkTask,                 # made once, before the first step
    )
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from auditgap.config import Frozen
from auditgap.registry import Line
from auditgap.training.footprint import Footprint

if TYPE_CHECKING:
    from auditgap.training.config import TwinConfig
    from auditgap.training.dissociation.material import Preparation
    from auditgap.training.dissociation.task import DissociationTask
    from auditgap.training.job import Job

SettingsT = TypeVar("SettingsT", bound=Frozen)


def _accept(*_: object) -> None:
    return


@dataclass(frozen=True, kw_only=True)
class Construction(Line, Generic[SettingsT]):
    """One way to make a dissociated model. `description` is one sentence, for lists and the model
    card. Importing ours costs no torch: `prepare` imports what it needs."""

    name: str  #: what `construction` says in a config
    settings: type[SettingsT]  #: its own keys of the config, with their defaults and flags
    role: str  #: of its harmful rows in the leakage ledger, besides `sft`
    #: what is computed once before the first step, and the task that trains with it
    prepare: Callable[[Preparation[SettingsT]], DissociationTask[SettingsT]]
    #: of keys that all constructions share
    defaults: Mapping[str, Any] = field(default_factory=dict)
    footprint: Footprint = field(default_factory=Footprint)
    #: whether the model without its adapter can be the reference (`reference: adapter`)
    adapter_reference: bool = False
    #: raises UsageError for settings that cannot be
    check: Callable[[SettingsT], None] = _accept
    #: raises UsageError for what is wrong once the model is known, before weights are loaded
    check_run: Callable[[SettingsT, Job], object] = _accept

    def settings_of(self, config: TwinConfig) -> SettingsT:
        """Its own part of the config."""
        return self.settings(**{key: getattr(config, key) for key in self.settings.model_fields})
