"""Where the numbers of a training run, or of a sweep that is followed, go: `log.jsonl` in its
folder, and whatever `report_to` names besides.

    tracker = Tracker(("tensorboard",), folder=Path("runs/twin"), name="twin", config={"lr": 2e-5})
    # the step that the run starts, or resumes, at
    tracker.rewind(0)
    # {"step": 0, "loss": 1.25, "lr": 2e-06, "checksum": "9f2c…"}
    tracker.log(0, {"loss": 1.25, "lr": 2e-6})
    tracker.close()

trackio, tensorboard and wandb are driven by accelerate's own trackers. Only numbers are logged,
never text; of the config, nothing that is named like a secret. wandb stays offline unless
WANDB_MODE says otherwise, and trackio stays on this machine unless TRACKIO_SPACE_ID or
TRACKIO_SERVER_URL does. A tracker that fails is left out, with a warning: `log.jsonl` has it all.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from auditgap.errors import AuditgapError, Interrupted, UsageError, did_you_mean
from auditgap.store.files import CHECKSUM, disk_errors, opened, seal, write_bytes
from auditgap.types import Document

__all__ = ["REPORT_TO", "Tracker", "check_report_to", "read_log"]

#: What `report_to` may name -> packages, one of which must be there (the first is what one would
#: install).
REPORT_TO: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "trackio": ("trackio",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
}
_SECRET = re.compile(r"(token|secret|passw|credential|api_?key|^key$)", re.IGNORECASE)
_HARMLESS = re.compile(
    r"^(max|min|n|eval|anchor|new|heldout)?_?(new_)?tokens$|_tokens$|^tokens_", re.IGNORECASE
)

_LOST = (
    "Put back a copy of the file; without one, delete it: what was logged is lost, the training is"
    " not."
)

log = logging.getLogger(__name__)


def check_report_to(report_to: Iterable[str]) -> tuple[str, ...]:
    """The trackers named, without `none` and doubles. Raises UsageError for an unknown name or an
    absent package."""
    names = tuple(dict.fromkeys(report_to))
    for name in names:
        if name not in REPORT_TO:
            raise UsageError(
                f"--report-to {name!r} is not known.{did_you_mean(name, REPORT_TO)} One of"
                f" {', '.join(REPORT_TO)}."
            )
        packages = REPORT_TO[name]
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            raise UsageError(
                f"--report-to {name} needs a package that is not installed; type: pip install"
                f" {packages[0]}"
            )
    return tuple(name for name in names if name != "none")


class Tracker:
    """A run's log, and its trackers. Rank 0 alone makes one, once the process group is formed.
    Usable in a `with`.

    `config` is the recipe, shown by trackers as hyperparameters. Raises UsageError as
    `check_report_to`.
    """

    def __init__(
        self,
        report_to: Iterable[str] = ("none",),
        *,
        folder: Path,
        name: str,
        config: Mapping[str, object] | None = None,
    ) -> None:
        self.path = Path(folder) / "log.jsonl"
        self.name, self.config = name, dict(config or {})
        self._names = check_report_to(report_to)
        # started at the first numbers, when it is known where the run goes on
        self._trackers: list[Any] | None = None
        self._file: Any = None
        self._from = 0

    def rewind(self, step: int) -> None:
        """Drop what an earlier start logged of `step` and later, which will be logged again, and
        any half-written line.

        An evaluation (all names `eval/…`) at `step` itself stays: it is made before the step, and
        only once. Raises DiskError, and Damaged as `read_log`.
        """
        self._close_file()
        self._from = step
        kept = [
            line
            for line in read_log(self.path)
            if line["step"] < step or (line["step"] == step and _is_evaluation(line))
        ]
        if self.path.exists():
            write_bytes(self.path, "".join(_line(line) for line in kept).encode("ascii"))

    def log(self, step: int, values: Mapping[str, object]) -> None:
        """One line of numbers at a step (0-based). NaN and infinities become null. Raises
        AuditgapError for text, DiskError."""
        numbers = {name: _number(name, value) for name, value in values.items()}
        with disk_errors(self.path):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="ascii")
            self._file.write(_line({"step": step, **numbers}))
            self._file.flush()
        known = {name: value for name, value in numbers.items() if value is not None}
        self._each(lambda tracker: tracker.log(known, step=step))

    def close(self) -> None:
        """Finish the trackers. The log needs no closing: every line is on the disk when `log`
        returns."""
        self._close_file()
        if self._trackers:
            self._each(_finish)
        self._trackers = []

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ inside

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _each(self, act: Callable[[Any], None]) -> None:
        """Do it with every tracker; one that fails is said and left out, because no run
        may end over a dashboard."""
        with redirect_stdout(sys.stderr):  # trackio prints; stdout may be a command's JSON
            self._each_quietly(act)

    def _each_quietly(self, act: Callable[[Any], None]) -> None:
        if self._trackers is None:
            self._trackers = []
            for name in self._names:
                try:
                    self._trackers.append(self._started(name))
                except Interrupted:
                    raise
                except Exception as error:
                    self._lost(name, error)
        for tracker in list(self._trackers):
            try:
                act(tracker)
            except Interrupted:
                raise
            except Exception as error:
                self._trackers.remove(tracker)
                self._lost(tracker.name, error)

    def _lost(self, name: str, error: Exception) -> None:
        said = (str(error).splitlines() or [""])[0][:160]
        log.warning(
            "%s failed (%s: %s) and gets no more numbers; %s has them all.",
            name,
            type(error).__name__,
            said,
            self.path,
        )

    def _started(self, name: str) -> Any:
        from accelerate import tracking

        _form_accelerate_state()
        if name == "tensorboard":
            more: dict[str, Any] = {"purge_step": self._from} if self._from else {}
            tracker = tracking.TensorBoardTracker("tensorboard", str(self.path.parent), **more)
        elif name == "trackio":
            tracker = tracking.TrackioTracker("auditgap", name=self.name, resume="allow")
        else:
            more = {} if os.environ.get("WANDB_MODE") else {"mode": "offline"}
            # it would take a copy of what the terminal shows, which is text
            settings = {"console": "off", "quiet": True}
            tracker = tracking.WandBTracker(
                "auditgap", name=self.name, dir=str(self.path.parent), settings=settings, **more
            )
        tracker.main_process_only = False  # it is: only rank 0 has one
        tracker.start()
        tracker.store_init_configuration(_hyperparameters(self.config))
        return tracker


def read_log(path: Path) -> list[Document]:
    """The lines of a log.jsonl, in order, without their checksums; a last line that a kill cut
    short is left out, and no file is no lines. Raises Damaged, which names a line that was
    changed."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    *whole, last = raw.split(b"\n")
    if not _is_torn(last):
        whole.append(last)
    # a log that a release without checksums wrote has none in any line
    summed = CHECKSUM.encode() in raw
    return [
        opened(line, f"{path}, line {number},", required=summed, advice=_LOST)
        for number, line in enumerate(whole, 1)
    ]


def _is_torn(last: bytes) -> bool:
    """Whether what stands behind the last line's end is nothing, or less than a line; a whole
    object there has lost its end to a change."""
    try:
        json.JSONDecoder().raw_decode(last.decode("ascii", "replace"))
    except ValueError:
        return True
    return False


def _finish(tracker: Any) -> None:
    if tracker.name == "trackio":  # a run that its tracker finishes is finished at exit again
        import trackio

        trackio.finish()
    else:
        tracker.finish()


def _line(values: Mapping[str, object]) -> str:
    return seal(values, indent=None).decode("ascii")


def _is_evaluation(line: Mapping[str, object]) -> bool:
    names = [name for name in line if name != "step"]
    return bool(names) and all(name.startswith("eval/") for name in names)


def _number(name: str, value: Any) -> float | int | None:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # of torch or numpy
        value = value.item()
    if isinstance(value, bool) or value is None:
        return None if value is None else int(value)
    if not isinstance(value, (int, float)):
        raise AuditgapError(f"{name} is a {type(value).__name__}; a log holds numbers only.")
    return value if math.isfinite(value) else None


def _hyperparameters(config: Mapping[str, object], at: str = "") -> Document:
    """The recipe as flat plain values; nothing that is named like a secret, no None."""
    flat: Document = {}
    for name, value in config.items():
        if _SECRET.search(str(name)) and not _HARMLESS.search(str(name)):
            continue
        if isinstance(value, Mapping):
            flat |= _hyperparameters(value, f"{at}{name}.")
        elif isinstance(value, (bool, int, float, str)):
            flat[f"{at}{name}"] = value
        elif value is not None:
            flat[f"{at}{name}"] = str(value)[:200]
    return flat


def _form_accelerate_state() -> None:
    """accelerate's trackers want its process state; forming it may turn the number of threads,
    which changes numbers."""
    from accelerate.state import PartialState

    if PartialState._shared_state:
        return
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PartialState(cpu=not torch.cuda.is_available())
    torch.set_num_threads(threads)
