r"""Tables of a report as LaTeX, as they are read on the page; they need the package booktabs.

    latex.table(block)      # '\begin{tabular}{lrr}\n\toprule\n…'

Cells are strangers' text: every character that LaTeX reads as more than itself is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

from auditgap.report.columns import DisplayTable
from auditgap.report.section import Table
from auditgap.report.text import clean

_SIGNS = str.maketrans(
    {
        **{mark: f"\\{mark}" for mark in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
        "[": "{[}",  # behind \\ a bracket would be a distance
        "]": "{]}",
        "\n": " ",
        "\u00a0": "~",
        "\u2009": r"\,",
        "–": "--",
        "—": "---",
        "‘": "`",
        "’": "'",
        "“": "``",
        "”": "''",
        "…": r"\dots{}",
        **{
            sign: f"$\\{name}$"
            for sign, name in {
                **{"ε": "varepsilon", "κ": "kappa", "δ": "delta", "Δ": "Delta", "α": "alpha"},
                **{"η": "eta", "ρ": "rho", "×": "times", "≤": "le", "≥": "ge", "∞": "infty"},
                **{"→": "rightarrow", "·": "cdot", "‖": "|", "✓": "checkmark"},
            }.items()
        },
        "−": "$-$",
        "′": "$'$",
        "₂": "$_2$",
        "²": "$^2$",
    }
)


def table(block: Table) -> str:
    """A table with its groups below each other; one that has other columns in a group is several."""
    parts = block.parts
    if not parts:
        return ""
    if len({part.titles for _, part in parts}) == 1:
        return _tabular(parts)
    return "\n".join(_tabular([part]) for part in parts)


def _tabular(parts: list[tuple[str, DisplayTable]]) -> str:
    first = parts[0][1]
    aligned = "".join("r" if numeric else "l" for numeric in first.numeric)
    lines = [f"\\begin{{tabular}}{{{aligned}}}", r"\toprule", _row(first.titles), r"\midrule"]
    for n, (name, part) in enumerate(parts):
        if name:
            lines += [r"\midrule"] if n else []
            lines.append(
                f"\\multicolumn{{{len(aligned)}}}{{l}}{{\\textbf{{{escaped(name)}}}}} \\\\"
            )
        lines += [_row(cell.text for cell in row) for row in part.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _row(cells: Iterable[str]) -> str:
    return " & ".join(map(escaped, cells)) + r" \\"


def escaped(words: str) -> str:
    """Text that LaTeX sets and does not run."""
    said = words.striptags() if isinstance(words, Markup) else words
    return clean(said).translate(_SIGNS)
