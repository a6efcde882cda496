"""Sections as one HTML file: no network, no script but its own, nothing in it but what the store
holds.

    html = render(sections, frame)
    write(sections, frame, Path("out"))        # report.html, figures/*.{csv,svg}, tables/*.csv

Names, prompts and completions are strangers' text. jinja2 escapes all of it, every value passes
`text.clean` on its way out, and the page's own content security policy forbids requests and every
script but ours (by its hash, for sorting and choosing rows) even if that should fail. Without
scripts the page shows the same.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from auditgap.errors import UsageError
from auditgap.report import drawing, latex, pdf, summary, text
from auditgap.report.charts import Figure
from auditgap.report.columns import FITS, PAGE
from auditgap.report.frame import Frame
from auditgap.report.section import (
    Section,
    answer_text,
    at_the_top,
    figures_of,
    headline_text,
    shown,
    tables_in,
    tables_of,
)
from auditgap.store import files
from auditgap.store.tables import to_csv

#: Files of figures/ and tables/.
_TWINS = frozenset({".csv", ".svg", ".tex", ".pdf"})


def _finalize(value: Any) -> Any:
    """What the template prints, cleaned; markup made by our own drawing functions passes."""
    if hasattr(value, "__html__"):
        return value
    return text.NOT_MEASURED if text.is_null(value) else text.clean(value)


@lru_cache(maxsize=1)
def _script() -> Markup:
    """The page's own script: nothing of a run is in it, so its hash in the page's policy lets it
    run, and it alone."""
    script = resources.files("auditgap.report").joinpath("templates/report.js")
    return Markup(script.read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    """The templates."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("auditgap.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "headline": headline_text,
        "answer": answer_text,
        "kind": lambda block: type(block).__name__,
    }
    return made


@dataclass(frozen=True, slots=True)
class Copies:
    """What is written beside the page besides: its first screen as a page and as Markdown; each
    page and each figure as a PDF, and all figures as one, a sheet each; its tables as LaTeX."""

    summary: bool = False
    pdf: bool = False
    latex: bool = False

    @property
    def beside(self) -> list[str]:
        """The files that a reader looks for beside report.html."""
        texts = ["summary.html", "summary.md"] if self.summary else []
        pages = ["report.html", *texts[:1]] if self.pdf else []
        tables = ["tables/*.tex"] if self.latex else []
        return texts + [name.replace(".html", ".pdf") for name in pages] + tables


def render(sections: Sequence[Section], frame: Frame, *, is_summary: bool = False) -> str:
    """The page; of a summary the first screen alone."""
    digest = hashlib.sha256(_script().encode("utf-8")).digest()
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            frame=frame,
            sections=[] if is_summary else shown(sections),
            top=at_the_top(sections),
            script=_script(),
            fits=FITS,
            page=PAGE,
            script_hash=f"sha256-{base64.b64encode(digest).decode('ascii')}",
        )
    )


def write(
    sections: Sequence[Section],
    frame: Frame,
    home: Path,
    *,
    private: bool = False,
    copies: Copies = Copies(),
) -> Path:
    """Write the page and the data of its tables and figures into a folder, each file atomically;
    returns the page's path. `private`: the page is for its owner alone (0600).

    Raises UsageError when `home` is a file or a PDF cannot be made, DiskError when the disk is
    full.
    """
    if home.exists() and not home.is_dir():
        raise UsageError(
            f"{home} is a file; a report needs a folder, for report.html and figures/. Choose"
            " another name."
        )
    files.make_folder(home)
    drawn = [figure for figure in figures_of(sections).values() if not figure.missing]
    tables = {f"{n}.csv": to_csv(t) for n, t in tables_of(sections).items() if len(t)}
    if copies.latex:
        tables |= {f"{t.name}.tex": latex.table(t) for t in tables_in(sections) if len(t.data)}
    write_twins(figure_files(drawn), home / "figures")
    write_twins(tables, home / "tables")
    mode = files.PRIVATE if private else 0o666
    made = {"report.html": render(sections, frame)}
    if copies.summary:
        made["summary.html"] = render(sections, frame, is_summary=True)
        made["summary.md"] = summary.markdown(sections, frame)
    for name, said in made.items():
        files.write_bytes(home / name, said.encode("utf-8"), mode)
        if copies.pdf and name.endswith(".html"):
            pdf.write(home / name)
    if copies.pdf and drawn:
        for name, some in {"figures": drawn, **{one.name: [one] for one in drawn}}.items():
            sheets = home / "figures" / f"{name}.html"
            files.write_bytes(sheets, drawing.sheets(some).encode("utf-8"), mode)
            pdf.write(sheets)
            sheets.unlink()
    return home / "report.html"


def figure_files(figures: Sequence[Figure]) -> dict[str, str]:
    """What stands in figures/: of each its data and its drawing."""
    return {f"{f.name}.csv": to_csv(f.data) for f in figures} | {
        f"{f.name}.svg": drawing.svg(f) for f in figures if not f.missing
    }


def write_twins(made: Mapping[str, str], folder: Path) -> None:
    """Write the files of figures/ or tables/; those of an earlier report, which would pass for this
    one's, go."""
    files.make_folder(folder)
    for stale in folder.iterdir():
        if stale.suffix in _TWINS and stale.name not in made:
            stale.unlink()
    for name, said in made.items():
        files.write_bytes(folder / name, said.encode("utf-8", "backslashreplace"))
