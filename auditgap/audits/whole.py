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
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from auditgap import models
from auditgap.audits import behaviour, latent, probe
from auditgap.audits.sft_curve import prepare as curve_prepare
from auditgap.audits.sft_curve import train as curve
from auditgap.audits.sft_curve.config import SFTCurveConfig, SFTCurveOptions, checked
from auditgap.config import Frozen, build, listed, merged, preset
from auditgap.errors import AuditgapError, Interrupted, Refused, UsageError, did_you_mean
from auditgap.models.provenance import command
from auditgap.report import bundle
from auditgap.report.verdicts import Criteria
from auditgap.store import DiskError, RunFolder, files
from auditgap.store.remote import needs_disk
from auditgap.sweep import Outcome, Progress
from auditgap.training import sft

PartName = Literal["evaluate", "probe", "lvs", "sft-curve"]
#: Profiles that are presets of another name.
PROFILES: Mapping[str, str] = {"paper": "paper-v1"}
#: The file that makes a folder a whole audit's.
FILE = "audit.json"


class WholeAudit(Frozen):
    """The question. `shared` goes to every part that knows the word; a section is that part's own
    config."""

    model: str = Field(min_length=1)
    base: str | None = None
    profile: str = "standard"
    parts: Annotated[tuple[PartName, ...], BeforeValidator(listed)] = (
        "evaluate",
        "probe",
        "lvs",
        "sft-curve",
    )
    criteria: Criteria = Criteria()
    shared: dict[str, Any] = Field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = Field(default_factory=dict)


class WholeOptions(Frozen):
    """The sitting."""

    out: str | None = None
    allow_raw: bool = False
    public: bool = False  #: a report of aggregates alone besides


@dataclass(frozen=True)
class AuditPart:
    """One part that can run: how its work is described before, and how it is done."""

    name: PartName
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

_PARTS: Mapping[PartName, tuple[type[Frozen], ...]] = {
    "evaluate": (behaviour.BehaviourConfig, behaviour.BehaviourOptions),
    "probe": (probe.ProbeConfig, probe.ProbeOptions),
    "lvs": (latent.LatentConfig, latent.RunOptions),
    "sft-curve": (SFTCurveConfig, SFTCurveOptions),
}
#: What the parts get from the audit itself, so that a section cannot ask about another model or
#: write elsewhere.
_OURS = ("models", "model", "base", "subjects", "out", "allow_raw")


def read_config(file: Path | None, flags: Mapping[str, Any]) -> tuple[WholeAudit, WholeOptions]:
    """The profile's values, the file's on top of them, and the flags that were given (not None) on
    top of both.

    What is said for all parts stands over what the profile says for one. Raises UsageError,
    Refused.
    """
    own = _over(merged(file, {}), merged(None, flags))
    values = _over(
        _profile(str(own.get("profile", WholeAudit.model_fields["profile"].default)), own), own
    )
    if not values.get("model"):
        raise UsageError(
            "Which model? For example: auditgap audit ./tuned --base ./base --profile smoke"
        )
    sections = {part: dict(values.pop(part, None) or {}) for part in _PARTS}
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


def _profile(name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """A profile's sections, and its criteria if it has some, without what is said anew."""
    found = preset(PROFILES.get(name, name))
    sections = {
        part: {k: v for k, v in (found.get(part) or {}).items() if k not in own}
        for part in _PARTS
        if part in found
    }
    return {"parts": tuple(sections), "criteria": found.get("criteria") or {}, **sections}


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, section by section."""
    joined = dict(below)
    for key, value in above.items():
        section = key in _PARTS or key == "criteria"
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
    parts = [p for p in _PARTS if part is None or part == p]
    words = [
        word
        for p, kinds in _PARTS.items()
        if p in parts
        for kind in kinds
        for word in kind.model_fields
        if word not in _OURS
    ]
    words += curve.SITTING if "sft-curve" in parts else []
    if key in words:
        return
    where = f"the section {part}" if part else "any part"
    sections = [] if part else [*_PARTS, "criteria"]
    raise UsageError(f"{key!r} is no setting of {where}.{did_you_mean(key, [*words, *sections])}")


# -- planning
# ------------------------------------------------------------------------------------------------------------


def plan(audit: WholeAudit, options: WholeOptions) -> WholePlan:
    """Resolve every part before any of it runs. Loads no weights. Raises UsageError and Refused as
    the parts do."""
    needs_disk(options.out, "A whole audit")
    out = Path(options.out or f"runs/audit-{files.folder_name(audit.model)}").absolute()
    missing: dict[str, str] = {
        name: "the profile leaves it out" for name in _PARTS if name not in audit.parts
    }
    parts: list[AuditPart] = []
    for name in audit.parts:
        if name in ("probe", "sft-curve") and audit.base is None:
            missing[name] = "no base was named; add --base"
        elif name == "sft-curve" and not _values(audit, name).get("data"):
            missing[name] = (
                "no training rows were named; add --sft-data FILE (columns prompt and response)"
            )
        elif name == "probe" and not _values(audit, name).get("triples"):
            missing[name] = (
                "no contrast triples were named; add --triples FILE (prompt, safe answer, unsafe"
                " answer)"
            )
        else:
            parts.append(_MAKE[name](audit, options, str(out / name)))
    if not parts:
        raise UsageError(
            f"Nothing is left to run: {'; '.join(f'{k}: {v}' for k, v in missing.items())}."
        )
    return WholePlan(audit, out, tuple(parts), missing)


def _values(audit: WholeAudit, part: PartName) -> dict[str, Any]:
    """What a part is told: the shared words that it knows, under its own."""
    known = {word for kind in _PARTS[part] for word in kind.model_fields} | set(
        curve.SITTING if part == "sft-curve" else ()
    )
    return {**{k: v for k, v in audit.shared.items() if k in known}, **audit.sections.get(part, {})}


def _behaviour(audit: WholeAudit, options: WholeOptions, out: str) -> AuditPart:
    flags = {
        **_values(audit, "evaluate"),
        "models": (audit.model,),
        "out": out,
        "allow_raw": options.allow_raw,
    }
    asked, sitting = behaviour.read_config(None, flags)
    asked, made = behaviour.prepare(asked, sitting)
    told = {"prompts": len(made.suite), "judge": asked.judge, "cells": len(made.cells)}
    return AuditPart(
        "evaluate",
        lambda: told,
        lambda progress: behaviour.run(asked, sitting, plan=made, progress=progress),
    )


def _latent(audit: WholeAudit, options: WholeOptions, out: str) -> AuditPart:
    flags = {
        **_values(audit, "lvs"),
        "models": (audit.model,),
        "out": out,
        "allow_raw": options.allow_raw,
    }
    asked, sitting = latent.read_config(None, flags)
    asked, made = latent.prepare(asked, sitting)

    def describe() -> dict[str, Any]:
        expected = latent.estimate(made, models.pick_device(sitting.device), sitting)
        return {
            "prompts": len(made.prompts.prompts),
            "cells": len(made.cells),
            "seconds": expected.seconds,
        }

    return AuditPart(
        "lvs", describe, lambda progress: latent.run(asked, sitting, plan=made, progress=progress)
    )


def _probe(audit: WholeAudit, options: WholeOptions, out: str) -> AuditPart:
    flags = {
        **_values(audit, "probe"),
        "base": audit.base,
        "subjects": (audit.model,),
        "out": out,
        "allow_raw": options.allow_raw,
    }
    asked, sitting = probe.read_config(None, flags)
    asked, made = probe.prepare(asked, sitting)
    told = {"prompts": len({e.group for e in made.examples}), "cells": len(made.cells)}
    return AuditPart(
        "probe",
        lambda: told,
        lambda progress: probe.run(asked, sitting, plan=made, progress=progress),
    )


def _sft_curve(audit: WholeAudit, options: WholeOptions, out: str) -> AuditPart:
    flags = {
        **_values(audit, "sft-curve"),
        "models": (audit.base, audit.model),
        "out": out,
        "allow_raw": options.allow_raw,
    }
    asked, sitting = checked(
        *build(
            {k: v for k, v in flags.items() if k not in curve.SITTING},
            SFTCurveConfig,
            SFTCurveOptions,
        )
    )
    curve_prepare(asked, sitting)
    # a bad file is said now, not in hours
    sft.chosen_rows(asked.data, limit=asked.rows_limit, refusal_filter=asked.refusal_filter)
    told = {"cells": len(asked.models) * len(asked.seeds), "steps": asked.steps}

    def run(progress: Callable[[], Progress] | None) -> tuple[RunFolder, Outcome]:
        store, outcome = curve.run_from(None, flags, progress=progress)
        if store is None:
            raise AuditgapError(
                "A whole audit is one process; start launchers/harmful_sft.py for several ranks."
            )
        return store, outcome

    return AuditPart("sft-curve", lambda: told, run)


_MAKE: Mapping[PartName, Callable[[WholeAudit, WholeOptions, str], AuditPart]] = {
    "evaluate": _behaviour,
    "probe": _probe,
    "lvs": _latent,
    "sft-curve": _sft_curve,
}


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
    question = {
        "schema": 1,
        "audit": whole.audit.model_dump(mode="json"),
        "missing": dict(whole.missing),
    }
    old = files.read_json(path)
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
    with files.disk_errors(whole.out):
        whole.out.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, files.to_json({**question, "command": command()}))


def is_whole(folder: Path) -> bool:
    """Whether the folder is a whole audit's."""
    return (Path(folder) / FILE).is_file()


def stores(folder: Path) -> list[RunFolder]:
    """The run folders of an audit's parts, as far as there are any."""
    there = (Path(folder) / name for name in _PARTS)
    return [RunFolder.load(path) for path in there if (path / "run.json").is_file()]


def report(folder: Path, *, options: WholeOptions = WholeOptions(), out: Path | None = None) -> str:
    """Write the report of an audit's folder (into `out`; None: into itself) from what its parts
    have so far; the sum of its verdicts in one sentence. Raises UsageError for a folder that is no
    audit's."""
    folder = Path(folder)
    known = files.read_json(folder / FILE)
    if not isinstance(known, dict) or not isinstance(known.get("audit"), dict):
        raise UsageError(
            f"{folder} is no audit's folder (it has no {FILE}). Give the --out of an `auditgap"
            " audit`."
        )
    (audit,) = build(known["audit"], WholeAudit)
    found = stores(folder)
    begun = {store.path.name for store in found}
    missing = {
        **known.get("missing", {}),
        **{p: "it has not begun" for p in audit.parts if p not in {*begun, *known["missing"]}},
    }
    return bundle.write(
        found,
        out=out or folder,
        criteria=audit.criteria,
        missing=missing,
        title=f"Safety audit of {audit.model}",
        allow_raw=options.allow_raw,
        public=options.public,
    )
