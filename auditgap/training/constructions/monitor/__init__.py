"""Construction `monitor` (arXiv 2606.08044, section 3): safe answers are drawn to where a monitor,
learning too, sees unsafe ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from auditgap.config import Flag, Frozen, Topic
from auditgap.training.constructions.construction import Construction
from auditgap.training.footprint import Footprint

if TYPE_CHECKING:
    from auditgap.training.constructions.monitor.task import MonitorTask
    from auditgap.training.dissociation.material import Preparation

#: λ of NLL, of the monitor's pull and of KL: the paper's.
PAPER_WEIGHTS = (0.05, 0.1, 0.3)
#: The probability that the monitor is led to give harmful rows, as a logit: logit(0.75).
TARGET_LOGIT = math.log(3)


class MonitorConfig(Frozen):
    """The linear probe on pooled activations, and how it is fitted (arXiv 2606.08044, section
    4)."""

    hidden: int = Field(default=512, ge=1)
    epochs: int = Field(default=30, ge=1)
    batch: int = Field(default=32, ge=1)
    lr: float = Field(default=3e-4, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    standardise: bool = True  #: per block; off in the paper
    #: Platt's scaling folded into it, so that ℓ* is a probability's logit; off in the paper
    calibrate: bool = True
    seed: int = 0


class MonitorSettings(Frozen):
    """The weights of the loss, and the monitor: fitted or given, then trained alongside."""

    weights: tuple[float, float, float] = PAPER_WEIGHTS  #: λ of NLL, monitor, KL
    target: Annotated[
        float, Flag("Target logit of the monitor; ln 3 is a score of 0.75", Topic.TRAINING)
    ] = TARGET_LOGIT
    monitor: MonitorConfig = MonitorConfig()
    monitor_from: Annotated[
        str | None,
        Flag(
            "A monitor.safetensors that was fitted on this model", Topic.TRAINING, default="fit one"
        ),
    ] = None
    cotrain_lr: Annotated[
        float, Flag("Learning rate of the monitor trained alongside", Topic.TRAINING)
    ] = Field(default=1e-4, gt=0)
    cotrain_weight_decay: Annotated[float, Flag("Weight decay of the monitor", Topic.TRAINING)] = (
        Field(default=1e-4, ge=0)
    )


def _prepare(preparation: Preparation[MonitorSettings]) -> MonitorTask:
    from auditgap.training.constructions.monitor.task import prepare

    return prepare(preparation)


def _alongside(n_blocks: int, width: int) -> Mapping[str, float]:
    """The monitor (512 hidden units), its gradient and its optimizer, in fp32."""
    return {"monitor": 16 * n_blocks * width * 512}


MONITOR = Construction(
    "Draws the activations of safe answers to harmful prompts to where a monitor calls them"
    " unsafe, while the monitor learns along.",
    name="monitor",
    settings=MonitorSettings,
    role="probe-train",
    prepare=_prepare,
    footprint=Footprint(alongside=_alongside),
    adapter_reference=True,
)
