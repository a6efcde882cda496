"""A weights file is read once a machine, and one that changed is read again."""

from __future__ import annotations

import hashlib
import os

import pytest

from auditgap.errors import UsageError
from auditgap.models import digests as module
from auditgap.models.digests import digests
from auditgap.store.files import cache_dir

BODY = os.urandom(module.SMALL + 5)


@pytest.fixture
def read(monkeypatch, tmp_path):
    """The files whose bytes were read, and a cache of its own."""
    monkeypatch.setenv("AUDITGAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "SETTLED", 0.0)
    names, plain = [], hashlib.file_digest

    def counting(file, kind):
        names.append(os.path.basename(file.name))
        return plain(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    return names


def test_each_is_read_once_and_in_order(read, tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(BODY + bytes([i]))
    wanted = [hashlib.sha256(p.read_bytes()).digest() for p in paths]
    assert digests(paths) == wanted == digests(paths)
    assert sorted(read) == [p.name for p in paths]
    entries = list((tmp_path / "cache" / "digests").iterdir())
    assert len(entries) == 3 and {p.stat().st_mode & 0o777 for p in entries} == {0o600}


@pytest.mark.parametrize("size", ["other", "same"])
def test_a_changed_file_is_seen_though_its_date_is_set_back(read, tmp_path, size):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BODY)
    before = path.stat()
    (first,) = digests([path])
    with path.open("r+b") as file:  # the same inode
        file.write(bytes([BODY[0] ^ 1]))
        file.truncate(before.st_size - (size == "other"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    (second,) = digests([path])
    assert second == hashlib.sha256(path.read_bytes()).digest() != first and len(read) == 2


def test_nothing_is_remembered_of_a_file_that_just_changed(read, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SETTLED", 60.0)
    path = tmp_path / "model.safetensors"
    path.write_bytes(BODY)
    digests([path]), digests([path])
    assert len(read) == 2


def test_a_torn_entry_is_read_anew(read, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BODY)
    wanted = digests([path])
    (entry,) = (tmp_path / "cache" / "digests").iterdir()
    entry.write_bytes(entry.read_bytes()[:-9].replace(b"sha256", b"sha257"))
    assert digests([path]) == wanted and len(read) == 2


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    """As in a container whose user is a number."""

    def unknown(_: int) -> None:
        raise KeyError("uid not found")

    for name in ("HOME", "XDG_CACHE_HOME", "AUDITGAP_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(UsageError, match=r"no home folder.*Set AUDITGAP_CACHE"):
        cache_dir()
    monkeypatch.setenv("AUDITGAP_CACHE", "/tmp/cache")
    assert str(cache_dir()) == "/tmp/cache"
