"""What a run stores beside its cells carries its own checksum, and a byte of it that changed is
seen: documents, tables, edits."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
import run_folders
import safetensors.numpy

from auditgap.rows import Row
from auditgap.store import RunFolder, files, tables
from auditgap.store.files import Damaged
from auditgap.types import Budget, Cell, Site, Subject

CELL = Cell(Subject("toy", "f00d"), Site(0), Budget(0.03, "rms"), "targeted", "5150", {"seed": 0})


def flips(data: bytes, n: int) -> list[bytes]:
    """`n` copies of the bytes with one bit of each turned over; the same ones every time."""
    draw, found = random.Random(7), []
    for _ in range(n):
        changed = bytearray(data)
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        found.append(bytes(changed))
    return found


def test_a_changed_byte_of_a_document_is_another_number_nowhere(tmp_path):
    path, document = tmp_path / "card.json", {"sens_k": 176, "auroc": 0.875, "name": "vault"}
    files.write_document(path, document)
    assert files.read_document(path) == document
    for changed in flips(path.read_bytes(), 400):
        path.write_bytes(changed)
        with suppress(Damaged):
            assert files.read_document(path) == document


def test_a_document_of_an_earlier_release_is_taken_as_it_is(tmp_path):
    (tmp_path / "old.json").write_text('{"n": 3}')
    assert files.read_document(tmp_path / "old.json") == {"n": 3}
    assert files.read_document(tmp_path / "none.json") is None
    for text in ("[1]", "{", '{"n": NaN, "checksum": "9c1e"}'):
        (tmp_path / "old.json").write_text(text)
        with pytest.raises(Damaged, match=r"old\.json is damaged"):
            files.read_document(tmp_path / "old.json")


def test_a_changed_byte_of_a_table_is_another_number_nowhere(tmp_path):
    frame = pd.DataFrame(
        {"attack": ["targeted", "random"] * 20, "lvs": np.linspace(0, 1, 40), "n": range(40)}
    )
    frame.loc[3, "lvs"] = None
    path = tmp_path / "lvs.parquet"
    path.write_bytes(tables.seal(frame))
    pd.testing.assert_frame_equal(tables.unseal(path), pd.read_parquet(path))
    assert len(pd.read_parquet(path)) == 40
    seen = 0
    for changed in flips(path.read_bytes(), 400):
        path.write_bytes(changed)
        try:
            pd.testing.assert_frame_equal(tables.unseal(path), frame, check_dtype=False)
        except Damaged:
            seen += 1
    assert seen > 100


def test_a_changed_byte_of_an_edit_is_not_exported(tmp_path):
    store = RunFolder.open(tmp_path / "out", config={}, info={})
    path = store.edits(CELL.key)
    path.parent.mkdir()
    path.write_bytes(safetensors.numpy.save({"delta": np.ones(4, np.float32)}))
    empty = {field.name: None for field in fields(Row)}
    named = {"subject": "toy", "attack": "targeted", "draw": 0, "prompt_id": "p0"}
    counts = {"n_prompt_tokens": 7, "n_new_tokens": 5, "flags": "", "unscored": ""}
    store.write(CELL, [Row(**{**empty, **named, **counts})], seconds=1.0)
    assert store.tensors(CELL.key)["delta"].sum() == 4
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged, match="checksum that its cell names"):
        store.tensors(CELL.key)


def test_a_folder_without_checksums_is_said_to_be_unchecked(tmp_path):
    store = RunFolder.open(tmp_path / "out", config={}, info={})
    store.plan([CELL])
    assert store.unchecked == ""
    run_folders.age(tmp_path / "out")
    assert "unchecked" in RunFolder.load(tmp_path / "out").unchecked
