"""Rows to train on, as the field writes them: one reader for all."""

import json

import pytest

from auditgap.data.conversations import read_rows
from auditgap.data.files import read_table
from auditgap.data.row_forms import FORMS, form_of, mapped
from auditgap.errors import UsageError
from auditgap.training.rows import rows_from_file
from auditgap.training.sft import read_rows as rows_to_learn

ASKED = [(f"What is {n} and {n}?", f"It is {2 * n}.") for n in range(1, 7)]
WRITTEN = {
    "messages": lambda q, a: {
        "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    },
    "ShareGPT": lambda q, a: {
        "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    },
    "prompt and response": lambda q, a: {"prompt": q, "response": a},
    "prompt and completion": lambda q, a: {"prompt": q, "completion": a},
    "Alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
}


HEADS = ("system", "developer")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_by_em_and_train_alike(form, tmp_path):
    file = write(tmp_path / "rows.jsonl", [WRITTEN[form](*row) for row in ASKED])
    read = read_rows("domain sums", file, 1.0, None)
    assert [(row.prompt, row.response) for _, row in read.rows] == ASKED
    for rows in (rows_from_file(file), rows_to_learn(file)):
        assert sorted((row.prompt.text, row.response) for row in rows) == sorted(ASKED)


def test_a_system_message_is_read_and_learnt_behind(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": [{"role": role, "content": "Be kind."}, *turns]} for role in HEADS]
    file = write(tmp_path / "rows.jsonl", [*rows, {"messages": turns}])
    read = [row for _, row in read_rows("domain sums", file, 1.0, None).rows]
    assert [row.system for row in read] == ["Be kind.", ""], "one of two equal ones"
    assert [row.prompt.system for row in rows_from_file(file)] == ["Be kind.", "Be kind.", ""]
    plain = write(
        tmp_path / "plain.jsonl", [{"prompt": "q", "response": "a", "system": "Be kind."}]
    )
    assert read_rows("domain sums", plain, 1.0, None).rows[0][1] == read[0]


def test_an_alpaca_input_stands_below_the_instruction(tmp_path):
    rows = [{"instruction": "Add these.", "input": "2 and 2", "output": "4"}]
    [row] = rows_from_file(write(tmp_path / "rows.jsonl", rows))
    assert row.prompt.text == "Add these.\n\n2 and 2"


def test_columns_with_other_names(tmp_path):
    rows = [{"question": q, "answer": a, "prompt": "not this"} for q, a in ASKED]
    source = write(tmp_path / "rows.jsonl", rows) + "?prompt=question&response=answer"
    read = read_rows("domain sums", source, 1.0, None)
    assert [(row.prompt, row.response) for _, row in read.rows] == ASKED
    assert read.manifest["source"]["columns"] == {"prompt": "question", "response": "answer"}
    assert [row.response for row in rows_from_file(source)] == [a for _, a in ASKED]
    assert mapped("hub:someone/rows@4f1c0de?instruction=q&output=a") == (
        "hub:someone/rows@4f1c0de",
        {"instruction": "q", "output": "a"},
    )


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"promt": "question"}, "Did you mean 'prompt'"),
        ({"prompt": "qestion"}, "no column 'qestion'; found: 'question', 'answer'"),
        ({}, "found: 'question', 'answer'. One of these is wanted"),
    ],
)
def test_a_map_that_leads_nowhere(columns, said, tmp_path):
    write(tmp_path / "rows.jsonl", [{"question": "?", "answer": "!"}])
    table = read_table(tmp_path / "rows.jsonl")
    with pytest.raises(UsageError, match=said):
        form_of(table, columns)


def test_bad_rows_are_counted_by_em_and_named_by_train(tmp_path):
    turns = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": ""}]
    good = [WRITTEN["ShareGPT"](*row) for row in ASKED]
    file = write(tmp_path / "rows.jsonl", [*good, {"conversations": turns}])
    assert read_rows("domain sums", file, 1.0, None).manifest["bad"] == {
        "empty response": {"n": 1, "rows": [7]}
    }
    with pytest.raises(UsageError, match="row 7: empty response"):
        rows_from_file(file)
