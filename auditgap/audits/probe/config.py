"""What a probe audit, or the fit of a construction monitor, is asked to do: frozen values from
flags or YAML.

    base: ./safe-base
    subjects: [./dissociated, ./harmful]
    triples: demo

Every field but those of `ProbeOptions` can change a number, and so is part of the run folder's
identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from auditgap import probes
from auditgap.audits import options
from auditgap.config import COMMAS, Flag, Frozen, Needs, Topic, build, merged


class FitConfig(Frozen):
    """What is fitted: whose activations, of which triples, how. The defaults are the paper's but
    for `standardise`."""

    base: Annotated[str, Flag("Model to fit the probe on", positional=True)] = Field(min_length=1)
    triples: Annotated[str, Flag("Contrast triples: a file, hub:ID@REVISION, or demo")] = Field(
        min_length=1
    )
    limit: Annotated[int | None, Flag("Use N triples, chosen by hash", default="all")] = Field(
        default=None, ge=1
    )
    standardise: Annotated[
        bool, Flag("Standardise the activations of each block (the paper does not)", Topic.TRAINING)
    ] = True
    epochs: Annotated[int, Flag("Epochs for fitting the probe", Topic.TRAINING)] = Field(
        default=probes.EPOCHS, ge=1
    )
    batch: Annotated[int, Flag("Rows in each step of the probe fit", Topic.TRAINING)] = Field(
        default=probes.BATCH, ge=1
    )
    lr: Annotated[float, Flag("Learning rate for fitting the probe", Topic.TRAINING)] = Field(
        default=probes.LR, gt=0, lt=1
    )
    weight_decay: Annotated[float, Flag("Weight decay for fitting the probe", Topic.TRAINING)] = (
        Field(default=probes.WEIGHT_DECAY, ge=0)
    )
    heldout: Annotated[float, Flag("Share of prompts for choosing the epoch", Topic.TRAINING)] = (
        Field(default=probes.HELDOUT, gt=0, lt=1)
    )
    max_tokens: Annotated[int, Flag("Maximum tokens of prompt and response together")] = Field(
        default=512, ge=8
    )
    dtype: options.Dtype = "auto"
    features: Annotated[
        Literal["float32", "bfloat16"], Flag("Dtype of stored pooled activations", Topic.WHERE)
    ] = "float32"
    chat_template: options.ChatTemplate = None
    seed: options.Seed = 0

    def fitting(self) -> dict[str, Any]:
        """The keyword arguments of `probes.fit.fit`."""
        return {
            "standardise": self.standardise,
            "seed": self.seed,
            "epochs": self.epochs,
            "batch_size": self.batch,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "heldout": self.heldout,
        }


class FitMonitorConfig(FitConfig):
    """The monitor that a construction starts from."""

    calibrate: Annotated[
        bool,
        Flag(
            "Fold Platt's scaling into the monitor, so that a logit of ln 3 means a score of 0.75;"
            " the paper's is not scaled",
            Topic.TRAINING,
        ),
    ] = True


class ProbeConfig(FitConfig):
    """The audit: a probe fitted on the base is read on the base and on each subject, on prompts
    that it has never seen."""

    subjects: Annotated[
        tuple[str, ...], COMMAS, Flag("Further models to read the probe on", positional=True)
    ] = ()
    evaluate: Annotated[float, Flag("Share of prompts held out for the test")] = Field(
        default=0.2, gt=0, lt=1
    )


class ProbeOptions(options.AuditOptions):
    """Where it runs and in what portions. Nothing here changes what is measured."""

    cache: Annotated[
        str | None,
        Flag(
            "A folder for features that outlive the run",
            Topic.OUTPUT,
            default="in the run's folder, until it is finished",
        ),
    ] = None
    allow_overlap: options.AllowOverlap = False


def required(example: str) -> Needs:
    """What a probe and a monitor are fitted on; `example`: a command that names both."""
    return {
        "base": f"Which base model? For example: {example}",
        "triples": f"Which triples (prompt, safe answer, unsafe answer)? For example: {example}",
    }


def read_monitor_config(
    file: Path | None, flags: Mapping[str, Any]
) -> tuple[FitMonitorConfig, ProbeOptions]:
    """The fit of a construction monitor, as `Audit.read` reads an audit's config. Raises
    UsageError, Refused."""
    return build(
        merged(file, flags, section="monitor"),
        FitMonitorConfig,
        ProbeOptions,
        needs=required("auditgap train monitor ./base --triples demo"),
    )
