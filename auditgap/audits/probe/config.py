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

from pydantic import BeforeValidator, Field

from auditgap.config import Frozen, build, listed, merged
from auditgap.errors import UsageError
from auditgap.probes import fit


class FitConfig(Frozen):
    """What is fitted: whose activations, of which triples, how. The defaults are the paper's but
    for `standardise`."""

    base: str = Field(min_length=1)
    triples: str = Field(min_length=1)  #: a file, `hub:…`, or a built-in set such as `demo`
    limit: int | None = Field(default=None, ge=1)
    standardise: bool = True  #: each block's activations first; the paper does not
    epochs: int = Field(default=fit.EPOCHS, ge=1)
    batch: int = Field(default=fit.BATCH, ge=1)
    lr: float = Field(default=fit.LR, gt=0, lt=1)
    weight_decay: float = Field(default=fit.WEIGHT_DECAY, ge=0)
    #: share of the prompts that choose the epoch
    heldout: float = Field(default=fit.HELDOUT, gt=0, lt=1)
    max_tokens: int = Field(default=512, ge=8)  #: of prompt and response together
    dtype: str = "auto"  #: the model runs in
    features: Literal["float32", "bfloat16"] = "float32"  #: what pooled activations are kept in
    chat_template: str | None = None
    seed: int = 0

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

    #: fold Platt's scaling into it, so that ℓ* = ln 3 means a score of 0.75; the paper's is not
    calibrate: bool = True


class ProbeConfig(FitConfig):
    """The audit: a probe fitted on the base is read on the base and on each subject, on prompts
    that it has never seen."""

    subjects: Annotated[tuple[str, ...], BeforeValidator(listed)] = ()
    #: share of the prompts set aside before anything is fitted
    evaluate: float = Field(default=0.2, gt=0, lt=1)


class ProbeOptions(Frozen):
    """The sitting: where it runs and in what portions. Nothing here changes what is measured."""

    out: str | None = None
    device: str = "auto"
    batch_tokens: int | None = Field(default=None, ge=16)
    #: a folder for features that outlive the run; None: in the run folder, until it is finished
    cache: str | None = None
    #: go on although a subject was trained on prompts of the evaluation, and record it
    allow_overlap: bool = False
    break_lock: bool = False
    retry_failed: bool = False
    allow_raw: bool = False


def read_config(file: Path | None, flags: Mapping[str, Any]) -> tuple[ProbeConfig, ProbeOptions]:
    """The audit's config: the file's values with the flags that were given (not None) on top.

    Raises UsageError naming the key and what was wanted; Refused when foreign code is asked for.
    """
    return _read(file, flags, ProbeConfig, "auditgap probe ./base ./subject --triples demo")


def read_monitor_config(
    file: Path | None, flags: Mapping[str, Any]
) -> tuple[FitMonitorConfig, ProbeOptions]:
    """The same for the fit of a construction monitor."""
    return _read(file, flags, FitMonitorConfig, "auditgap train monitor ./base --triples demo")


def _read(
    file: Path | None, flags: Mapping[str, Any], kind: type[FitConfig], example: str
) -> tuple[Any, ProbeOptions]:
    values = merged(file, flags, section="probe" if kind is ProbeConfig else "monitor")
    for key, what in (
        ("base", "Which base model?"),
        ("triples", "Which triples (prompt, safe answer, unsafe answer)?"),
    ):
        if not values.get(key):
            raise UsageError(f"{what} For example: {example}")
    config, options = build(values, kind, ProbeOptions)
    return config, options
