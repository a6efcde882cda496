"""Checkpoints: whole or passed over, ours or refused, and never lost to a kill (real SIGKILLs at
every file operation)."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from auditgap.errors import AuditgapError, Refused, UsageError
from auditgap.store.files import read_json, to_json
from auditgap.training import checkpoints
from auditgap.training.checkpoints import (
    adopt,
    begin,
    check_world,
    latest,
    name_of,
    point,
    rotate,
)
from auditgap.training.manifest import hash_files, seal

FACTS = {"stage": 2, "config": "9c1e"}


@pytest.fixture(autouse=True)
def own_key(tmp_path, monkeypatch):
    monkeypatch.setenv("AUDITGAP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "run" / "checkpoints"


def shards(folder: Path, step: int, world: int = 2) -> None:
    """Files as DeepSpeed names them, with a folder among them."""
    (folder / "extra").mkdir(exist_ok=True)
    (folder / "extra" / "monitor.safetensors").write_bytes(b"monitor" * step)
    for rank in range(world):
        (folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(
            bytes([step % 256, rank]) * 5000
        )


def save(root: Path, step: int, world: int = 2, facts: dict = FACTS) -> Path:
    folder = begin(root, step)
    shards(folder, step, world)
    seal(folder, step=step, world=world, facts=facts)
    point(root, step)
    return folder


SHARD = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def test_the_newest_is_found_with_what_it_was_sealed_with(root):
    assert latest(root) is None
    save(root, 4)
    save(root, 12, facts={**FACTS, "tokens": 7})
    found = latest(root)
    assert (found.step, found.world, found.stage, found.facts["tokens"], found.skipped) == (
        12,
        2,
        2,
        7,
        (),
    )
    assert found.folder == root / "step00000012"
    assert (root / "latest").read_text().strip() == "step00000012"


def test_ranks_that_hash_their_own_files_seal_the_same(root):
    folder = begin(root, 3)
    shards(folder, 3)
    mine, theirs = (
        hash_files(folder, sorted(folder.rglob(f"*{end}"))) for end in (".pt", ".safetensors")
    )
    with pytest.raises(UsageError, match="differ"):
        seal(folder, step=3, world=2, facts=FACTS, files=mine)
    seal(folder, step=3, world=2, facts=FACTS, files={**mine, **theirs})
    assert {**mine, **theirs} == hash_files(folder) == read_json(folder / "manifest.json")["files"]
    assert latest(root).step == 3


def test_a_save_that_vouches_for_nothing_is_refused(root, tmp_path):
    folder = begin(root, 3)
    for facts in ({"config": "x"}, {"stage": 4, "config": "x"}, {"stage": 2}):
        with pytest.raises(UsageError, match="stage"):
            seal(folder, step=3, world=1, facts=facts)
    (tmp_path / "outside.pt").write_bytes(b"x")
    (folder / "link.pt").symlink_to(tmp_path / "outside.pt")
    with pytest.raises(UsageError, match="plain file"):
        seal(folder, step=3, world=1, facts=FACTS)


def cut(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1])


def flip(folder: Path) -> None:
    data = bytearray((folder / SHARD).read_bytes())
    data[17] ^= 1
    (folder / SHARD).write_bytes(data)


def to_link(folder: Path) -> None:
    shutil.copy(folder / SHARD, folder.parent.parent / "elsewhere.pt")
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to(folder.parent.parent / "elsewhere.pt")


@pytest.mark.parametrize(
    ("hurt", "why"),
    [
        (lambda f: (f / SHARD).unlink(), "is missing"),
        (cut, "9,999 bytes where 10,000"),
        (flip, "SHA-256"),
        (to_link, "no plain file"),
        (lambda f: (f / "manifest.json").unlink(), "cut short"),
        (lambda f: (f / "manifest.json").write_text('{"schema": 1, "na'), "not readable"),
        (lambda f: (f / "manifest.json").write_text("[1]"), "not readable"),
    ],
    ids=["missing", "truncated", "altered", "link", "no manifest", "half a manifest", "other json"],
)
def test_a_torn_one_is_passed_over_and_it_says_so(root, hurt, why):
    save(root, 4)
    save(root, 8)
    hurt(save(root, 12))
    said = []
    found = latest(root, say=said.append)
    assert found.step == 8
    assert (
        len(found.skipped) == 1 and "step00000012" in found.skipped[0] and why in found.skipped[0]
    )
    assert tuple(said) == found.skipped


def test_none_whole_is_for_a_person_to_decide_but_a_cut_first_save_is_not(root):
    shards(begin(root, 4), 4)  # killed before it was sealed
    assert latest(root) is None
    save(root, 8)
    cut(root / name_of(8))
    with pytest.raises(UsageError, match=r"no whole checkpoint.*9,999 bytes"):
        latest(root)
    shutil.rmtree(root / name_of(8))
    # `latest` still names it: something was lost
    with pytest.raises(UsageError, match="no whole checkpoint"):
        latest(root)


def test_a_lost_newest_is_said(root):
    save(root, 4)
    save(root, 8)
    shutil.rmtree(root / name_of(8))
    found = latest(root)
    assert found.step == 4 and "not there" in found.skipped[0]


def test_a_sealed_one_counts_before_the_pointer_names_it(root):
    save(root, 4)
    folder = begin(root, 8)
    shards(folder, 8)
    seal(folder, step=8, world=2, facts=FACTS)
    assert latest(root).step == 8


def test_another_users_is_refused_and_his_key_opens_it(root, tmp_path, monkeypatch):
    save(root, 4)
    monkeypatch.setenv("AUDITGAP_CACHE", str(tmp_path / "other"))
    with pytest.raises(Refused, match=r"another user or on another machine.*copy"):
        latest(root)  # no key at all
    save(tmp_path / "b", 1)
    with pytest.raises(Refused, match=r"another user or on another machine.*copy"):
        latest(root)
    shutil.copy(tmp_path / "cache" / "checkpoint.key", tmp_path / "other" / "checkpoint.key")
    assert latest(root).step == 4


@pytest.mark.parametrize(
    "change", [{"step": 99}, {"world": 1}, {"files": {}}, {"schema": 2}, {"name": "step00000005"}]
)
def test_an_altered_manifest_is_refused(root, change):
    folder = save(root, 4)
    (folder / "manifest.json").write_bytes(
        to_json({**read_json(folder / "manifest.json"), **change})
    )
    with pytest.raises(Refused, match="altered"):
        latest(root)


def test_a_file_that_was_slipped_in_and_a_renamed_folder_are_refused(root):
    folder = save(root, 4)
    # DeepSpeed would open it by its name
    (folder / "zero_pp_rank_2_mp_rank_00_optim_states.pt").write_bytes(b"x")
    with pytest.raises(Refused, match="does not list"):
        latest(root)
    (folder / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    folder.rename(root / name_of(9))
    with pytest.raises(Refused, match="renamed"):
        latest(root)


def test_the_key_is_private_and_stays(root, tmp_path):
    key = tmp_path / "cache" / "checkpoint.key"
    save(root, 4)
    before = key.read_bytes()
    assert len(before) == 32 and key.stat().st_mode & 0o777 == 0o600
    save(root, 5)
    assert key.read_bytes() == before
    assert before not in (root / name_of(5) / "manifest.json").read_bytes()
    assert before.hex() not in (root / name_of(5) / "manifest.json").read_text()
    key.chmod(0o644)
    with pytest.raises(Refused, match="chmod 600"):
        latest(root)
    key.chmod(0o600)
    key.write_bytes(b"short")
    with pytest.raises(Refused, match="32"):
        latest(root)


def test_begin_makes_room_and_never_overwrites_a_whole_one(root):
    save(root, 4)
    with pytest.raises(AuditgapError, match="already holds"):
        begin(root, 4)
    cut(root / name_of(4))
    assert list(begin(root, 4).iterdir()) == []
    assert (root / "step00000004.1.corrupt" / SHARD).exists()


# ---------------------------------------------------------------- rotation


def test_rotation_keeps_the_newest_and_the_named(root):
    for step in (1, 2, 3, 4, 5):
        save(root, step)
    assert rotate(root, keep=2, also={2}) == [1, 3]
    assert checkpoints.steps(root) == [2, 4, 5]
    assert rotate(root, keep=0) == [2, 4]
    assert latest(root).step == 5
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step00000005"]


def test_rotation_counts_whole_ones_only(root):
    for step in (1, 2, 3, 4, 5):
        save(root, step)
    cut(root / name_of(5))
    (root / name_of(2) / "manifest.json").unlink()
    assert rotate(root, keep=1) == [1, 2, 3]
    # 5 is newer than anything whole: somebody may want to look
    assert checkpoints.steps(root) == [4, 5]
    assert latest(root).step == 4
    cut(root / name_of(4))
    assert rotate(root, keep=1) == []  # nothing whole: nothing goes


def test_a_strangers_is_not_deleted(root, tmp_path, monkeypatch):
    monkeypatch.setenv("AUDITGAP_CACHE", str(tmp_path / "other"))
    save(root, 1)
    monkeypatch.setenv("AUDITGAP_CACHE", str(tmp_path / "cache"))
    for step in (2, 3):
        save(root, step)
    assert rotate(root, keep=1) == [2]
    assert checkpoints.steps(root) == [1, 3]


#: What the audit hook counts: every way in which a save or a rotation touches the disk.
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree")


def killed_after(root: Path, n: int) -> bool:
    """In a forked child: save step 4, then rotate to one; SIGKILL itself at the n-th touch of
    `root`. False: it got through."""
    child = os.fork()
    if child == 0:
        try:
            left = [n]

            def hook(event: str, args: tuple) -> None:
                if event in EVENTS and (event.startswith("os.") or str(root) in str(args[0])):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            save(root, 4)
            rotate(root, keep=1)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(root, tmp_path):
    for step in (1, 2, 3):
        save(root, step)
    seen, n = set(), 0
    while True:
        copy = tmp_path / f"kill{n}"
        shutil.copytree(root, copy)
        killed = killed_after(copy, n)
        found = latest(copy)
        assert found is not None and found.step in (3, 4), n
        seen.add((tuple(checkpoints.steps(copy)), found.step))
        if found.step == 3:  # the same command again: it resumes from 3 and saves 4
            save(copy, 4)
        rotate(copy, keep=1)
        assert latest(copy).step == 4
        assert sorted(p.name for p in copy.iterdir() if "corrupt" not in p.name) == [
            "latest",
            "step00000004",
        ], n
        shutil.rmtree(copy)
        if not killed:
            break
        n += 1
    # it did kill: at the shards, the manifest, the pointer, each rename and each deletion
    assert n > 30
    assert {((1, 2, 3, 4), 3), ((1, 2, 3, 4), 4), ((2, 3, 4), 4), ((4,), 4)} <= seen


# -------------------------------------------------------------- other world


def test_the_same_world_is_fine_and_another_stage_is_not(root):
    save(root, 4)
    found = latest(root)
    assert check_world(found, 2, 2) is found
    with pytest.raises(UsageError, match=r"stage 2.*stage 3"):
        check_world(found, 2, 3)


def test_another_world_gets_the_folder_of_the_converted_one(root):
    save(root, 4)
    assert check_world(latest(root), 1, 2) == root / "step00000004_universal"


def test_a_converted_one_is_adopted_once_and_then_read_by_any_world(root):
    save(root, 4, facts={**FACTS, "tokens": 7})
    wanted = check_world(latest(root), 1, 2)
    (wanted / "zero").mkdir(parents=True)
    (wanted / "zero" / "fp32.pt").write_bytes(b"x" * 100)
    # not sealed yet: it could be anybody's
    assert check_world(latest(root), 1, 2) == wanted
    assert adopt(wanted).world == 0
    twin = check_world(latest(root), 3, 2)
    assert (twin.folder, twin.world, twin.step, twin.facts["tokens"]) == (wanted, 0, 4, 7)
    assert check_world(twin, 5, 2) is twin
    (wanted / "zero" / "fp32.pt").write_bytes(b"y" * 100)
    assert check_world(latest(root), 3, 2) == wanted
    (wanted / "zero" / "more.pt").write_bytes(b"y")
    with pytest.raises(Refused, match="does not list"):
        check_world(latest(root), 3, 2)


def test_adopting_what_was_not_converted_is_refused(root, tmp_path):
    save(root, 4)
    (tmp_path / "step00000007_universal").mkdir()
    for folder in (
        root / name_of(4),
        tmp_path,
        tmp_path / "step00000007_universal",
        root / "step00000004_universal",
    ):
        with pytest.raises(UsageError):
            adopt(folder)


def test_the_universal_twin_goes_with_its_checkpoint(root):
    save(root, 4)
    twin = root / "step00000004_universal"
    twin.mkdir()
    (twin / "fp32.pt").write_bytes(b"x")
    adopt(twin)
    save(root, 5)
    rotate(root, keep=1)
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step00000005"]
