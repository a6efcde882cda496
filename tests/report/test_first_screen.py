"""The first screen of every page, and each page in a real browser, on a desk and on a telephone:
nothing of it is cropped."""

from __future__ import annotations

import html
import re
import subprocess

import pytest
from test_page import CHROMIUM, Page, browser

from auditgap.audits import pages
from auditgap.errors import UsageError
from auditgap.report import pdf
from auditgap.report.page import Copies
from auditgap.report.text import short_names
from auditgap.store import RunFolder

WIDTHS = (1280, 390)
#: Says of every frame which boxes hold more than they show, which words of a table's cells are broken
#: over two lines, and of how many tables it looked at.
MEASURE = """<!doctype html><body>{frames}<p id="out"></p><script>window.onload = () => {{
  const said = [];
  for (const frame of document.querySelectorAll("iframe")) {{
    const page = frame.contentDocument, boxes = [...page.querySelectorAll(".scroll, .formula, pre"), page.documentElement];
    for (const box of boxes) if (box.scrollWidth > box.clientWidth)
      said.push(`${{frame.title}}: ${{box.getAttribute("aria-label") || box.className || box.tagName}} ${{box.scrollWidth}} > ${{box.clientWidth}}`);
    for (const cell of page.querySelectorAll("td.word")) if (getComputedStyle(cell).display === "table-cell") {{
      const texts = page.createTreeWalker(cell, NodeFilter.SHOW_TEXT), range = page.createRange();
      while (texts.nextNode()) for (const word of texts.currentNode.data.matchAll(/[\\p{{L}}\\p{{N}}_]{{2,30}}/gu)) {{
        range.setStart(texts.currentNode, word.index);
        range.setEnd(texts.currentNode, word.index + word[0].length);
        if (new Set([...range.getClientRects()].map(box => box.top)).size > 1) said.push(`${{frame.title}}: ${{word[0]}} is broken`);
      }}
    }}
    const row = page.querySelector("#first .verdicts tbody tr");
    if (row) said.push(`${{frame.title}} has verdicts laid out as ${{getComputedStyle(row).display}}, and tables`);
    said.push(`${{frame.title}} has ${{page.querySelectorAll(".scroll > table").length}} tables`);
  }}
  document.getElementById("out").textContent = said.join("\\n");
}}</script></body>"""


def measured(pages, tmp_path) -> list[str]:
    frames = "".join(
        f'<iframe title="{name} at {width}" style="border:0;width:{width}px;height:800px"'
        f' src="{path.as_uri()}"></iframe>'
        for name, path in pages.items()
        for width in WIDTHS
    )
    harness = tmp_path / "harness.html"
    harness.write_text(MEASURE.format(frames=frames), "utf-8")
    command = [*browser(tmp_path), "--virtual-time-budget=5000", "--dump-dom", harness.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return html.unescape(re.search(r'<p id="out">([^<]*)</p>', done.stdout)[1]).splitlines()


@pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium on this machine, so the pages cannot be tried in a browser",
)
def test_no_table_is_cropped_at_any_width(every_page, tmp_path):
    wide = tmp_path / "wide.html"  # the harness notices a table that is
    wide.write_text(
        '<!doctype html><div class="scroll" style="overflow:auto"><table><td>'
        f'{"x" * 400}</table></div><table><td class="word" style="max-width:3rem;word-break:break-all">'
        "a_long_word",
        "utf-8",
    )
    said = measured({**every_page, "bad": wide}, tmp_path)
    counted = {line.partition(" at ")[0]: line for line in said if line.endswith(" tables")}
    laid = {line for line in said if line.startswith("whole at ") and "laid out" in line}
    assert laid == {  # on a telephone the verdicts are cards
        f"whole at {width} has verdicts laid out as {form}, and tables"
        for width, form in ((1280, "table-row"), (390, "grid"))
    }
    assert counted.keys() == {*every_page, "bad"}
    assert all(" has 0 " not in line for line in counted.values()), counted
    cropped = [line for line in said if not line.endswith(" tables")]
    assert [line for line in cropped if not line.startswith("bad")] == []
    bad = [line for line in cropped if line.startswith("bad at")]
    assert sum(line.endswith("a_long_word is broken") for line in bad) == len(WIDTHS), bad
    assert len(bad) == 2 * len(WIDTHS), bad


def test_every_page_opens_with_whom_when_and_what(every_page):
    for name, path in every_page.items():
        source = path.read_text("utf-8")
        top = source[source.index("<header>") : source.index("<nav")]
        title = re.search(r"<h1>([^<]*)</h1>", top)[1]
        assert "/" not in title and title in source[source.index("<title>") :][:200], name
        said = Page(top).text
        assert re.search(r"Date \d+ \w+ \d{4}", said), name
        assert "What limits this most" in said and 'id="headline"' in top, name
        judged = name not in ("probe", "intervene", "compare")
        assert not judged or "Judge" in said, name
    latent = Page(every_page["latent"].read_text("utf-8")).text
    assert "Audit gap of base, tuned" in latent and "typed as ./models/tuned" in latent
    assert "Bounded edits break at most 10 % of the prompts" in every_page["whole"].read_text()


def test_the_summary_is_the_first_screen_alone(every_page, tmp_path):
    run = RunFolder.load(every_page["latent"].parent)
    pages.write([run], out=tmp_path, copies=Copies(summary=True))
    source, said = ((tmp_path / f"summary.{kind}").read_text("utf-8") for kind in ("html", "md"))
    assert "<section" not in source and "<nav" not in source and 'id="headline"' in source
    assert said.startswith("# Audit gap of base, tuned\n") and "span" not in said
    assert "| Question | What a pass asks for | Verdict | Figure |" in said
    for heading in ("## tuned", "## What limits this most", "## What to do next"):
        assert heading in said
    assert not (tmp_path / "report.pdf").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine, which prints the page")
def test_the_summary_of_a_whole_audit_is_one_sheet(every_page, tmp_path):
    """All lines of the verdict table, the limits and what to do next, on paper of either size."""
    source = every_page["whole"].read_text("utf-8")
    for size in ("A4", "letter"):
        page = tmp_path / f"{size}.html"
        only = re.sub(r"<nav.*</nav>|<section.*</section>", "", source, flags=re.DOTALL)
        page.write_text(only.replace("@page {", f"@page {{ size: {size};"), "utf-8")
        assert len(re.findall(rb"/Type /Page\b", pdf.write(page).read_bytes())) == 1, size


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine, which prints the page")
def test_a_page_is_printed(every_page, tmp_path):
    page = tmp_path / "page.html"
    page.write_bytes(every_page["probe"].read_bytes())
    page.chmod(0o600)
    made = pdf.write(page)
    assert made.read_bytes().startswith(b"%PDF-") and made.stat().st_mode & 0o777 == 0o600


def test_without_a_browser_it_is_said_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="the package is called chromium"):
        pdf.browser()


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["./models/base", "smollm2"], ["base", "smollm2"]),
        (["meta-llama/Llama-3.1-8B"], ["meta-llama/Llama-3.1-8B"]),
        (["/a/one/model/", "/a/two/model"], ["one/model", "two/model"]),
        (["../tuned", "tuned"], ["../tuned", "tuned"]),
        (["<b>/a b/c"], ["<b>/a b/c"]),
    ],
    ids=["folder", "hub", "alike", "same", "text"],
)
def test_a_folder_is_called_by_what_tells_it_apart(names, short):
    assert list(short_names(names).values()) == short
