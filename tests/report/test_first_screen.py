"""Every page in a real browser, on a desk and on a telephone: nothing of it is cropped."""

from __future__ import annotations

import html
import re
import subprocess

import pytest
from test_page import CHROMIUM, browser

WIDTHS = (1280, 390)
#: Says of every frame which boxes hold more than they show, and of how many tables it looked at.
MEASURE = """<!doctype html><body>{frames}<p id="out"></p><script>window.onload = () => {{
  const said = [];
  for (const frame of document.querySelectorAll("iframe")) {{
    const page = frame.contentDocument, boxes = [...page.querySelectorAll(".scroll, .formula, pre"), page.documentElement];
    for (const box of boxes) if (box.scrollWidth > box.clientWidth)
      said.push(`${{frame.title}}: ${{box.getAttribute("aria-label") || box.className || box.tagName}} ${{box.scrollWidth}} > ${{box.clientWidth}}`);
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
        '<!doctype html><div class="scroll" style="overflow:auto"><table><td>' + "x" * 400, "utf-8"
    )
    said = measured({**every_page, "bad": wide}, tmp_path)
    counted = {line.partition(" at ")[0]: line for line in said if line.endswith(" tables")}
    assert counted.keys() == {*every_page, "bad"}
    assert all(" has 0 " not in line for line in counted.values()), counted
    cropped = [line for line in said if not line.endswith(" tables")]
    assert [line for line in cropped if not line.startswith("bad")] == []
    assert sum(line.startswith("bad at") for line in cropped) == 2 * len(WIDTHS), cropped
