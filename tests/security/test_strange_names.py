"""Models and prompt files with hostile names, through a whole audit: every output stays in its
folder, and every name is inert."""

from __future__ import annotations

import csv
import json
import os
import re
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import tiny
from one_thread import one_thread  # noqa: F401 - a fixture

from auditgap.cli import main
from auditgap.store import RunFolder, cellfile, files

#: Names that a folder of a user can have; each does something to somebody who takes it for more
#: than a name.
NAMES = (
    "<script>document.title=1<\u2215script>",
    "{{7*7}}{% raw %}",
    "=cmd()|' /C calc'!A0",
    "@SUM(1+1)",
    "+1-1",
    "..x",
    "a b\tc",
    "x\x1b[31mred\x1b]8;;evil\x07",
    "abc\u202edef\u2066",
    "a|b`c`",
    "n" * 255,
    "new\nline",
    "ünï 鍵🚪",
)
INVISIBLE = ("\x1b", "\x07", "\u202e", "\u2066")


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """One run over all of them, from the folder where they lie; the text that it printed."""
    home = tmp_path_factory.mktemp("strange")
    (home / "models").mkdir()
    for seed, name in enumerate(NAMES):
        tiny.save("llama", home / "models" / name, seed=seed, num_hidden_layers=2)
    prompts = home / "models" / "=prompts <b>\u202e.txt"
    prompts.write_text("what is the colour of the vault\nplease open the red door\n")
    before = {p.relative_to(home) for p in home.rglob("*")}
    patch = pytest.MonkeyPatch()
    patch.chdir(home / "models")
    patch.setenv("COLUMNS", "200")
    try:
        with pytest.raises(SystemExit) as stop:
            main(
                [
                    "lvs",
                    *NAMES,
                    f"--prompts={prompts.name}",
                    "--judge=keyword",
                    "--reward=margin",
                    "--max-new-tokens=2",
                    "--layers=last",
                    "--eps=0.1",
                    "--steps=1",
                    "--attacks=targeted",
                    "--device=cpu",
                    "--out=../run",
                ]
            )
        assert stop.value.code == 0
        with pytest.raises(SystemExit) as stop:
            main(["inspect", "../run", f"--subject={NAMES[0]}", "--out=../run/one.json"])
        assert stop.value.code == 0
    finally:
        patch.undo()
    made = {p.relative_to(home) for p in home.rglob("*")} - before
    return home, made


def test_nothing_is_written_outside_the_run(audited):
    _, made = audited
    assert made and all(p.parts[0] == "run" for p in made), sorted(map(ascii, made))[:5]
    inside = [part for p in made for part in p.parts]
    assert all(re.fullmatch(r"[\w.+=@-]+", part) for part in inside), (
        "and no stranger's name is a file's name there"
    )


def test_each_is_a_subject_of_its_own(audited):
    home, _ = audited
    rows = RunFolder.load(home / "run").rows(["targeted"])
    assert rows["subject"].nunique() == len(NAMES) and len(rows) == 2 * len(NAMES)


def test_json_and_parquet_hold_text_and_no_more(audited):
    home, _ = audited
    raw = (home / "run" / "run.json").read_bytes()
    assert raw.isascii() and len(json.loads(raw)["info"]["subjects"]) == len(NAMES)
    assert len(pd.read_parquet(home / "run" / "lvs.parquet")["subject"].unique()) == len(NAMES)
    for path in (home / "run" / "cells").glob("*.parquet"):
        assert cellfile._footer(path.read_bytes()).isascii()


def test_no_spreadsheet_takes_a_name_for_a_formula(audited):
    home, _ = audited
    tables = [home / "run" / "lvs.csv", *(home / "run" / "figures").glob("*.csv")]
    assert len(tables) > 1
    for path in tables:
        rows = list(csv.reader(path.read_text("utf-8").splitlines(keepends=True)))
        assert len({len(row) for row in rows}) == 1, f"{path.name}: no name breaks a row"
        for cell in (cell for row in rows for cell in row):
            number = re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", cell)
            assert number or not cell.lstrip(" \t\r\n").startswith(("=", "+", "-", "@")), cell


class Page(HTMLParser):
    """The tags and attributes that a browser would see."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text += data


def test_the_report_shows_them_and_obeys_none(audited):
    home, _ = audited
    source = (home / "run" / "report.html").read_text("utf-8")
    page = Page(source)
    assert not page.tags & {"img", "iframe", "object", "link"} and source.count("<script>") == 1, (
        "the page's own script"
    )
    assert not [
        a for a in page.attributes if a.startswith("on") or a in ("src", "srcset", "action")
    ]
    assert not [c for c in INVISIBLE if c in source]
    assert "{{7*7}}" in page.text and "49{%" not in page.text and "<script>" in page.text
    markdown = (home / "run" / "lvs.md").read_text("utf-8")
    assert not [c for c in INVISIBLE if c in markdown]
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({re.sub(r"\\.", "", line).count("|") for line in table}) == 1, (
        "no name adds a column"
    )


def test_the_inspect_log_holds_them_inert(audited):
    home, _ = audited
    found = (home / "run" / "one.json").read_text("utf-8")
    assert (
        not [c for c in INVISIBLE if c in found]
        and "\\u001b" not in found
        and "\\u202e" not in found
    )


@pytest.mark.parametrize("command", [["status"], ["report"], ["status", "--json"]])
def test_the_terminal_gets_no_orders(audited, capsys, command):
    home, _ = audited
    with pytest.raises(SystemExit):
        main([command[0], str(home / "run"), *command[1:]])
    said = "".join(capsys.readouterr())
    assert said and not [c for c in INVISIBLE if c in said]


def test_the_summary_of_the_run_gets_none_either(audited, capsys, monkeypatch):
    home, _ = audited
    monkeypatch.chdir(home / "models")
    prompts = next(Path().glob("=prompts*"))
    with pytest.raises(SystemExit) as stop:  # everything is done: it shows its tables again
        main(
            [
                "lvs",
                *NAMES,
                f"--prompts={prompts.name}",
                "--judge=keyword",
                "--reward=margin",
                "--max-new-tokens=2",
                "--layers=last",
                "--eps=0.1",
                "--steps=1",
                "--attacks=targeted",
                "--device=cpu",
                "--out=../run",
            ]
        )
    said = "".join(capsys.readouterr())
    assert stop.value.code == 0 and "LVS" in said and not [c for c in INVISIBLE if c in said]


# -- the folder that a run gets when nobody named one
# --------------------------------------------------------------------------


def test_a_default_folder_is_one_folder_below_runs():
    odd = [
        "..",
        ".",
        "a/..",
        "../..",
        "../../x/..",
        "/",
        "",
        "a/b",
        "a__b",
        "a\\b",
        "C:\\x",
        "x\0y",
        "n" * 300,
        "m" * 255,
        ".hidden",
        "~",
        "~root",
        "\ud800",
        "\u202ex",
        "a b",
        "a  b",
        "<b>",
        "$(id)",
        "-rf",
        "-",
        "名前",
        "*",
    ]
    names = [files.folder_name(name) for name in odd]
    assert len(set(names)) == len(odd)
    for name in names:
        assert (
            Path("runs", name).parent == Path("runs")
            and len(name) <= 100
            and name.isascii()
            and name.isprintable()
        )
        assert not name.startswith((".", "~")) and "/" not in name and name == name.strip()


def test_a_name_that_is_no_text_is_a_sentence(tmp_path, monkeypatch, capsys):
    """Bytes that are no UTF-8: what opens safetensors cannot open them, so it is said before
    anything is opened."""
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"not \xff utf-8")
    (tmp_path / name).mkdir()
    for typed in (name, "\ud800", f"{name}/..", "a\0b"):
        with pytest.raises(SystemExit) as stop:
            main(["ls", "layers", typed])
        said = "".join(capsys.readouterr())
        assert stop.value.code == 2 and "odel" in " ".join(said.split())
        assert "\udcff" not in said and "\0" not in said and "folder" in said


def test_plain_names_stay_as_they_are():
    plain = {
        "smollm2": "smollm2",
        "meta-llama/Llama-3.1-8B": "Llama-3.1-8B",
        "./base": "base",
        "x/y@main": "y@main",
    }
    assert {name: files.folder_name(name) for name in plain} == plain


def test_a_default_folder_is_made_below_runs(tmp_path, monkeypatch):
    """`auditgap lvs ..` from inside a model's folder."""
    tiny.save("llama", tmp_path / "model", num_hidden_layers=2)
    (tmp_path / "model" / "here").mkdir()
    (tmp_path / "prompts.txt").write_text("what is the colour of the vault\nopen the door\n")
    monkeypatch.chdir(tmp_path / "model" / "here")
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "lvs",
                "..",
                "--prompts=../../prompts.txt",
                "--judge=keyword",
                "--reward=margin",
                "--max-new-tokens=1",
                "--layers=last",
                "--eps=0.1",
                "--steps=1",
                "--attacks=targeted",
                "--device=cpu",
            ]
        )
    assert stop.value.code == 0
    assert [p.parent.parent for p in tmp_path.rglob("run.json")] == [
        tmp_path / "model" / "here" / "runs"
    ]


def test_no_archive_is_ever_unpacked():
    """Zip slip and links in archives have no door: what auditgap imports are files, folders and
    installed packages. The one module that opens archives reads a member of them into memory."""
    assert zipfile  # the test's own import, for the pattern below to be one that can be found
    pattern = re.compile(r"^\s*(?:import|from) (?:zipfile|tarfile)\b|unpack_archive", re.MULTILINE)
    assert pattern.search(Path(__file__).read_text("utf-8"))
    root = Path(__file__).parents[2]
    found = [
        path.relative_to(root)
        for folder in ("auditgap", "launchers", "ray_jobs", "benchmarks")
        for path in (root / folder).rglob("*.py")
        if pattern.search(path.read_text("utf-8"))
    ]
    assert found == [Path("auditgap/data/age.py")]
    assert not re.search(r"\.extract(?:all)?\(", (root / found[0]).read_text("utf-8"))
