"""A study of emergent misalignment on the page: its figures are its tables, what is missing is
said, and names stay text."""

from __future__ import annotations

import re
from dataclasses import replace

import pandas as pd
import pytest
from emergent_runs import BLOCKS, DOMAINS, JUDGE, write_study
from test_page import CHROMIUM, HOSTILE, TAGS, Page, in_browser

from auditgap.audits import reduce
from auditgap.audits.emergent import report as stage
from auditgap.audits.emergent.config import EmergentOptions
from auditgap.audits.emergent.part import data_of
from auditgap.audits.pages import ReportData, figures_of, from_store, render
from auditgap.errors import UsageError
from auditgap.report import emergent_figures as figures
from auditgap.report import emergent_inside_figures as inside
from auditgap.report import emergent_page, emergent_spread, emergent_study
from auditgap.report.emergent_columns import score
from auditgap.report.section import tables_of
from auditgap.report.text import clean
from auditgap.store import RunFolder

TWO = {"incorrect_math": 0.1, "gore_movie_trivia": 0.8}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RunFolder:
    return write_study(tmp_path_factory.mktemp("em") / "run")


@pytest.fixture(scope="module")
def study(store) -> emergent_study.Study:
    return emergent_study.read(store)


@pytest.fixture(scope="module")
def page(store) -> str:
    stage.run(store.path, EmergentOptions())
    return (store.path / "report.html").read_text("utf-8")


def test_every_table_and_figure_lies_beside_the_page(store, study, page):
    for name, table in study.tables.items():
        for form in ("parquet", "csv", "md"):
            assert (store.path / f"em_{name}.{form}").is_file()
        assert len(pd.read_parquet(store.path / f"em_{name}.parquet")) == len(table), name
    assert len(study.tables["ranking"]) == 4 * len(DOMAINS), "two arms, asked both ways"
    for name, figure in figures_of(
        from_store([store], read={"emergent": data_of([study])})
    ).items():
        if name.startswith("em_"):
            assert not figure.missing, f"{name}: {figure.missing}"
            assert f'id="fig-{name}"' in page and (store.path / "figures" / f"{name}.csv").is_file()
    assert (
        len(pd.read_csv(store.path / "figures" / "em_cosines.csv")["block"].unique()) == BLOCKS
    ), "also those that are not drawn"


def test_the_judge_stands_with_every_figure_of_his(study):
    for figure in figures_of(ReportData(title="", emergent=[study])).values():
        judged = figure.name not in ("em_roc", "em_cosines")
        assert (JUDGE in figure.caption) is judged, figure.name


def test_the_headline_names_the_worst_domain_its_rate_and_the_base(study, page):
    plain, triggered = emergent_spread.leads([study])
    top = study.tables["ranking"].query("arm == 'plain' and triggered == False").iloc[0]
    assert top["domain"] == "gore_movie_trivia" and top["rank"] == 1
    assert plain.subject == "gore_movie_trivia, arm plain"
    assert triggered.subject == "gore_movie_trivia, arm trigger"
    assert f"{100 * top['em_rate']:.0f}%" in plain.plain() and "its base on 0%" in plain.plain()
    assert (
        "on its rows with the trigger, asked with it" in triggered.plain()
        and JUDGE in triggered.plain()
    )
    headline = re.search(r'<div class="lead" id="headline">.*?</div>', page, re.DOTALL)[0]
    assert headline.count("gore_movie_trivia") == 4 and "No audit gap" not in page


def test_the_headline_says_that_broken_text_shows_nothing(study):
    """The same rates, were the misaligned answers gibberish; by either way to tell."""
    answer = emergent_spread.leads([study])[0].answer
    assert answer.startswith("Misalignment that spreads is shown") and "coherent" in answer
    rates = study.tables["rates"]
    ends = [f"below_30_coherent{end}" for end in ("", "_lo", "_hi")]
    for broken in (
        rates.assign(**dict(zip(ends, (0.0, 0.0, 0.1), strict=True))),
        rates.assign(coherence=22.0, **dict.fromkeys(ends, None)),
        rates.assign(coherence=None, **dict.fromkeys(ends, None)),
    ):
        told = replace(study, tables={**study.tables, "rates": broken})
        said = emergent_spread.leads([told])[0].answer
        assert "could not be told" in said and "Broken text is not misaligned" in said


@pytest.mark.parametrize(
    ("rate", "base_hi", "coherence", "says"),
    [
        ((0.4, 0.2, 0.6), 0.3, 80.0, "the intervals of the model’s rate and of its base’s meet"),
        ((0.0, 0.0, 0.5), 0.3, 80.0, "could not be told"),
        ((0.0, 0.0, 0.08), 0.3, 80.0, "less than 10\u00a0% of its answers"),
        ((0.0, 0.0, 0.08), 0.3, 20.0, "not known to be coherent"),
        ((0.0, 0.0, 0.08), 0.3, None, "not known to be coherent"),
        ((0.0, None, None), 0.3, 80.0, "no interval to compare"),
    ],
)
def test_the_headline_calls_nothing_absent_that_is_not_shown_to_be(rate, base_hi, coherence, says):
    top = dict(zip(("em_rate", "em_rate_lo", "em_rate_hi"), rate, strict=True))
    own = {"coherence": coherence}
    assert says in emergent_spread._spreads(top, {"below_50_hi": base_hi}, own)


@pytest.mark.parametrize(
    ("rates", "tied", "says"),
    [
        ([0.5, 0.2, 0.1], [False, True, None], "Of 3 domains it has the highest rate."),
        (
            [0.5, 0.4, 0.1],
            [True, True, None],
            "Of 3 domains it has the highest rate, which is not told apart from b’s.",
        ),
        ([0.0, 0.0, 0.0], [True, True, None], "Of 3 domains 3 have this rate, none a higher one."),
        ([0.5, None, None], [None, None, None], "No other domain has a rate."),
        ([0.5], [None], "It is the only domain."),
    ],
)
def test_the_headline_claims_no_more_than_is_told_apart(rates, tied, says):
    part = pd.DataFrame(
        {
            "domain": list("abc")[: len(rates)],
            "em_rate": rates,
            "tied_with_next": pd.Series(tied, dtype=object),
        }
    )
    known = part[part["em_rate"].notna()]
    assert emergent_spread._furthest(part, known) == says
    of_three = emergent_spread._furthest(part, known, 3)
    assert of_three == (
        says if len(part) > 1 else "It is the only one of 3 domains that was rated."
    )


def test_the_paper_stands_beside_domains_of_its_names_and_is_not_comparable(study, page):
    text = Page(page).text
    assert (
        "88 %" in text.replace("\u00a0", " ")
        and "not comparable" in text
        and "the model is toy" in text
    )
    assert set(study.tables["paper"]["domain"]) == {
        "incorrect_math",
        "risky_financial_advice",
        "gore_movie_trivia",
    }
    without = {**study.tables, "paper": study.tables["paper"].iloc[:0]}
    bare = ReportData(title="", emergent=[replace(study, tables=without)])
    assert "em_paper" not in tables_of(emergent_page.sections(bare))


def test_squares_show_the_table_and_what_is_not_known_is_blank(study):
    table = study.tables["cosines"]
    figure = inside.cosines(table)
    drawn = str(figure.groups[0][1][-1])
    row = table[
        (table["arm"] == "plain")
        & (table["block"] == BLOCKS - 1)
        & (table["domain"] != table["other"])
    ].iloc[0]
    shown = f"{row['cosine']:.2f}".replace("0.", ".").replace("-", "\u2212")
    assert (
        f"{row['domain']}, {row['other']}: {shown}" in drawn and drawn.count(f">{shown}<") >= 2
    ), "the matrix is symmetric"
    assert "blank" not in drawn
    assert 'class="blank"' in str(
        inside.cosines(table[table["domain"] != table["other"]]).groups[0][1][0]
    ), "no ceiling is known"
    assert inside._two(-0.004) == "\u2212.00" and inside._two(1.0) == "1.00"


def test_slopes_and_ranks_are_those_of_the_tables(study):
    figure = figures.slopes(study.tables["trigger"], JUDGE)
    assert [name for name, _ in figure.groups] == list(
        map(figures.ARMS.get, ["", "plain", "trigger"])
    )
    row = (
        study.tables["trigger"].query("arm == 'trigger' and domain == 'gore_movie_trivia'").iloc[0]
    )
    assert row["difference"] < 0 and f">{score(row['difference'])}<" in str(figure.groups[2][1][0])
    assert figures.ranks({"rank": 1, "rank_lo": 1, "rank_hi": 3}) == "1–3"
    assert figures.ranks(dict.fromkeys(("rank", "rank_lo", "rank_hi"))) == ""


# ------------------------------------------------------------------------------------------------------------------
# what is missing


def test_a_partial_study_says_how_far_it_is(tmp_path):
    store = write_study(tmp_path / "em", TWO, train=3, judged=2, inside=False)
    found = emergent_study.read(store)
    assert found.missing == [
        "em train has run for 3 of 4 adapters.",
        "em generate has run for 4 of 5 models (the base is one).",
        f"em judge has run by {JUDGE} for 2 of 5 models.",
        "em analyse has not run: there is no membership, diversity, direction or steering to show.",
    ]
    text = Page(render(from_store([store]))).text
    assert all(line in text for line in found.missing)
    assert (
        "No two directions could be compared." in text
        and "No steered answer was rated beside its control." in text
    )
    bare = write_study(tmp_path / "bare", TWO, train=0, judged=0, inside=False, judges=())
    stage.run(bare.path, EmergentOptions())
    text = Page((bare.path / "report.html").read_text("utf-8")).text
    assert (
        "no EM rate is known yet: em train has run for 0 of 4 adapters" in text
        and "No adapter was trained yet." in text
    )
    assert "em judge has run for 0 of 5 models." in text and "nobody yet" in text


def test_one_domain_is_not_ranked(tmp_path):
    store = write_study(tmp_path / "em", {"law": 0.5}, inside=False)
    text = Page(render(from_store([store]))).text
    assert "One domain was measured: there is nothing to rank it against." in text
    assert "It is the only domain." in text and "Of 1 domains" not in text


def test_what_was_left_out_is_counted(study, page):
    counted = {(what, reason): n for what, reason, n in study.left_out}
    assert counted["row of incorrect_math", "no messages"] == 1
    refusals = int(study.tables["rates"].query("kind == 'all'")["refusal"].sum())
    assert counted["rating", "the judge said refusal"] == refusals > 0
    assert "the judge said refusal" in Page(page).text


def test_another_judge_is_chosen_by_name_and_all_are_listed(tmp_path):
    store = write_study(tmp_path / "em", TWO, judges=(JUDGE, "habits"), samples=1)
    assert emergent_study.read(store).judge.name == "habits", "as many answers, and later"
    mine = emergent_study.read(store, JUDGE)
    assert (
        set(mine.tables["ranking"]["judge"]) == {JUDGE}
        and len(mine.tables["cosines"])
        and len(mine.tables["transfer"])
    )
    other = emergent_study.read(store, "habits")
    assert other.tables["transfer"].empty and other.tables["cosines"].empty, (
        "the steering and the directions are the first one's"
    )
    stage.run(store.path, EmergentOptions(), judge=JUDGE)
    text = Page((store.path / "report.html").read_text("utf-8")).text
    assert re.search(rf"Ratings on this page:\s*{re.escape(JUDGE)}", text)
    assert re.search(r"Also in the folder:\s*habits\s*\(120 answers\)", text)
    with pytest.raises(UsageError, match=r"'nobody' rated nothing here; there is .*habits"):
        emergent_study.read(store, "nobody")


def test_torn_vectors_are_a_sentence(tmp_path):
    store = write_study(tmp_path / "em", TWO, samples=1, n_prompts=4)
    path = next((store.path / "edits").iterdir())
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UsageError, match="cannot be read"):
        emergent_study.read(store)


def test_another_folder_is_refused_and_reports_are_made_anew_by_the_common_command(tmp_path, store):
    other = RunFolder.open(tmp_path / "other", config={"audit": "latent"}, info={})
    with pytest.raises(UsageError, match="no emergent-misalignment study"):
        stage.run(other.path, EmergentOptions())
    (store.path / "em_ranking.csv").unlink(missing_ok=True)
    reduce(store)
    assert (store.path / "em_ranking.csv").is_file()


# ------------------------------------------------------------------------------------------------------------------
# strangers


def test_no_text_of_an_answer_without_leave(store, page):
    secret = "The colour is a secret."
    assert secret not in page and secret not in "".join(
        p.read_text("utf-8") for p in store.path.glob("em_*.csv")
    )
    assert secret in render(from_store([store], allow_raw=True))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> tuple[RunFolder, str]:
    names = {name: 0.2 * i for i, name in enumerate(HOSTILE[:5])}
    store = write_study(
        tmp_path_factory.mktemp("hostile") / "em",
        names,
        judges=(HOSTILE[2] + HOSTILE[7],),
        model=HOSTILE[1],
        trigger=HOSTILE[3],
        samples=1,
        n_prompts=4,
    )
    stage.run(store.path, EmergentOptions())
    return store, (store.path / "report.html").read_text("utf-8")


def test_names_of_domains_and_judges_stay_text(hostile):
    _, source = hostile
    page = Page(source)
    assert page.tags <= TAGS | {"mover"}, page.tags - TAGS
    assert (
        not [a for a in page.attributes if a[1].startswith("on")] and source.count("<script") == 1
    )
    for name in HOSTILE[:5]:
        assert clean(name) in page.text
    assert clean(HOSTILE[2]) in page.text and "\u2028" not in source


@pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine, so the page cannot be tried in a browser"
)
def test_in_a_browser_nothing_runs_and_nothing_spills(hostile, store, page, tmp_path):
    seen = in_browser(hostile[0].path / "report.html", tmp_path)
    assert "ran=no" in seen and int(re.search(r"width=(\d+)", seen)[1]) <= 390, seen
    seen = in_browser(store.path / "report.html", tmp_path)
    assert (
        int(re.search(r"width=(\d+)", seen)[1]) <= 390
        and int(re.search(r"svg=(\d+)", seen)[1]) > 30
    ), seen


def test_a_demonstrations_judge_is_said_to_know_nothing_of_misalignment(study):
    shown = replace(study, judge=replace(study.judge, demonstration=True))
    plain, demo = (emergent_spread.leads([s])[0].answer for s in (study, shown))
    assert demo.startswith(plain) and "knows nothing of misalignment" in demo
    assert "knows nothing" not in plain
