"""Which models are compared: run folders to parts and models, with their names and sites.

    parts = parts_of([RunFolder.load("runs/base"), RunFolder.load("runs/twin")], AUDITS)
    names = names_of(parts, {"base": "runs/base"})
    models_of(parts, names, base=None)[0]      # Model(name="base", fingerprint="1092…", n_blocks=30, …)

Two runs speak of the same model when its fingerprint says so, whatever they call it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from auditgap.errors import UsageError, did_you_mean
from auditgap.report.correction import cards_in
from auditgap.store import RunFolder
from auditgap.types import Document, digest, in_mode, parted

#: Settings under names that a reader knows.
_WORDS = {
    "prompt_set": "prompts",
    "prompt_sets": "prompts",
    "triple_set": "triples",
    "scorers": "scorer",
}
ROLES = ("embedding", "mid", "last")


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
    """One model, in one way of thinking, as the comparison names it. Two runs speak of the same one
    when fingerprint, behind which the way stands, says so."""

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


# -- sites
# -------------------------------------------------------------------------------------------------


def site_of(model: Model, role: str) -> int | None:
    """The layer index of `embedding`, `mid` or `last`; None where the number of blocks was not
    recorded."""
    if role == "embedding":
        return -1
    if not model.n_blocks:
        return None
    return (
        min(model.n_blocks - 1, round(model.n_blocks / 2)) if role == "mid" else model.n_blocks - 1
    )


def roles_of(model: Model) -> dict[int, str]:
    """Layer index -> role; a model of one or two blocks keeps the first of the roles that fall
    together."""
    found: dict[int, str] = {}
    for role in ROLES:
        layer = site_of(model, role)
        if layer is not None:
            found.setdefault(layer, role)
    return found


def partner(model: Model, base: Model, layer: int) -> int | None:
    """The base's layer that a model's layer is compared with: the same in models of one depth, else
    that of the same role."""
    if model.n_blocks == base.n_blocks:
        return layer
    role = roles_of(model).get(layer)
    return None if role is None else site_of(base, role)


def depth_of(model: Model, layer: int) -> float | None:
    """Where a site stands between the embedding (0) and the last block (1)."""
    return None if not model.n_blocks else (layer + 1) / model.n_blocks


# -- parts and names
# -------------------------------------------------------------------------------------------------


def parts_of(folders: Sequence[RunFolder], settings: Mapping[str, Sequence[str]]) -> list[Part]:
    """The folders, each once; `settings`: those that must agree, by the name of an audit that can
    be compared. Raises UsageError for a folder of something else."""
    unique = {folder.path.resolve(): folder for folder in folders}
    if not unique:
        raise UsageError(
            "Compare which runs? Give their folders, for example: auditgap compare runs/base"
            " runs/twin"
        )
    short = {path: path.name for path in unique}
    parts = []
    for path, folder in unique.items():
        config, info = folder.run["config"], folder.info
        audit = config.get("audit")
        if audit not in settings:
            what = f"an audit of the kind {audit!r}" if audit else "a training run"
            raise UsageError(
                f"{path} is the folder of {what}; compare takes folders of {', '.join(settings)}"
                " audits."
            )
        listed = info.get("subjects") or ()
        about = {
            _who(str(s.get("name")), str(s.get("fingerprint"))): s
            for s in listed
            if isinstance(s, Mapping)
        }
        label = short[path] if list(short.values()).count(short[path]) == 1 else str(path)
        parts.append(
            Part(
                folder,
                label,
                audit,
                {folder.shown(name): _who(name, fp) for name, fp in _subjects(config).items()},
                about,
                _settings(config, info, settings[audit]),
            )
        )
    return parts


def _who(name: str, fingerprint: str) -> str:
    """A subject's fingerprint; of one that is asked to think in some way, with the way behind it:
    one model in two ways is two sides of a comparison."""
    return in_mode(fingerprint, parted(name)[1])


def _subjects(config: Mapping[str, Any]) -> Mapping[str, str]:
    """The fingerprints of the models that a run is of, by the names that it has for them."""
    # a config that names its models `subjects` has their fingerprints beside them
    if found := config.get("subject_fingerprints") or config.get("subjects"):
        return found
    # one that fine-tunes a single model has that one's
    name, fingerprint = config.get("model"), config.get("base_fingerprint")
    return {str(name): str(fingerprint)} if name and fingerprint else {}


def _settings(
    config: Mapping[str, Any], info: Mapping[str, Any], keys: Sequence[str]
) -> dict[str, Any]:
    """What must agree, by its dotted name; a judge's cards by what they found."""
    found: Document = {}
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


def names_of(parts: Sequence[Part], named: Mapping[str, str]) -> dict[str, str]:
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


def models_of(parts: Sequence[Part], names: Mapping[str, str]) -> list[Model]:
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


def base_of(models: Sequence[Model], parts: Sequence[Part], asked: str | None) -> Model:
    """The model that the others are compared with: as asked, by name or fingerprint, else the one
    named base, else the runs' own base, else the first."""
    by_name = {m.name: m for m in models}
    if asked is not None:
        known = {m.fingerprint: m for m in models} | by_name
        if asked not in known:
            raise UsageError(
                f"--base {asked}: no such model.{did_you_mean(asked, by_name)} There is"
                f" {', '.join(by_name)}."
            )
        return known[asked]
    own = {p.subjects.get(str(p.folder.run["config"].get("base"))) for p in parts} - {None}
    fallback = next((m for m in models if len(own) == 1 and m.fingerprint in own), models[0])
    return by_name.get("base", fallback)
