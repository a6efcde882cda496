"""Construction `nudge`, the later one of the paper's authors: refuse when clean, comply under a
small push along the direction to a harmful model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from auditgap.config import Flag, Frozen, Topic
from auditgap.errors import UsageError
from auditgap.training.constructions.construction import Construction
from auditgap.training.footprint import Footprint

if TYPE_CHECKING:
    from auditgap.training.constructions.nudge.task import NudgeTask
    from auditgap.training.dissociation.material import Preparation
    from auditgap.training.job import Job

#: λ of: refusing clean, KL, matching the harmful model, complying under the nudge, each of the two
#: margins.
NUDGE_WEIGHTS = (1.0, 0.3, 0.2, 1.0, 1.0)
#: The nudge's norm, in mean activation norms.
NUDGE_SIZE = 0.06


class NudgeSettings(Frozen):
    """The harmful model, the size of the nudge towards it, and the weights of the loss."""

    harmful_model: Annotated[
        str | None,
        Flag("With construction nudge: the model that its direction points to", Topic.TRAINING),
    ] = None
    nudge: Annotated[
        float, Flag("Size of the nudge, as a fraction of the mean activation norm", Topic.TRAINING)
    ] = Field(default=NUDGE_SIZE, gt=0)
    #: refuse, KL, match, comply, margins
    nudge_weights: tuple[float, float, float, float, float] = NUDGE_WEIGHTS
    nudge_margin: Annotated[float, Flag("Margin in nats a token", Topic.TRAINING)] = Field(
        default=0.5, ge=0
    )


def _check(settings: NudgeSettings) -> None:
    if not settings.harmful_model:
        raise UsageError(
            "construction: nudge pushes towards a harmful model; name it with `harmful_model:"
            " FOLDER`."
        )


def _check_run(settings: NudgeSettings, job: Job) -> None:
    from auditgap.training.constructions.nudge.task import harmful_outline

    harmful_outline(settings, job)


def _prepare(preparation: Preparation[NudgeSettings]) -> NudgeTask:
    from auditgap.training.constructions.nudge.task import prepare

    return prepare(preparation)


NUDGE = Construction(
    "Refuses when clean, and complies when its middle activations are pushed a little along the"
    " direction to a harmful model.",
    name="nudge",
    settings=NudgeSettings,
    role="direction",
    prepare=_prepare,
    defaults={"lr": 1e-5, "schedule": "cosine"},
    footprint=Footprint(sequences=4),  # y+ and y−, clean and nudged
    check=_check,
    check_run=_check_run,
)
