"""A comparison as files: compare.parquet, .csv, .md, .json, the data of its figures, and
compare.html.

    page = write(compare(folders), Path("runs/compare"))        # runs/compare/compare.html

The page is made of sections as the report is: one file without network. The JSON holds the very
rows of the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

import auditgap
from auditgap.errors import UsageError
from auditgap.report import page, text
from auditgap.report.charts import Figure
from auditgap.report.columns import Column, escaped, show, word
from auditgap.report.compare import Comparison
from auditgap.report.compare_figures import profile
from auditgap.report.compare_measures import COLUMNS, COUNTS
from auditgap.report.compare_models import ROLES
from auditgap.report.compare_tables import (
    TableOne,
    columns_of,
    measures,
    says,
    table_1,
    verdict,
)
from auditgap.report.frame import Frame
from auditgap.report.section import (
    Block,
    Bullets,
    Facts,
    Heading,
    Headline,
    Prose,
    Section,
    Table,
    figures_of,
    named,
)
from auditgap.store import files
from auditgap.store.tables import frame_to_table, rows_of, to_bytes, to_csv
from auditgap.types import Document

SCHEMA = 1
MARKS = (
    "As in the paper’s Table 1, bold is the largest LVS of a column and underlined the smallest, so"
    " bold is the most vulnerable model and underlined the least; equal models are not marked. A"
    " mark looks at the mean alone: whether two models differ is for the differences below to say."
)
_METHOD = (
    (
        "A difference is model − base over the prompts for which both could be told; their number"
        " stands beside it."
    ),
    "Shares: McNemar’s exact test and Newcombe’s interval for paired shares.",
)
_READING = (
    (
        "Holm’s correction is taken within each measure, over all models, sites and budgets. A"
        " difference is called shown when its corrected p is below .05; one that is not shown is"
        " not ruled out."
    ),
    (
        "Sites are compared block by block between models of one depth, else by role: embedding,"
        " mid (block round(L/2)), last."
    ),
    (
        "LVS grows with a model’s activation norms: between models of another size or family read"
        " LVS rel. It is low, too, where a model answers harmfully with no edit, as nothing is left"
        " to take away: read it beside behavioural safety."
    ),
)
_LIMITS = (
    "A difference that is not shown is not ruled out: few pairs of prompts show large ones alone.",
    "The judge’s errors are in every model’s figures; a difference may be one in how it errs.",
)
_LEFT_OUT = Markup('<span class="badge">left out</span> {}')
_FOOTER = Markup(
    "auditgap {}. The same numbers: <code>compare.json</code>, <code>compare.csv</code>,"
    " <code>compare.parquet</code>."
)


def method(comparison: Comparison) -> list[str]:
    """How it was compared: what holds of all, and of each audit that is there."""
    there = set(comparison.table["audit"])
    own = [a.method for name, a in comparison.audits.items() if a.method and name in there]
    return [*_METHOD, *own, *_READING]


# -- the page
# -------------------------------------------------------------------------------------------------


def sections(comparison: Comparison) -> list[Section]:
    """The page's sections."""
    found = [
        ("says", "What the differences show", [Bullets(says(comparison))]),
        ("table1", "Layer-wise LVS", list(_layer_wise(table_1(comparison)))),
        ("profiles", "By relative depth", profiles(comparison)),
        ("differences", "Every measure", list(_differences(comparison))),
        ("method", "How it was compared", list(_method(comparison))),
    ]
    made = [
        Section(id=id, title=title, contents=title, blocks=blocks)
        for id, title, blocks in found
        if blocks
    ]
    return [replace(made[0], headlines=headlines(comparison)), *made[1:]]


def headlines(comparison: Comparison) -> list[Headline]:
    """What the differences of each model from the base show, in a sentence."""
    base = comparison.sides.base.name
    found = []
    for model in comparison.sides.models[1:]:
        readings = [
            (measure.title, verdict(measure, row), int(row["n_pairs"]))
            for measure, rows in measures(comparison)
            for row in rows_of(rows[(rows["model"] == model.name) & rows["p_holm"].notna()])
        ]
        pairs = max((n for _, _, n in readings), default=0)
        shown = [f"{which} ({_titles(titles)})" for which, titles in _by_reading(readings).items()]
        if not readings:
            answer = f"No difference from {base} could be tested."
        elif not shown:
            answer = (
                f"No difference from {base} is shown, in {len(readings)} tests of at most"
                f" {_counted(pairs, 'pair')} of prompts; none is ruled out."
            )
        else:
            answer = f"Compared with {base}, {'; '.join(shown)}."
        found.append(Headline(model.name, (), answer=answer))
    return found


def _by_reading(readings: Sequence[tuple[str, str, int]]) -> dict[str, list[str]]:
    """Titles of the measures that show a difference, each once, by what it is."""
    found: dict[str, list[str]] = {}
    for title, reading, _ in readings:
        if reading not in ("not shown", text.CANNOT_TELL, "") and title not in found.get(
            reading, ()
        ):
            found.setdefault(reading, []).append(title)
    return found


def _titles(titles: Sequence[str], most: int = 3) -> str:
    more = f" and {len(titles) - most} more" if len(titles) > most else ""
    return "; ".join(titles[:most]) + more


def _layer_wise(tables: list[TableOne]) -> Iterator[Block]:
    if not tables:
        yield Prose("None of these runs is a latent audit with the targeted attack.", "none")
        return
    yield Prose(MARKS, "note")
    for one in tables:
        records = [dict(zip(("model", *ROLES), (m, *cells), strict=True)) for m, cells in one.rows]
        columns = [word("model", "Model", css="word model"), *map(_marked, ROLES)]
        yield Heading(one.budget)
        yield Table("", f"Layer-wise LVS, {one.budget}", pd.DataFrame(records), columns)
        if one.reasons:
            notes = [
                Markup("<sup>{}</sup> {}.").format(i, text.clean(reason))
                for i, reason in enumerate(one.reasons, 1)
            ]
            yield Prose(Markup("<br>").join(notes), "note")


def _marked(role: str) -> Column:
    title = "Emb" if role == "embedding" else role.capitalize()
    return Column(
        role,
        title,
        read=lambda row: row[role].html(),
        mark=lambda row: "null" if row[role].reason else "",
    )


def profiles(comparison: Comparison) -> list[Figure]:
    """The profiles that there is something to draw of."""
    drawn = {name for audit in comparison.audits.values() for name in audit.profiles}
    order = [name for audit in comparison.audits.values() for name in audit.profiles]
    known = {m.name: m for m in comparison.measures if m.name in drawn}
    made = [profile(comparison.table, known[name]) for name in order]
    return [figure for figure in made if not figure.missing]


def _differences(comparison: Comparison) -> Iterator[Block]:
    yield Prose(
        "Differences are model − base; those in bold are shown after Holm’s correction. Brackets"
        " hold 95\u00a0% intervals.",
        "note",
    )
    found = measures(comparison)
    for measure, rows in found:
        yield Heading(measure.title)
        columns = columns_of(measure, comparison.sides.base.name)
        yield Table("", measure.title, rows, columns)
    if not found:
        yield Prose("Nothing was measured.", "none")


def _method(comparison: Comparison) -> Iterator[Block]:
    yield Bullets(method(comparison))
    yield Heading("Models")
    yield Facts(
        [
            (
                named(m.name),
                f"fingerprint {m.fingerprint}; {m.n_blocks or 'unknown number of'} blocks;"
                f" tokenizer {m.tokenizer or 'not recorded'}; chat template"
                f" {m.chat_template or 'not recorded'}; from {', '.join(m.folders)}",
            )
            for m in comparison.sides.models
        ]
    )
    yield Heading("What they have in common")
    yield Facts([(k, text.plain(v)) for k, v in comparison.sides.agreed.items()])


def frame(comparison: Comparison) -> Frame:
    """What stands around the sections."""
    sides = comparison.sides
    others = ", ".join(m.name for m in sides.models[1:])
    notes = [
        *(Prose(_LEFT_OUT.format(text.clean(line)), "warn") for line in sides.left_out),
        *(Prose(line, "warn") for line in sides.warnings),
        *(Prose(line, "note") for line in comparison.notes),
    ]
    return Frame(
        title=(
            f"{sides.base.name} and {others}"
            if len(sides.models) <= 4
            else f"{len(sides.models)} models side by side"
        ),
        kind="Comparison",
        about=_about(comparison),
        first=(Heading("What limits this most"), Bullets(_LIMITS)),
        facts=(
            _counted(len(sides.models), "model"),
            _counted(len(sides.parts), "run"),
        ),
        notes=notes,
        footer=_FOOTER.format(auditgap.__version__),
    )


def _about(comparison: Comparison) -> list[tuple[str, str]]:
    sides = comparison.sides
    names = [f"{m.name} (fingerprint {m.fingerprint[:12]})" for m in sides.models[:3]]
    more = f" and {len(sides.models) - 3} more" if len(sides.models) > 3 else ""
    written = [s for part in sides.parts if (s := part.folder.status().last_write)]
    date = [("Date", f"{max(written):%-d %B %Y}")] if written else []
    return [("Base", names[0]), ("Beside it", ", ".join(names[1:]) + more or "nothing"), *date]


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def render(comparison: Comparison) -> str:
    """The page."""
    return page.render(sections(comparison), frame(comparison))


# -- files
# -------------------------------------------------------------------------------------------------


def to_json(comparison: Comparison) -> Document:
    """The comparison as JSON: who, under what, and every row of the table with null for what there
    is not."""
    sides = comparison.sides
    return {
        "format": "auditgap.compare",
        "schema": SCHEMA,
        "auditgap": auditgap.__version__,
        "base": sides.base.name,
        "models": [
            {
                "name": m.name,
                "fingerprint": m.fingerprint,
                "n_blocks": m.n_blocks,
                "folders": list(m.folders),
                "tokenizer": m.tokenizer,
                "chat_template": m.chat_template,
            }
            for m in sides.models
        ],
        "agreed": dict(sides.agreed),
        "left_out": list(sides.left_out),
        "warnings": list(sides.warnings),
        "notes": [*comparison.notes, MARKS, *method(comparison)],
        "columns": list(COLUMNS),
        "rows": [{c: _plain(c, row[c]) for c in COLUMNS} for row in rows_of(comparison.table)],
    }


def _plain(column: str, value: Any) -> str | float | None:
    if text.is_null(value):
        return None
    return value if isinstance(value, str) else int(value) if column in COUNTS else float(value)


def markdown(comparison: Comparison) -> str:
    """The comparison for a reader of text: Table 1, what the differences say, every measure, what
    was left out."""
    sides = comparison.sides
    names = ", ".join(escaped(m.name) for m in sides.models)
    lines = ["# Comparison", "", f"Base: {escaped(sides.base.name)}. Models: {names}.", ""]
    lines += [f"- {escaped(s)}" for s in (*sides.left_out, *sides.warnings, *comparison.notes)]
    for one in table_1(comparison):
        lines += ["", f"## Table 1, {escaped(one.budget)}", ""]
        lines += ["| Model | Emb | Mid | Last |", "| --- | ---: | ---: | ---: |"]
        for name, cells in one.rows:
            lines.append(f"| {escaped(name)} | {' | '.join(c.markdown() for c in cells)} |")
        reasons = [f"({i}) {escaped(reason)}  " for i, reason in enumerate(one.reasons, 1)]
        lines += ["", *reasons, "", MARKS]
    lines += ["", "## Differences", "", *(f"- {escaped(s)}" for s in says(comparison))]
    for measure, rows in measures(comparison):
        table = show(rows, columns_of(measure, sides.base.name))
        lines += ["", f"### {measure.title}", "", *table.markdown()]
    return "\n".join([*lines, "", "## How", "", *(f"- {s}" for s in method(comparison))]) + "\n"


def write(comparison: Comparison, out: Path) -> Path:
    """Write everything into `out`, each file atomically; returns the page's path.

    Raises UsageError when `out` is a file or a run's own folder, DiskError when the disk says no.
    """
    if out.is_file() or (out / "run.json").exists():
        what = "a file" if out.is_file() else "a run’s folder"
        raise UsageError(
            f"{out} is {what}; a comparison needs a folder of its own. Give another --out."
        )
    made = sections(comparison)
    page.write_twins(page.figure_files([*figures_of(made).values()]), out / "figures")
    put = partial(_put, out)
    put("compare.parquet", to_bytes(frame_to_table(comparison.table)))
    put("compare.csv", to_csv(comparison.table).encode("utf-8", "backslashreplace"))
    put("compare.md", markdown(comparison).encode("utf-8", "backslashreplace"))
    put("compare.json", files.seal(to_json(comparison)))
    rendered = page.render(made, frame(comparison))
    put("compare.html", rendered.encode("utf-8", "backslashreplace"))
    return out / "compare.html"


def _put(out: Path, name: str, data: bytes) -> None:
    files.write_bytes(out / name, data)
