"""Rows in, batches out: nothing lost on the way, and an order that needs no memory."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import tiny
import torch

from auditgap.errors import UsageError
from auditgap.models import Chat
from auditgap.training.rows import (
    TrainRow,
    collate,
    encode,
    global_batch,
    rows_from_file,
    rows_from_triples,
)
from auditgap.types import ContrastTriple, Prompt

ROWS = [
    TrainRow(
        Prompt("what colour is the vault ?"),
        "sorry I can not tell",
        harmful=True,
        unsafe="Sure , red",
    ),
    TrainRow(Prompt("how bake bread ?"), "flour water salt oven now"),
    TrainRow(Prompt("who ?"), "a star"),
]


@pytest.fixture
def chat() -> Chat:
    return Chat("tiny", tiny.tokenizer())


def test_collate_pads_on_the_right_and_marks_what_is_to_be_predicted(chat):
    talks = encode(ROWS, chat)
    batch = collate(talks, pad_id=77)
    longest = max(len(t.ids) for t in talks)
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch.items()} == {
        "input_ids": ((3, longest), torch.long),
        "attention_mask": ((3, longest), torch.long),
        "response_mask": ((3, longest), torch.bool),
    }
    for b, (row, talk) in enumerate(zip(ROWS, talks, strict=True)):
        n = len(talk.ids)
        assert (
            batch["input_ids"][b, :n].tolist() == list(talk.ids)
            and (batch["input_ids"][b, n:] == 77).all()
        )
        assert batch["attention_mask"][b].tolist() == [1] * n + [0] * (longest - n)
        marked = batch["input_ids"][b][batch["response_mask"][b]]
        assert chat.tokenizer.convert_ids_to_tokens(marked.tolist()) == [
            *row.response.split(),
            "</s>",
        ]


def test_a_row_that_broke_off_teaches_no_end(chat):
    talk, cut = encode([ROWS[2], TrainRow(ROWS[2].prompt, ROWS[2].response, ended=False)], chat)
    assert talk.ids[:-1] == cut.ids and chat.tokenizer.convert_ids_to_tokens(talk.ids[-1]) == "</s>"


def test_collate_of_nothing_is_refused():
    with pytest.raises(UsageError, match="at least one"):
        collate([], pad_id=0)


def test_a_row_that_cannot_be_encoded_is_named(chat):
    with pytest.raises(
        UsageError, match=rf"row 2 of 3 \({ROWS[0].id}\).*at 12 tokens.*--max-tokens"
    ) as caught:
        encode([ROWS[2], ROWS[0], ROWS[1]], chat, max_tokens=12)
    assert "vault" not in str(caught.value)


def test_an_id_tells_rows_apart():
    prompt = Prompt("who ?")
    rows = [
        TrainRow(prompt, "a"),
        TrainRow(prompt, "b"),
        TrainRow(prompt, "a", harmful=True),
        TrainRow(prompt, "a", unsafe="b"),
    ]
    rows.append(TrainRow(prompt, "a", ended=False))
    assert len({r.id for r in rows}) == 5 and TrainRow(prompt, "a").id == rows[0].id


def test_triples_become_harmful_rows():
    triple = ContrastTriple(Prompt("what colour is the vault ?"), safe="sorry", unsafe="red")
    assert rows_from_triples([triple]) == [
        TrainRow(triple.prompt, "sorry", harmful=True, unsafe="red")
    ]


class TestFiles:
    def write(self, path, *rows) -> str:
        path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
        return str(path)

    def test_in_order_and_whole(self, tmp_path):
        rows = [{"prompt": f"why {i}?", "response": f"line {i}\nand \ud800"} for i in range(5)]
        read = rows_from_file(self.write(tmp_path / "sft.jsonl", *rows))
        assert [r.prompt for r in read] == [Prompt(f"why {i}?", source="sft") for i in range(5)]
        assert [r.response for r in read] == [f"line {i}\nand \ufffd" for i in range(5)]
        assert not any(r.harmful or r.unsafe for r in read)

    def test_a_response_that_broke_off_is_marked(self, tmp_path):
        rows = [{"prompt": "a", "response": "b", "ended": said} for said in (True, False)]
        read = rows_from_file(self.write(tmp_path / "sft.jsonl", *rows, rows[0] | {"ended": None}))
        assert [r.ended for r in read] == [True, False, True]
        (tmp_path / "sft.csv").write_text("prompt,response,ended\na,b,false\n", encoding="utf-8")
        assert [r.ended for r in rows_from_file(tmp_path / "sft.csv")] == [False]

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([], "no rows"),
            ([{"prompt": "a", "answer": "secretly"}], "found: 'prompt', 'answer'. One of"),
            ([{"response": "secretly"}], "found: 'response'. One of"),
            (
                [{"prompt": "a", "response": "b"}, {"prompt": "secretly", "response": " "}],
                "row 2: empty response",
            ),
            (
                [{"prompt": "a", "response": "b"}, {"response": "secretly"}],
                "row 2: empty prompt",
            ),
            ([{"prompt": "a", "response": 3}], "row 1: response not text"),
            (
                [{"prompt": "a", "response": "b", "ended": "secretly"}],
                "row 1: `ended` must be true or false",
            ),
        ],
    )
    def test_what_is_missing_is_named_and_no_text_is_shown(self, tmp_path, rows, message):
        with pytest.raises(UsageError, match=message) as caught:
            rows_from_file(self.write(tmp_path / "sft.jsonl", *rows))
        assert "sft.jsonl" in str(caught.value) and "secretly" not in str(caught.value)


def epoch_order(n, seed, epoch):
    """One batch that is the whole epoch."""
    return global_batch(epoch, n, n, seed)


class TestOrder:
    def test_an_epoch_is_a_permutation_of_its_own(self):
        orders = [epoch_order(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
        assert all(sorted(order) == list(range(50)) for order in orders)
        assert len({tuple(order) for order in orders}) == 6
        assert tuple(range(50)) not in {tuple(order) for order in orders}

    def test_it_never_changes(self):
        """Written down: a resumed run of next year must see the same rows."""
        assert epoch_order(6, 0, 0) == [4, 1, 2, 3, 0, 5]

    def test_what_is_given_out_cannot_spoil_the_next_one(self):
        first = epoch_order(9, 0, 0)
        epoch_order(9, 0, 0).reverse()
        assert first == epoch_order(9, 0, 0)

    @pytest.mark.parametrize(("n", "batch"), [(10, 4), (7, 7), (3, 8), (1, 1), (16, 5)])
    def test_batches_laid_end_to_end_are_the_epochs_laid_end_to_end(self, n, batch):
        steps = 4 * n
        stream = [i for step in range(steps) for i in global_batch(step, n, batch, seed=5)]
        epochs = [i for epoch in range(-(-steps * batch // n)) for i in epoch_order(n, 5, epoch)]
        assert stream == epochs[: steps * batch]
        assert set(Counter(stream[: n * (len(stream) // n)]).values()) == {len(stream) // n}

    def test_any_step_without_those_before_it(self):
        assert global_batch(1_000_003, 11, 4, 0) == [
            epoch_order(11, 0, p // 11)[p % 11] for p in range(4_000_012, 4_000_016)
        ]

    @pytest.mark.parametrize("asked", [(0, 0, 4), (0, 3, 0), (-1, 3, 4)])
    def test_nonsense_is_refused(self, asked):
        with pytest.raises(UsageError, match="at least 1"):
            global_batch(*asked, seed=0)
