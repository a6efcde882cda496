"""Figures as files of their own: an SVG that needs no page, and a PDF with one figure a page.

    drawing.svg(figure)          # '<svg xmlns=… viewBox="0 0 1068 300">…'
    drawing.sheets([figure])     # the page that Chromium prints as figures/figures.pdf

A page's drawings take their colours from its style sheet by variables, which drawing programs do
not read: here every rule has the values of a light page. Panels stand in rows under the name of
their subject, the legend below.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from auditgap.errors import UsageError
from auditgap.report.charts import Figure
from auditgap.report.svg import WIDTH, f
from auditgap.report.text import clean
from auditgap.store import files


@dataclass(frozen=True)
class Drawing:
    """A figure that a notebook shows."""

    figure: Figure

    @property
    def data(self) -> pd.DataFrame:
        """The numbers that it shows, for a plot of your own."""
        return self.figure.data

    def save(self, path: str | Path) -> Path:
        """Write it as an SVG file. Raises UsageError where nothing was measured, DiskError."""
        files.write_bytes(Path(path), self._repr_svg_().encode("utf-8", "backslashreplace"))
        return Path(path)

    def _repr_svg_(self) -> str:
        if self.figure.missing:
            raise UsageError(f"{self.figure.title}: {self.figure.missing}")
        return svg(self.figure)


@dataclass(frozen=True)
class Profile:
    """A measure by depth: `table` has a row a site, attack and budget."""

    figure: Figure

    @property
    def table(self) -> pd.DataFrame:
        return self.figure.data

    def plot(self) -> Drawing:
        """The figure of the report."""
        return Drawing(self.figure)


_GAP, _EDGE, _NAME, _ENTRY, _COLUMNS = 24, 12, 22, 18, 3
_ENTRIES = re.compile(r"<li>(<svg .*?</svg>)?<span>(.*?)</span></li>")
_VIEW = re.compile(r'<svg viewBox="0 0 (?P<width>[\d.]+) (?P<height>[\d.]+)"')


@lru_cache(maxsize=1)
def _style() -> str:
    """The page's rules for drawings, with the values of a light page in place of variables."""
    css = resources.files("auditgap.report").joinpath("templates/report.css").read_text("utf-8")
    root = css[: css.index("}")]
    known = dict(re.findall(r"--([\w-]+): ([^;]+);", root))
    kinds = {"ink": known["ink"]} | {
        k: known[name] for k, name in re.findall(r"\.(k\d) \{ --k: var\(--(c\d)\); \}", css)
    }

    def value(found: re.Match[str]) -> str:
        return known[found[1]]

    rules = []
    for selector, body in re.findall(r"^svg (\S[^{]*?) \{ ([^}]*)\}", css, re.MULTILINE):
        of_each = kinds if "var(--k)" in body else {"": ""}
        for kind, colour in of_each.items():
            names = re.sub(r"(\.\w+)", rf"\1.{kind}", selector, count=1) if kind else selector
            filled = re.sub(r"var\(--([\w-]+)\)", value, body.replace("var(--k)", colour))
            rules.append(f"{names} {{ {filled.strip()} }}")
    return "\n".join(rules).replace("svg .", ".")


def svg(figure: Figure) -> str:
    """The figure as one SVG document. Names in it are strangers' text, escaped where they were
    drawn."""
    parts: list[Markup] = []
    width, at = 0.0, float(_EDGE)
    for name, panels in figure.groups:
        if len(figure.groups) > 1:
            parts.append(_words(_EDGE, at + 12, name, "heading"))
            at += _NAME
        for start in range(0, len(panels), _COLUMNS):
            row = panels[start : start + _COLUMNS]
            sizes = [_VIEW.match(panel) for panel in row]
            heights = [float(size["height"]) for size in sizes if size]
            for column, (panel, height) in enumerate(zip(row, heights, strict=True)):
                left = _EDGE + column * (WIDTH + _GAP)
                parts.append(_placed(panel, left, at, height))
                width = max(width, left + WIDTH + _EDGE)
            at += max(heights, default=0.0) + _GAP
    for sample, words in _legend(figure.legend):
        if sample:
            parts.append(Markup(sample.replace("<svg ", f'<svg x="{_EDGE}" y="{f(at)}" ', 1)))
        parts.append(_words(_EDGE + 36, at + 10, words))
        at += _ENTRY
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}"'
        ' role="img"><title>{title}</title><style>{style}</style>'
        '<rect width="100%" height="100%" fill="#fff"/>{body}</svg>\n'
    ).format(
        w=f(width or WIDTH),
        h=f(at + _EDGE),
        title=clean(figure.title),
        style=Markup(_style()),
        body=Markup("").join(parts),
    )


def _placed(panel: Markup, left: float, top: float, height: float) -> Markup:
    """A panel inside the drawing."""
    size = f'<svg x="{f(left)}" y="{f(top)}" width="{WIDTH}" height="{f(height)}" '
    return Markup(str(panel).replace("<svg ", size, 1))


def _words(left: float, base: float, words: str, css: str = "") -> Markup:
    return Markup('<text x="{}" y="{}" class="{}">{}</text>').format(
        f(left), f(base), css, clean(words)
    )


def _legend(legend: str) -> Iterator[tuple[str, str]]:
    """Each entry's sample and words, as `svg.legend` wrote them."""
    for sample, words in _ENTRIES.findall(legend):
        yield sample, Markup(words).unescape()


_SIZE = re.compile(r'width="([\d.]+)" height="([\d.]+)"')


def sheets(figures: Sequence[Figure]) -> str:
    """A page that prints as one sheet a figure, each cut to its size."""
    rules, shown = [], []
    for n, drawn in enumerate(map(svg, figures)):
        size = _SIZE.search(drawn)
        width, height = size.groups() if size else (WIDTH, WIDTH)
        rules.append(
            f"@page p{n} {{ size: {width}px {height}px; margin: 0 }} .p{n} {{ page: p{n} }}"
        )
        shown.append(f'<div class="p{n}">{drawn}</div>')
    style = "body { margin: 0 } div { break-inside: avoid } svg { display: block }"
    head = f"<!doctype html><meta charset=utf-8><style>{style} {' '.join(rules)}</style>"
    return head + "".join(shown)
