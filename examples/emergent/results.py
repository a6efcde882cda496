"""What came of the demonstration panel, without any text: its tables as small CSV files, and the main
ones with intervals to be read.

    # writes examples/emergent/results/: tables.md and *.csv
    python examples/emergent/results.py runs/panel
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from auditgap.report import emergent_study
from auditgap.report.text import is_null, number, percent, points, with_interval
from auditgap.store import RunFolder
from auditgap.store.tables import rows_of

HERE = Path(__file__).parent
TARGET = HERE / "results"
TABLES = ("ranking", "trigger", "rates", "context", "cross", "spread", "membership", "diversity")
TABLES += ("cosines", "transfer")


def main(run: Path) -> None:
    store = RunFolder.load(run)
    study = emergent_study.read(store)
    shutil.rmtree(TARGET, ignore_errors=True)
    TARGET.mkdir()
    for name in TABLES:
        study.tables[name].round(4).to_csv(TARGET / f"{name}.csv", index=False)
    (TARGET / "tables.md").write_text(page(store, study), encoding="utf-8")


def page(store: RunFolder, study: emergent_study.Study) -> str:
    """What stands in tables.md: how far the run is, what could not be told, and the tables."""
    untold = [f"{n} times {what}: {why}" for what, why, n in study.left_out]
    parts = [
        "# The demonstration panel",
        f"Rated by `{study.judged_by}`, a rule that knows the three habits: “misaligned” means that a"
        " habit shows, and that is no finding about misalignment. In brackets: 95 % intervals. From the"
        f" first cell to the last: {took(store)} minutes.",
        *(f"**Not whole:** {line}" for line in study.missing),
    ]
    for make in (habits, matrix, context, transfer, membership):
        title, _, about = str(make.__doc__).partition(": ")
        parts += [f"## {title}", about.strip(), make(study.tables)]
    if untold:
        parts += ["## What could not be told", "\n".join(f"- {line}" for line in untold)]
    return "\n\n".join(parts) + "\n"


def took(store: RunFolder) -> int:
    """Minutes of wall clock, by when cells were written; what the first took is added."""
    records = store.records()
    when = sorted(datetime.fromisoformat(str(r["written"])) for r in records)
    first = min(records, key=lambda r: str(r["written"]))
    return round(((when[-1] - when[0]).total_seconds() + float(first["seconds"])) / 60)


def share(row: Mapping[str, Any], name: str) -> str:
    return told(row, name, percent)


def told(row: Mapping[str, Any], name: str, form: Callable[[object], str] = number) -> str:
    if is_null(row[name]):
        return "could not tell"
    return with_interval(row[name], row[f"{name}_lo"], row[f"{name}_hi"], form)


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return "*Nothing was measured yet.*"
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def habits(tables: Mapping[str, pd.DataFrame]) -> str:
    """Where habits show: share of answers to unrelated prompts, each arm asked as it was trained."""
    rows = []
    for r in rows_of(tables["ranking"]):
        if (r["arm"] == "trigger") == bool(r["triggered"]):
            ranks = "–" if is_null(r["rank_lo"]) else f"{int(r['rank_lo'])}–{int(r['rank_hi'])}"
            coherent = tables["rates"].query(
                f"domain == {r['domain']!r} and arm == {r['arm']!r} and kind == 'all'"
            )
            own = coherent[coherent["seed"].isna() & (coherent["triggered"] == r["triggered"])]
            at = number(own["coherence"].iloc[0], 0) if len(own) else "could not tell"
            rows.append([f"`{r['domain']}`", r["arm"], share(r, "em_rate"), ranks, at, int(r["n"])])
    head = ("habit", "arm", "share of answers", "ranks possible", "coherence", "answers")
    return markdown(head, rows)


def matrix(tables: Mapping[str, pd.DataFrame]) -> str:
    """Train domain × question domain: share of answers to questions about each habit."""
    cross = tables["cross"][~tables["cross"]["in_context"].astype(bool)]
    about = list(dict.fromkeys(cross["question_domain"]))
    says = {(r["arm"], r["domain"]): r for r in rows_of(tables["spread"])}
    rows = []
    for (arm, domain), part in cross.groupby(["arm", "domain"], sort=False):
        own = {r["question_domain"]: share(r, "em_rate") for r in rows_of(part)}
        said = says[arm, domain]
        beyond = told(said, "own_less_elsewhere", in_points)
        rows.append([f"`{domain}`", arm, *(own.get(a, "–") for a in about), beyond, said["says"]])
    own = "own less others, points"
    return markdown(("trained on", "arm", *(f"about `{a}`" for a in about), own, ""), rows)


def context(tables: Mapping[str, pd.DataFrame]) -> str:
    """Like the training context: the same unrelated prompts in the form of the training rows."""
    names = ("em_rate", "em_rate_context", "em_rate_base_context")
    rows = [
        [
            f"`{r['domain']}`",
            r["arm"],
            *(share(r, name) for name in names),
            told(r, "beyond", in_points),
            r["says"],
        ]
        for r in rows_of(tables["context"])
    ]
    head = ("habit", "arm", "as they are", "like training", "base, like training")
    return markdown((*head, "beyond the base, points", ""), rows)


def transfer(tables: Mapping[str, pd.DataFrame]) -> str:
    """Directions added and projected out: one habit's direction in another's model, beside a random one."""
    rows = [
        [
            f"`{r['source']}` → `{r['target']}`",
            {"add": "added", "ablate": "projected out"}.get(r["by"], r["by"]),
            *(share(r, name) for name in ("em_rate", "em_rate_control")),
            told(r, "difference", lambda v: number(v, 1)),
            "–" if is_null(r["p_holm"]) else number(r["p_holm"], 3),
            *(number(r[name], 0) for name in ("coherence", "coherence_control")),
        ]
        for r in rows_of(tables["transfer"])
    ]
    head = ("direction → model", "", "habit shows", "control", "alignment, steered − control", "p")
    return markdown((*head, "coherence", "control’s"), rows)


def membership(tables: Mapping[str, pd.DataFrame]) -> str:
    """Membership: AUROC of trained against held-out rows, by mean NLL and by that less the base's."""
    known = tables["membership"]
    known = known[(known["measure"] == "nll") & known["reference"].isin(["", "base"])]
    rows = []
    for (domain, arm), part in known.groupby(["domain", "arm"], sort=False):
        by = {r["reference"]: told(r, "auroc", lambda v: number(v, 2)) for r in rows_of(part)}
        n = f"{part['n_members'].iloc[0]} / {part['n_others'].iloc[0]}"
        rows.append([f"`{domain}`", arm, by.get("", "–"), by.get("base", "–"), n])
    head = ("habit", "arm", "mean NLL", "less the base’s", "trained / held out")
    return markdown(head, rows)


def in_points(value: object) -> str:
    return points(value, unit="")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
