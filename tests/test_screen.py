"""Tables on terminals of any width: every word whole, every value there."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auditgap.cli import screen

LVS = [
    {
        "subject": "smollm2-refuses",
        "site": "block15",
        "eps": eps,
        "n": 34,
        "LVS": lvs,
        "− matched": lvs,
        "ASR, corrected": asr,
        "drop": lvs,
    }
    for eps, lvs, asr in [
        ("0.03 rms", "0.81 [0.49, 1.14]", "0.27 [0.01, 0.54]"),
        ("0.1 rms", "1.32 [1.09, 1.43]", "0.97 [0.73, 1.00]"),
    ]
]
WORDS = st.lists(st.text("abc→é", min_size=1, max_size=9), max_size=3).map(" ".join)
NAMES = st.lists(WORDS.filter(bool), min_size=1, max_size=6, unique=True)
ROWS = NAMES.flatmap(
    lambda names: st.lists(
        st.fixed_dictionaries(dict.fromkeys(names, WORDS)), min_size=1, max_size=4
    )
)


def shown(rows, width: int) -> str:
    with pytest.MonkeyPatch.context() as patch, screen.out.capture() as caught:
        patch.setattr(screen.out, "_width", width)
        screen.print_table(rows)
    return caught.get()


@settings(deadline=None, max_examples=60)
@given(ROWS, st.integers(24, 120))
def test_no_word_is_broken_and_no_value_is_left_out(rows, width):
    text = shown(rows, width)
    seen = {word.removesuffix(":") for word in text.split()}
    for row in rows:
        assert {word for value in row.values() for word in value.split()} <= seen
    assert {word for name in rows[0] for word in name.split()} <= seen
    assert all(screen.cell_len(line.rstrip()) <= width for line in text.splitlines())


def test_what_all_rows_agree_in_stands_above_a_table_that_is_too_wide():
    assert shown(LVS, 140).splitlines()[0].startswith("subject          site")
    narrow = shown(LVS, 66).splitlines()
    assert narrow[:2] == ["subject: smollm2-refuses", "site: block15"]
    assert sum(line.startswith("0.03") for line in narrow) == 1


def test_one_long_word_turns_no_table_into_lists():
    path = "/models/" + "x" * 90
    rows = [{"type": f"family{i}", "note": path if i == 3 else "proven"} for i in range(9)]
    lines = [line.rstrip() for line in shown(rows, 80).splitlines()]
    assert lines[1] == "family0  proven"
    assert path in "".join(line.removeprefix("family3").strip() for line in lines[4:7])


def test_on_a_terminal_too_narrow_for_that_each_row_is_a_list():
    lines = [line.rstrip() for line in shown(LVS, 34).splitlines()]
    assert lines[lines.index("") + 1] == "eps: 0.1 rms"
    assert lines[-2:] == ["ASR, corrected: 0.97 [0.73, 1.00]", "drop: 1.32 [1.09, 1.43]"]


def test_a_space_of_the_page_is_a_space_and_a_control_is_marked():
    assert screen.inert("90\u00a0% < 1\u2009\u202fé") == "90 % < 1  é"
    assert screen.inert("a\x1b[31m\u2028\u202e") == "a\ufffd[31m\ufffd\ufffd"
