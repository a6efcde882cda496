"""Figures as values, and the four forms that every one of them is drawn in.

    lines([Series([Point(0, .1), Point(15, .7, lo=.5, hi=.9)], STYLES[0])], x, y, title=…, desc=…, key=…)
    dots([DotRow("maths", [Dot(.2, .1, .4, STYLES[1])], reading="2")], x, title=…, desc=…, key=…)
    bars([Bar(0, 1, 3.2, 2.8, 3.9, STYLES[3])], x, y, title=…, desc=…, key=…)
    heat(["a", "b"], ["a", "b"], {("a", "b"): -.31}, top=1.0, title=…, desc=…, key=…)

A form takes numbers and words and gives one drawing. A null is never drawn: it breaks a line, and
is words in a row, under a bar or in a square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pandas as pd
from markupsafe import Markup

from auditgap.report import svg
from auditgap.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, Scale, Style
from auditgap.report.text import NOT_MEASURED, is_null, percent, shorten
from auditgap.store.tables import rows_of

Groups = tuple[tuple[str, tuple[Markup, ...]], ...]
_DASHED = Markup('<path class="axis" stroke-dasharray="4 3" d="{}"/>')
_INK = Style("ink", "", "")


@dataclass(frozen=True)
class Figure:
    """Drawings grouped by subject, their legend, and the data they show (`figures/<name>.csv`);
    `missing` says why there is nothing to draw."""

    name: str
    title: str
    caption: str = ""
    groups: Groups = ()
    legend: str = ""
    data: pd.DataFrame = field(default_factory=pd.DataFrame)
    missing: str = ""

    @property
    def is_flat(self) -> bool:
        """Whether each subject has one drawing, so that they stand side by side."""
        return len(self.groups) > 1 and all(len(panels) == 1 for _, panels in self.groups)


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: its ends, its name, and where which ticks stand."""

    lo: float
    hi: float
    label: str = ""
    ticks: Sequence[tuple[float, str]] = ()
    log: bool = False

    def scale(self, start: float, stop: float) -> Scale:
        return Scale(self.lo, self.hi, start, stop, self.log)


def shares(label: str, at: Sequence[float] = (0, 0.25, 0.5, 0.75, 1)) -> Axis:
    """From none to all."""
    return Axis(0.0, 1.0, label, [(v, percent(v)) for v in at])


def numbers(
    lo: float, hi: float, label: str, form: Callable[[float], str] = "{:g}".format, count: int = 4
) -> Axis:
    """About `count` round numbers between the ends."""
    return Axis(lo, hi, label, [(v, form(v)) for v in svg.ticks(lo, hi, count)])


def top_of(table: pd.DataFrame, columns: Sequence[str]) -> float:
    """The largest value of these columns; 1 where there is none above 0."""
    return max([float(v) for c in columns for v in table[c].dropna()], default=0.0) or 1.0


# -- lines with bands
# -------------------------------------------------------------------------------------------------


class Spread(Enum):
    """How the intervals of a series are drawn."""

    NONE = "not"
    BAND = "as one band"
    WHISKERS = "as a whisker a point"


@dataclass(frozen=True, slots=True)
class Point:
    """A measured value with its interval; a point with a `tip` has a marker, `name` stands beside
    it."""

    x: float
    y: float | None
    lo: float | None = None
    hi: float | None = None
    tip: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """Points from left to right in one style; not `joined`, they are markers alone."""

    points: Sequence[Point]
    style: Style
    spread: Spread = Spread.BAND
    size: float = 3.2  #: of markers
    joined: bool = True
    stepped: bool = False  #: a right-continuous step function, as a survival curve


def points_of(
    table: pd.DataFrame, along: str, column: str, tip: Callable[[dict[str, Any]], str]
) -> list[Point]:
    """A table's rows from left to right, with the ends in `column`_lo and `column`_hi."""
    lo, hi = f"{column}_lo", f"{column}_hi"
    return [
        Point(
            float(row[along]),
            row[column],
            row[lo],
            row[hi],
            "" if is_null(row[column]) else tip(row),
        )
        for row in rows_of(table.sort_values(along, kind="stable"))
    ]


def lines(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    title: str,
    desc: str,
    key: str,
    heading: str = "",
    guides: Sequence[float] = (),
    diagonal: bool = False,
) -> Markup:
    """Series over one axis, the last one on top; `guides` are dashed at these heights, `diagonal`
    where both axes are alike."""
    across, up = x.scale(LEFT, RIGHT), y.scale(BOTTOM, TOP)
    parts = [svg.axes(across, up, x.ticks, y.ticks, x.label, y.label)]
    parts += [_DASHED.format(f"M{LEFT} {svg.f(up(v))}H{RIGHT}") for v in guides]
    lo, hi = max(x.lo, y.lo), min(x.hi, y.hi)
    if diagonal and lo < hi:
        ends = (svg.f(v) for v in (across(lo), up(lo), across(hi), up(hi)))
        parts.append(_DASHED.format("M{} {}L{} {}".format(*ends)))
    for one in series:
        if one.spread == Spread.BAND:
            lows, highs = [(p.x, p.lo) for p in one.points], [(p.x, p.hi) for p in one.points]
            if one.stepped:
                lows, highs = svg.steps(lows), svg.steps(highs)
            limits = [(a, b, c) for (a, b), (_, c) in zip(lows, highs, strict=True)]
            parts.append(svg.band(limits, across, up, one.style))
    for one in series:
        parts += _marks(one, across, up)
    parts += _names([p for one in series for p in one.points if p.name], across, up)
    return svg.draw(parts, title=title, desc=desc, key=key, heading=heading)


def _marks(one: Series, across: Scale, up: Scale) -> Iterator[Markup]:
    values = [(p.x, p.y) for p in one.points]
    if one.joined:
        yield svg.line(svg.steps(values) if one.stepped else values, across, up, one.style)
    for p in one.points:
        if p.y is None or is_null(p.y):
            continue
        if one.spread == Spread.WHISKERS and not (is_null(p.lo) or is_null(p.hi)):
            yield svg.whisker(across(p.x), up(p.lo or 0.0), up(p.hi or 0.0), one.style)
        if p.tip:
            yield svg.marker(across(p.x), up(p.y), one.style, p.tip, one.size)


def _names(points: Iterable[Point], across: Scale, up: Scale) -> Iterator[Markup]:
    """The points' names, towards the middle of the drawing; none lies on another."""
    taken: list[tuple[float, bool]] = []
    for p in sorted(points, key=lambda p: p.y or 0.0):
        a, line = across(p.x), up(p.y or 0.0) + 4
        right = a < (LEFT + RIGHT) / 2
        while any(abs(line - other) < 11 and right == side for other, side in taken):
            line -= 11
        taken.append((line, right))
        where = (a + 7, line) if right else (a - 7, line)
        yield svg.text(*where, shorten(p.name, 22), "tick", "start" if right else "end")


# -- dots with intervals
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dot:
    """A value with its interval; `lift` moves the whisker off the row's middle, so that two do not
    lie on each other."""

    value: float | None
    lo: float | None
    hi: float | None
    style: Style
    tip: str = ""
    size: float = 4.0
    lift: float = 0.0


@dataclass(frozen=True, slots=True)
class DotRow:
    """One row: its name to the left, its dots, and to the right a reading with its interval under
    it; `null` are the words where there is no dot to draw. A row without dots and words is a
    heading."""

    label: str
    dots: Sequence[Dot] = ()
    reading: str = ""
    ends: str = ""
    null: str = ""
    height: float = 36.0
    css: str = "tick"


def dots(
    rows: Sequence[DotRow],
    x: Axis,
    *,
    title: str,
    desc: str,
    key: str,
    heading: str = "",
    left: float = 14,
    right: float = RIGHT - 12,
    columns: tuple[str, str] = ("", ""),
) -> Markup:
    """Rows below one another over one axis from `left` to `right`; dots of a row with two are
    joined. `columns` name what stands to the left and to the right."""
    top = TOP + 4
    bottom = top + sum(row.height for row in rows)
    across, up = x.scale(left, right), Scale(0.0, 1.0, bottom, TOP - 6)
    parts = [svg.axes(across, up, x.ticks, [], x.label, "")]
    parts += [
        Markup('<path class="grid" d="M{} {}V{}"/>').format(svg.f(across(v)), svg.f(bottom), TOP)
        for v, _ in x.ticks
    ]
    side = TOP + 2 if heading else 12
    for words, at, anchor in ((columns[0], 4, "start"), (columns[1], RIGHT, "end")):
        parts += [svg.text(at, side, words, "label", anchor)] if words else []
    for row in rows:
        parts += _row(row, top + row.height / 2, across)
        top += row.height
    return svg.draw(parts, title=title, desc=desc, key=key, heading=heading, height=bottom + 42)


def _row(row: DotRow, at: float, x: Scale) -> Iterator[Markup]:
    if row.label:
        yield svg.text(4, at + 4, row.label, row.css)
    known = [dot for dot in row.dots if dot.value is not None and not is_null(dot.value)]
    if row.null and len(known) < max(1, len(row.dots)):
        yield svg.text(x((x.lo + x.hi) / 2), at + 4, row.null, "tick null", "middle")
        return
    ends = [x(dot.value or 0.0) for dot in known]
    if len(ends) == 2:
        join = Markup('<path class="gapbar" d="M{} {}H{}"/>')
        yield join.format(svg.f(ends[1]), svg.f(at), svg.f(ends[0]))
    for dot, middle in zip(known, ends, strict=True):
        if not (is_null(dot.lo) or is_null(dot.hi)):
            limits = x(dot.lo or 0.0), x(dot.hi or 0.0)
            yield svg.whisker(at + dot.lift, *limits, dot.style, across=True)
        yield svg.marker(middle, at, dot.style, dot.tip, dot.size)
    if row.reading:
        yield svg.text(RIGHT, at if row.ends else at + 4, row.reading, "value", "end")
    if row.ends:
        yield svg.text(RIGHT, at + 13, row.ends, "tick", "end")


# -- bars
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bar:
    """A value between two places of the axis, with its interval."""

    left: float
    right: float
    value: float | None
    lo: float | None = None
    hi: float | None = None
    style: Style = _INK
    tip: str = ""


def bars(
    items: Sequence[Bar], x: Axis, y: Axis, *, title: str, desc: str, key: str, heading: str = ""
) -> Markup:
    """Bars from 0. A measured 0 leaves a line; nothing measured leaves words."""
    across, up = x.scale(LEFT, RIGHT), y.scale(BOTTOM, TOP)
    parts = [svg.axes(across, up, x.ticks, y.ticks, x.label, y.label)]
    for item in items:
        parts += _bar(item, across, up)
    return svg.draw(parts, title=title, desc=desc, key=key, heading=heading, height=HEIGHT)


def _bar(item: Bar, across: Scale, up: Scale) -> Iterator[Markup]:
    left, right = across(item.left) + 0.5, across(item.right) - 0.5
    middle, floor = (left + right) / 2, up(0)
    if item.value is None or is_null(item.value):
        yield Markup(
            '<text class="tick null" transform="translate({} {}) rotate(-90)">{}</text>'
        ).format(svg.f(middle + 3.5), svg.f(floor - 4), NOT_MEASURED)
        return
    height = max(floor - up(item.value), 1.0)
    yield Markup('<g class="bar {}">{}<rect x="{}" y="{}" width="{}" height="{}"/></g>').format(
        item.style.css,
        svg.tooltip(item.tip),
        *map(svg.f, (left, floor - height, right - left, height)),
    )
    if not (is_null(item.lo) or is_null(item.hi)):
        yield svg.whisker(middle, up(item.lo or 0.0), up(item.hi or 0.0), _INK, cap=2.5)


# -- heat maps
# -------------------------------------------------------------------------------------------------


def heat(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[str, str], float | None],
    *,
    form: Callable[[float], str],
    top: float,
    title: str,
    key: str,
    heading: str,
) -> Markup:
    """A grid of numbers on blue (above 0) or red (below), the deeper the nearer to ±`top`; what is
    not known stays blank. A column's number is its place in the rows, so that no word is turned."""
    left = 116.0
    width = min(44.0, (RIGHT - left) / len(columns))
    height, at = min(width, 30.0), TOP + 8
    parts = [
        svg.text(left + width * (j + 0.5), TOP + 2, f"{j + 1}", "tick", "middle")
        for j in range(len(columns))
    ]
    for i, mine in enumerate(rows):
        y = at + height * i
        parts.append(svg.text(4, y + height / 2 + 4, f"{i + 1} {shorten(mine, 16)}", "tick"))
        for j, other in enumerate(columns):
            box = (left + width * j, y, width, height)
            parts += _square(values.get((mine, other)), f"{mine}, {other}", box, form, top)
    said = [
        f"{a} and {b}: {form(v)}" for (a, b), v in values.items() if not (v is None or is_null(v))
    ]
    return svg.draw(
        parts,
        title=f"{title}, {heading}",
        desc="; ".join(said),
        key=key,
        heading=heading,
        height=at + height * len(rows) + 8,
    )


def _square(
    value: float | None,
    what: str,
    box: tuple[float, float, float, float],
    form: Callable[[float], str],
    top: float,
) -> Iterator[Markup]:
    x, y, width, height = box
    inside = [svg.f(v) for v in (x + 0.75, y + 0.75, width - 1.5, height - 1.5)]
    shape = Markup(
        '<rect class="{}" fill-opacity="{}" x="{}" y="{}" width="{}" height="{}">{}</rect>'
    )
    if value is None or is_null(value):
        yield shape.format("blank", "1", *inside, svg.tooltip(f"{what}: {NOT_MEASURED}"))
        return
    depth = min(1.0, abs(float(value)) / top)
    css = "bar k1" if float(value) >= 0 else "bar k0"
    tip = svg.tooltip(f"{what}: {form(value)}")
    yield shape.format(css, svg.f(0.06 + 0.94 * depth), *inside, tip)
    small, ink = " small" if width < 30 else "", " onheat" if depth > 0.6 else ""
    line = y + height / 2 + (3 if small else 4)
    yield svg.text(x + width / 2, line, form(value), f"heat{small}{ink}", "middle")
