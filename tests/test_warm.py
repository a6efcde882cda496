"""A child that is forked from a waiting process is the child that was asked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import warm

ROOT = Path(__file__).parents[1]
ABOUT = """
import json, os, sys, auditgap
print(json.dumps({
    "parent": os.getppid(), "session": os.getsid(0) == os.getpid(), "argv": sys.argv,
    "cwd": os.getcwd(), "mood": os.environ.get("MOOD"), "name": __name__,
    "kept": os.read(int(sys.argv[1]), 9).decode(), "in": sys.stdin.read(),
    "fds": sorted(fd for fd in map(int, os.listdir("/proc/self/fd")) if fd > 2),
}))
print("grüße", file=sys.stderr)
raise SystemExit(7)
"""


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **changes}


@pytest.fixture(autouse=True, scope="module")
def not_the_first() -> None:
    """The first child under these settings starts from nothing."""
    subprocess.run([sys.executable, "-c", "import auditgap"], env=environment(), check=True)


def test_it_is_what_was_asked_for(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.write(write, b"something")
    done = subprocess.run(
        [sys.executable, "-c", ABOUT, str(read), "two words"],
        input="told",
        capture_output=True,
        text=True,
        pass_fds=[read],
        cwd=tmp_path,
        env=environment(MOOD="good"),
        start_new_session=True,
    )
    os.close(read)
    os.close(write)
    about = json.loads(done.stdout)
    fds = about.pop("fds")
    assert done.returncode == 7 and done.stderr == "grüße\n"
    assert read in fds and len(fds) <= 2  # the other is the folder that was being listed
    assert about == {
        "parent": os.getpid(),
        "session": True,
        "argv": ["-c", str(read), "two words"],
        "cwd": str(tmp_path),
        "mood": "good",
        "name": "__main__",
        "kept": "something",
        "in": "told",
    }


def test_it_has_imported_libraries_and_nothing_of_ours() -> None:
    code = "import auditgap, sys; print(*vars(sys)['modules'])"
    command = [sys.executable, "-c", code]
    warmed, cold = (
        subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
        for command in (command, [*command[:1], "-B", *command[1:]])
    )
    assert "torch" in warmed.stdout.split() and "torch" not in cold.stdout.split()
    assert [m for m in warmed.stdout.split() if m.startswith("auditgap")] == ["auditgap"]


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("sys.exit('no')", 1, "no\n"),
        ("1 / 0", 1, 'Traceback (most recent call last):\n  File "<string>", line 1'),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
        ("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT, "Traceback"),
        ("atexit.register(print, 'bye', file=sys.stderr)", 0, "bye\n"),
    ],
)
def test_it_ends_as_any(ending: str, code: int, said: str) -> None:
    words = f"import atexit, os, signal, sys, auditgap; {ending}"
    done = subprocess.run(
        [sys.executable, "-c", words], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == code
    assert done.stderr.startswith(said) and "warm.py" not in done.stderr


def test_it_is_known_by_its_command_line() -> None:
    code = "import auditgap; print(input(), flush=True); input()"
    command = [sys.executable, "-c", code, "here I am"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write("told\n")
        child.stdin.flush()
        assert child.stdout.readline() == "told\n"  # it is up
        words = psutil.Process(child.pid).cmdline()
        assert [word for word in words if word] == command
        assert child.pid not in warm.waiting_pids()


def test_a_module_in_the_way_of_a_library_is_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("print('not the real one')")
    command = [sys.executable, "-c", "import auditgap, torch"]
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(PYTHONPATH=path), check=True
    )
    assert done.stdout == "not the real one\n"


@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"],
        [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node=2", "--master_port=0"],
    ],
    ids=["module", "program"],
)
def test_what_a_launcher_starts_is_forked_from_a_child_of_its_own(
    launcher: list[str], tmp_path: Path
) -> None:
    script = Path(__file__).with_name("about_me.py")
    words = [sys.executable, *launcher] if launcher[0] == "-m" else launcher
    before = set(psutil.pids())
    done = subprocess.run(
        [*words, str(script), str(tmp_path)], capture_output=True, env=environment(MOOD="good")
    )
    assert done.returncode == 0, done.stderr.decode()
    started = {p.pid for p in psutil.Process().children(recursive=True)} - before
    assert started <= warm.waiting_pids(), "nothing of it is left"
    for rank in ("0", "1"):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "rank": rank,
            "launcher": launcher[:2],
            "argv": ["about_me.py", str(tmp_path)],
            "file": "about_me.py",
            "name": "__main__",
            "finds": "tests",
            "warm": True,
            "ours": [],
            "shown": "good",
            "at_once": True,
        }
