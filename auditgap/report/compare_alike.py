"""Who is compared, and whether that is fair: run folders to models, and every setting in which
their runs differ.

    side = sides([RunFolder.load("runs/base"), RunFolder.load("runs/twin")], named={"base": "runs/base"})
    # (Model(name="base", fingerprint="1092…", n_blocks=30, …), Model(name="./twin", …))
    side.models

Numbers of two runs can be set against each other only where the same question was asked: the same
tokenizer and chat template, prompts, unit, attack, judge, reward, length and dtype. What differs is
refused field by field, or left out and said.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from auditgap.errors import UsageError, did_you_mean
from auditgap.report.correction import cards_in
from auditgap.store import RunFolder
from auditgap.store.tables import groups_of
from auditgap.types import CLEAN, digest

#: Audits that can be compared -> settings of their config that must agree.
AUDITS: Mapping[str, tuple[str, ...]] = {
    "latent": (
        "unit",
        "dtype",
        "prompt_set",
        "target",
        "steps",
        "restarts",
        "schedule",
        "iterate",
        "max_new_tokens",
        "untargeted_tokens",
        "scorers",
    ),
    "behaviour": ("dtype", "prompt_set", "prompt_sets", "max_new_tokens", "scorers"),
    "probe": (
        "dtype",
        "triple_set",
        "max_tokens",
        "epochs",
        "batch",
        "lr",
        "weight_decay",
        "heldout",
        "evaluate",
        "standardise",
        "features",
        "seed",
    ),
    "sft_curve": (
        "dtype",
        "prompt_sets",
        "max_new_tokens",
        "scorers",
        "training",
        "method",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_targets",
        "lr",
        "weight_decay",
        "warmup",
        "batch",
        "max_tokens",
        "steps",
        "eval_every",
        "refusal_filter",
    ),
}
#: Settings of a subject rather than of a run; they must agree between all runs, whatever was
#: audited.
OF_SUBJECT = ("tokenizer", "chat_template")
_WORDS = {
    "prompt_set": "prompts",
    "prompt_sets": "prompts",
    "triple_set": "triples",
    "scorers": "scorer",
    "training": "training",
    "chat_template": "chat template",
}


@dataclass(frozen=True, eq=False)
class Part:
    """One run folder: what it audited, and which subjects (fingerprint by the name that its rows
    have)."""

    folder: RunFolder
    label: str
    audit: str
    subjects: Mapping[str, str]
    about: Mapping[str, Mapping[str, Any]]  #: what it recorded of each subject, by fingerprint
    settings: Mapping[str, Any]  #: flat


@dataclass(frozen=True, slots=True)
class Model:
    """One model as the comparison names it. Two runs speak of the same model when fingerprint says
    so."""

    name: str
    fingerprint: str
    n_blocks: int | None
    folders: tuple[str, ...]
    tokenizer: str | None = None
    chat_template: str | None = None


@dataclass(frozen=True, eq=False)
class Sides:
    """What is compared with what: the parts that are comparable, their models (the base first), and
    what was left out."""

    parts: tuple[Part, ...]
    models: tuple[Model, ...]
    agreed: Mapping[str, Any]  #: settings by `audit: field`
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    #: (part's label, fingerprint) not to be read
    skipped: frozenset[tuple[str, str]] = field(default_factory=frozenset)

    @property
    def base(self) -> Model:
        return self.models[0]

    def named(self, part: Part) -> dict[str, str]:
        """A part's own names of subjects -> the comparison's; those that were left out are not
        there."""
        names = {m.fingerprint: m.name for m in self.models}
        return {
            own: names[fp]
            for own, fp in part.subjects.items()
            if (part.label, fp) not in self.skipped and fp in names
        }


def sides(
    folders: Sequence[RunFolder],
    *,
    named: Mapping[str, str] | None = None,
    base: str | None = None,
    only_compatible: bool = False,
) -> Sides:
    """Models and runs of these folders. `named`: a name of your own -> a folder with one subject,
    or a subject's name.

    Raises UsageError: no audit's folder, an unknown name or base, runs that asked different
    questions (unless `only_compatible`, which leaves out what differs from the base's run and says
    so).
    """
    parts = _parts(folders)
    names = _names(parts, named or {})
    models = _models(parts, names)
    first = _base(models, parts, base)
    models = sorted(models, key=lambda m: m is not first)
    skipped, left_out = _compatible(parts, first, names, only_compatible)
    kept = [p for p in parts if any((p.label, fp) not in skipped for fp in p.subjects.values())]
    there = {fp for p in kept for fp in p.subjects.values() if (p.label, fp) not in skipped}
    agreed = {f"{p.audit}: {name}": value for p in kept for name, value in p.settings.items()}
    warnings = [*_doubled(folders), *_unknown(kept, names, skipped)]
    compared = tuple(m for m in models if m.fingerprint in there)
    return Sides(
        tuple(kept), compared, agreed, tuple(left_out), tuple(warnings), frozenset(skipped)
    )


# -- parts and names
# -----------------------------------------------------------------------------------------------------


def _parts(folders: Sequence[RunFolder]) -> list[Part]:
    unique = {folder.path.resolve(): folder for folder in folders}
    if not unique:
        raise UsageError(
            "Compare which runs? Give their folders, for example: auditgap compare runs/base"
            " runs/twin"
        )
    short = {path: path.name for path in unique}
    parts = []
    for path, folder in unique.items():
        config, info = folder.run["config"], folder.run.get("info", {})
        audit = config.get("audit")
        if audit not in AUDITS:
            what = f"an audit of the kind {audit!r}" if audit else "a training run"
            raise UsageError(
                f"{path} is the folder of {what}; compare takes folders of {', '.join(AUDITS)}"
                " audits."
            )
        subjects = (
            config.get("subject_fingerprints") if audit == "probe" else config.get("subjects")
        )
        listed = info.get("subjects") or ()
        about = {str(s.get("fingerprint")): s for s in listed if isinstance(s, Mapping)}
        label = short[path] if list(short.values()).count(short[path]) == 1 else str(path)
        parts.append(
            Part(
                folder,
                label,
                audit,
                dict(subjects or {}),
                about,
                _settings(config, info, AUDITS[audit]),
            )
        )
    return parts


def _settings(
    config: Mapping[str, Any], info: Mapping[str, Any], keys: Sequence[str]
) -> dict[str, Any]:
    """What must agree, by its dotted name; a judge's cards by what they found."""
    found: dict[str, Any] = {}
    for key in keys:
        if key in config:
            found |= _flat(config[key], _WORDS.get(key, key))
    for card in cards_in(info):
        what = {
            k: card.get(k)
            for k in ("identity", "gold_digest", "n", "n_unscored", "errors", "kappa")
        }
        found[f"card of {card.get('name')} on {card.get('gold_set')} ({card.get('task')})"] = (
            digest(what, 12)
        )
    return found


def _flat(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}").items()}


def _names(parts: Sequence[Part], named: Mapping[str, str]) -> dict[str, str]:
    """fingerprint -> name: given, else as the first run called it; names that two models share get
    their fingerprint."""
    found: dict[str, str] = {}
    for name, target in named.items():
        fingerprint = _target(parts, name, target)
        if fingerprint in found:
            raise UsageError(
                f"--as {name} and --as {found[fingerprint]} name the same weights; a model has one"
                " name here."
            )
        found[fingerprint] = name
    for part in parts:
        for own, fingerprint in part.subjects.items():
            found.setdefault(fingerprint, own)
    shared = {name for name in found.values() if list(found.values()).count(name) > 1}
    return {fp: f"{name} ({fp[:6]})" if name in shared else name for fp, name in found.items()}


def _target(parts: Sequence[Part], name: str, target: str) -> str:
    for part in parts:
        if target in part.subjects:
            return part.subjects[target]
    place = Path(target).resolve()
    mine = [
        p
        for p in parts
        if target == str(p.folder.place)
        or place in (p.folder.path.resolve(), p.folder.path.resolve().parent)
    ]
    if mine:  # a whole audit's folder holds several runs; its probe has the base beside the subject
        fewest = min(mine, key=lambda p: len(p.subjects))
        if len(fewest.subjects) == 1:
            return next(iter(fewest.subjects.values()))
        several = ", ".join(fewest.subjects)
        raise UsageError(
            f"--as {name}: {target} holds several subjects; name one of them instead: {several}"
        )
    known = [own for part in parts for own in part.subjects]
    raise UsageError(
        f"--as {name}={target}: neither one of the folders nor a subject in"
        f" them.{did_you_mean(target, known)} Subjects: {', '.join(dict.fromkeys(known))}."
    )


def _models(parts: Sequence[Part], names: Mapping[str, str]) -> list[Model]:
    models = []
    for fingerprint, name in names.items():
        mine = [p for p in parts if fingerprint in p.subjects.values()]
        told = [p.about.get(fingerprint, {}) for p in mine]

        def first(key: str, told: Sequence[Mapping[str, Any]] = told) -> Any:
            return next((t[key] for t in told if t.get(key) is not None), None)

        models.append(
            Model(
                name,
                fingerprint,
                first("n_blocks"),
                tuple(p.label for p in mine),
                first("tokenizer"),
                first("chat_template"),
            )
        )
    return models


def _base(models: Sequence[Model], parts: Sequence[Part], asked: str | None) -> Model:
    """The model that the others are compared with: as asked, else the one named base, else the
    runs' own base, else the first."""
    by_name = {m.name: m for m in models}
    if asked is not None:
        if asked not in by_name:
            raise UsageError(
                f"--base {asked}: no such model.{did_you_mean(asked, by_name)} There is"
                f" {', '.join(by_name)}."
            )
        return by_name[asked]
    own = {p.subjects.get(str(p.folder.run["config"].get("base"))) for p in parts} - {None}
    fallback = next((m for m in models if len(own) == 1 and m.fingerprint in own), models[0])
    return by_name.get("base", fallback)


# -- what differs
# --------------------------------------------------------------------------------------------------------


def _compatible(
    parts: Sequence[Part], base: Model, names: Mapping[str, str], only_compatible: bool
) -> tuple[set[tuple[str, str]], list[str]]:
    """(part, subject) pairs to leave out, each with its sentence; raises UsageError when there are
    any and none may be."""
    differences = [*_by_subject(parts, base, names), *_by_audit(parts, base, names)]
    if differences and not only_compatible:
        lines = "\n".join(f"  {d.says}" for d in differences)
        raise UsageError(
            "These runs asked different questions, so their numbers cannot be"
            f" compared:\n{lines}\nAudit the models alike, or leave out what differs from"
            f" {base.name} with --only-compatible."
        )
    sentences: dict[tuple[str, ...], list[str]] = {}
    for d in differences:
        sentences.setdefault((d.label, *d.who), []).append(d.says)
    left_out = [
        f"{', '.join(names[fp] for fp in who)} in {label} is left out: {'; '.join(said)}."
        for (label, *who), said in sentences.items()
    ]
    return {(d.label, fp) for d in differences for fp in d.who}, left_out


@dataclass(frozen=True, slots=True)
class _Difference:
    """One setting of one part that is not as in the reference; `who`: the fingerprints that it
    concerns."""

    label: str
    who: tuple[str, ...]
    says: str


def _by_subject(
    parts: Sequence[Part], base: Model, names: Mapping[str, str]
) -> Iterator[_Difference]:
    """Tokenizers and chat templates that are not the base's."""
    for key in OF_SUBJECT:
        wanted = getattr(base, key)
        for part in parts:
            for fingerprint, told in part.about.items():
                came = told.get(key)
                if (
                    fingerprint in names
                    and wanted is not None
                    and came is not None
                    and came != wanted
                ):
                    what = _WORDS.get(key, key)
                    says = (
                        f"{what}: {_shown(wanted)} of {base.name}, {_shown(came)} of"
                        f" {names[fingerprint]} in {part.label}"
                    )
                    yield _Difference(part.label, (fingerprint,), says)
    yield from _by_length(parts, base, names)


def _by_length(
    parts: Sequence[Part], base: Model, names: Mapping[str, str]
) -> Iterator[_Difference]:
    """Older runs do not record their tokenizer, but the same prompt in another number of tokens
    gives it away."""
    lengths: dict[str, dict[str, int]] = {}
    where: dict[str, Part] = {}
    for part in (p for p in parts if p.audit == "latent"):
        if all(part.about.get(fp, {}).get("tokenizer") for fp in part.subjects.values()):
            continue
        rows = part.folder.rows([CLEAN])
        for (own,), some in groups_of(rows, ["subject"], sort=True):
            if own in part.subjects:
                fingerprint = part.subjects[own]
                lengths.setdefault(
                    fingerprint, dict(zip(some["prompt_id"], some["n_prompt_tokens"], strict=True))
                )
                where.setdefault(fingerprint, part)
    ours = lengths.get(base.fingerprint, {})
    for fingerprint, theirs in lengths.items():
        other = sum(ours[p] != n for p, n in theirs.items() if p in ours)
        if other:
            says = (
                f"tokenizer or chat template (not recorded): {other} prompts have another number of"
                f" tokens in {names[fingerprint]} than in {base.name}"
            )
            yield _Difference(where[fingerprint].label, (fingerprint,), says)


def _by_audit(
    parts: Sequence[Part], base: Model, names: Mapping[str, str]
) -> Iterator[_Difference]:
    """Settings of a run that are not those of the base's run of that audit (or of the first, where
    the base has none)."""
    for audit in AUDITS:
        mine = [p for p in parts if p.audit == audit]
        mine.sort(key=lambda p: base.fingerprint not in p.subjects.values())
        for part in mine[1:]:
            reference = mine[0]
            for name in [n for n in reference.settings if n in part.settings]:
                wanted, came = reference.settings[name], part.settings[name]
                if wanted != came:
                    says = (
                        f"{audit}, {name}: {_shown(wanted)} in {reference.label}, {_shown(came)} in"
                        f" {part.label}"
                    )
                    yield _Difference(
                        part.label, tuple(dict.fromkeys(part.subjects.values())), says
                    )


def _doubled(folders: Sequence[RunFolder]) -> list[str]:
    times = Counter(folder.path.resolve() for folder in folders)
    return [
        f"{path.name} was given {n} times and is read once." for path, n in times.items() if n > 1
    ]


def _unknown(
    parts: Sequence[Part], names: Mapping[str, str], skipped: set[tuple[str, str]]
) -> list[str]:
    """What could not be held against each other because a run does not record it."""
    if len({fp for p in parts for fp in p.subjects.values()}) < 2:
        return []
    said = []
    for key in OF_SUBJECT:
        silent = dict.fromkeys(
            names[fp]
            for p in parts
            for fp in p.subjects.values()
            if (p.label, fp) not in skipped and p.about.get(fp, {}).get(key) is None
        )
        if silent:
            what = _WORDS.get(key, key)
            said.append(
                f"Whether the {what} is the same could not be told: not recorded for"
                f" {', '.join(silent)}."
            )
    for audit in AUDITS:
        mine = [p for p in parts if p.audit == audit]
        known = dict.fromkeys(
            name for p in mine for name in p.settings if not name.startswith("card of")
        )
        for part in mine:
            missing = [name for name in known if name not in part.settings]
            if missing:
                said.append(
                    f"{part.label} does not record {', '.join(missing)}, so whether it agrees could"
                    " not be told."
                )
    return said


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:59] + "…"
