"""The page: inert whatever the names and texts are, honest about nulls, whole without a network, no
script but its own."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import threading
from dataclasses import replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources

import pandas as pd
import pytest
from PIL import Image

from auditgap.audits.pages import ReportData, figures_of, from_store, render, write
from auditgap.errors import UsageError
from auditgap.report import paper
from auditgap.report.tables import GAP_COLUMNS
from auditgap.report.text import percent, points
from auditgap.report.verdict_lines import Criteria
from auditgap.store.tables import to_csv
from auditgap.types import Budget, Cell, Site, Subject

SCRIPT = resources.files("auditgap.report").joinpath("templates/report.js").read_text("utf-8")
OURS = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
CSP = (
    f"default-src 'none'; script-src 'sha256-{OURS}'; style-src 'unsafe-inline'; img-src data:;"
    " base-uri 'none'; form-action 'none'"
)
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>document.documentElement.dataset.ran=1</script>",
    '<img src=x onerror="document.documentElement.dataset.ran=1">',
    "</title></style></svg><svg onload=alert(1)>",
    '" onmouseover=alert(1) x="',
    "{{7*7}}{% raw %}",
    "--> <!-- ]]>",
    "a\u2028b\u2029c",
    "abc\u202edef\u2066ghi",
    "\x1b[31mred\x1b[0m \x1b]8;;https://evil.example\x07link\x1b]8;;\x07 \x9b1m\x07\x00",
    '<a href="javascript:alert(1)">x</a>',
    "\ud800 lone",
)
#: Every tag that our own template and drawings use; nothing else may appear.
OUR_TAGS = """
    html head meta title style body main header p h1 h2 h3 span div b strong table thead tbody tr th td br section nav ol ul li a
    figure figcaption svg desc path circle rect g text dl dt dd code pre footer
    script math mi mo mn mtext mrow mfrac msub msup munder mspace
"""
TAGS = set(OUR_TAGS.split())


class Page(HTMLParser):
    """What a parser sees: tags, attributes, comments, and the text a reader reads."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.comments: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.in_style = False
        self.scripts: list[str] = []
        self.feed(source)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.in_style = tag in ("style", "script")
        self.scripts += [""] if tag == "script" else []
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        self.in_style = self.in_style and tag not in ("style", "script")

    def handle_comment(self, data):
        self.comments.append(data)

    def handle_data(self, data):
        if not self.in_style:
            self.words.append(data)
        elif self.scripts:
            self.scripts[-1] += data


def small(toy_run, path, **options):
    defaults = {
        "subjects": {"toy": 4},
        "n": 12,
        "sites": (-1, 0, 2, 3),
        "eps": (0.01, 0.03),
        "attacks": ("targeted", "random_matched"),
    }
    return toy_run(path, **{**defaults, **options})


@pytest.fixture(scope="module")
def store(toy_run, tmp_path_factory):
    return small(toy_run, tmp_path_factory.mktemp("run") / "out")


@pytest.fixture(scope="module")
def data(store):
    return from_store([store])


@pytest.fixture(scope="module")
def hostile_page(toy_run, tmp_path_factory):
    """One page with every hostile string in every place that strangers' text can reach."""
    every = " ".join(HOSTILE)
    run = small(
        toy_run,
        tmp_path_factory.mktemp("hostile") / "out",
        subjects={every: 4, "=cmd|' /C calc'!A0 <b>": 4},
        n=4,
        sites=(-1, 3),
        eps=(0.03,),
        prompt=every,
        completion=every,
        config={every[:40]: every, "target": every, "prompts": every},
        info={
            "command": every,
            "warnings": [every],
            "versions": {every: every},
            "machine": {"cpu": every},
            "reward": every,
            "refused": {every: 2},
            "note": {"inner": [every]},
            "judge_cards": [
                {"name": every, "label": every, "notes": every, "kappa": None, every: every}
            ],
        },
    )
    run.fail(Cell(Subject(every, "f"), Site(1), Budget(0.5, "rms"), "targeted", "set"), cause=every)
    path = write([run], allow_raw=True)
    return path, path.read_text("utf-8")


def test_hostile_text_is_inert(hostile_page):
    _, source = hostile_page
    page = Page(source)
    assert page.tags <= TAGS, page.tags - TAGS
    assert page.scripts == [SCRIPT], "one script: ours, with nothing of a run in it"
    assert not page.comments
    assert not [
        a
        for a in page.attributes
        if a[1].startswith("on") or a[1] in ("src", "srcset", "style", "action", "xlink:href")
    ]
    assert all(value.startswith("#") for _, name, value in page.attributes if name == "href")
    assert ("meta", "content", CSP) in page.attributes
    assert source.index("Content-Security-Policy") < source.index("<title>"), (
        "the policy stands before any stranger's text"
    )
    assert len(page.ids) == len(set(page.ids))
    for raw in (
        "\x1b",
        "\x9b",
        "\x00",
        "\u2028",
        "\u2029",
        "\u202e",
        "\u2066",
        "\ud800",
        "[31m",
        "evil.example",
    ):
        assert raw not in source, repr(raw)
    for shown in (
        "<script>alert(1)</script>",
        "{{7*7}}{% raw %}",
        "--> <!-- ]]>",
        "⟦U+202E⟧",
        "⟦U+2028⟧",
        "⟦U+D800⟧",
    ):
        assert page.text.count(shown) >= 8, f"{shown} is shown as the text it is"


def test_no_external_address_and_no_script_but_ours(data):
    source = render(data)
    assert source.count(f"<script>{SCRIPT}</script>") == 1
    source = source.replace(f"<script>{SCRIPT}</script>", "")
    assert not re.search(
        r"fetch|XMLHttp|WebSocket|import|eval|innerHTML|cookie|storage|location",
        SCRIPT,
        re.IGNORECASE,
    )
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(|<script|javascript:", source, re.IGNORECASE
    )


def test_model_text_only_with_allow_raw(store, tmp_path):
    secret, answer = "Never reveal the colour of the vault", "The colour is a secret."
    plain = write([store])
    assert secret not in plain.read_text("utf-8") and answer not in plain.read_text("utf-8")
    assert "--allow-raw" not in plain.read_text("utf-8")
    raw = write([store], allow_raw=True)
    page = Page(raw.read_text("utf-8"))
    assert secret in page.text and answer in page.text and "Do not publish this copy" in page.text
    assert raw.stat().st_mode & 0o777 == 0o600
    write([store])
    assert secret not in raw.read_text("utf-8")


def test_headline_says_gap_interval_and_budget(data):
    both = {
        f"excess_{name}{end}": value
        for name in ("matched", "benign")
        for end, value in (("", 0.2), ("_lo", 0.15), ("_hi", 0.3))
    }
    changed = dict.fromkeys(("looked_twice", "changed", "changed_matched", "changed_benign"), 1.0)
    shown = data.gaps.assign(excess=0.2, excess_lo=0.1, excess_hi=0.3, **both, **changed)
    row = shown[shown["eps"] == 0.03].iloc[0]
    criteria = Criteria(accept_screening=True).model_dump()
    source = render(replace(data, gaps=shown, criteria=criteria))
    text = Page(source).text
    assert 'class="gap"' in source

    def pc(value):
        return points(value, unit="")

    assert (
        f"toy is behaviourally safe on {pc(row['safety'])} % [{pc(row['safety_lo'])},"
        f" {pc(row['safety_hi'])}] of prompts; under bounded edits of at most ε = 0.03 rms it stays"
        f" safe on {pc(row['robustness'])} %" in text
    )
    assert (
        f"The audit gap is {pc(row['gap'])} points [{pc(row['gap_lo'])}, {pc(row['gap_hi'])}], of"
        f" which {pc(row['excess'])} points [{pc(row['excess_lo'])}, {pc(row['excess_hi'])}] go"
        in text
    )


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"n_at_risk": 1, "n_harmful": 11, "safety": 1 / 12},
            "the audit gap cannot exceed 8 points",
        ),
        ({"gap_lo": None, "gap_hi": None}, "too few prompts to tell"),
        (
            {"gap_lo": -0.17, "gap_hi": 0.35},
            "This run does not show an audit gap, nor rule one out",
        ),
        ({"gap_lo": 0.0}, "This run does not show an audit gap, nor rule one out"),
        ({"excess": None}, "no matched control was measured"),
        ({"control_gap_lo": 0.2}, "random edits of equal size do as much"),
        ({}, "not shown to be more than random edits of equal size do"),
    ],
)
def test_a_gap_that_is_not_shown_is_not_announced(data, values, sentence):
    """The first screen says what the evidence shows; only a gap that is shown is in colour."""
    known = {
        **{"n_at_risk": 50, "n_harmful": 2, "gap": 0.3, "gap_lo": 0.1, "gap_hi": 0.5},
        **{"excess": 0.2, "excess_lo": -0.1, "excess_hi": 0.4, "control_gap": 0.1},
        **{"control_gap_lo": 0.0, "control_gap_hi": 0.3},
    }
    source = render(replace(data, gaps=data.gaps.assign(**{**known, **values})))
    lead = source[source.index('id="headline"') :]
    lead = lead[: lead.index("</div>")]
    assert "an audit gap is shown:" not in Page(lead).text.replace("o audit gap", "")
    assert sentence in Page(lead).text
    assert 'class="gap"' not in lead and "The audit gap is" not in lead


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"excess_lo": 0.1, "excess_hi": 0.6}, "alone that is no finding yet"),
        ({"excess_lo": -0.1, "excess_hi": 0.6, "control_gap_lo": 0.0}, "does not rule one out"),
        (
            {"excess_lo": -0.1, "excess_hi": 0.1, "control_gap_lo": 0.2, "gap_lo": 0.2},
            "edits of any direction break it",
        ),
        ({"excess": None, "gap_lo": 0.1}, "is a gap by itself"),
        ({"excess": None, "gap_lo": 0.0}, "does not rule one out"),
        ({"excess": None, "gap_lo": None, "gap_hi": None}, "settles nothing"),
        ({"excess": None}, "No matched control was measured"),
    ],
)
def test_reading_follows_the_interval_of_the_excess(data, values, sentence):
    known = {"excess": 0.2, "control_gap": 0.1, "control_gap_hi": 0.4} | values
    gaps = data.gaps.assign(**known)
    assert sentence in Page(render(replace(data, gaps=gaps))).text


def test_the_headline_budget_looks_at_sizes_only(data):
    small_edits = data.lvs.assign(
        relative_norm_median=[0.9 if e == 0.03 else 0.1 for e in data.lvs["eps"]]
    )
    assert "of at most ε = 0.01 rms" in Page(render(replace(data, lvs=small_edits))).text
    assert "of at most ε = 0.03 rms" in Page(render(data)).text


def test_null_is_never_zero():
    gaps = pd.DataFrame(
        [
            {
                "subject": "toy",
                "n_at_risk": 0,
                "n_harmful": 0,
                "unit": "rms",
                "eps": 0.03,
                "n": 0,
                "n_unscored": 5,
                "worst_site": None,
            }
        ]
    ).reindex(columns=list(GAP_COLUMNS))
    base = {
        "subject": "toy",
        "site": "block1",
        "layer_index": 1,
        "unit": "rms",
        "eps": 0.03,
        "attack": "targeted",
        "n": 5,
        "n_unscored": 5,
        "n_broken": 0,
        "flag": "",
    }
    lvs = pd.DataFrame([base]).reindex(columns=list(ReportData(title="").lvs.columns))
    report = ReportData(
        title="Nothing",
        gaps=gaps,
        lvs=lvs.astype({"lvs_mean": float}),
        subjects=[{"name": "toy", "n_blocks": 2}],
        cards=[{"name": "judge", "n": 10, "kappa": None, "auc": float("nan")}],
    )
    page = Page(render(report))
    assert "the audit gap at ε = 0.03 rms was not measured" in page.text
    assert "Cohen’s κ not measured" in re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", render(report)))
    assert "nan" not in page.text.lower().split() and "None" not in page.text.split()
    cells = re.findall(r'<td class="null[^"]*"[^>]*>([^<]*)</td>', render(report))
    assert "unscored" in cells and "not measured" in cells
    assert "0.000" not in render(report).split('<tbody class="paper">')[0]
    assert not re.search(r"\b0\s%", page.text)


def test_numbers_are_not_rounded_into_a_claim():
    assert [percent(v) for v in (0, 0.002, 0.02, 0.996, 1)] == [
        "0\xa0%",
        "<\u20091\xa0%",
        "2\xa0%",
        ">\u200999\xa0%",
        "100\xa0%",
    ]
    assert [points(v, unit="") for v in (0, 1e-17, -0.002, 0.33)] == ["0", "0", "\u22120.2", "33"]
    assert percent(None) == points(float("nan")) == "not measured"


def test_an_empty_run_still_renders():
    page = Page(render(ReportData(title="Empty")))
    for sentence in (
        "No audit gap was measured",
        "LVS by depth: not drawn, as no site was measured",
        "No minimum distances were measured",
        "no judge card",
        "No edit was measured",
        "The clean pass was not measured",
    ):
        assert sentence in page.text, sentence


def test_one_site_no_distances_no_controls_are_sentences(toy_run, tmp_path):
    run = small(toy_run, tmp_path / "out", sites=(2,), attacks=("targeted",), distances=False)
    page = Page(render(from_store([run])))
    for sentence in (
        "only one site was measured (block2)",
        "No minimum distances were measured",
        "No control was run",
    ):
        assert sentence in page.text


def test_every_figure_has_its_csv_twin(store):
    path = write([store])
    drawn = figures_of(from_store([store]))
    on_page = set(re.findall(r'<figure id="fig-([a-z_]+)"', path.read_text("utf-8")))
    assert on_page == set(drawn) == {p.stem for p in (path.parent / "figures").glob("*.csv")}
    for name, figure in drawn.items():
        twin = (path.parent / "figures" / f"{name}.csv").read_text("utf-8")
        assert len(figure.data) and twin == to_csv(figure.data)
    back = pd.read_csv(path.parent / "figures" / "lvs_by_depth.csv", float_precision="round_trip")
    assert back["lvs_mean"].tolist() == drawn["lvs_by_depth"].data["lvs_mean"].tolist(), (
        "nothing is rounded"
    )


def test_csv_formulas_are_neutralised(hostile_page):
    path, _ = hostile_page
    twin = (path.parent / "figures" / "gap_by_budget.csv").read_text("utf-8")
    assert "'=cmd|" in twin and not re.search(r"(^|,)\"?=cmd", twin, re.MULTILINE)


def test_paper_stands_apart_and_says_why(data):
    source = render(data)
    ours, theirs = source.split('<tbody class="paper">')
    assert "201.190" in theirs and "201.190" not in ours
    text = Page(source).text
    assert (
        "not comparable" in text
        and "the unit is rms" in text
        and "the reward is screening logit" in text
    )
    same = paper.differences("max", [0.0005, 0.001], "hf:" + paper.REWARD, "HarmBench")
    assert same == []
    assert len(paper.TABLE_1) == 8 and paper.TABLE_1[3].last == 201.190


def test_left_out_is_counted(data):
    counts = data.left_out.set_index(["what", "reason"])["count"]
    # prompts × sites × budgets × attacks
    assert counts["LVS unscored", "reward: empty answer"] == 2 * 4 * 2 * 2
    assert counts["edited answer", "broken"] == 4 * 2
    assert counts["prompt refused before the run", "too_long"] == 1
    assert "reward: empty answer" in Page(render(data)).text


def test_a_card_as_judges_write_it(data):
    card = {
        "name": "builtin",
        "label": "",
        "gold_set": "pyrit",
        "n": 9,
        "sensitivity": 0.9,
        "sensitivity_interval": [0.8, 0.95],
        "specificity": None,
        "specificity_interval": None,
        "injection_flips": {"inst": 0, "json": 2},
        "harmless": {"numbers": {"harmful": 1, "safe": 2}, "plain text": {"refusal": 4}},
        "notes": [],
    }
    source = render(replace(data, cards=[card]))
    facts = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", source))
    assert facts["Sensitivity"] == "90\xa0%\xa0[80,\xa095]"
    assert (
        facts["Specificity"] == "not measured"
        and facts["Verdicts flipped by injection"] == "inst: 0; json: 2"
    )
    assert facts["Harmless texts called harmful"] == "numbers: 1 of 3; plain text: 0 of 4"
    assert "Notes" not in facts and "sensitivity interval" not in facts
    assert "from a screening judge" not in source and "from a screening judge" in render(data)


def test_another_folder_can_take_the_page(store, tmp_path):
    path = write([store], out=tmp_path / "both" / "report")
    assert path == tmp_path / "both" / "report" / "report.html" and path.is_file()
    assert len(list((path.parent / "figures").glob("*.csv"))) == 5
    with pytest.raises(UsageError, match="is a file"):
        write([store], out=path)


def test_secrets_stay_out(toy_run, tmp_path):
    run = small(
        toy_run,
        tmp_path / "out",
        n=3,
        sites=(0,),
        distances=False,
        config={"endpoint": {"api_key": "canary-1"}},
        info={
            "hf_token": "canary-2",
            "command": "HF_TOKEN=canary-3 auditgap --key hf_abcdefghijklmnopqrstuv",
        },
    )
    source = write([run]).read_text("utf-8")
    assert (
        "canary" not in source and "hf_abc" not in source and source.count("[secret removed]") >= 4
    )


def test_two_folders_make_one_page(toy_run, tmp_path):
    runs = [
        small(toy_run, tmp_path / name, subjects={name: 4}, n=6, sites=(0, 3), distances=False)
        for name in ("base", "other")
    ]
    page = Page(render(from_store(runs)))
    assert "Audit gap of base, other" in page.text
    assert page.text.count("is behaviourally safe on") == 2
    with pytest.raises(UsageError, match="at least one run folder"):
        write([])


# ------------------------------------------------------------------------------------------------------------
# a browser

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
HARNESS = """<!doctype html><body><iframe id="f" style="border:0;width:390px;height:800px" src="{src}"></iframe><p id="out"></p>
<script>document.getElementById("f").onload = function () {{
  var d = this.contentDocument.documentElement;
  document.getElementById("out").textContent = "width=" + d.scrollWidth + " ran=" + (d.dataset.ran || "no") + " h2=" +
    d.querySelectorAll("h2").length + " svg=" + d.querySelectorAll("figure svg").length;
}}</script></body>"""


def browser(tmp_path) -> list[str]:
    """Chromium without a screen, with a profile of its own, that fetches nothing for itself."""
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
        " --disable-background-networking --disable-component-update --disable-sync"
        " --disable-dev-shm-usage --allow-file-access-from-files"
    )
    return [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]


def in_browser(page_path, tmp_path) -> str:
    """What Chromium saw of a page in a frame 390 px wide: `width=390 ran=no h2=12 svg=19`."""
    harness = tmp_path / "harness.html"
    harness.write_text(HARNESS.format(src=page_path.as_uri()), "utf-8")
    command = [*browser(tmp_path), "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run([*command, harness.as_uri()], capture_output=True, text=True, timeout=120)
    return html.unescape(re.search(r'<p id="out">([^<]*)</p>', done.stdout)[1])


@pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine, so the page cannot be tried in a browser"
)
def test_in_a_browser_nothing_runs_and_nothing_spills(hostile_page, tmp_path):
    path, source = hostile_page
    seen = in_browser(path, tmp_path)
    assert "ran=no" in seen, seen
    assert int(re.search(r"width=(\d+)", seen)[1]) <= 390, seen
    assert int(re.search(r"h2=(\d+)", seen)[1]) >= 12
    bare = tmp_path / "bare.html"  # the harness notices a script that does run …
    bare.write_text(
        "<!doctype html><p>x<script>document.documentElement.dataset.ran=1</script>", "utf-8"
    )
    assert "ran=1" in in_browser(bare, tmp_path)
    forced = tmp_path / "forced.html"  # … and the page's policy holds even if escaping had failed
    forced.write_text(source.replace("<main>", "<main>" + HOSTILE[1] + HOSTILE[2], 1), "utf-8")
    assert "ran=no" in in_browser(forced, tmp_path)


CLICKS = """<!doctype html><body><iframe id="f" style="width:1280px;height:800px" src="{src}"></iframe><p id="out"></p>
<script>document.getElementById("f").onload = function () {{
  var d = this.contentDocument, table = d.querySelector("#table table"), heads = [...table.tHead.rows[0].cells];
  var at = heads.findIndex(h => h.textContent.trim() === "LVS, mean"), eps = heads.findIndex(h => h.textContent.trim() === "ε");
  var column = i => [...table.tBodies[0].rows].filter(r => !r.hidden).map(r => parseFloat(r.cells[i].textContent));
  var before = column(at);
  heads[at].querySelector("button").click(); var up = column(at);
  heads[at].querySelector("button").click(); var down = column(at);
  var select = [...d.querySelectorAll("#table .choose label")].find(l => l.textContent.startsWith("ε")).querySelector("select");
  select.value = select.options[2].value; select.dispatchEvent(new Event("change")); var chosen = column(eps);
  document.getElementById("out").textContent = JSON.stringify({{before, up, down, chosen}});
}}</script></body>"""


@pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine, so the page cannot be tried in a browser"
)
def test_in_a_browser_tables_are_sorted_and_one_budget_is_chosen(store, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "HARNESS", CLICKS)
    seen = json.loads(in_browser(write([store]), tmp_path))
    known = sorted(v for v in seen["before"] if v is not None)
    assert len(set(known)) > 3 and [v for v in seen["up"] if v is not None] == known
    assert [v for v in seen["down"] if v is not None] == known[::-1]
    assert len(set(seen["chosen"])) == 1 and 0 < len(seen["chosen"]) < len(seen["before"])


class Listener(ThreadingHTTPServer):
    """Serves one page, and hears every request that is made of a host in .test; what Chromium asks
    its makers is no page's."""

    daemon_threads = True

    def __init__(self, page: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Heard)
        self.page, self.heard = page, []


class Heard(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.headers["host"].partition(":")[0].endswith(".test"):
            self.server.heard.append(self.path)
        self.send_response(200)
        self.send_header("content-type", "text/html; charset=utf-8")
        self.send_header("content-length", str(len(self.server.page)))
        self.end_headers()
        self.wfile.write(self.server.page)


def requests_of(page: str, tmp_path) -> set[str]:
    """What was asked for while the page was looked at, the icon that Chromium itself wants
    aside."""
    server = Listener(page.encode("utf-8"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        rules = f"--host-resolver-rules=MAP * 127.0.0.1:{server.server_port}"
        here = f"http://report.test:{server.server_port}/page"
        command = [*browser(tmp_path), rules, "--virtual-time-budget=3000", "--dump-dom", here]
        subprocess.run(command, capture_output=True, timeout=120, check=True)
    finally:
        server.shutdown()
        server.server_close()
    return set(server.heard) - {"/favicon.ico"}


@pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine, so the page cannot be tried in a browser"
)
def test_no_request_leaves_the_page(hostile_page, tmp_path):
    _, source = hostile_page
    lure = (
        '<img src="http://else.test/i"><link rel="stylesheet" href="http://else.test/s"><iframe'
        ' src="http://else.test/f"></iframe>'
    )
    assert requests_of(source.replace("<main>", f"<main>{lure}", 1), tmp_path) == {"/page"}, (
        "even where markup asked for one"
    )
    assert requests_of(f"<!doctype html>{lure}", tmp_path) >= {
        "/page",
        "/i",
        "/s",
    }, "which a page without our policy would get"


@pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine, so the page cannot be tried in a browser"
)
@pytest.mark.parametrize("width", [1280, 500])
def test_a_picture_of_it_is_no_blank_sheet(store, tmp_path, width):
    """500: no window of Chromium's is narrower; what a telephone's frame shows is tested above."""
    picture = tmp_path / "page.png"
    sizes = [f"--screenshot={picture}", f"--window-size={width},2000", "--hide-scrollbars"]
    subprocess.run(
        [*browser(tmp_path), *sizes, write([store]).as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    with Image.open(picture) as image:
        assert image.size == (width, 2000)
        shades = image.convert("L")
        bands = [shades.crop((0, top, width, top + 200)) for top in range(0, 2000, 200)]
    assert (
        sum(low < 100 < 200 < high for low, high in (band.getextrema() for band in bands)) >= 9
    ), "ink on paper all the way down"
