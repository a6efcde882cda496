"""Small SVG drawings made of plain values: scales, axes, lines with bands, whiskers, markers,
steps.

A drawing is an inline `<svg>` 340 units wide, so that it can be read on a telephone without
shrinking; pages lay several side by side. Colours and dashes come from the page's style sheet
through classes `k0` … `k7`, so one drawing serves a light page, a dark page and paper:

    x, y = Scale(0, 29, LEFT, RIGHT), Scale(0, 1, BOTTOM, TOP)
    draw([axes(x, y, …), line([(0, .1), (15, .7)], x, y, STYLES[0])], title="ASR by depth", desc="…", key="asr0")
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from auditgap.report.text import clean, is_null

WIDTH, HEIGHT = 340, 232
LEFT, RIGHT, TOP, BOTTOM = 42, 332, 26, 188


@dataclass(frozen=True, slots=True)
class Style:
    """One series' look: class (colour), dash pattern and marker, so that colour is never the only
    difference."""

    css: str
    dash: str
    marker: str


STYLES: tuple[Style, ...] = (
    Style("k0", "", "circle"),
    Style("k1", "6 3", "square"),
    Style("k2", "2 3", "triangle"),
    Style("k3", "8 3 2 3", "diamond"),
    Style("k4", "4 2", "cross"),
    Style("k5", "1 2", "circle"),
    Style("k6", "10 4", "square"),
    Style("k7", "3 5", "triangle"),
)


#: Where colours say which subject: the first two are those of a base and of what was made of it.
SUBJECT_STYLES = tuple(STYLES[i] for i in (1, 0, 3, 4, 5, 6, 7, 2))


@dataclass(frozen=True, slots=True)
class Scale:
    """Data [lo, hi] to drawing units [start, stop]; values outside are held at the edge."""

    lo: float
    hi: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        lo, hi, value = (
            math.log(max(v, 1e-300)) if self.log else v for v in (self.lo, self.hi, value)
        )
        share = 0.5 if hi == lo else (value - lo) / (hi - lo)
        return self.start + min(max(share, 0.0), 1.0) * (self.stop - self.start)


def ticks(lo: float, hi: float, count: int = 5) -> list[float]:
    """About `count` round values (1, 2, 2.5, 5 × 10ⁿ) inside [lo, hi]."""
    if not hi > lo:
        return [lo]
    raw = (hi - lo) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(lo: float, hi: float, most: int = 6) -> list[float]:
    """Round values for a logarithmic axis: 1, 2, 5 × 10ⁿ when they fit, else powers of ten."""
    decades = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
    for multiples in ((1, 2, 5), (1, 3), (1,)):
        found = [
            m * 10.0**d
            for d in decades
            for m in multiples
            if lo * (1 - 1e-9) <= m * 10.0**d <= hi * (1 + 1e-9)
        ]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def f(value: float) -> str:
    """A coordinate: two decimals, no trailing zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{f(a)} {f(b)}" for a, b in points)


def segments(values: Sequence[tuple[float, object]]) -> list[list[tuple[float, float]]]:
    """Runs of neighbouring measured values: a null breaks the line, it is never bridged and never
    drawn as 0."""
    runs: list[list[tuple[float, float]]] = [[]]
    for a, b in values:
        if is_null(b):
            runs.append([])
        else:
            runs[-1].append((a, float(b)))  # type: ignore[arg-type]
    return [run for run in runs if run]


def line(values: Sequence[tuple[float, object]], x: Scale, y: Scale, style: Style) -> Markup:
    """A broken line through the measured values."""
    dash = Markup(' stroke-dasharray="{}"').format(style.dash) if style.dash else Markup("")
    return Markup("").join(
        Markup('<path class="line {}" d="{}"{}/>').format(
            style.css, _path((x(a), y(b)) for a, b in run), dash
        )
        for run in segments(values)
        if len(run) > 1
    )


def band(
    values: Sequence[tuple[float, object, object]], x: Scale, y: Scale, style: Style
) -> Markup:
    """The area between lower and upper limits; broken where either is null."""
    runs: list[list[tuple[float, float, float]]] = [[]]
    for a, lo, hi in values:
        if is_null(lo) or is_null(hi):
            runs.append([])
        else:
            runs[-1].append((a, float(lo), float(hi)))  # type: ignore[arg-type]
    shapes = []
    for run in (run for run in runs if len(run) > 1):
        there = [(x(a), y(hi)) for a, _, hi in run]
        back = [(x(a), y(lo)) for a, lo, _ in reversed(run)]
        shapes.append(
            Markup('<path class="band {}" d="{}Z"/>').format(style.css, _path(there + back))
        )
    return Markup("").join(shapes)


def steps(values: Sequence[tuple[float, object]]) -> list[tuple[float, object]]:
    """The corners of a right-continuous step function through (x, y), for a survival curve."""
    corners: list[tuple[float, object]] = []
    for a, b in values:
        if corners:
            corners.append((a, corners[-1][1]))
        corners.append((a, b))
    return corners


def marker(a: float, b: float, style: Style, tip: str = "", r: float = 3.2) -> Markup:
    """A marker at drawing coordinates (a, b), with its reading as a tooltip."""
    shape = {
        "circle": Markup('<circle cx="{0}" cy="{1}" r="{2}"/>').format(f(a), f(b), f(r)),
        "square": (
            Markup('<rect x="{}" y="{}" width="{s}" height="{s}"/>').format(
                f(a - r), f(b - r), s=f(2 * r)
            )
        ),
        "triangle": (
            Markup('<path d="M{} {}l{} {}h-{}Z"/>').format(
                f(a), f(b - 1.2 * r), f(1.2 * r), f(2.1 * r), f(2.4 * r)
            )
        ),
        "diamond": (
            Markup('<path d="M{0} {1}l{2} {2}l-{2} {2}l-{2} -{2}Z"/>').format(
                f(a), f(b - 1.3 * r), f(1.3 * r)
            )
        ),
        "cross": (
            Markup('<path class="thin" d="M{} {}l{s} {s}m0 -{s}l-{s} {s}"/>').format(
                f(a - r), f(b - r), s=f(2 * r)
            )
        ),
    }[style.marker]
    return Markup('<g class="mark {}">{}{}</g>').format(style.css, tooltip(tip), shape)


def whisker(
    a: float, lo: float, hi: float, style: Style, *, across: bool = False, cap: float = 3
) -> Markup:
    """An interval in drawing units: upright at x = a, or lying at y = a when `across`."""
    if across:
        d = (
            f"M{f(lo)} {f(a - cap)}v{f(2 * cap)}M{f(lo)} {f(a)}H{f(hi)}M{f(hi)}"
            f" {f(a - cap)}v{f(2 * cap)}"
        )
    else:
        d = (
            f"M{f(a - cap)} {f(lo)}h{f(2 * cap)}M{f(a)} {f(lo)}V{f(hi)}M{f(a - cap)}"
            f" {f(hi)}h{f(2 * cap)}"
        )
    return Markup('<path class="whisker {}" d="{}"/>').format(style.css, d)


def text(a: float, b: float, words: object, css: str = "", anchor: str = "start") -> Markup:
    return Markup('<text x="{}" y="{}" class="{}" text-anchor="{}">{}</text>').format(
        f(a), f(b), css, anchor, clean(words)
    )


def tooltip(words: str) -> Markup:
    return Markup("<title>{}</title>").format(clean(words)) if words else Markup("")


def axes(
    x: Scale,
    y: Scale,
    xticks: Sequence[tuple[float, str]],
    yticks: Sequence[tuple[float, str]],
    xlabel: str,
    ylabel: str,
) -> Markup:
    """Gridlines, tick labels and axis names; `ylabel` stands above the axis, upright, where it can
    be read."""
    left, right = min(x.start, x.stop), max(x.start, x.stop)
    bottom = max(y.start, y.stop)
    parts = []
    for value, label in yticks:
        at = y(value)
        parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(f(left), f(at), f(right)))
        parts.append(text(left - 6, at + 3.5, label, "tick", "end"))
    for value, label in xticks:
        at = x(value)
        parts.append(Markup('<path class="axis" d="M{} {}v4"/>').format(f(at), f(bottom)))
        parts.append(text(at, bottom + 16, label, "tick", "middle"))
    parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(f(left), f(bottom), f(right)))
    parts.append(text((left + right) / 2, bottom + 34, xlabel, "label", "middle"))
    if ylabel:
        parts.append(text(4, 12, ylabel, "label"))
    return Markup("").join(parts)


def draw(
    parts: Iterable[Markup],
    *,
    title: str,
    desc: str,
    key: str,
    heading: str = "",
    height: float = HEIGHT,
) -> Markup:
    """One `<svg>` with its accessible name and description; `key` makes their ids unique on the
    page."""
    label = text(RIGHT, 12, heading, "heading", "end") if heading else Markup("")
    return Markup(
        '<svg viewBox="0 0 {w} {h}" role="img" aria-labelledby="{k}-t {k}-d"><title'
        ' id="{k}-t">{title}</title><desc id="{k}-d">{desc}</desc>{label}{body}</svg>'
    ).format(
        w=WIDTH,
        h=f(height),
        k=key,
        title=clean(title),
        desc=clean(desc),
        label=label,
        body=Markup("").join(parts),
    )


def swatch(style: Style, *, filled: bool = False) -> Markup:
    """The sample of a series in a legend."""
    if filled:
        body = Markup('<rect class="bar {}" x="6" y="1" width="16" height="10"/>').format(style.css)
    else:
        dash = Markup(' stroke-dasharray="{}"').format(style.dash) if style.dash else Markup("")
        body = Markup('<path class="line {}" d="M0 6H28"{}/>').format(style.css, dash) + marker(
            14, 6, style
        )
    return Markup(
        '<svg class="swatch" viewBox="0 0 28 12" width="28" height="12" aria-hidden="true">{}</svg>'
    ).format(body)


def legend(entries: Iterable[tuple[Style, str]], *, filled: bool = False) -> Markup:
    """The legend as a list of words beside samples: it wraps on a narrow page, which text inside an
    SVG cannot."""
    items = Markup("").join(
        Markup("<li>{}<span>{}</span></li>").format(swatch(style, filled=filled), clean(words))
        for style, words in entries
    )
    return Markup('<ul class="legend">{}</ul>').format(items) if items else Markup("")
