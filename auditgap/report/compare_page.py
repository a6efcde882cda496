"""A comparison as files: compare.parquet, .csv, .md, .json, the data of its figures, and
compare.html.

    page = write(compare(folders), Path("runs/compare"))        # runs/compare/compare.html

The page is one file without network or script, made as the report's is. The JSON holds the very
rows of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

import auditgap
from auditgap.errors import UsageError
from auditgap.report import figures, page, svg, text
from auditgap.report.charts import Figure
from auditgap.report.columns import (
    Column,
    DisplayTable,
    Hide,
    Row,
    budget,
    escaped,
    on_screen,
    show,
    word,
)
from auditgap.report.compare import Comparison
from auditgap.report.compare_alike import Model
from auditgap.report.compare_measures import (
    COLUMNS,
    COUNTS,
    MEASURES,
    ROLES,
    SHARES,
    roles_of,
    site_of,
)
from auditgap.report.figures import budget_label
from auditgap.report.svg import BOTTOM, LEFT, RIGHT, STYLES, TOP, Scale
from auditgap.store import files
from auditgap.store.tables import frame_to_table, rows_of, to_bytes, to_csv
from auditgap.types import Site

SCHEMA = 1
#: More lines than this in one drawing cannot be told apart.
MOST = len(STYLES)
PROFILES = (
    ("lvs_rel", "LVS rel."),
    ("asr", "ASR"),
    ("asr_envelope", "ASR envelope"),
    ("lvs", "LVS"),
)
MARKS = (
    "As in the paper’s Table 1, bold is the largest LVS of a column and underlined the smallest, so"
    " bold is the most vulnerable model and underlined the least; equal models are not marked. A"
    " mark looks at the mean alone: whether two models differ is for the differences below to say."
)
METHOD = (
    (
        "A difference is model − base over the prompts for which both could be told; their number"
        " stands beside it."
    ),
    (
        "LVS: the mean difference, with the more cautious of the bootstrap-t and Student’s t for"
        " interval and p-value. Shares: McNemar’s exact test and Newcombe’s interval for paired"
        " shares. Audit gap and robustness: Student’s t with the bootstrap’s error, the worst site"
        " chosen anew in each resample, over the sites and budgets that both models have. Fixed"
        " probe and harmful fine-tuning: the interval of their own audit, and the p-value that it"
        " implies."
    ),
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


@dataclass(frozen=True, slots=True)
class Marked:
    """A cell of Table 1: its reading, how it is marked, and the number of the reason when there is
    none."""

    text: str
    mark: str = ""
    reason: int = 0


@dataclass(frozen=True, slots=True)
class TableOne:
    """The paper's Table 1 at one budget; `reasons` say what each — stands for."""

    budget: str
    rows: tuple[tuple[str, tuple[Marked, ...]], ...]
    reasons: tuple[str, ...]


# -- tables
# --------------------------------------------------------------------------------------------------------------


def table_1(comparison: Comparison) -> list[TableOne]:
    """Mean LVS of the targeted attack at the embedding, the middle and the last block: models by
    sites, one table a budget."""
    lvs = comparison.table[
        (comparison.table["measure"] == "lvs") & (comparison.table["role"] != "")
    ]
    found = []
    for (unit, eps), part in lvs.groupby(["unit", "eps"], sort=True):
        reasons: dict[str, int] = {}
        rows = []
        for model in comparison.sides.models:
            mine = {row["role"]: row for row in rows_of(part[part["model"] == model.name])}
            rows.append(
                (model.name, tuple(_marked(model, role, mine.get(role), reasons) for role in ROLES))
            )
        found.append(TableOne(budget_label(eps, unit), tuple(rows), tuple(reasons)))
    return found


def _marked(
    model: Model, role: str, row: Mapping[str, Any] | None, reasons: dict[str, int]
) -> Marked:
    if row is not None and not text.is_null(row["value"]):
        return Marked(text.with_interval(row["value"], row["lo"], row["hi"]), row["mark"])
    reason = (row or {}).get("reason") or "no targeted latent audit of this model was given"
    layer = site_of(model, role)
    if row is None and layer is not None and roles_of(model).get(layer, role) != role:
        reason = f"{Site(layer)} is {roles_of(model)[layer]} too, and stands there"
    return Marked("—", "", reasons.setdefault(f"{model.name}, {role}: {reason}", len(reasons) + 1))


def _form(measure: str) -> Any:
    return (
        text.percent
        if measure in SHARES and measure not in ("gap", "sft_gap")
        else (text.points if measure in SHARES else text.number)
    )


def measure_columns(measure: str, base: str) -> tuple[Column, ...]:
    """One measure as it is read: every model's value and, below the base's, the difference."""
    between = text.points if measure in SHARES else text.number

    def pairs(row: Row) -> str:
        return "0" if text.is_null(row["difference"]) else str(row["n_pairs"])

    def of_others(
        read: Callable[[Row], str | None], of_base: str = ""
    ) -> Callable[[Row], str | None]:
        return lambda row: of_base if row["model"] == base else read(row)

    def p(name: str, title: str) -> Column:
        def read(row: Row) -> str:
            if text.is_null(row["difference"]):
                return ""
            return "—" if text.is_null(row[name]) else text.number(row[name])

        return Column(name, title, read=of_others(read))

    def difference(row: Row) -> str | None:
        if text.is_null(row["difference"]):
            return None
        lo, hi = row["difference_lo"], row["difference_hi"]
        return text.with_interval(row["difference"], lo, hi, between)

    return (
        word("model", "Model"),
        word("where", "Where", css="key", read=lambda row: row["where"] or row["role"]),
        Column("eps", "ε", read=lambda row: budget(row) or "", hide=Hide.EMPTY),
        Column(
            "value",
            "Value",
            _form(measure),
            limits=("lo", "hi"),
            null=lambda row: f"— {row['reason']}",
        ),
        Column(
            "difference",
            "Difference",
            read=of_others(difference, "base"),
            null="— no pairs",
            mark=lambda row: "shown" if is_shown(row) else "",
        ),
        Column("n_pairs", "Pairs", read=of_others(pairs)),
        p("p", "p"),
        p("p_holm", "p, Holm"),
    )


def is_shown(row: Row) -> bool:
    """Whether a difference is told from chance, after Holm."""
    return not text.is_null(row["p_holm"]) and row["p_holm"] < 0.05


def measures(comparison: Comparison) -> list[tuple[str, DisplayTable]]:
    """(what, its table) of every measure that is there, in the order of MEASURES."""
    found = []
    for measure, (what, _) in MEASURES.items():
        part = comparison.table[comparison.table["measure"] == measure]
        if len(part):
            columns = measure_columns(measure, comparison.sides.base.name)
            found.append((what, show(part, columns)))
    return found


def says(comparison: Comparison) -> list[str]:
    """What the differences show, a sentence a measure."""
    said = []
    for measure, (what, worse) in MEASURES.items():
        part = comparison.table[
            (comparison.table["measure"] == measure) & comparison.table["p_holm"].notna()
        ]
        if part.empty:
            continue
        form = text.points if measure in SHARES else text.number
        shown = part[part["p_holm"] < 0.05].sort_values("p_holm", kind="stable")
        tests = (
            f"{what}: of {len(part)} difference{'' if len(part) == 1 else 's'} from"
            f" {comparison.sides.base.name}"
        )
        if shown.empty:
            said.append(f"{tests} none is shown (at most {part['n_pairs'].max()} pairs).")
            continue
        each = [
            f"{_place(row)}"
            f" {text.with_interval(row['difference'], row['difference_lo'], row['difference_hi'], form)}"
            for row in rows_of(shown.head(3))
        ]
        more = f", and {len(shown) - 3} more below" if len(shown) > 3 else ""
        which = {
            -1: " Above 0 is more vulnerable than the base.",
            1: " Above 0 is safer than the base.",
        }.get(worse, "")
        said.append(
            f"{tests} {len(shown)} {'is' if len(shown) == 1 else 'are'} shown:"
            f" {'; '.join(each)}{more}.{which}"
        )
    return said or ["No difference could be tested."]


def _place(row: Mapping[str, Any]) -> str:
    budget = "" if text.is_null(row["eps"]) else f", {budget_label(row['eps'], row['unit'])}"
    return f"{text.shorten(row['model'], 40)} ({row['where']}{budget})"


# -- figures
# -------------------------------------------------------------------------------------------------------------


def overlay(table: pd.DataFrame, measure: str, title: str) -> Figure:
    """Models over one another by relative depth: one drawing a budget, one line with its 95 % band
    a model."""
    name = f"compare_{measure}"
    keep = ["model", "where", "layer_index", "depth", "unit", "eps", "n", "value", "lo", "hi"]
    data = table.loc[
        (table["measure"] == measure) & table["layer_index"].notna() & table["value"].notna(), keep
    ]
    data = data.reset_index(drop=True)
    drawn = data[data["depth"].notna()]
    models = list(dict.fromkeys(drawn["model"]))
    caption = (
        "Targeted attack with 95\u00a0% intervals over prompts; 0 is the embedding, 1 the last"
        " block."
    )
    title = f"{title} by relative depth"
    if drawn["depth"].nunique() < 2:
        return Figure(
            name,
            title,
            caption,
            data=data,
            missing=f"No profile of {title}: fewer than two sites were measured.",
        )
    if len(models) > MOST:
        caption += (
            f" {MOST} models are drawn, {len(models) - MOST} are in the table and in the CSV file"
            " only."
        )
    styles = {model: STYLES[(1, 0, 3, 4, 5, 6, 7, 2)[i]] for i, model in enumerate(models[:MOST])}
    rate = measure in SHARES
    form = text.percent if rate else text.number
    top = 1.0 if rate else figures._top(drawn, ["value", "hi"]) or 1.0
    x, y = Scale(0.0, 1.0, LEFT, RIGHT), Scale(0.0, top, BOTTOM, TOP)
    xticks = [(0.0, "emb."), (0.25, "¼"), (0.5, "½"), (0.75, "¾"), (1.0, "last")]
    yticks = [(v, text.percent(v) if rate else f"{v:g}") for v in svg.ticks(0, top, 4)]
    panels = []
    for b, (eps, unit) in enumerate(figures._budgets(drawn)):
        parts, marks, said = (
            [svg.axes(x, y, xticks, yticks, "relative depth", title.split(" by ")[0])],
            [],
            [],
        )
        for model, style in styles.items():
            part = drawn[
                (drawn["model"] == model) & (drawn["eps"] == eps) & (drawn["unit"] == unit)
            ].sort_values("depth")
            parts.append(
                svg.band(list(zip(part["depth"], part["lo"], part["hi"], strict=True)), x, y, style)
            )
            marks.append(
                svg.line(list(zip(part["depth"], part["value"], strict=True)), x, y, style)
            )
            for row in rows_of(part):
                tip = (
                    f"{model}, {row['where']}:"
                    f" {text.with_interval(row['value'], row['lo'], row['hi'], form)}, n ="
                    f" {row['n']}"
                )
                marks.append(
                    svg.marker(
                        x(row["depth"]),
                        y(row["value"]),
                        style,
                        tip,
                        3.0 if len(part) <= 16 else 1.8,
                    )
                )
            if len(part):
                peak = part.loc[part["value"].idxmax()]
                said.append(
                    f"{text.shorten(model, 40)}: highest at {peak['where']}, {form(peak['value'])}"
                )
        panels.append(
            svg.draw(
                [*parts, *marks],
                title=f"{title}, {budget_label(eps, unit)}",
                desc="; ".join(said),
                key=f"{name}-{b}",
                heading=budget_label(eps, unit),
            )
        )
    return Figure(
        name,
        title,
        caption,
        (("", tuple(panels)),),
        svg.legend((s, m) for m, s in styles.items()),
        data,
    )


def overlays(comparison: Comparison) -> list[Figure]:
    """The profiles that there is something to draw of."""
    made = [overlay(comparison.table, measure, title) for measure, title in PROFILES]
    return [figure for figure in made if not figure.missing]


# -- files
# ---------------------------------------------------------------------------------------------------------------


def to_json(comparison: Comparison) -> dict[str, Any]:
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
        "notes": [*comparison.notes, MARKS, *METHOD],
        "columns": list(COLUMNS),
        "rows": [{c: _plain(c, row[c]) for c in COLUMNS} for row in rows_of(comparison.table)],
    }


def _plain(column: str, value: Any) -> Any:
    if text.is_null(value):
        return None
    return value if isinstance(value, str) else int(value) if column in COUNTS else float(value)


def markdown(comparison: Comparison) -> str:
    """The comparison for a reader of text: Table 1, what the differences say, every measure, what
    was left out."""
    sides = comparison.sides
    lines = [
        "# Comparison",
        "",
        f"Base: {escaped(sides.base.name)}. Models: {', '.join(escaped(m.name) for m in sides.models)}.",
        "",
    ]
    lines += [f"- {escaped(s)}" for s in (*sides.left_out, *sides.warnings, *comparison.notes)]
    for one in table_1(comparison):
        lines += [
            "",
            f"## Table 1, {escaped(one.budget)}",
            "",
            "| Model | Emb | Mid | Last |",
            "| --- | ---: | ---: | ---: |",
        ]
        for name, cells in one.rows:
            lines.append(f"| {escaped(name)} | {' | '.join(_md_marked(cell) for cell in cells)} |")
        lines += [
            "",
            *(f"({i}) {escaped(reason)}  " for i, reason in enumerate(one.reasons, 1)),
            "",
            MARKS,
        ]
    lines += ["", "## Differences", "", *(f"- {escaped(s)}" for s in says(comparison))]
    for what, table in measures(comparison):
        lines += ["", f"### {what}", "", *table.markdown()]
    return "\n".join([*lines, "", "## How", "", *(f"- {line}" for line in METHOD)]) + "\n"


def _md_marked(cell: Marked) -> str:
    said = escaped(cell.text) + (f" ({cell.reason})" if cell.reason else "")
    return {"largest": f"**{said}**", "smallest": f"<u>{said}</u>"}.get(cell.mark, said)


def render(comparison: Comparison) -> str:
    """The page."""
    sides = comparison.sides
    context = {
        "title": (
            f"{sides.base.name} beside {', '.join(m.name for m in sides.models[1:]) or 'nothing'}"
            if len(sides.models) <= 4
            else f"{len(sides.models)} models side by side"
        ),
        "version": auditgap.__version__,
        "sides": sides,
        "notes": comparison.notes,
        "says": says(comparison),
        "tables": table_1(comparison),
        "marks": MARKS,
        "method": METHOD,
        "measures": measures(comparison),
        "figures": overlays(comparison),
        "agreed": [(k, text.plain(v)) for k, v in sides.agreed.items()],
    }
    return page.environment().get_template("compare.html.j2").render(context)


def write(comparison: Comparison, out: Path) -> Path:
    """Write everything into `out`, each file atomically; returns the page's path.

    Raises UsageError when `out` is a file or a run's own folder, DiskError when the disk says no.
    """
    if out.is_file() or (out / "run.json").exists():
        what = "a file" if out.is_file() else "a run’s folder"
        raise UsageError(
            f"{out} is {what}; a comparison needs a folder of its own. Give another --out."
        )
    drawn = overlays(comparison)
    with files.disk_errors(out):
        (out / "figures").mkdir(parents=True, exist_ok=True)
    put = partial(_put, out)
    put("compare.parquet", to_bytes(frame_to_table(comparison.table)))
    put("compare.csv", to_csv(comparison.table).encode("utf-8", "backslashreplace"))
    put("compare.md", markdown(comparison).encode("utf-8", "backslashreplace"))
    put("compare.json", files.to_json(to_json(comparison)))
    there = {figure.name: figure for figure in drawn}
    for measure, _ in PROFILES:
        name = f"compare_{measure}"
        if name in there:
            put(f"figures/{name}.csv", to_csv(there[name].data).encode("utf-8", "backslashreplace"))
        else:
            # an earlier comparison's would pass for this one's
            (out / "figures" / f"{name}.csv").unlink(missing_ok=True)
    put("compare.html", render(comparison).encode("utf-8", "backslashreplace"))
    return out / "compare.html"


def _put(out: Path, name: str, data: bytes) -> None:
    files.write_bytes(out / name, data)


def terminal(tables: Sequence[TableOne]) -> list[list[dict[str, str]]]:
    """Table 1 for a terminal: * largest, _ smallest, (1) the first reason."""
    signs = {"largest": "*", "smallest": "_"}

    def cell(marked: Marked) -> str:
        sign = signs.get(marked.mark, "")
        return f"{sign}{on_screen(marked.text)}{sign}" + (
            f" ({marked.reason})" if marked.reason else ""
        )

    titles = ("emb", "mid", "last")
    return [
        [
            {"model": name, **dict(zip(titles, map(cell, cells), strict=True))}
            for name, cells in one.rows
        ]
        for one in tables
    ]
