"""Several models side by side: from run folders to one table of values, differences, and reasons
where there is no number.

    found = compare(folders, audits, named={"base": "runs/base"})
    # a row a (model, site, budget): value, difference from the base, Holm's p
    found.table[found.table["measure"] == "lvs"]
    found.sides.left_out                             # what was not comparable, a sentence each

`audits` says what of each audit is compared (`Comparable`); `audits.comparing` hands in all that
can be. Folders of any mix of them; those of one model (by fingerprint) are read together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from auditgap.report import compare_alike, compare_models
from auditgap.report.compare_measures import Measure, Reading, table
from auditgap.report.compare_models import Part, Sides
from auditgap.store import RunFolder


@dataclass(frozen=True, kw_only=True)
class Comparable:
    """What of an audit is compared between models, and when that is fair."""

    attacks: tuple[str, ...]  #: of the cells whose rows are read
    identity: tuple[str, ...]  #: columns by which two rows are the same answer to the same question
    settings: tuple[str, ...]  #: of the config, which must agree between runs
    measures: tuple[Measure, ...]
    #: from rows whose `subject` is a model's name in `Sides`, and a seed
    readings: Callable[[pd.DataFrame, Sides, int], Iterable[Reading]]
    method: str = ""  #: how its differences are estimated, a sentence
    profiles: tuple[str, ...] = ()  #: measures that are drawn by depth
    #: a run's rows by the names that it has for its models, where a row's own `subject` is something
    #: made of one
    of_model: Callable[[pd.DataFrame, Part], pd.DataFrame] | None = None


@dataclass(frozen=True, eq=False)
class Comparison:
    """Who was compared (`sides`), by which measures, the numbers (`compare_measures.COLUMNS`), and
    what a reader must know of them."""

    sides: Sides
    audits: Mapping[str, Comparable]
    table: pd.DataFrame
    notes: tuple[str, ...]

    @property
    def measures(self) -> list[Measure]:
        return [measure for audit in self.audits.values() for measure in audit.measures]


def compare(
    folders: Sequence[RunFolder],
    audits: Mapping[str, Comparable],
    *,
    named: Mapping[str, str] | None = None,
    base: str | None = None,
    only_compatible: bool = False,
    seed: int = 0,
) -> Comparison:
    """Read the folders and compare every model with the base (see `sides` for names, base and
    refusals)."""
    # those with a profile by depth are what the page begins with
    audits = dict(sorted(audits.items(), key=lambda one: not one[1].profiles))
    found = sides(
        folders,
        {name: audit.settings for name, audit in audits.items()},
        named=named,
        base=base,
        only_compatible=only_compatible,
    )
    readings: dict[str, list[Reading]] = {}
    notes: list[str] = []
    for name, audit in audits.items():
        rows, said = _rows(found, name, audit)
        notes += said
        readings[name] = list(audit.readings(rows, found, seed)) if len(rows) else []
    measures = [measure for audit in audits.values() for measure in audit.measures]
    return Comparison(found, audits, table(readings, measures, found.models), tuple(notes))


def sides(
    folders: Sequence[RunFolder],
    settings: Mapping[str, Sequence[str]],
    *,
    named: Mapping[str, str] | None = None,
    base: str | None = None,
    only_compatible: bool = False,
) -> Sides:
    """Models and runs of these folders. `settings`: those that must agree, by audit; `named`: a
    name of your own -> a folder with one subject, or a subject's name.

    Raises UsageError: no audit's folder, an unknown name or base, runs that asked different
    questions (unless `only_compatible`, which leaves out what differs from the base's run and says
    so).
    """
    parts = compare_models.parts_of(folders, settings)
    names = compare_models.names_of(parts, named or {})
    models = compare_models.models_of(parts, names)
    first = compare_models.base_of(models, parts, base)
    models.sort(key=lambda m: m is not first)
    skipped, left_out = compare_alike.compatible(parts, first, names, only_compatible)
    kept = [p for p in parts if any((p.label, fp) not in skipped for fp in p.subjects.values())]
    there = {fp for p in kept for fp in p.subjects.values() if (p.label, fp) not in skipped}
    times = Counter(folder.path.resolve() for folder in folders)
    doubled = [
        f"{path.name} was given {n} times and is read once." for path, n in times.items() if n > 1
    ]
    return Sides(
        parts=tuple(kept),
        models=tuple(m for m in models if m.fingerprint in there),
        agreed={f"{p.audit}: {name}": value for p in kept for name, value in p.settings.items()},
        left_out=tuple(left_out),
        warnings=(*doubled, *compare_alike.unknown(kept, names, skipped)),
        skipped=frozenset(skipped),
    )


def _rows(found: Sides, name: str, audit: Comparable) -> tuple[pd.DataFrame, list[str]]:
    """All rows of an audit under the comparison's names; the same answer from two folders once, and
    a sentence about it."""
    frames, said = [], []
    for part in (p for p in found.parts if p.audit == name):
        rows = part.folder.rows(audit.attacks)
        if audit.of_model is not None:
            rows = audit.of_model(rows, part)
        if "subject" in rows and set(audit.identity) <= set(rows.columns):
            rows = rows.assign(subject=rows["subject"].map(found.named(part)))
            frames.append(rows[rows["subject"].notna()])
        elif len(rows):
            said.append(
                f"The rows of {part.label} are those of an older version of the {name} audit, and"
                " are not compared."
            )
        if not len(rows):
            said.append(f"{part.label} holds no finished rows of its {name} audit.")
    if not frames:
        return pd.DataFrame(), said
    rows = pd.concat([f for f in frames if len(f)] or frames[:1], ignore_index=True)
    again = rows.duplicated(list(audit.identity))
    for model, count in rows.loc[again, "subject"].value_counts().items():
        said.append(
            f"{count} {name} rows of {model} stand in several of the folders; the first folder's"
            " are used."
        )
    return rows[~again].reset_index(drop=True), said
