"""Figures: the ink follows the numbers, a null is never ink, and the data beside a figure is what
it shows."""

import re
from itertools import pairwise

import pandas as pd
import pytest

from auditgap.report import depth, figures, svg
from auditgap.report.svg import BOTTOM, LEFT, RIGHT, STYLES, TOP, Scale
from auditgap.rows import TABLE_COLUMNS


def lvs(*rows: dict) -> pd.DataFrame:
    """Rows in the shape of `tables.lvs_table`, with defaults."""
    base = {
        "subject": "toy",
        "unit": "rms",
        "eps": 0.03,
        "attack": "targeted",
        "n": 10,
        "n_unscored": 0,
        "flag": "",
    }
    filled = [{**dict.fromkeys(TABLE_COLUMNS), **base, **row} for row in rows]
    for row in filled:
        row["site"] = "embedding" if row["layer_index"] < 0 else f"block{row['layer_index']}"
        if row["lvs_mean"] is not None and row["lvs_mean_lo"] is None:
            row |= {"lvs_mean_lo": row["lvs_mean"] * 0.8, "lvs_mean_hi": row["lvs_mean"] * 1.2}
    return pd.DataFrame(filled)


def profile(table: pd.DataFrame) -> figures.Figure:
    return figures.by_depth(table, "lvs_mean", name="p", title="LVS by depth", ylabel="LVS")


def paths(drawing: str, css: str) -> list[list[tuple[float, float]]]:
    """The corners of every `<path>` of a class."""
    found = re.findall(rf'<path class="{css}[^"]*" d="([^"]*)"', str(drawing))
    return [
        [tuple(map(float, pair)) for pair in re.findall(r"(-?[\d.]+) (-?[\d.]+)", d)] for d in found
    ]


def test_profile_follows_the_numbers():
    values = [0.0, 1.0, 2.5, 2.6, 9.0]
    figure = profile(
        lvs(*({"layer_index": i, "lvs_mean": v} for i, v in enumerate(values, start=-1)))
    )
    (corners,) = paths(figure.groups[0][1][0], "line k0")
    xs, ys = zip(*corners, strict=True)
    assert list(xs) == sorted(set(xs)) and xs[0] == LEFT and xs[-1] == RIGHT
    assert list(ys) == sorted(ys, reverse=True), "a higher LVS stands higher (a smaller y)"
    assert ys[0] == BOTTOM
    top = 9.0 * 1.2
    assert ys[2] == pytest.approx(BOTTOM - 2.5 / top * (BOTTOM - TOP), abs=0.02)
    (band,) = paths(figure.groups[0][1][0], "band k0")
    assert all(
        lo <= y <= hi
        for (_, y), (_, lo), (_, hi) in zip(corners, band[:5], band[:4:-1], strict=True)
    )


def test_a_null_breaks_the_line_and_leaves_no_mark():
    values = [1.0, 2.0, None, 3.0, 4.0]
    figure = profile(lvs(*({"layer_index": i, "lvs_mean": v} for i, v in enumerate(values))))
    drawing = str(figure.groups[0][1][0])
    assert [len(run) for run in paths(drawing, "line k0")] == [2, 2]
    assert drawing.count('class="mark k0"') == 4
    assert "block2," not in drawing
    assert figure.data["lvs_mean"].isna().sum() == 1, (
        "the data keeps the site that was not measured, as null"
    )


def test_one_site_is_a_sentence():
    figure = profile(lvs({"layer_index": 5, "lvs_mean": 1.0}, {"layer_index": 7, "lvs_mean": None}))
    assert figure.groups == () and "only one site was measured (block5)" in figure.missing
    assert "no site was measured" in profile(lvs({"layer_index": 5, "lvs_mean": None})).missing


def test_one_drawing_a_budget_with_common_axes():
    rows = [
        {"layer_index": i, "eps": eps, "lvs_mean": eps * 100 * (i + 1)}
        for eps in (0.1, 0.01)
        for i in range(3)
    ]
    rows += [{**row, "attack": "random_matched", "lvs_mean": 0.1} for row in rows]
    figure = profile(lvs(*rows))
    small, large = figure.groups[0][1]
    assert "ε = 0.01 rms" in small and "ε = 0.1 rms" in large
    ends = [paths(drawing, "line k0")[0][-1][1] for drawing in (small, large)]
    assert BOTTOM - ends[0] == pytest.approx((BOTTOM - ends[1]) / 10, abs=0.05)
    assert paths(small, "line k1"), "the matched control has its own line"
    assert "matched random signs" in figure.legend and "untargeted" not in figure.legend


def test_an_axis_is_logarithmic_where_one_site_dwarfs_the_others():
    rows = [{"layer_index": i, "lvs_mean": v} for i, v in enumerate((400.0, 2.0, 0.0, 4.0))]
    figure = profile(lvs(*rows))
    drawing = str(figure.groups[0][1][0])
    (heights,) = [[y for _, y in run] for run in paths(drawing, "line k0")]
    assert heights[2] == BOTTOM, "0 stands at the foot"
    # 400 : 4 is as far as 4 : 0.04, and 2 and 4 are apart
    assert heights[1] - heights[3] == pytest.approx((heights[3] - heights[0]) * 0.1505, rel=0.01)
    assert "logarithmic" in figure.caption and "log scale" in drawing
    even = profile(lvs(*({**row, "lvs_mean": row["lvs_mean"] / 100 + 1} for row in rows)))
    assert "logarithmic" not in even.caption


def test_base_and_tuned_stand_in_one_axis():
    rows = [
        {"layer_index": i, "lvs_mean": v * (i + 1), "subject": name}
        for name, v in (("base", 1.0), ("tuned", 2.0))
        for i in range(3)
    ]
    both = depth.together(lvs(*rows), "lvs_mean", name="m", title="LVS", ylabel="LVS")
    assert both is not None and len(both.groups[0][1]) == 1
    drawing = str(both.groups[0][1][0])
    ends = [paths(drawing, f"line {css}")[0][-1][1] for css in ("k1", "k0")]
    assert BOTTOM - ends[1] == pytest.approx(2 * (BOTTOM - ends[0]), abs=0.05)
    assert depth.together(lvs(*rows[:3]), "lvs_mean", name="m", title="LVS", ylabel="LVS") is None


def gaps(*rows: dict) -> pd.DataFrame:
    base = {"subject": "toy", "unit": "rms", "n": 24, "n_unscored": 0, "worst_site": "block1"}
    nulls = dict.fromkeys(
        f"{k}{e}" for k in ("safety", "robustness", "gap") for e in ("", "_lo", "_hi")
    )
    return pd.DataFrame([{**nulls, **base, **row} for row in rows])


def test_gap_is_the_bar_between_robustness_and_safety():
    figure = figures.gap_by_budget(
        gaps(
            {
                "eps": 0.03,
                "safety": 0.9,
                "robustness": 0.4,
                "gap": 0.5,
                "gap_lo": 0.3,
                "gap_hi": 0.7,
            },
            {"eps": 0.01},
        )
    )
    drawing = str(figure.groups[0][1][0])
    ((start, end),) = [
        tuple(map(float, m))
        for m in re.findall(r'class="gapbar" d="M([\d.]+) [\d.]+H([\d.]+)"', drawing)
    ]
    x0, x1 = (
        float(re.search(rf'<text x="([\d.]+)"[^>]*>{share}\xa0%<', drawing)[1])
        for share in (0, 100)
    )
    assert start == pytest.approx(x0 + 0.4 * (x1 - x0), abs=0.02)
    assert end == pytest.approx(x0 + 0.9 * (x1 - x0), abs=0.02)
    assert drawing.count("not measured") >= 1, "the budget without a gap says so and draws nothing"
    assert drawing.index("0.01 rms") < drawing.index("0.03 rms"), "small budgets come first"
    assert ">50<" in drawing and "[30, 70]" in drawing
    assert figures.gap_by_budget(gaps({"eps": 0.03})).missing


def test_bars_are_as_high_as_the_numbers_and_null_is_words():
    table = lvs(
        {"layer_index": -1, "lvs_mean": 2.0},
        {"layer_index": 2, "lvs_mean": 8.0},
        {"layer_index": 3, "lvs_mean": 0.0},
        {"layer_index": 2, "lvs_mean": 99.0, "attack": "random"},
        {"subject": "other", "layer_index": 2, "lvs_mean": 4.0},
        {"subject": "other", "layer_index": -1, "lvs_mean": None},
    )
    role = {"emb": -1, "mid": 2, "last": 3}
    figure = figures.lvs_bars(table, {"toy": role, "other": role})
    drawing = str(figure.groups[0][1][0])
    heights = [
        float(h) for h in re.findall(r'<g class="bar k\d"><title>toy.*?height="([\d.]+)"', drawing)
    ]
    assert heights[1] == pytest.approx(4 * heights[0], rel=0.01)
    assert heights[2] == 1.0, "a measured 0 is a line on the axis"
    assert drawing.count("not measured</text>") == 2, (
        "one was tried and not scored, one was not tried"
    )
    assert 99.0 not in set(figure.data["lvs_mean"]), "controls are no bars"
    assert figures.lvs_bars(table, {}).missing


def test_survival_falls_and_ends_where_the_data_end():
    curve = [(0.0, 1.0), (0.01, 0.9), (0.02, 0.5), (0.05, 0.5), (0.1, 0.2)]
    data = pd.DataFrame(
        [
            {
                "subject": "toy",
                "site": f"block{layer}",
                "layer_index": layer,
                "unit": "rms",
                "eps": e,
                "survival": s,
                "lo": max(0, s - 0.1),
                "hi": min(1, s + 0.1),
            }
            for layer in range(9)
            for e, s in curve
        ]
    )
    figure = figures.survival(data)
    drawing = str(figure.groups[0][1][0])
    corners = paths(drawing, "line k0")[0]
    xs, ys = zip(*corners, strict=True)
    assert list(xs) == sorted(xs) and list(ys) == sorted(ys), "to the right, and down"
    assert ys[0] == TOP and ys[-1] == pytest.approx(BOTTOM - 0.2 * (BOTTOM - TOP), abs=0.02)
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in pairwise(corners)), "steps, no slopes"
    assert len(re.findall(r'class="mark', drawing)) == figures.MOST_CURVES
    assert "3 are in the table" in figure.caption and len(figure.data) == 45
    assert "No minimum distances" in figures.survival(data.iloc[:0]).missing


def test_scales_and_ticks():
    scale = Scale(0.01, 1.0, 0, 100, log=True)
    assert [round(scale(v), 6) for v in (0.01, 0.1, 1.0, 50, 0)] == [0, 50, 100, 100, 0]
    assert svg.ticks(0, 13, 4) == [0, 5, 10]
    assert svg.ticks(0, 1, 4) == [0, 0.25, 0.5, 0.75, 1]
    assert svg.log_ticks(0.004, 0.2) == pytest.approx([0.005, 0.01, 0.02, 0.05, 0.1, 0.2])
    labels = [label for _, label in figures.depth_ticks(list(range(-1, 32)))]
    assert labels[0] == "emb." and labels[-1] == "31" and len(labels) <= 7
    assert figures.depth_ticks([3, 4]) == [(3, "3"), (4, "4")]


def test_series_differ_by_more_than_colour():
    assert len({(style.dash, style.marker) for style in STYLES}) == len(STYLES)


def test_text_in_drawings_is_escaped_and_cleaned():
    bad = "<script>alert(1)</script>\x1b[31m\u202e"
    drawing = svg.draw(
        [svg.text(0, 0, bad), svg.marker(0, 0, STYLES[0], bad)], title=bad, desc=bad, key="k"
    )
    assert "<script" not in drawing and "\x1b" not in drawing and "\u202e" not in drawing
    assert drawing.count("&lt;script&gt;") == 4
