"""Figures and tables outside a page: strangers' names are text in SVG and in LaTeX."""

import re
from xml.etree import ElementTree

import pandas as pd
import pytest
from markupsafe import Markup

from auditgap.audits import pages
from auditgap.errors import UsageError
from auditgap.report import drawing, latex, pdf, svg
from auditgap.report.charts import Figure
from auditgap.report.columns import count, word
from auditgap.report.page import Copies
from auditgap.report.section import Table

HOSTILE = "</text><script>alert(1)</script> \\input{/etc/passwd} & 50% of $x_1^2$ {~}"


def figure(*names: str) -> Figure:
    panel = svg.draw([], title="ASR", desc=HOSTILE, key="k")
    legend = svg.legend((svg.STYLES[0], name) for name in names)
    return Figure("asr", HOSTILE, groups=tuple((n, (panel,) * 4) for n in names), legend=legend)


def test_names_in_a_drawing_are_text():
    source = drawing.svg(figure("base", HOSTILE))
    root = ElementTree.fromstring(source)
    assert not [node for node in root.iter() if node.tag.endswith("script")]
    words = [node.text for node in root.iter() if node.tag.endswith("}text")]
    assert words.count("base") == words.count(HOSTILE) == 2, "over its panels and in the legend"
    boxes = [
        tuple(float(node.get(side)) for side in ("x", "y"))
        for node in root
        if "aria-labelledby" in node.attrib
    ]
    assert len(set(boxes)) == 8, "no panel lies on another"
    assert max(x for x, _ in boxes) + svg.WIDTH < float(root.get("width"))


def test_a_drawing_of_nothing_says_so(tmp_path):
    with pytest.raises(UsageError, match="ASR: no attack ran"):
        drawing.Drawing(Figure("asr", "ASR", missing="no attack ran")).save(tmp_path / "a.svg")


def test_cells_of_a_latex_table_are_text():
    rows = pd.DataFrame({"model": ["base", HOSTILE], "n": [3, 4]})
    said = latex.table(Table("t", "T", rows, [word("model", "Model, ε"), count("n")]))
    assert said.startswith("\\begin{tabular}{lr}\n\\toprule\nModel, $\\varepsilon$ & N \\\\\n")
    line = next(line for line in said.splitlines() if "script" in line)
    commands = set(re.findall(r"\\[a-z]+", line))
    assert commands == {
        *("\\textless", "\\textgreater", "\\textbackslash", "\\textasciitilde"),
        "\\textasciicircum",
    }
    assert line.count(" & ") == 1 and line.endswith(" & 4 \\\\") and "\\%" in line
    assert latex.escaped(Markup("<b>a</b>[1]")) == "a{[}1{]}"


def test_a_report_as_latex_and_its_figures_on_paper(toy_run, tmp_path):
    run = toy_run(tmp_path / "run")
    browser = True
    try:
        pdf.browser()
    except UsageError:
        browser = False
    pages.write([run], out=tmp_path / "both", copies=Copies(pdf=browser, latex=True))
    made = {path.name for path in (tmp_path / "both" / "tables").iterdir()}
    assert {"audit_gap.tex", "audit_gap.csv", "lvs.csv"} <= made
    said = (tmp_path / "both" / "tables" / "audit_gap.tex").read_text("utf-8")
    assert said.count("\\begin{tabular}") == said.count("\\bottomrule") == 1 and "{[}" in said
    sheets = tmp_path / "both" / "figures" / "figures.pdf"
    if browser:
        drawn = len(list(sheets.parent.glob("*.svg")))
        assert len(re.findall(rb"/Type\s*/Page\b", sheets.read_bytes())) == drawn > 1
        each = {path.stem for path in sheets.parent.glob("*.pdf")} - {"figures"}
        assert each == {path.stem for path in sheets.parent.glob("*.svg")}
        alone = (sheets.parent / "lvs_by_depth.pdf").read_bytes()
        assert len(re.findall(rb"/Type\s*/Page\b", alone)) == 1
    pages.write([run], out=tmp_path / "both")  # without them: those of before do not stay
    assert not list((tmp_path / "both").rglob("*.tex")) and not sheets.exists()
    assert not list(sheets.parent.glob("*.html"))
