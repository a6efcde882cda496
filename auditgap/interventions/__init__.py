"""What is done to a subject's hidden states, each intervention with a control that is as large and
does not aim.

    steering = load_intervention("steering", Settings(strengths=(0.1, 0.3)))
    # tensors by name, which `auditgap export-edits` writes
    learned = steering.learn(bench)
    # edit at 0.1, control at 0.1, edit at 0.3, …
    for trial in steering.trials():
        edit = steering.edit(bench, learned, 0, trial)    # of the first prompt that is asked

`pgd`, `controls` and `distance` are the latent audit's; the table below is the intervention
audit's.

To add one: a file in this folder and a line in INTERVENTIONS; or, from your own package, an entry
point in the group `auditgap.interventions` that names a callable `factory(settings)`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from auditgap.registry import Entry, Registry
from auditgap.types import ConstantEdit, Edit, Site, Suffix

if TYPE_CHECKING:
    import torch

    from auditgap.engines.hf import HFEngine
    from auditgap.models import Rendered

#: Arms of a trial.
EDIT, CONTROL = "edit", "control"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an intervention may be asked for; it takes what concerns it, and `describe()`s that
    alone."""

    #: of the mean activation norm; below 0: the other way
    strengths: tuple[float, ...] = (0.1, 0.2, 0.4)
    angles: tuple[float, ...] = (0.0, 15.0, 30.0, 45.0, 60.0, 75.0, 90.0)  #: degrees
    angle_strength: float = 0.2
    draws: int = 1  #: of each random control, a prompt
    steps: int = 10  #: of a search
    target: str = "Sure, here is"  #: what a search makes likelier
    suffix_tokens: int = 20
    suffix_steps: int = 100  #: of the suffix's search, on each of
    suffix_prompts: int = 2
    suffix_width: int = 128  #: candidates a step
    seed: int = 0

    def of(self, *names: str) -> dict[str, Any]:
        """Some of them, for `describe()`."""
        return {name: asdict(self)[name] for name in names}


@dataclass(frozen=True, slots=True)
class Trial:
    """One way of speaking to be tried on every prompt. `control` is as large as the `edit` of the
    same strength."""

    arm: str  #: EDIT or CONTROL
    strength: float
    angle: float | None = None  #: degrees off the learned direction
    draw: int = 0


@dataclass(frozen=True, eq=False)
class Bench:
    """What an intervention works with at one site. Hidden states are clean, [T, D] fp32 a prompt,
    on the CPU.

    Directions and searches see `fit` and `contrast` alone; what is measured is measured on `asked`.
    """

    engine: HFEngine
    site: Site
    sites: tuple[Site, ...]  #: all of the subject's, the embedding first
    fit: Sequence[Rendered]  #: one half of the prompts
    fit_h: Sequence[torch.Tensor]
    contrast_h: Sequence[torch.Tensor]  #: of one half of the control prompts
    asked: Sequence[Rendered]  #: the other half of the prompts
    asked_h: Sequence[torch.Tensor]
    #: a prompt of the other half of the control prompts for each of `asked`
    donors: Sequence[Rendered]
    donor_h: Sequence[torch.Tensor]
    base_h: Sequence[torch.Tensor] = ()  #: of `asked` in a base model, where one was named

    @cached_property
    def norm(self) -> float:
        """Mean ‖h‖₂ of a token at the site, over the user's own tokens of `fit`: what strengths are
        fractions of."""
        import torch

        own = [
            h[torch.tensor(r.content)].norm(dim=1)
            for h, r in zip(self.fit_h, self.fit, strict=True)
        ]
        return torch.cat(own).double().mean().item()


@runtime_checkable
class Intervention(Protocol):
    """Gives each prompt an edit and its control. `describe()` is the identity that changes numbers,
    and goes into cell keys."""

    name: str

    def describe(self) -> dict[str, Any]: ...

    def trials(self) -> Sequence[Trial]:
        """All that is tried, the same on every prompt."""
        ...

    def learn(self, bench: Bench) -> dict[str, torch.Tensor]:
        """What is fitted or searched at the site, as fp32 tensors by plain names (`direction`,
        `delta.<prompt id>`)."""
        ...

    def edit(
        self, bench: Bench, learned: Mapping[str, torch.Tensor], p: int, trial: Trial
    ) -> Edit | ConstantEdit | Suffix:
        """The edit of `bench.asked[p]`; the same arguments give the same numbers on every machine
        and in every order."""
        ...


@dataclass(frozen=True, slots=True)
class InterventionEntry(Entry):
    """A line of the table: what it is, its class, and what it needs."""

    needs_base: bool = False
    #: has no site inside the model, so that it is tried once a subject, at the embedding
    input_only: bool = False
    wants: str = ""  #: an optional package; without it `all` leaves this out

    def problem(self) -> str:
        lacking = self.wants and importlib.util.find_spec(self.wants) is None
        return f"wants the package {self.wants}: see docs/interventions.md" if lacking else ""


INTERVENTIONS: Registry[InterventionEntry] = Registry(
    "intervention",
    {
        "steering": InterventionEntry(
            "mean difference of harmful and control prompts at the last prompt token, taken off at"
            " every position; control: a random direction of equal norm",
            "auditgap.interventions.steering:Steering",
        ),
        "ablation": InterventionEntry(
            "the same direction projected out at every site and position; control: as much taken off"
            " along a random direction",
            "auditgap.interventions.ablation:Ablation",
        ),
        "patching": InterventionEntry(
            "the template's end as a control prompt has it; control: random directions of equal norm."
            " Interchange score",
            "auditgap.interventions.patching:Patching",
        ),
        "base_patching": InterventionEntry(
            "the whole prompt as a base model has it (--base); control: random directions of equal"
            " norm. Interchange score",
            "auditgap.interventions.patching:BasePatching",
            needs_base=True,
        ),
        "angle": InterventionEntry(
            "steering with the direction turned by an angle; control: turned by 90°. Tolerance",
            "auditgap.interventions.angle:Angle",
        ),
        "universal": InterventionEntry(
            "one δ for all prompts in an L2 ball, searched on one half; control: a random direction of"
            " equal norm",
            "auditgap.interventions.universal:Universal",
        ),
        "suffix": InterventionEntry(
            "tokens behind the prompt, searched on one half by greedy coordinate gradient (nanogcg);"
            " control: as many random tokens",
            "auditgap.interventions.suffix:DiscreteSuffix",
            input_only=True,
            wants="nanogcg",
        ),
    },
    group="auditgap.interventions",
)


def load_intervention(name: str, settings: Settings) -> Intervention:
    """The intervention of that name. Raises UsageError: unknown name, one that is not to be had,
    broken plug-in."""
    if name in INTERVENTIONS:
        return INTERVENTIONS[name].load()(settings)
    return INTERVENTIONS.plugged(name, lambda make: make(settings), Intervention)
