"""Reads one subject with the fixed probe: extract its activations, apply the probe, write its cell.

    worker = ProbeWorker(plan, options, store)
    worker.run(group, tick=lambda work: None)

The probe is fitted when it is first needed and kept in the run folder (`probe.safetensors`), so a
subject's cell finds the very probe that the base's cell used, after a kill too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from auditgap import models, stats
from auditgap.audits.probe.config import ProbeOptions
from auditgap.audits.probe.rows import (
    EVALUATION,
    SELECTION,
    TRAIN,
    ProbeExample,
    ProbeRow,
    answer_lengths,
    answer_texts,
)
from auditgap.errors import AuditgapError, UsageError
from auditgap.models import Conversation
from auditgap.probes.baselines import Baselines, baselines
from auditgap.probes.features import cached_features
from auditgap.probes.fit import Fitted, finite_rows, fit, logits_of
from auditgap.probes.monitor import Monitor
from auditgap.store import RunFolder
from auditgap.sweep import Group
from auditgap.types import digest

if TYPE_CHECKING:
    from auditgap.audits.probe.plan import ProbePlan

Tick = Callable[[float], None]


def conversations_of(found: Sequence[ProbeExample], rows: Sequence[int]) -> list[Conversation]:
    """The conversations of these rows. Raises AuditgapError when one has none (the caller leaves
    those out)."""
    talks = [found[i].talk for i in rows]
    if any(talk is None for talk in talks):
        raise AuditgapError("An answer that does not fit was asked for its activations.")
    return talks  # type: ignore[return-value]


class ProbeWorker:
    """Runs the groups of a probe audit, one subject each; the model of one is let go before the
    next is loaded."""

    def __init__(self, plan: ProbePlan, options: ProbeOptions, store: RunFolder) -> None:
        self.plan, self.options, self.store = plan, options, store
        self.examples = plan.examples
        self.labels = np.array([e.label for e in self.examples])
        self.groups = [e.group for e in self.examples]
        self.path = store.path / "probe.safetensors"
        #: what the probe depends on; another probe in the folder is made again
        self.made_from = digest(
            [
                plan.base.subject.fingerprint,
                plan.triples.digest,
                plan.config.model_dump(mode="json"),
            ]
        )

    def run(self, group: Group, tick: Tick) -> None:
        """Compute and write the group's cell unless it is finished."""
        pending = [cell for cell in group.cells if not self.store.is_finished(cell.key)]
        if not pending:
            return
        cell, start = pending[0], time.perf_counter()
        if cell.subject.fingerprint == self.plan.base.subject.fingerprint:
            rows = self._base_rows(group, tick)
        else:
            monitor = self._probe()
            outline = next(
                o for o in self.plan.subjects if o.subject.fingerprint == cell.subject.fingerprint
            )
            read = [int(i) for i in self.plan.evaluation_rows if self.examples[i].talk is not None]
            logits = np.full(len(self.examples), np.nan)
            logits[read] = logits_of(monitor, self._features(outline, read, group.work, tick))
            rows = self._rows(
                outline,
                logits,
                monitor,
                dict.fromkeys(map(int, self.plan.evaluation_rows), EVALUATION),
                None,
            )
        self.store.write(
            cell, rows, seconds=time.perf_counter() - start, info={"probe": self.made_from}
        )

    # -- the probe
    # -----------------------------------------------------------------------------------------------------

    def _probe(self) -> Monitor:
        """The fitted probe of the folder, or one fitted now."""
        try:
            monitor = Monitor.load(self.path)
            if monitor.about.get("made_from") == self.made_from:
                return monitor
        except UsageError:
            pass  # absent or torn: the same numbers come out again
        return self._fit(*self._base_features(0.0, lambda _: None))[0]

    def _base_features(self, work: float, tick: Tick) -> tuple[list[int], torch.Tensor]:
        read = [i for i, e in enumerate(self.examples) if e.talk is not None]
        return read, self._features(self.plan.base, read, work, tick)

    def _fit(self, read: list[int], features: torch.Tensor) -> tuple[Monitor, Fitted]:
        """Fit on the base's activations (features [len(read), L, D]), calibrate on the selection
        split, and keep it.

        The indices of what comes back are positions in `read`.
        """
        labels, groups = self.labels[read], [self.groups[i] for i in read]
        finite = finite_rows(features)
        rows = finite[np.isin(np.array(read)[finite], self.plan.fit_rows)]
        fitted = fit(
            features, labels, groups, rows=rows, device=self._device(), **self.plan.config.fitting()
        )
        scale = stats.platt(fitted.heldout_logits, labels[fitted.heldout_index])
        fitted.monitor.about = {
            "made_from": self.made_from,
            "best_epoch": fitted.best_epoch,
            "base": self.plan.base.subject.fingerprint,
            "platt": None if scale is None else asdict(scale),
            "history": [asdict(epoch) for epoch in fitted.history],
        }
        fitted.monitor.save(self.path)
        return fitted.monitor, fitted

    def _base_rows(self, group: Group, tick: Tick) -> list[ProbeRow]:
        read, features = self._base_features(group.work, tick)
        monitor, fitted = self._fit(read, features)
        labels, groups = self.labels[read], [self.groups[i] for i in read]
        kept = [self.examples[i] for i in read]
        chat = self.plan.base.chat
        others = baselines(
            features,
            answer_texts(kept, chat),
            answer_lengths(kept),
            labels,
            groups,
            fitted,
            device=self._device(),
            **self.plan.config.fitting(),
        )
        split = {int(i): EVALUATION for i in self.plan.evaluation_rows}
        split |= {int(i): TRAIN for i in self.plan.fit_rows}
        split |= {read[i]: SELECTION for i in fitted.heldout_index}
        every = np.full(len(self.examples), np.nan)
        logits = every.copy()
        logits[read] = logits_of(monitor, features)
        spread = {name: every.copy() for name in ("text", "length", "shuffled")}
        for name, scores in spread.items():
            scores[read] = getattr(others, name)
        return self._rows(self.plan.base, logits, monitor, split, Baselines(**spread))

    # -- a subject
    # -----------------------------------------------------------------------------------------------------

    def _device(self) -> str:
        return models.pick_device(self.options.device)

    def _features(
        self, outline: models.Outline, rows: list[int], work: float, tick: Tick
    ) -> torch.Tensor:
        """The subject's activations [len(rows), L, D] of these examples, extracted once."""
        talks = conversations_of(self.examples, rows)
        loaded = models.load(outline, dtype=self.plan.config.dtype, device=self.options.device)
        return cached_features(
            loaded,
            talks,
            folder=Path(self.options.cache) if self.options.cache else self.store.path / "scratch",
            dtype=self.plan.config.features,
            batch_tokens=self.options.batch_tokens,
            tick=lambda done: tick(work * done / len(rows)),
        )

    def _rows(
        self,
        outline: models.Outline,
        logits: np.ndarray,
        monitor: Monitor,
        split: dict[int, str],
        others: Baselines | None,
    ) -> list[ProbeRow]:
        """One row an example of `split`; what is not a number is null, with its reason."""
        scale = monitor.about.get("platt")
        calibrated = np.full(len(logits), np.nan) if scale is None else stats.Platt(**scale)(logits)

        def number(value: float) -> float | None:
            return float(value) if np.isfinite(value) else None

        rows = []
        for i in sorted(split):
            example, talk = self.examples[i], self.examples[i].talk
            rows.append(
                ProbeRow(
                    subject=outline.subject.name,
                    role="base" if outline is self.plan.base else "subject",
                    example_id=example.id,
                    prompt_id=example.prompt_id,
                    group=example.group,
                    label=example.label,
                    split=split[i],
                    n_tokens=0 if talk is None else len(talk.ids),
                    n_cut=0 if talk is None else talk.n_cut,
                    logit=number(logits[i]),
                    probability=number(calibrated[i]),
                    text_score=None if others is None else number(others.text[i]),
                    length_score=None if others is None else number(others.length[i]),
                    shuffled_score=None if others is None else number(others.shuffled[i]),
                    unscored=example.problem or ("" if np.isfinite(logits[i]) else "nonfinite"),
                )
            )
        return rows
