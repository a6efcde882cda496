"""The probe audit from end to end, and the fit of a construction monitor.

    folder, outcome = run(*read_config(None, {"base": "./base", "subjects": "./dissociated", "triples": "demo"}))
    path = fit_monitor(MonitorConfig(base="./base", triples="demo"), ProbeOptions(out="runs/monitor"))

The probe is fitted once, on the base's activations, and never touched again (arXiv 2606.08044,
section 4.1): it is read on the base and on each subject, on the same answers to prompts that it has
not seen. The same call again resumes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from auditgap import models, stats
from auditgap.audits import audit
from auditgap.audits.audit import Plan
from auditgap.audits.planning import with_dtype
from auditgap.audits.probe.audit import PROBE, ProbeCell
from auditgap.audits.probe.config import FitConfig, FitMonitorConfig, ProbeConfig, ProbeOptions
from auditgap.audits.probe.rows import (
    ProbeExample,
    answer_lengths,
    answer_texts,
    examples,
    set_aside,
)
from auditgap.audits.probe.worker import conversations_of
from auditgap.data.ledger import LeakageLedger
from auditgap.data.triples import TripleSet, load_triples
from auditgap.errors import UsageError
from auditgap.models.provenance import provenance
from auditgap.probes.baselines import baselines
from auditgap.probes.features import cached_features
from auditgap.probes.fit import calibrate, finite_rows, fit
from auditgap.probes.monitor import Monitor
from auditgap.report import probe
from auditgap.store import RunFolder, files
from auditgap.sweep import Group, Outcome, Progress
from auditgap.types import Document, digest

#: Fewer prompts than this cannot be split three ways.
FEWEST = 5
#: The leakage ledger's name, in a run folder and beside a trained model's weights.
LEDGER = "ledger.json"


@dataclass(frozen=True, eq=False)
class ProbePlan(Plan):
    """The base and its subjects, and the answers that they are read on."""

    config: ProbeConfig
    triples: TripleSet
    outlines: tuple[models.Outline, ...]  #: the base's first
    examples: tuple[ProbeExample, ...]  #: as the base writes them
    fit_rows: np.ndarray  #: of the examples: for the probe, its epoch and its calibration
    evaluation_rows: np.ndarray
    groups: tuple[Group, ...]  #: one cell each, the base's first
    #: which prompts the probe was fitted to and which it is read on, with what the subjects' own
    #: ledgers say
    ledger: LeakageLedger

    @property
    def base(self) -> models.Outline:
        return self.outlines[0]

    @property
    def subjects(self) -> tuple[models.Outline, ...]:
        return self.outlines[1:]

    @property
    def passes(self) -> tuple[tuple[Group, ...], ...]:
        """The probe is fitted on the base before it is read on the subjects."""
        return self.groups[:1], self.groups[1:]


def prepare(config: ProbeConfig, options: ProbeOptions) -> tuple[ProbeConfig, ProbePlan]:
    """The config with `auto` resolved for this machine, and its plan. Loads no weights."""
    config = with_dtype(config, options.device)
    return config, make_plan(config, allow_overlap=options.allow_overlap)


def make_plan(config: ProbeConfig, *, allow_overlap: bool = False) -> ProbePlan:
    """Resolve every name of the config. Loads no weights.

    Raises UsageError for models that cannot be compared, triples that are too few, and (unless
    `allow_overlap`) evaluation prompts that a subject was trained on, as far as a `ledger.json` in
    its folder says.
    """
    triples = load_triples(config.triples, limit=config.limit, seed=config.seed)
    base = models.outline(config.base, chat_template=config.chat_template)
    found = examples(triples.triples, base.chat, _window(config, base))
    _enough(found, config.triples, FEWEST)
    subjects: list[models.Outline] = []
    for name in dict.fromkeys(config.subjects):
        outline = models.outline(name, chat_template=config.chat_template)
        # the same weights count once
        if all(outline.subject.fingerprint != o.subject.fingerprint for o in (base, *subjects)):
            comparable(
                base, outline, found, examples(triples.triples, outline.chat, _window(config, base))
            )
            subjects.append(outline)
    fit_rows, evaluation_rows = set_aside([e.group for e in found], config.evaluate, config.seed)
    ledger = LeakageLedger()
    for outline in (base, *subjects):
        if (outline.folder / LEDGER).is_file():
            ledger.merge(LeakageLedger.load(outline.folder / LEDGER))
    for role, rows in (("probe-train", fit_rows), ("evaluation", evaluation_rows)):
        ledger.use(role, {triples.triples[i // 2].prompt for i in rows})
    ledger.check(allow_overlap=allow_overlap)
    tokens = [0 if e.talk is None else len(e.talk.ids) for e in found]
    settings = {
        "base": base.subject.fingerprint,
        "max_tokens": _window(config, base),
        "dtype": config.dtype,
        "features": config.features,
        "evaluate": config.evaluate,
        "chat_template": digest(base.chat.template) if base.chat.template else None,
        **config.fitting(),
    }
    groups = []
    for outline in (base, *subjects):
        rows = range(len(found)) if outline is base else evaluation_rows
        work = 2.0 * outline.n_block_params * sum(tokens[i] for i in rows)
        cell = ProbeCell(outline.subject, None, None, probe.PROBE, triples.digest, settings)
        groups.append(Group(f"{outline.subject.name} · probe", (cell,), work=work))
    return ProbePlan(
        config,
        triples,
        (base, *subjects),
        tuple(found),
        fit_rows,
        evaluation_rows,
        tuple(groups),
        ledger,
    )


def _window(config: FitConfig, outline: models.Outline) -> int:
    """Tokens of a conversation: what was asked for, or what the model can read where that is
    less."""
    limit = getattr(outline.chat.tokenizer, "model_max_length", None)
    return (
        min(config.max_tokens, limit) if isinstance(limit, int) and limit > 0 else config.max_tokens
    )


def _enough(found: list[ProbeExample], name: str, fewest: int) -> None:
    usable = {e.group for e in found if e.talk is not None}
    if len(usable) < fewest:
        raise UsageError(
            f"Triples {name!r} have {len(usable)} different prompts with an answer that fits; at"
            f" least {fewest} are needed to fit a probe and to test it on others. Give more"
            " triples, or a larger --max-tokens."
        )


def comparable(
    base: models.Outline,
    other: models.Outline,
    ours: list[ProbeExample],
    theirs: list[ProbeExample],
) -> None:
    """Raises UsageError when the base's probe cannot be read on the other model: another shape, or
    other tokens."""
    if (base.n_blocks, base.width) != (other.n_blocks, other.width):
        raise UsageError(
            f"{other.subject.name} has {other.n_blocks} blocks of width {other.width}, the base"
            f" {base.subject.name} {base.n_blocks} of width {base.width}: a probe of one cannot be"
            " read on the other. Compare a subject with the base it was made from."
        )
    for one, two in zip(ours, theirs, strict=True):
        if (None if one.talk is None else one.talk.ids) != (
            None if two.talk is None else two.talk.ids
        ):
            raise UsageError(
                f"{other.subject.name} writes the same conversation in other tokens than the base"
                f" {base.subject.name} (another tokenizer or chat template), so their activations"
                " cannot be set side by side. Compare a subject with the base it was made from, or"
                " give both one --chat-template FILE."
            )


# -- the audit
# ---------------------------------------------------------------------------------------------------------


def run(
    config: ProbeConfig,
    options: ProbeOptions,
    *,
    plan: ProbePlan | None = None,
    progress: Callable[[], Progress] | None = None,
) -> tuple[RunFolder, Outcome]:
    """Run what is missing of the audit and reduce it. The same call again resumes.

    Raises UsageError, Refused, Interrupted; cells that fail are in the outcome, with their causes.
    """
    return audit.run(PROBE, config, options, plan=plan, progress=progress)


def reduce(store: RunFolder, *, allow_raw: bool = False) -> None:
    """Reduce the rows of the finished cells into tables, figures and the report. Deterministic, and
    safe on a partial run."""
    PROBE.reduce(store, allow_raw=allow_raw)


def facts(plan: ProbePlan) -> Document:
    """What a reader wants to know besides: versions, the triples, what could not be read."""
    unread = sum(e.talk is None for e in plan.examples)
    cut = sum(e.talk is not None and e.talk.n_cut > 0 for e in plan.examples)
    return {
        **provenance(plan.outlines, dtype=plan.config.dtype),
        "triples": {
            "name": plan.triples.name,
            "n": len(plan.triples.triples),
            "digest": plan.triples.digest,
            "answers_cut": cut,
            **plan.triples.provenance,
        },
        "refused": (
            {"answer that does not fit the token limit, or is empty": unread} if unread else {}
        ),
        "warnings": [],
    }


# -- the construction monitor
# ------------------------------------------------------------------------------------------


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
        "max_tokens": _window(config, outline),
    }
    path = home / "monitor.safetensors"
    with files.disk_errors(home):
        home.mkdir(parents=True, exist_ok=True)
    if _is_there(home, identity):
        return path
    found = examples(triples.triples, outline.chat, identity["max_tokens"])
    _enough(found, config.triples, 2)
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
    kept = [found[i] for i in read]
    labels, groups = np.array([e.label for e in kept]), [e.group for e in kept]
    finite = finite_rows(features)
    fitting = {**config.fitting(), "device": device}
    fitted = fit(
        features,
        labels,
        groups,
        rows=finite,
        **fitting,
        tick=None if tick is None else lambda epoch: tick("fit", epoch, config.epochs),
    )
    others = baselines(
        features,
        answer_texts(kept, outline.chat),
        answer_lengths(kept),
        labels,
        groups,
        fitted,
        **fitting,
    )
    held, scores = fitted.heldout_index, fitted.heldout_logits
    y, by = labels[held], [groups[i] for i in held]
    aurocs = {name: stats.auroc(getattr(others, name)[held], y, by) for name in probe.BASELINES}
    scale = calibrate(fitted, labels) if config.calibrate else None
    if scale is not None:
        scores = scale.slope * scores + scale.offset
    auroc = stats.auroc(scores, y, by)
    raw = stats.Platt(1.0, 0.0)(scores)
    card = {
        "identity": identity,
        "base": {"name": outline.subject.name, "fingerprint": outline.subject.fingerprint},
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
            "train_prompts": len({groups[i] for i in fitted.train_index}),
            "heldout_prompts": len(set(by)),
            "unread": len(found) - len(read),
            "nonfinite": len(read) - len(finite),
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
        "notes": [
            (
                "Figures are of the held-out split, which also chose the epoch, so that the AUROC"
                " is slightly flattered; `auditgap probe` tests on prompts that chose nothing."
            ),
            "Gap and ECE are of the sigmoid of the monitor's own logits, "
            + (
                "calibrated on this same split, which flatters them."
                if scale
                else "which are not calibrated."
            ),
        ],
        "warnings": probe.doubts(auroc, aurocs),
        "versions": provenance((), dtype=config.dtype)["versions"],
    }
    fitted.monitor.about = {key: card[key] for key in ("identity", "base", "best_epoch", "auroc")}
    ledger = LeakageLedger()
    ledger.use("probe-train", {t.prompt for t in triples.triples})
    ledger.save(home / LEDGER)
    fitted.monitor.save(path)
    card["sha256"] = files.sha256(path.read_bytes())
    # last: it says that the monitor is whole
    files.write_bytes(home / "monitor.json", files.to_json(card))
    return path


def _is_there(home: Path, identity: dict[str, Any]) -> bool:
    """Whether the folder holds this very monitor, whole. Raises UsageError when it holds another
    one."""
    card = files.read_json(home / "monitor.json")
    if not isinstance(card, dict):
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
