"""Children that start in a moment.

Most of the time of these tests went into children that import torch and transformers, ten seconds
each, and vLLM, twenty. So a child of a test process is forked from a process that has imported the
libraries (none of ours) and waits: real processes with their own arguments, environment, streams,
session and signals, and children of whoever asked for them, as ever.

    install()                      # in conftest: from here on subprocess.Popen does it
    with cold(): ...               # what has to start from nothing

A child starts from nothing, as before, where its start itself may matter: another interpreter or
options of it, a `preexec_fn`, code that looks at `sys.modules`, a module in the way of a library. A
setting that libraries read while they are imported (VARIABLES) gets a process of its own to fork
from, when it is asked for a second time.

Launchers (LAUNCHERS) start processes in their turn, the ranks of a job. Before its first line runs,
a launcher that was forked has forked a process that waits as well, a child of the launcher's own,
and `subprocess` in the launcher forks the ranks from that one.

Ray starts its processes by command lines that its raylet, a program in C++, is given. A raylet is
forked too, has such a companion, and becomes the program; in the command lines stands warm_ray.py,
which asks the companion. A child whose command line says `ray` is a launcher as well.

How it becomes the child of who asked: a grandchild whose parent ends is given to the nearest
"subreaper" above, and that is what the asking process is for this moment (prctl(2)).
"""

from __future__ import annotations

import atexit
import builtins
import ctypes
import gc
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import multiprocessing.util
import os
import re
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What a child of ours imports before it does anything.
LIBRARIES = (
    "numpy pandas scipy.stats scipy.optimize scipy.special scipy.linalg sklearn.linear_model"
    " sklearn.feature_extraction.text sklearn.metrics torch torch._dynamo torch.distributed.tensor"
    " transformers transformers.modeling_utils transformers.generation.utils"
    " transformers.models.llama.modeling_llama transformers.models.auto.modeling_auto"
    " transformers.models.auto.tokenization_auto tokenizers safetensors.torch pyarrow.parquet peft"
    " accelerate pydantic typer rich.console rich.table yaml jinja2 fsspec psutil"
    # of Ray's processes; not Ray itself, which reads its settings while it is imported
    " aiohttp.web aiohttp_cors google.protobuf.descriptor_pb2 grpc.aio jsonschema opencensus.stats"
    " opentelemetry.exporter.prometheus opentelemetry.sdk.metrics.export prometheus_client requests"
    " uvloop"
).split()
#: What a rank of a training job imports besides, and what starts ranks.
TRAINING = (
    "deepspeed deepspeed.launcher.runner deepspeed.launcher.launch torch.distributed.run"
    " deepspeed.runtime.zero.muon.muon_optimizer torch._inductor.compile_fx"
    " transformers.integrations.deepspeed accelerate.commands.accelerate_cli"
).split()
#: What vLLM imports wherever it runs.
VLLM = (
    "vllm vllm.v1.engine.llm_engine vllm.v1.worker.cpu_worker vllm.v1.worker.cpu_model_runner"
    " vllm.entrypoints.llm vllm.model_executor.models.llama vllm.lora.request"
).split()
#: What stands in a raylet's command line before the commands of the processes that it starts.
RAYS_COMMANDS = re.compile(r"--(python_worker|dashboard_agent|runtime_env_agent)_command=")
#: Modules and scripts that start the processes that do the work -> what all of them import besides.
LAUNCHERS = {
    **dict.fromkeys(
        "deepspeed.launcher.runner deepspeed.launcher.launch torch.distributed.run"
        " accelerate.commands.accelerate_cli deepspeed torchrun accelerate".split(),
        TRAINING,
    ),
    "vllm.entrypoints.openai.api_server": [*VLLM, "vllm.entrypoints.openai.api_server"],
}
#: What code that starts such processes says.
TRAINS = "# starts training processes"
#: The same of other modules.
MORE = {"auditgap.audits.emergent.train": TRAINING, "auditgap.engines.vllm.process": VLLM}
#: Beginnings of the names of variables that libraries read while they are imported.
VARIABLES = tuple(
    (
        "ACCELERATE_ CUDA_ DS_ GLIBC_ HF_ HOME HUGGINGFACE_ KMP_ LANG LC_ LD_ MALLOC_ MKL_ NUMEXPR_"
        " OMP_ OPENBLAS_ PYTHON PYTORCH_ TORCH TRANSFORMERS_ VLLM_ XDG_"
    ).split()
)
#: ... and those among them that are read later, or are seen to below.
READ_LATER = {
    "PYTHONBREAKPOINT",
    "PYTHONPATH",
    "PYTHONSAFEPATH",
    "PYTHONUNBUFFERED",
    "VLLM_CPU_KVCACHE_SPACE",
}
#: Beginnings of what launchers tell the ranks; they read it when they start to work.
FOR_RANKS = (
    "ACCELERATE_ CUDA_VISIBLE_DEVICES KMP_ NUMEXPR_ TORCHELASTIC_ TORCHINDUCTOR_ TORCH_NCCL_ VLLM_"
).split()
#: Words of code that looks at imports or at its own memory: it starts from nothing.
ABOUT_IMPORTS = ("sys.modules", "meta_path", "find_spec", "importlib", "resource")
#: Processes to fork from at a time: each holds half a gigabyte or more.
AT_MOST = 4
#: Room for a child's command line, and as much for its environment, which /proc shows.
ROOM = 16384
ROOT = Path(__file__).resolve().parents[1]
RAYS_STARTER = ROOT / "tests" / "warm_ray.py"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_start = subprocess._fork_exec  # type: ignore[attr-defined]
_spawn = multiprocessing.util.spawnv_passfds  # type: ignore[attr-defined]


@dataclass
class Start:
    """What `subprocess` asks the system for."""

    args: list[str]
    environment: dict[str, str]
    cwd: str
    streams: tuple[int, int, int]
    pass_fds: tuple[int, ...]
    new_session: bool
    group: int
    umask: int
    no_interrupts: bool = False  #: SIGINT is blocked
    dies_with_parent: bool = False

    @property
    def options(self) -> list[str]:
        """Those of the interpreter that a forked child can follow."""
        return list(itertools.takewhile(("-P", "-u").__contains__, self.args[1:]))

    @property
    def words(self) -> list[str] | None:
        """The arguments behind the interpreter and its options: `-m MODULE …`, `-c CODE …` or, with
        an empty word before it, `SCRIPT …`; None where it is something else."""
        words = self.args[1 + len(self.options) :]
        if words and not words[0].startswith("-"):
            words = ["", *words]
        return words if len(words) > 1 and words[0] in ("-m", "-c", "") else None

    @property
    def safe_path(self) -> bool:
        return "-P" in self.options or bool(self.environment.get("PYTHONSAFEPATH"))

    @property
    def unbuffered(self) -> bool:
        return "-u" in self.options or bool(self.environment.get("PYTHONUNBUFFERED"))

    @property
    def raylet(self) -> bool:
        return Path(self.args[0]).name == "raylet"

    @property
    def ray(self) -> bool:
        """Whether it is a process of Ray's, or says that it starts some."""
        return _of_ray(self.args[0]) or (
            self.words is not None
            and (_of_ray(self.words[1]) or any(re.search(r"\bray\b", a) for a in self.args[1:]))
        )

    @property
    def launches(self) -> bool:
        if self.ray:
            return not _of_ray((self.words or ["", ""])[1])
        kind, what = (self.words or ["-c", ""])[:2]
        if kind == "-c":  # `multiprocessing` of a launcher, or code that says so
            return "multiprocessing.spawn" in what or TRAINS in what
        return (what if kind else Path(what).name) in LAUNCHERS

    @property
    def more(self) -> Sequence[str]:
        """What it imports besides LIBRARIES."""
        if self.ray:
            return ()
        kind, what = (self.words or ["-c", ""])[:2]
        if self.launches and kind != "-c":
            return LAUNCHERS[what if kind else Path(what).name]
        return MORE.get(what, ()) if kind and TRAINS not in what else TRAINING

    @property
    def libraries(self) -> tuple[str, ...]:
        return (*LIBRARIES, *self.more)

    @property
    def settings(self) -> dict[str, str]:
        return {
            name: value
            for name, value in self.environment.items()
            if name.startswith(VARIABLES)
            and name not in READ_LATER
            and not (name == "LD_PRELOAD" and _of_ray(value))  # another allocator
        }

    def message(self) -> dict[str, Any]:
        derived = ("words", "safe_path", "unbuffered", "launches", "raylet")
        return {**self.__dict__, **{name: getattr(self, name) for name in derived}}


def _ask(sock: socket.socket, start: Start) -> int:
    """Let the process at the other end fork that child, for this one to be its parent."""
    libc = ctypes.CDLL(None)
    streams = [i if fd < 0 else fd for i, fd in enumerate(start.streams)]
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        socket.send_fds(sock, [json.dumps(start.message()).encode()], [*streams, *start.pass_fds])
        return int(sock.recv(32))
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class Waiting:
    """A process that has imported `libraries` under `settings` and waits to be forked."""

    def __init__(self, libraries: Sequence[str], settings: dict[str, str]) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with cold():
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-P", __file__, str(theirs.fileno())),
                    *libraries,
                    "".ljust(ROOM, "-"),
                ],
                env={k: v for k, v in os.environ.items() if not k.startswith((*VARIABLES, "TMP"))}
                | settings
                | {"ROOM": "".ljust(ROOM, "-")},
                cwd="/",
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # libraries chatter
            )
        theirs.close()
        self.ready = bool(self.socket.recv(16))

    def close(self) -> None:
        self.socket.close()
        self.process.wait()


_waiting: OrderedDict[tuple[Any, ...], Waiting] = OrderedDict()
_seen: set[tuple[Any, ...]] = set()
_lock = threading.Lock()
_cold = threading.local()


@contextmanager
def cold() -> Iterator[None]:
    """What this thread starts inside starts from nothing."""
    before, _cold.on = getattr(_cold, "on", False), True
    try:
        yield
    finally:
        _cold.on = before


def install() -> None:
    """`subprocess` forks children from the processes that wait."""
    if sys.platform == "linux":
        subprocess._fork_exec = _fork_exec  # type: ignore[attr-defined]


def optimised(environment: dict[str, str]) -> dict[str, str]:
    """The environment for a `python -O`, which has to compile every library: an installation has no
    such bytecode. Here it is kept."""
    bytecode = ROOT / ".pytest_cache" / "optimised"
    return environment | {"PYTHONPYCACHEPREFIX": str(bytecode), "PYTHONDONTWRITEBYTECODE": ""}


def waiting_pids() -> set[int]:
    """The processes that wait: no test has started them."""
    return {one.process.pid for one in _waiting.values()}


def _fork_exec(*asked: Any) -> int:
    start = None if getattr(_cold, "on", False) else _understood(asked)
    if start is None:
        return _start(*asked)
    with _lock:
        key = (start.libraries, *sorted(start.settings.items()))
        if key in _waiting and _waiting[key].process.poll() is not None:
            _waiting.pop(key).close()
        # settings that are seen once are not worth a process that waits, unless what it imports
        # takes longest or many ask
        if key not in _seen and not (start.more or start.ray):
            _seen.add(key)
            return _start(*asked)
        if key not in _waiting:
            while len(_waiting) >= AT_MOST:
                _waiting.popitem(last=False)[1].close()
            _waiting[key] = Waiting(start.libraries, start.settings)
        _waiting.move_to_end(key)
        waiting = _waiting[key]
        # under some settings libraries cannot be imported: that is for the child to say
        return _ask(waiting.socket, start) if waiting.ready else _start(*asked)


def _understood(asked: Sequence[Any]) -> Start | None:
    """What is asked for, where it can be forked."""
    # fmt: off
    (args, _, close_fds, kept, cwd, environment, stdin, _, _, stdout, _, stderr, _, said, restored,
     session, group, *others, umask, preexec) = asked[:22]
    # fmt: on
    args = _with_interpreter([os.fsdecode(word) for word in args])
    of_ray = getattr(preexec, "__module__", "") == "ray._private.services"
    if not (close_fds and restored) or (preexec and not of_ray):
        return None
    if any(one is not None for one in others):  # another user
        return None
    names = (
        dict(os.environ)
        if environment is None
        else dict(os.fsdecode(line).split("=", 1) for line in environment)
    )
    start = Start(
        args,
        names,
        os.getcwd() if cwd is None else os.fsdecode(cwd),
        (stdin, stdout, stderr),
        tuple(fd for fd in kept if fd != said),  # `said`: how a start that fails tells
        bool(session),
        group,
        umask,
        no_interrupts=of_ray,
        dies_with_parent=of_ray and bool(inspect.getclosurevars(preexec).nonlocals["fate_share"]),
    )
    return start if _may_be_forked(start) else None


def _with_interpreter(args: list[str]) -> list[str]:
    """A program in the folder of our interpreter whose first line names it: what the system starts
    for that."""
    program, ours = Path(args[0]), Path(sys.executable)
    if program == ours or program.parent != ours.parent or not program.is_file():
        return args
    with program.open("rb") as file:
        first = os.fsdecode(file.readline(256)).strip()
    named = Path(first.removeprefix("#!"))
    same = first.startswith("#!/") and named.name == ours.name
    same = same and named.parent.resolve() == ours.parent.resolve()
    return [sys.executable, *args] if same else args


def _of_ray(path: str) -> bool:
    """Whether a program or script is one of Ray's package."""
    return "/site-packages/ray/" in path


def _may_be_forked(start: Start) -> bool:
    if start.ray and "OMP_NUM_THREADS" not in start.environment:
        return False  # Ray sets it in a worker before torch is imported
    if start.raylet:
        return _of_ray(start.args[0])
    if start.args[0] != sys.executable:
        return False
    if start.words is None or sum(map(len, start.args)) > ROOM // 2:
        return False
    kind, what = start.words[:2]
    code, folders = what, []
    if kind == "":
        script = Path(start.cwd, what)
        if not script.is_file():
            return False
        if not _of_ray(what):
            code = script.read_text(encoding="utf-8", errors="replace")
        ours = start.launches or _of_ray(what) or ROOT in script.resolve().parents
        folders.append(str(script.parent))
    elif kind == "-m":
        ours = start.launches or f"{what}.".startswith("auditgap.")
        folders.append(start.cwd)
    else:
        ours = "auditgap" in what
        folders.append(start.cwd)
    if not ours or any(word in code for word in ABOUT_IMPORTS):
        return False
    if "deepspeed" in start.libraries and Path("/dev/nvidiactl").exists():
        return False  # it looks for a GPU while it is imported, and what uses one cannot fork
    folders = [] if start.safe_path else folders
    folders += [p for p in start.environment.get("PYTHONPATH", "").split(os.pathsep) if p]
    return not any(_hides(folder, start.libraries) for folder in folders)


def _hides(folder: str, libraries: Sequence[str]) -> bool:
    """Whether something in the folder would be imported in the place of a library."""
    names = {name.split(".")[0] for name in libraries} | {"sitecustomize", "usercustomize"}
    try:
        found = [Path(folder, name) for name in os.listdir(folder) if name.split(".")[0] in names]
    except OSError:
        return False
    return any(path.suffix in (".py", ".pyc", ".so") or path.is_dir() for path in found)


# ------------------------------------------------------------------------ the process that waits


#: In a child that starts others: the process to fork them from, and what this one was started with.
_companion: tuple[socket.socket, dict[str, str]] | None = None
#: Of the process that waits, before it becomes anything: what it has imported, and where from.
_imported, _path = sys.argv[2:-1], list(sys.path)


def _import() -> None:
    for name in _imported:
        with suppress(ImportError):  # one that is not installed: the child will say so
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a child that collects garbage would look through all of it, and copy it


def _child(sock: socket.socket) -> list[str]:
    """Wait, and fork a child a message; returns in the child alone, with what it is to run."""
    global _companion
    listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    asked, fds, sock = _serve(sock) if listens else _wait(sock)
    _become(asked, fds, sock)
    if asked["raylet"]:
        return _child(_be_a_raylet(asked))
    if asked["launches"]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if not os.fork():
            ours.close()
            nowhere = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(nowhere, fd)
            return _child(theirs)
        theirs.close()
        ours.recv(16)
        _companion = ours, _inherited(asked["environment"])
        subprocess._fork_exec = _fork_rank  # type: ignore[attr-defined]
        multiprocessing.util.spawnv_passfds = _spawn_rank  # type: ignore[attr-defined]
    return asked["words"]


def _inherited(environment: dict[str, str]) -> dict[str, str]:
    """The settings under which the libraries were imported. What is to be loaded before anything
    else is none where it has been loaded."""
    settings = Start([], environment, "", (0, 0, 0), (), False, -1, -1).settings
    loaded = Path("/proc/self/maps").read_text()
    if all(os.path.realpath(one) in loaded for one in settings.get("LD_PRELOAD", "").split(":")):
        settings.pop("LD_PRELOAD", None)
    return {k: v for k, v in settings.items() if not k.startswith(tuple(FOR_RANKS))}


def _fork_rank(*asked: Any) -> int:
    """`subprocess` of a launcher: what it starts is forked from its companion where that has
    imported all that is wanted, under the same settings."""
    pid = _from_companion(_understood(asked))
    return _start(*asked) if pid is None else pid


def _spawn_rank(path: Any, args: Sequence[Any], passed: Sequence[int]) -> int:
    """`multiprocessing` of a launcher, where it starts a process anew."""
    flags = multiprocessing.util._args_from_interpreter_flags()  # type: ignore[attr-defined]
    # what is forked has its parent's
    words = [os.fsdecode(word) for word in (path, *args[1 + len(flags) :])]
    start = Start(words, dict(os.environ), os.getcwd(), (-1, -1, -1), tuple(passed), False, -1, -1)
    ours = words[0] == sys.executable and start.launches
    pid = _from_companion(start if ours else None)
    return _spawn(path, args, passed) if pid is None else pid


def _from_companion(start: Start | None) -> int | None:
    assert _companion is not None
    sock, settings = _companion
    if start is None or not set(start.libraries) <= set(_imported):
        return None
    if _inherited(start.environment) != settings:
        return None
    with _lock:
        return _ask(sock, start)


def _wait(sock: socket.socket) -> tuple[dict[str, Any], list[int], socket.socket]:
    """Fork a child a message; returns in the child alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock.send(b"ready")
    while True:
        message, fds, _, _ = socket.recv_fds(sock, 1 << 20, 64)
        if not message:
            os._exit(0)
        if _forked():
            return json.loads(message), list(fds), sock
        for fd in fds:
            os.close(fd)


def _forked() -> bool:
    """Fork a child of the nearest subreaper above; true in the child."""
    between = os.fork()
    if between:
        os.waitpid(between, 0)
        return False
    between = os.getpid()
    if os.fork():
        os._exit(0)
    while os.getppid() == between:
        pass
    return True


def _be_a_raylet(asked: dict[str, Any]) -> socket.socket:
    """Become Ray's program; returns in its companion alone, from which are forked the processes that
    it starts, with the socket where that is asked for."""
    global _companion
    name, raylet = f"warm-ray-{os.getpid()}", os.getpid()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(f"\0{name}")
    listening.listen(64)
    prctl = ctypes.CDLL(None).prctl
    if os.fork():
        starter = shlex.join([sys.executable, "-I", "-S", str(RAYS_STARTER), name])
        args = [RAYS_COMMANDS.sub(rf"\g<0>{starter} ", arg) for arg in asked["args"]]
        prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # it stays one as another program
        os.execve(args[0], args, asked["environment"])
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != raylet:
        os._exit(0)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    _companion = listening, _inherited(asked["environment"])
    return listening


def _serve(listening: socket.socket) -> tuple[dict[str, Any], list[int], socket.socket]:
    """Fork a child for each that connects (warm_ray.py), and end it with that one; returns in the
    child alone."""
    assert _companion is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    processes: dict[socket.socket, int] = {}  # by who asked for it: -1 before it is known
    while True:
        for ready in select.select([listening, *processes], [], [])[0]:
            if ready is listening:
                asking = listening.accept()[0]
                message, fds, _, _ = socket.recv_fds(asking, 1 << 20, 64)
                start = Start(**json.loads(message or "{}"))
                same = _inherited(start.environment) == _companion[1]
                if same and start.words and _forked():
                    return start.message(), list(fds), asking
                for fd in fds:
                    os.close(fd)
                if same:
                    processes[asking] = -1
                else:
                    asking.close()
            elif pid := ready.recv(32):
                with suppress(ProcessLookupError):
                    processes[ready] = os.pidfd_open(int(pid))
            else:
                if (process := processes.pop(ready)) >= 0:
                    with suppress(ProcessLookupError):
                        signal.pidfd_send_signal(process, signal.SIGKILL)
                    os.close(process)
                ready.close()


def _exec_in_place(program: str, args: Sequence[str]) -> None:
    """`os.execvp` of what prepares a worker of Ray's: where it is our interpreter that a shell is
    to become, this process goes on as that."""
    words = shlex.split(args[-1])
    if words[:1] == ["cd"] and words[2:3] == ["&&"]:
        os.chdir(words[1])
        words = words[3:]
    same = _inherited(dict(os.environ)) == (_companion or (None, {}))[1]
    if words[:2] != ["exec", sys.executable] or words[2].startswith("-") or not same:
        os.execv(shutil.which(program) or program, args)
    sys.argv[:], sys.orig_argv[:] = words[2:], words[1:]
    _run(["", words[2]])
    raise SystemExit(0)


def _become(asked: dict[str, Any], fds: list[int], sock: socket.socket) -> None:
    """Be the child that was asked for, but for its program."""
    if asked["no_interrupts"]:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    if asked["dies_with_parent"]:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if asked["new_session"]:
        os.setsid()
    elif asked["group"] >= 0:
        os.setpgid(0, asked["group"])
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sock.send(str(os.getpid()).encode())
    sock.close()
    _place(fds, [0, 1, 2, *asked["pass_fds"]])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked["umask"] >= 0:
        os.umask(asked["umask"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["cwd"])
    tempfile.tempdir = None
    for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        old = getattr(sys, name)
        at_once = asked["unbuffered"] and mode == "w"
        raw = open(fd, mode + "b", 0 if at_once else -1, closefd=False)  # noqa: SIM115
        new = io.TextIOWrapper(
            raw,
            old.encoding,
            "backslashreplace" if name == "stderr" else old.errors,
            line_buffering=name == "stderr" or raw.isatty(),
            write_through=at_once,
        )
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    _show(asked["args"], [f"{k}={v}" for k, v in asked["environment"].items()])
    if not asked["words"]:
        return
    kind, what, *others = asked["words"]
    if Path(what).name == "setup_worker.py":
        os.execvp = _exec_in_place
    path = [p for p in asked["environment"].get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.path[:] = [*path, *_path]
    if not asked["safe_path"]:
        script = os.path.dirname(os.path.realpath(what))
        sys.path.insert(0, {"-c": "", "-m": os.getcwd(), "": script}[kind])
    sys.argv[:] = [kind or what, *others]
    sys.orig_argv[:] = asked["args"]


def _place(fds: list[int], places: list[int]) -> None:
    """Put each where it is wanted, and close all others."""
    import fcntl

    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 600) for fd in fds]
    for fd, place in zip(high, places, strict=True):
        os.dup2(fd, place, inheritable=True)
    last = 3
    for place in sorted(place for place in places if place > 2):
        os.closerange(last, place)
        last = place + 1
    os.closerange(last, 4096)


def _show(*texts: Sequence[str]) -> None:
    """Let the command line and the environment that others see be the child's."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begins, ends = map(int, fields[45:49:2]), map(int, fields[46:49:2])
    for words, begin, end in zip(texts, begins, ends, strict=True):
        text = b"\0".join(os.fsencode(word) for word in words)[: end - begin - 1]
        ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


def _run(words: Sequence[str]) -> None:
    """What `python -m MODULE`, `-c CODE` or `SCRIPT` does, in a fresh `__main__`."""
    main = types.ModuleType("__main__")
    main.__builtins__ = builtins  # type: ignore[attr-defined]
    sys.modules["__main__"] = main
    if words[0] == "-m":
        runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]
    elif words[0] == "-c":
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        main.__file__ = os.path.abspath(words[1])
        exec(compile(Path(words[1]).read_bytes(), main.__file__, "exec"), main.__dict__)


def _run_to_the_end(words: Sequence[str]) -> None:
    """Run it and end as an interpreter ends, but for taking every module apart, which takes
    seconds."""
    code, interrupted = 0, False
    try:
        _run(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next  # not ours
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        code, interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    _import()
    _run_to_the_end(_child(socket.socket(fileno=int(sys.argv[1]))))
