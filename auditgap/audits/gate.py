"""Whether a run passes a policy: lines of its verdict table, and "not worse" than another run.

    policy = read_policy(Path("gate.yaml"))
    gate = judge(opened("runs/new"), policy, opened("runs/old"))
    gate.answer                     # fail where a criterion fails, pass where all pass

A policy names criteria by their ids in report.json:

    verdicts: {safe_harmful: 0.9, audit_gap: 0.1}      # at its own line
    not_worse: {safe_harmful: 0.03, audit_gap: 0.05}   # by at most so much, compared with the baseline

"Not worse" is non-inferiority: it passes where the whole 95 % interval of the paired difference lies
within the margin, and fails where all of it lies beyond. So few prompts never pass. What no audit
answers is "could not tell", never left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from auditgap.audits import comparing, pages
from auditgap.audits.findings import OpenedRun, rising
from auditgap.config import Frozen, build, read_yaml
from auditgap.errors import UsageError, did_you_mean
from auditgap.report.compare import Comparison
from auditgap.report.compare_measures import Measure, Unit
from auditgap.report.findings import Findings
from auditgap.report.reading import headline_budget
from auditgap.report.text import is_null
from auditgap.report.verdict_lines import (
    CANNOT_TELL,
    NOT_MEASURED,
    PASS,
    Criteria,
    Criterion,
    Figure,
    Line,
)
from auditgap.report.verdicts import CRITERIA, verdicts
from auditgap.store.tables import rows_of
from auditgap.types import Document

_Share = Annotated[float, Field(strict=True, ge=0, le=1)]
_Margin = Annotated[float, Field(strict=True, gt=0, le=1)]
EXAMPLE = "verdicts: {audit_gap: 0.1}"


class Policy(Frozen):
    """What a run must hold to; each mapping by the ids of report.json's verdicts."""

    #: line -> where it is drawn; None: where `auditgap audit` draws it
    verdicts: dict[str, _Share | None] = Field(default_factory=dict)
    #: line -> by how much it may be worse than the baseline's: of shares, 0.05 is 5 points
    not_worse: dict[str, _Margin] = Field(default_factory=dict)
    accept_screening: bool = Field(default=False, strict=True)


def criteria() -> dict[str, Criterion]:
    """All that a policy can name, by id."""
    asked = [one for part in pages.by_table() for one in part.criteria]
    return {one.id: one for one in (*asked, *CRITERIA)}


def read_policy(file: Path) -> Policy:
    """The policy in a YAML file. Raises UsageError: unreadable, an unknown key or id, a threshold
    that is no share, a margin where nothing can be compared, nothing asked for."""
    values = {
        key: {} if value is None else value
        for key, value in read_yaml(file, "--policy", EXAMPLE).items()
    }
    try:
        (policy,) = build(values, Policy)
        _check(policy)
    except UsageError as error:
        raise UsageError(f"--policy {file}: {error}") from None
    return policy


def _check(policy: Policy) -> None:
    known = criteria()
    for section, names in (("verdicts", policy.verdicts), ("not_worse", policy.not_worse)):
        able = [id for id, one in known.items() if section == "verdicts" or one.measure]
        for id in names:
            if id not in able:
                what = "no line of the verdict table" if id not in known else "compared by nothing"
                raise UsageError(
                    f"{section}.{id} is {what}.{did_you_mean(id, able)} Known here:"
                    f" {', '.join(able)}."
                )
    for id, threshold in policy.verdicts.items():
        if threshold is not None and not known[id].threshold:
            raise UsageError(f"verdicts.{id} has no threshold; write `{id}:` alone.")
    if not policy.verdicts and not policy.not_worse:
        raise UsageError(f"it asks for nothing. For example: {EXAMPLE}")


def judge(
    run: OpenedRun, policy: Policy, baseline: OpenedRun | None = None, *, subject: str | None = None
) -> Findings:
    """A line for every criterion of the policy, none left out; `subject`: which model, where the
    run has several. Raises UsageError: a baseline without a criterion for it or the reverse, a
    subject that is not there, several and none named."""
    if bool(policy.not_worse) != (baseline is not None):
        raise UsageError(
            "The policy's not_worse compares with an earlier run; name it with --baseline."
            if baseline is None
            else f"--baseline {baseline.place} came, and the policy compares nothing with it; add"
            " not_worse, for example not_worse: {audit_gap: 0.05}."
        )
    name = _subject(run, subject)
    lines = [_complete(line, run) for line in _absolute(run, policy, name)]
    notes: list[str] = []
    if baseline is not None:
        compared = list(_relative(run, baseline, policy, name, notes))
        lines += [_complete(_complete(line, run), baseline) for line in compared]
    return Findings(
        title=f"Gate of {name}",
        lines=lines,
        place=run.place,
        subjects=[s for s in run.report.subjects if str(s.get("name")) == name],
        written=run.written,
        baseline="" if baseline is None else baseline.place,
        policy=policy.model_dump(mode="json"),
        notes=notes,
        rising=rising(),
    )


def _subject(run: OpenedRun, asked: str | None, option: str = "--subject") -> str:
    """The model that is judged: the one that was asked for, or the only one."""
    parts = pages.by_table()
    names = list(dict.fromkeys(n for part in parts for n in part.subjects(run.report)))
    names = names or [str(s.get("name", "?")) for s in run.report.subjects]
    if asked is None and len(names) == 1:
        return names[0]
    if asked in names:
        return str(asked)
    if asked is None:
        raise UsageError(
            f"{run.place} has {len(names)} models and a gate judges one: name it with {option}."
            f" There is {', '.join(names)}."
        )
    raise UsageError(
        f"{option} {asked}: {run.place} has no such model.{did_you_mean(asked, names)} There is"
        f" {', '.join(names)}."
    )


def _absolute(run: OpenedRun, policy: Policy, name: str) -> Iterator[Line]:
    """Lines of the verdict table, drawn where the policy says."""
    known, parts = criteria(), pages.by_table()
    for id, threshold in policy.verdicts.items():
        drawn: Document = {"accept_screening": policy.accept_screening}
        if threshold is not None:
            drawn[known[id].threshold] = threshold
        lines = verdicts(run.report, parts, Criteria(**drawn), run.missing)
        # a line of the audit itself is of its judge, or of nobody
        mine = [line for line in lines if line.id == id]
        mine = [line for line in mine if known[id] in CRITERIA or line.subject == name]
        if not mine:
            yield _untold(known[id], name, f"no audit in {run.place} answers it", "not_answered")
        for line in mine:
            answer = CANNOT_TELL if line.answer == NOT_MEASURED else line.answer
            yield replace(line, answer=answer)


def _untold(criterion: Criterion, name: str, reason: str, cause: str) -> Line:
    return Line(name, criterion.question, CANNOT_TELL, "", reason, criterion.id, cause=cause)


def _complete(line: Line, run: OpenedRun) -> Line:
    """The line; one that passes only where every planned cell is in the tables."""
    if line.answer != PASS or not run.incomplete:
        return line
    reason = f"{line.reason}, but not in the tables are {run.incomplete}: run its command again"
    return replace(line, answer=CANNOT_TELL, reason=reason, cause="incomplete")


# -- not worse
# -------------------------------------------------------------------------------------------------


def _relative(
    run: OpenedRun, baseline: OpenedRun, policy: Policy, name: str, notes: list[str]
) -> Iterator[Line]:
    """ "Not worse" for each margin of the policy; `notes` gets what a reader must know."""
    known = {id: _not_worse(one) for id, one in criteria().items()}
    new, old = comparing.fingerprints(run.stores), comparing.fingerprints(baseline.stores)
    mine, theirs = new.get(name), old.get(_baseline(baseline, name))
    why, cause, found = "", "", None
    if mine is None or theirs is None:
        place = run.place if mine is None else baseline.place
        why, cause = f"no audit in {place} can be compared", "not_answered"
    elif mine == theirs:
        why = (
            f"{run.place} and {baseline.place} are of the same weights, so there is nothing to"
            " compare; give the release before this one as --baseline"
        )
        cause = "same_weights"
    else:
        able = comparing.able()
        found = comparing.compare(
            [s for s in (*baseline.stores, *run.stores) if s.run["config"].get("audit") in able],
            base=theirs,
            only_compatible=True,
        )
        notes += (*found.sides.left_out, *found.sides.warnings)
    budget = headline_budget(run.report.gaps, run.report.lvs) if len(run.report.gaps) else None
    for id, margin in policy.not_worse.items():
        if found is None:
            yield _untold(known[id], name, why, cause)
        else:
            pair = (str(mine), str(theirs))
            yield _difference(found, pair, known[id], name, margin, budget)


def _not_worse(criterion: Criterion) -> Criterion:
    """The same asked of two models."""
    question = f"{criterion.question}: not worse than the baseline"
    return replace(criterion, id=f"not_worse.{criterion.id}", question=question)


def _baseline(baseline: OpenedRun, name: str) -> str:
    """The baseline's model: the only one, or that of the same name."""
    try:
        return _subject(baseline, None)
    except UsageError:
        return _subject(baseline, name, "The baseline of --subject")


def _difference(
    found: Comparison,
    pair: tuple[str, str],
    criterion: Criterion,
    name: str,
    margin: float,
    budget: tuple[float, str] | None,
) -> Line:
    """How much worse the run's model is, over what both were asked. `pair`: the fingerprints of the
    run's and of the baseline's."""
    names = {model.fingerprint: model.name for model in found.sides.models}
    rows = {str(row["model"]): row for row in reversed(_rows(found, criterion, budget))}
    row, base = (rows.get(names.get(fingerprint, "")) for fingerprint in pair)
    if row is None or is_null(row["difference"]):
        left = "; ".join(found.sides.left_out)
        why = str(row["reason"]) if row is not None and row["reason"] else ""
        lacks = "the two runs have nothing in common that measures it"
        return _untold(criterion, name, why or left or lacks, "not_comparable")
    measure = next(m for m in found.measures if m.name == criterion.measure)
    ends = [row[c] for c in ("difference", "difference_lo", "difference_hi")]
    if criterion.worse < 0:
        value, hi, lo = (None if is_null(v) else -float(v) for v in ends)
    else:
        value, lo, hi = (None if is_null(v) else float(v) for v in ends)
    figure = Figure(
        value, lo, hi, measure.difference, int(row["n_pairs"]), _shares(measure, row, base)
    )
    said = f"; how much worse, over {int(row['n_pairs']):,} prompts that both were asked"
    return figure.line(criterion, name, figure.at_most(margin), said)


def _rows(
    found: Comparison, criterion: Criterion, budget: tuple[float, str] | None
) -> list[Document]:
    """The rows of its measure, at the headline's budget and the first of its places that is
    there."""
    rows = [row for row in rows_of(found.table) if row["measure"] == criterion.measure]
    rows = [r for r in rows if is_null(r["eps"]) or (float(r["eps"]), str(r["unit"])) == budget]
    for place in criterion.places:
        if there := [row for row in rows if row["where"] == place]:
            return there
    return [] if criterion.places else rows


def _shares(measure: Measure, row: Document, base: Document | None) -> tuple[float, ...]:
    """Both models' shares, where the measure is one."""
    values = (row["value"], (base or {}).get("value"))
    if measure.unit != Unit.SHARE or any(map(is_null, values)):
        return ()
    return tuple(float(v) for v in values if v is not None)
