"""Two runs on one folder, and the locks of the dead: one writes, the other is told who, and no cell
is computed twice."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import children
import pytest
import tiny
import toys

from auditgap.cli import main
from auditgap.errors import UsageError
from auditgap.store import RunFolder


def test_of_runs_started_together_one_computes_each_cell(tmp_path):
    """Six at once on a new folder: whoever is late exits 2 by the name of the holder, or finds the
    work done."""
    out, log = tmp_path / "out", tmp_path / "log"
    started = [children.python(children.SWEEP, str(out), str(log), "{}") for _ in range(6)]
    said = [child.communicate(timeout=120) for child in started]
    for child, (words, err) in zip(started, said, strict=True):
        assert child.returncode in (0, 2) and "Traceback" not in err, words + err
        if child.returncode == 2:
            assert (
                "out is being written by process " in words or "out is locked by a process" in words
            )
    assert any(child.returncode == 0 for child in started), said
    begun = toys.counts(log)
    begun.pop("made")
    assert len(begun) == 12 and set(begun.values()) == {1}
    assert len(RunFolder.load(out).records()) == 12 and not (out / "lock.json").exists()


HOLDER = """
    import sys, time
    from auditgap.store import RunFolder
    store = RunFolder(sys.argv[1], {})
    with store.lock():
        print("held", flush=True)
        time.sleep(120)
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A tiny audit's command line, less its --out."""
    folder = tmp_path_factory.mktemp("audit")
    (folder / "prompts.txt").write_text("what is the colour of the vault\nplease tell the colour\n")
    options = {
        "prompts": folder / "prompts.txt",
        "judge": "keyword",
        "reward": "margin",
        "max-new-tokens": 3,
        "layers": "1",
        "eps": 0.1,
        "attacks": "targeted",
        "steps": 1,
        "device": "cpu",
        "dtype": "float32",
    }
    return [
        "lvs",
        str(tiny.save("llama", folder / "model")),
        *(f"--{name}={value}" for name, value in options.items()),
    ]


def audit(arguments: list[str], capsys: pytest.CaptureFixture) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    printed = capsys.readouterr()
    return int(stop.value.code or 0), " ".join(f"{printed.out} {printed.err}".split())


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "lock.json"
    }


def test_a_second_command_names_the_holder_and_changes_nothing(command, tmp_path, capsys):
    out = tmp_path / "run"
    assert audit([*command, f"--out={out}"], capsys)[0] == 0
    before = files(out)
    holder = children.python(HOLDER, str(out), stderr=subprocess.DEVNULL)
    try:
        assert holder.stdout.readline() == "held\n"
        for flag in ([], ["--break-lock"]):  # a living process of this host is never overruled
            code, said = audit([*command, f"--out={out}", *flag], capsys)
            assert (
                code == 2
                and f"is being written by process {holder.pid} on {socket.gethostname()}" in said
            )
        code, said = audit([*command, f"--out={out}", "--eps=0.2"], capsys)
        assert code == 2 and "eps: [0.1] in the folder, [0.2] now" in said, (
            "another config is said first: waiting is no use"
        )
        assert files(out) == before
        code, said = audit(["status", str(out)], capsys)
        assert code == 0 and f"running (pid {holder.pid}" in said
    finally:
        holder.kill()
        holder.communicate()
    code, said = audit([*command, f"--out={out}"], capsys)
    assert code == 0, "the lock of a process that died on this host is no obstacle"


def test_who_lost_the_lock_leaves_the_note_of_who_has_it(tmp_path, monkeypatch):
    """Another host breaks our lock: our end removes our own note only, never that of the living."""
    ours, theirs = RunFolder(tmp_path, {}), RunFolder(tmp_path, {}, break_lock=True)
    mine = ours.lock()
    mine.__enter__()
    first = json.loads((tmp_path / "lock.json").read_text())
    code = HOLDER.replace(
        "RunFolder(sys.argv[1], {})", "RunFolder(sys.argv[1], {}, break_lock=True)"
    )
    code = code.replace("import sys, time", ELSEWHERE)
    with children.python(code, str(tmp_path), stderr=subprocess.DEVNULL) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            second = json.loads((tmp_path / "lock.json").read_text())
            assert second["host"] == "node7" != first["host"]
            mine.__exit__(None, None, None)
            assert json.loads((tmp_path / "lock.json").read_text()) == second
            with pytest.raises(UsageError, match="on node7"), ours.lock():
                pass
        finally:
            holder.kill()
    with theirs.lock():
        pass
    assert not (tmp_path / "lock.json").exists()


#: A machine of another name: its processes are not to be seen from here, and the file system does
#: not carry its locks.
ELSEWHERE = """import fcntl, socket, sys, time
    socket.gethostname = lambda: "node7"
    fcntl.flock = lambda *_: None"""


def test_the_lock_of_another_host_is_taken_only_when_told(command, tmp_path, capsys):
    out = tmp_path / "run"
    assert audit([*command, f"--out={out}"], capsys)[0] == 0
    note = {
        "pid": os.getpid(),
        "host": "node-that-is-gone",
        "command": "auditgap lvs",
        "since": "2026-01-01T00:00:00+00:00",
    }
    (out / "lock.json").write_text(json.dumps(note))
    code, said = audit([*command, f"--out={out}"], capsys)
    assert code == 2 and "on node-that-is-gone" in said and "--break-lock" in said
    assert json.loads((out / "lock.json").read_text()) == note
    assert audit([*command, f"--out={out}", "--break-lock"], capsys)[0] == 0
    assert not (out / "lock.json").exists()
