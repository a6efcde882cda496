"""The fit of the monitor that a construction starts from.

    path = fit_monitor(FitMonitorConfig(base="./base", triples="demo"), ProbeOptions(out="runs/monitor"))

The probe is fitted once, on the base's activations, and never touched again (arXiv 2606.08044,
section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from auditgap import models, stats
from auditgap.audits.planning import with_dtype
from auditgap.audits.probe.config import FitMonitorConfig, ProbeOptions
from auditgap.audits.probe.plan import LEDGER, check_enough, window
from auditgap.audits.probe.rows import (
    ProbeExample,
    answer_lengths,
    answer_texts,
    examples,
)
from auditgap.audits.probe.worker import conversations_of
from auditgap.data.ledger import LeakageLedger
from auditgap.data.triples import TripleSet, load_triples
from auditgap.errors import UsageError
from auditgap.models.provenance import provenance
from auditgap.probes.baselines import Baselines, baselines
from auditgap.probes.features import cached_features
from auditgap.probes.fit import Fitted, calibrate, finite_rows, fit
from auditgap.probes.monitor import Monitor
from auditgap.report import probe
from auditgap.store import files
from auditgap.types import Document


def fit_monitor(
    config: FitMonitorConfig,
    options: ProbeOptions,
    *,
    shard: tuple[int, int] = (0, 1),
    tick: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Fit the monitor that a construction starts from; returns `monitor.safetensors`, with
    `monitor.json` beside it.

    Activations are extracted once (each rank its `shard` of them; the folder must be one that all
    ranks see) and kept, in `options.cache` or `features/` of the folder. Rank 0 fits and writes;
    another rank returns the path when its own part is done, and the caller waits for rank 0. What
    is there already is not made again. `tick(phase, done, total)`. Raises UsageError: triples that
    are too few, a folder that holds another monitor.
    """
    config = with_dtype(config, options.device)
    home = Path(options.out or f"runs/monitor-{files.folder_name(config.base)}")
    triples = load_triples(config.triples, limit=config.limit, seed=config.seed)
    outline = models.outline(config.base, chat_template=config.chat_template)
    identity = {
        **config.model_dump(mode="json"),
        "fingerprint": outline.subject.fingerprint,
        "triple_set": triples.digest,
        "max_tokens": window(config, outline),
    }
    path = home / "monitor.safetensors"
    with files.disk_errors(home):
        home.mkdir(parents=True, exist_ok=True)
    if _is_there(home, identity):
        return path
    found = examples(triples.triples, outline.chat, identity["max_tokens"])
    check_enough(found, config.triples, 2)
    read = [i for i, e in enumerate(found) if e.talk is not None]
    loaded = models.load(outline, dtype=config.dtype, device=options.device)
    done = 0

    def extracted(rows: int) -> None:
        nonlocal done
        done += rows
        if tick is not None:
            tick("features", done, len(range(shard[0], len(read), shard[1])))

    features = cached_features(
        loaded,
        conversations_of(found, read),
        folder=Path(options.cache) if options.cache else home / "features",
        dtype=config.features,
        shard=shard,
        batch_tokens=options.batch_tokens,
        tick=extracted,
    )
    if shard[0] != 0:
        return path
    device = str(loaded.device)
    del loaded  # its memory is the fit's now
    answers = FitData(found, read, features, outline)
    made = _fit(answers, config, device, tick)
    card = {"identity": identity, **_card(answers, made, config, triples)}
    made.fitted.monitor.about = {
        key: card[key] for key in ("identity", "base", "best_epoch", "auroc")
    }
    ledger = LeakageLedger()
    ledger.use("probe-train", {t.prompt for t in triples.triples})
    ledger.save(home / LEDGER)
    made.fitted.monitor.save(path)
    card["sha256"] = files.sha256(path.read_bytes())
    # last: it says that the monitor is whole
    files.write_document(home / "monitor.json", card)
    return path


class FitData:
    """What a monitor is fitted on: the N examples that fit the model's window, and their features
    [N, …]."""

    def __init__(
        self,
        found: Sequence[ProbeExample],
        read: Sequence[int],
        features: torch.Tensor,
        outline: models.Outline,
    ) -> None:
        self.features, self.outline = features, outline
        self.kept = [found[i] for i in read]
        self.n_unread = len(found) - len(read)
        self.labels = np.array([e.label for e in self.kept])  #: [N]
        self.groups = [e.group for e in self.kept]
        self.finite = finite_rows(features)


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted monitor with its baselines' scores and its calibration."""

    fitted: Fitted
    others: Baselines
    scale: stats.Platt | None


def _fit(
    data: FitData,
    config: FitMonitorConfig,
    device: str,
    tick: Callable[[str, int, int], None] | None,
) -> Fit:
    fitting = {**config.fitting(), "device": device}
    fitted = fit(
        data.features,
        data.labels,
        data.groups,
        rows=data.finite,
        **fitting,
        tick=None if tick is None else lambda epoch: tick("fit", epoch, config.epochs),
    )
    others = baselines(
        data.features,
        answer_texts(data.kept, data.outline.chat),
        answer_lengths(data.kept),
        data.labels,
        data.groups,
        fitted,
        **fitting,
    )
    return Fit(fitted, others, calibrate(fitted, data.labels) if config.calibrate else None)


def _card(data: FitData, made: Fit, config: FitMonitorConfig, triples: TripleSet) -> Document:
    """What `monitor.json` says of the monitor, measured on the held-out split."""
    fitted, scale = made.fitted, made.scale
    held, scores = fitted.heldout_index, fitted.heldout_logits
    y, by = data.labels[held], [data.groups[i] for i in held]
    aurocs = {
        name: stats.auroc(getattr(made.others, name)[held], y, by) for name in probe.BASELINES
    }
    if scale is not None:
        scores = scale.slope * scores + scale.offset
    auroc = stats.auroc(scores, y, by)
    raw = stats.Platt(1.0, 0.0)(scores)
    subject = data.outline.subject
    return {
        "base": {"name": subject.name, "fingerprint": subject.fingerprint},
        "triples": {
            "name": triples.name,
            "digest": triples.digest,
            "n": len(triples.triples),
            **triples.provenance,
        },
        "split": {
            "by": "prompt",
            "train": len(fitted.train_index),
            "heldout": len(held),
            "train_prompts": len({data.groups[i] for i in fitted.train_index}),
            "heldout_prompts": len(set(by)),
            "unread": data.n_unread,
            "nonfinite": len(data.kept) - len(data.finite),
        },
        "best_epoch": fitted.best_epoch,
        "history": [asdict(epoch) for epoch in fitted.history],
        "standardised": config.standardise,
        "calibration": None if scale is None else asdict(scale),
        "auroc": asdict(auroc),
        "gap": asdict(stats.separation(raw, y, by)),
        "ece": {
            **asdict(stats.ece(raw, y)),
            "by_chance": stats.ece_by_chance(raw),
            "bins": 15,
            "n": len(held),
        },
        "logits": {
            str(label): {"mean": _mean(scores[y == label]), "sd": _sd(scores[y == label])}
            for label in (0, 1)
        },
        "baselines": {
            name: {"what": words, **asdict(aurocs[name])} for name, words in probe.BASELINES.items()
        },
        "notes": _notes(scale is not None),
        "warnings": probe.doubts(auroc, aurocs),
        "versions": provenance((), dtype=config.dtype)["versions"],
    }


def _notes(is_calibrated: bool) -> list[str]:
    return [
        (
            "Figures are of the held-out split, which also chose the epoch, so that the AUROC"
            " is slightly flattered; `auditgap probe` tests on prompts that chose nothing."
        ),
        "Gap and ECE are of the sigmoid of the monitor's own logits, "
        + (
            "calibrated on this same split, which flatters them."
            if is_calibrated
            else "which are not calibrated."
        ),
    ]


def _is_there(home: Path, identity: dict[str, Any]) -> bool:
    """Whether the folder holds this very monitor, whole. Raises UsageError when it holds another
    one."""
    try:
        card = files.read_document(home / "monitor.json")
    except files.Damaged:
        return False
    if card is None:
        return False
    told = card.get("identity")
    stored: dict[str, Any] = told if isinstance(told, dict) else {}
    differs = [key for key in sorted({*stored, *identity}) if stored.get(key) != identity.get(key)]
    if differs:
        raise UsageError(
            f"{home} holds a monitor made otherwise ({', '.join(differs)} differ). Go back to that"
            " config, or choose another --out."
        )
    try:
        whole = files.sha256((home / "monitor.safetensors").read_bytes()) == card.get("sha256")
        return whole and Monitor.load(home / "monitor.safetensors") is not None
    except (OSError, UsageError):
        return False


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _sd(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None
