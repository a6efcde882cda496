"""The whole audit of one model: what it says, what a probe of its base sees inside, what bounded
edits make of it, how fast harmful fine-tuning undoes it; each a run folder of its own, and one
report over all of them.

    audit, options = read_config(None, {"model": "./tuned", "base": "./base", "profile": "smoke", "out": "runs/tuned"})
    outcome = run(audit, options, progress=Progress)
    # runs/tuned/{evaluate,probe,lvs,sft-curve}/ · report.html · report.json · verdicts.csv · figures/ · SHA256SUMS

A profile is a config file with a section a part; what stands above the sections goes to every part
that knows the word, and a section's own word wins. The same command again resumes every part. A
part that fails leaves the others alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from auditgap.audits import bundle
from auditgap.audits.audit import Audit, Can, NothingToMeasure
from auditgap.audits.audit import run as run_audit
from auditgap.audits.table import AUDITS
from auditgap.config import Frozen, build, listed, merged, preset
from auditgap.errors import AuditgapError, Interrupted, Refused, UsageError, did_you_mean
from auditgap.models.provenance import command
from auditgap.report.page import Copies
from auditgap.report.text import short_names
from auditgap.report.verdict_lines import Criteria
from auditgap.store import DiskError, RunFolder, files
from auditgap.store.remote import needs_disk
from auditgap.sweep import Outcome, Progress
from auditgap.types import Document

#: Profiles that are presets of another name.
PROFILES: Mapping[str, str] = {"paper": "paper-v1"}
#: The file that makes a folder a whole audit's.
FILE = "audit.json"


def parts_of_a_whole() -> Mapping[str, Audit[Any, Any, Any]]:
    """The audits that can be a part, by what is typed for them."""
    return {audit.command: audit for audit in AUDITS.values() if Can.PART in audit.can}


class WholeAudit(Frozen):
    """The question. `shared` goes to every part that knows the word; a section is that part's own
    config."""

    model: str = Field(min_length=1)
    base: str | None = None
    profile: str = "standard"
    parts: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(
        default_factory=lambda: tuple(parts_of_a_whole())
    )
    criteria: Criteria = Criteria()
    shared: dict[str, Any] = Field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("parts")
    @classmethod
    def _known_parts(cls, parts: tuple[str, ...]) -> tuple[str, ...]:
        known = parts_of_a_whole()
        for part in parts:
            if part not in known:
                raise UsageError(
                    f"parts takes {', '.join(known)}; {part!r} came.{did_you_mean(part, known)}"
                )
        return parts


class WholeOptions(Frozen):
    """The sitting."""

    name: str | None = None  #: what tables and reports call the model
    out: str | None = None
    allow_raw: bool = False
    public: bool = False  #: a report of aggregates alone besides


@dataclass(frozen=True)
class AuditPart:
    """One part that can run: how its work is described before, and how it is done."""

    name: str
    describe: Callable[[], dict[str, Any]]
    run: Callable[[Callable[[], Progress] | None], tuple[RunFolder, Outcome]]


@dataclass(frozen=True)
class WholePlan:
    """The parts that will run, in order, and why others will not."""

    audit: WholeAudit
    out: Path
    parts: tuple[AuditPart, ...]
    missing: Mapping[str, str]


@dataclass(frozen=True)
class WholeOutcome:
    """Where the report is, what failed by part and cell, and how the verdict table came out in one
    sentence."""

    out: Path
    failed: Mapping[str, str]
    overall: str


# -- reading
# -------------------------------------------------------------------------------------------------------------

#: What the parts get from the audit itself, so that a section cannot ask about another model or
#: write elsewhere.
_OURS = ("models", "model", "base", "subjects", "name", "out", "allow_raw")
#: Words about a run on Ray.
_ON_RAY = {"executor", "workers", "gpus_per_worker", "address"}


def read_config(file: Path | None, flags: Mapping[str, Any]) -> tuple[WholeAudit, WholeOptions]:
    """The profile's values, the file's on top of them, and the flags that were given (not None) on
    top of both.

    What is said for all parts stands over what the profile says for one. Raises UsageError,
    Refused.
    """
    own = _over(merged(file, {}), merged(None, flags))
    name = str(own.get("profile") or usual_profile(own.get("device")))
    values = _over(_profile(name, own), {**own, "profile": name})
    if not values.get("model"):
        raise UsageError(
            "Which model? For example: auditgap audit ./tuned --base ./base --profile smoke"
        )
    if data := values.pop("sft_data", None):
        values["sft-curve"] = {**(values.get("sft-curve") or {}), "data": str(data)}
    sections = {part: dict(values.pop(part, None) or {}) for part in parts_of_a_whole()}
    known = {*WholeAudit.model_fields, *WholeOptions.model_fields} - {"shared", "sections"}
    mine = {key: values.pop(key) for key in list(values) if key in known}
    for key in values:
        _known(key, None)
    for part, section in sections.items():
        for key in section:
            _known(key, part)
    audit, options = build(
        {**mine, "shared": values, "sections": sections}, WholeAudit, WholeOptions
    )
    return audit, options


def usual_profile(device: object = None) -> str:
    """The profile where none is named: standard on a GPU, laptop without one."""
    from auditgap.models import pick_device

    return "laptop" if pick_device(str(device or "auto")) == "cpu" else "standard"


def _profile(name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """A profile's sections, and its criteria if it has some, without what is said anew."""
    found = preset(PROFILES.get(name, name))
    sections = {
        part: {k: v for k, v in (found.get(part) or {}).items() if k not in own}
        for part in parts_of_a_whole()
        if part in found
    }
    return {"parts": tuple(sections), "criteria": found.get("criteria") or {}, **sections}


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, section by section."""
    joined = dict(below)
    for key, value in above.items():
        section = key in parts_of_a_whole() or key == "criteria"
        if section and not isinstance(value, Mapping):
            raise UsageError(
                f"{key} is a section of settings; {str(value)[:60]!r} came. For example: --set"
                " lvs.steps=20"
            )
        joined[key] = {**(joined.get(key) or {}), **value} if section else value
    return joined


def _known(key: str, part: str | None) -> None:
    """Raises UsageError for a word that no part knows (or, in a section, that part), or that is the
    audit's own."""
    audits = parts_of_a_whole()
    words = [
        word
        for name, audit in audits.items()
        if part in (None, name)
        for word in _words(audit)
        if word not in _OURS
    ]
    if key in words:
        return
    where = f"the section {part}" if part else "any part"
    sections = [] if part else [*audits, "criteria"]
    raise UsageError(f"{key!r} is no setting of {where}.{did_you_mean(key, [*words, *sections])}")


def _words(audit: Audit[Any, Any, Any]) -> list[str]:
    """The keys that a part's config and options know."""
    return [*audit.config.model_fields, *audit.options.model_fields]


# -- planning
# ------------------------------------------------------------------------------------------------------------


def plan(audit: WholeAudit, options: WholeOptions) -> WholePlan:
    """Resolve every part before any of it runs. Loads no weights. Raises UsageError and Refused as
    the parts do."""
    needs_disk(options.out, "A whole audit")
    out = folder_of(audit, options).absolute()
    missing: dict[str, str] = {
        name: "the profile leaves it out" for name in parts_of_a_whole() if name not in audit.parts
    }
    parts: list[AuditPart] = []
    for name in audit.parts:
        try:
            parts.append(_part(audit, options, name, str(out / name)))
        except NothingToMeasure as why:
            missing[name] = str(why)
    if not parts:
        raise UsageError(
            f"Nothing is left to run: {'; '.join(f'{k}: {v}' for k, v in missing.items())}."
        )
    return WholePlan(audit, out, tuple(parts), missing)


def folder_of(audit: WholeAudit, options: WholeOptions) -> Path:
    """The audit's folder."""
    return Path(options.out or f"runs/audit-{files.folder_name(audit.model)}")


def _values(audit: WholeAudit, name: str) -> dict[str, Any]:
    """What a part is told: the shared words that it knows (and where it runs, if it can run there),
    under its own."""
    part = parts_of_a_whole()[name]
    known = set(_words(part)) - (set() if Can.RAY in part.can else _ON_RAY)
    return {**{k: v for k, v in audit.shared.items() if k in known}, **audit.sections.get(name, {})}


def _part(whole: WholeAudit, options: WholeOptions, name: str, out: str) -> AuditPart:
    """Raises NothingToMeasure; and UsageError and Refused as the part does."""
    audit, values = parts_of_a_whole()[name], _values(whole, name)
    measured = audit.part(whole.model, whole.base, values)
    ours = {"out": out, "allow_raw": options.allow_raw}
    if options.name:
        ours["name"] = (options.name,)
    asked, sitting = audit.read(None, {**values, **measured, **ours})
    audit.check(sitting)
    made = audit.prepare(asked, sitting)
    return AuditPart(
        name,
        lambda: audit.estimate(made, sitting),
        lambda progress: run_audit(audit, asked, sitting, plan=made, progress=progress),
    )


# -- running
# -------------------------------------------------------------------------------------------------------------


def run(
    audit: WholeAudit,
    options: WholeOptions,
    *,
    planned: WholePlan | None = None,
    progress: Callable[[], Progress] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> WholeOutcome:
    """Run what is missing of every part, and write the report after each, so that it can be read
    while the rest runs.

    `say` is told which part begins. A part that cannot go on (not: an interrupt, a full disk) is
    left to the same command. Raises UsageError, Refused, Interrupted, DiskError.
    """
    whole = plan(audit, options) if planned is None else planned
    _remember(whole, options)
    failed: dict[str, str] = {}
    overall = ""
    for number, part in enumerate(whole.parts, 1):
        say(f"{number} of {len(whole.parts)}: {part.name}")
        try:
            _, outcome = part.run(progress)
        except (UsageError, Refused, DiskError, Interrupted):
            raise
        except AuditgapError as error:
            failed[part.name] = str(error)
        else:
            failed |= {f"{part.name}: {key}": cause for key, cause in outcome.failed.items()}
        overall = report(whole.out, options=options)
    return WholeOutcome(whole.out, failed, overall)


def _remember(whole: WholePlan, options: WholeOptions) -> None:
    """Write the audit's question, so that `report` needs nothing else. Raises UsageError where
    another one's stands."""
    path = whole.out / FILE
    question: Document = {
        "schema": 1,
        "audit": whole.audit.model_dump(mode="json"),
        "missing": dict(whole.missing),
    }
    old = files.read_document(path)
    if name := options.name or (old.get("name") if isinstance(old, dict) else None):
        question["name"] = name
    asked = ("model", "base")
    before = old.get("audit") if isinstance(old, dict) else None
    if old is not None and (
        not isinstance(before, dict) or any(before.get(k) != question["audit"][k] for k in asked)
    ):
        was = before.get("model") if isinstance(before, dict) else "something else"
        raise UsageError(
            f"{whole.out} holds an audit of {was}, with another base maybe; choose another --out"
            " for this one."
        )
    files.make_folder(whole.out)
    files.write_document(path, {**question, "command": command()})


def is_whole(folder: Path) -> bool:
    """Whether the folder is a whole audit's."""
    return (Path(folder) / FILE).is_file()


def report_of(folder: Path) -> Document:
    """What its report.json says. Raises Damaged where it was changed."""
    return files.unseal(Path(folder) / "report.json", required=False)


def stores(folder: Path) -> list[RunFolder]:
    """The run folders of an audit's parts, as far as there are any."""
    there = (Path(folder) / name for name in parts_of_a_whole())
    return [RunFolder.load(path) for path in there if (path / "run.json").is_file()]


def _question(folder: Path) -> Document:
    """The question of an audit's folder. Raises UsageError for another folder."""
    known = files.read_document(folder / FILE)
    if not isinstance(known, dict) or not isinstance(known.get("audit"), dict):
        raise UsageError(
            f"{folder} is no audit's folder (it has no {FILE}). Give the --out of an `auditgap"
            " audit`."
        )
    return {"missing": {}, **known}


def not_begun(folder: Path) -> list[str]:
    """The parts of an audit's folder that were planned and have no run folder yet. Raises
    UsageError for a folder that is no audit's."""
    known = _question(folder)
    begun = {store.path.name for store in stores(folder)}
    return [p for p in known["audit"]["parts"] if p not in {*begun, *known["missing"]}]


def described(folder: Path) -> tuple[str, Criteria, dict[str, str]]:
    """The title of an audit's folder, its criteria, and why parts are missing. Raises UsageError
    for a folder that is no audit's."""
    known = _question(folder)
    (audit,) = build(known["audit"], WholeAudit)
    missing = {**known["missing"], **dict.fromkeys(not_begun(folder), "it has not begun")}
    (name,) = short_names([str(known.get("name") or audit.model)]).values()
    return f"Safety audit of {name}", audit.criteria, missing


def report(
    folder: Path,
    *,
    options: WholeOptions = WholeOptions(),
    out: Path | None = None,
    copies: Copies = Copies(),
) -> str:
    """Write the report of an audit's folder (into `out`; None: into itself) from what its parts
    have so far; the sum of its verdicts in one sentence. Raises UsageError for a folder that is no
    audit's."""
    title, criteria, missing = described(Path(folder))
    return bundle.write(
        stores(Path(folder)),
        out=out or Path(folder),
        criteria=criteria,
        missing=missing,
        title=title,
        allow_raw=options.allow_raw,
        public=options.public,
        copies=copies,
    )
