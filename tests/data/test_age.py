"""Rows under age encryption: opened in memory, and nothing of them lies anywhere as it is."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

from auditgap.data import age
from auditgap.data.domains import Panel
from auditgap.data.files import read_table
from auditgap.data.panel import read_panel
from auditgap.errors import UsageError

pyrage = pytest.importorskip("pyrage")

#: A word that stands in every row and must be found nowhere.
CANARY = "quetzalcoatlus"
LINES = "".join(
    json.dumps({"prompt": f"{CANARY} number {i} of what ?", "response": f"{CANARY} {i}"}) + "\n"
    for i in range(12)
).encode()


@pytest.fixture
def secret(tmp_path, monkeypatch):
    found = pyrage.x25519.Identity.generate()
    file = tmp_path / "key.txt"
    file.write_text(f"# created: today\n# public key: {found.to_public()}\n{found}\n")
    monkeypatch.setenv(age.IDENTITY, str(file))
    return found


def put(path: Path, data: bytes, secret) -> Path:
    path.write_bytes(pyrage.encrypt(data, [secret.to_public()]))
    return path


def zipped(name: str = "sets/a.jsonl") -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, LINES)
        archive.writestr("read.me", "x")
    return made.getvalue()


def tarred() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        entry = tarfile.TarInfo("./sets/a.jsonl")
        entry.size = len(LINES)
        archive.addfile(entry, io.BytesIO(LINES))
    return made.getvalue()


def test_a_file_and_a_member_of_an_archive_are_the_table_that_was_sealed(tmp_path, secret):
    plain = tmp_path / "plain.jsonl"
    plain.write_bytes(LINES)
    rows = read_table(plain).rows
    assert read_table(put(tmp_path / "a.jsonl.age", LINES, secret)).rows == rows
    assert (
        read_table(put(tmp_path / "b.zip.age", zipped(), secret) / "sets" / "a.jsonl").rows == rows
    )
    assert (
        read_table(put(tmp_path / "c.tar.gz.age", tarred(), secret) / "sets/a.jsonl").rows == rows
    )


def test_a_panel_keeps_such_rows_sealed_and_nothing_of_them_lies_on_disk(
    tmp_path, secret, monkeypatch
):
    """Every file that is made meanwhile is scanned, and temporary ones have one place."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    file = put(tmp_path / "a.zip.age", zipped(), secret)
    panel = read_panel({"birds": f"{file}/sets/a.jsonl", "sums": "demo:off_by_one"}, heldout=0.25)
    told = panel.domains["birds"].manifest["source"]
    assert told["origin"] == "a.jsonl.age" and len(told["sha256"]) == 64
    panel.save(tmp_path / "panel")
    rows = tmp_path / f"rows{panel.domains['birds'].suffix}"
    assert panel.write_rows("birds", "plain", rows) == (9, 0)
    assert len(read_table(rows).rows) == 9, "as training reads them"
    assert Panel.load(tmp_path / "panel") == panel
    assert {p.name for p in (tmp_path / "panel").iterdir()} == {
        "birds.jsonl.age",
        "sums.jsonl",
        "manifest.json",
    }
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 6 and not [p.name for p in written if CANARY.encode() in p.read_bytes()]
    assert not list(temporary.iterdir())


def test_sentences_for_what_cannot_be_opened(tmp_path, secret, monkeypatch):
    file = put(tmp_path / "a.zip.age", zipped(), secret)
    with pytest.raises(UsageError, match=r"name a file in it, such as a\.zip\.age/sets/a\.jsonl"):
        read_table(file)
    with pytest.raises(UsageError, match=r"has no sets/b\.jsonl.*a\.jsonl"):
        read_table(file / "sets" / "b.jsonl")
    with pytest.raises(UsageError, match="unknown format"):
        read_table(file / "read.me")
    with pytest.raises(UsageError, match="no zip archive"):
        read_table(put(tmp_path / "b.zip.age", LINES, secret) / "a.jsonl")
    with pytest.raises(UsageError, match="no tar archive"):
        read_table(put(tmp_path / "b.tar.age", LINES, secret) / "a.jsonl")
    with pytest.raises(UsageError, match="no archive"):
        read_table(put(tmp_path / "c.jsonl.age", LINES, secret) / "a.jsonl")
    with pytest.raises(UsageError, match="There is no file"):
        read_table(tmp_path / "none.jsonl.age")
    monkeypatch.setattr(age, "MOST_BYTES", 500)
    with pytest.raises(UsageError, match="larger than"):
        read_table(file / "sets" / "a.jsonl")
    monkeypatch.undo()


def test_another_identity_or_none_is_a_sentence_and_no_key_is_in_it(tmp_path, secret, monkeypatch):
    file = put(tmp_path / "a.jsonl.age", LINES, secret)
    other = tmp_path / "other.txt"
    other.write_text(f"{pyrage.x25519.Identity.generate()}\n")
    for value, said in (
        (str(other), "made for another one"),
        ("", "set AUDITGAP_AGE_IDENTITY"),
        (str(tmp_path / "nowhere"), "no file of text"),
        (str(file), "no file of text|no identity"),
    ):
        monkeypatch.setenv(age.IDENTITY, value)
        with pytest.raises(UsageError, match=said) as caught:
            read_table(file)
        assert "AGE-SECRET-KEY-1" not in str(caught.value)
    torn = tmp_path / "torn.txt"
    torn.write_text("AGE-SECRET-KEY-1XX\n")
    monkeypatch.setenv(age.IDENTITY, str(torn))
    with pytest.raises(UsageError, match="no identity as age-keygen writes it"):
        read_table(file)
