"""The architecture as a test: who may import whom, which library has which home, and what is
nowhere to be found."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import warm

PACKAGE = Path(__file__).parents[1] / "auditgap"
#: A module imports only what stands to its left.
STREET = (
    "errors",
    "types",
    "rows",
    "config",
    "signatures",
    "registry",
    "store",
    "stats",
    "data",
    "models",
    "sweep",
    "report",
    "engines",
    "judges",
    "interventions",
    "probes",
    "training",
    "audits",
    "evidence",
    "inspect",
    "api",
    "agents",
    "cli",
)
#: A heavy or optional library and where alone it may be imported: a file, or a folder.
HOMES = {
    "ray": ("sweep/cluster.py", "sweep/jobs.py"),
    # all of it in the child process: `__init__` is the parent's side
    "vllm": tuple(
        f"engines/vllm/{name}.py" for name in ("process", "worker", "editor", "self_test")
    ),
    "openai": ("engines/openai/",),
    "inspect_ai": ("inspect/export.py", "inspect/tasks.py", "agents/inspect_tools.py"),
    "mcp": ("agents/server.py",),
    "deepspeed": ("training/engine.py",),
    "fsspec": ("store/objects.py",),
    "cryptography": ("evidence/",),
    "pyrage": ("data/age.py",),
    "nanogcg": ("interventions/suffix.py",),
    "peft": ("models/adapters.py",),
    "typer": ("cli/",),
    # the page's templates; a subject's chat template, in its child
    "jinja2": ("report/page.py", "models/template_child.py"),
}
#: Places that may not pull torch in: they are read on machines that hold results only.
WITHOUT_TORCH = (
    "errors",
    "types",
    "rows",
    "config",
    "signatures",
    "registry",
    "store",
    "stats",
    "data",
    "report",
)

FILES = sorted(PACKAGE.rglob("*.py"))


def over_every_file(check: Callable[[Path], None]) -> Callable[[], None]:
    """One case for the whole package, which names every file that fails the check."""

    def test() -> None:
        faults = []
        for file in FILES:
            try:
                check(file)
            except AssertionError as error:
                faults.append(f"{file.relative_to(PACKAGE)}: {str(error).splitlines()[0]}")
        assert FILES and not faults, "\n".join(faults)

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    return test


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def place(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in the file; `from auditgap import
    models` is auditgap.models."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import hides where it goes"
            if node.module == "auditgap":
                yield from ((node.lineno, f"auditgap.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, str(node.module)


@over_every_file
def test_the_street(file):
    here = place(file)
    doors = {"__init__": "auditgap.api", "__main__": "auditgap.cli"}
    if here in doors:  # that of `import auditgap` opens only when it is asked for
        assert {n for _, n in imports(file) if n.startswith("auditgap")} <= {doors[here]}
        return
    assert here in STREET, f"{here} has no number on the street: {' > '.join(STREET)}"
    for line, name in imports(file):
        parts = name.split(".")
        if parts[0] == "auditgap" and len(parts) > 1 and parts[1] not in ("__version__", here):
            assert STREET.index(parts[1]) < STREET.index(here), (
                f"{file.name}:{line}: {here} imports {parts[1]}, to its right"
            )


@over_every_file
def test_a_file_is_one_screen_after_the_other_and_not_a_book(file):
    assert len(file.read_text("utf-8").splitlines()) <= 400, "give its nouns files of their own"


@over_every_file
def test_every_library_is_at_home(file):
    for line, name in imports(file):
        library = name.split(".")[0]
        if library in HOMES:
            here = file.relative_to(PACKAGE).as_posix()
            assert here.startswith(HOMES[library]), (
                f"{here}:{line}: {library} lives in {HOMES[library]}"
            )
        assert not (library == "torch" and place(file) in WITHOUT_TORCH), (
            f"{file.name}:{line}: {place(file)} needs no torch"
        )


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "torch.save",
    "torch.load",
    "pd.read_pickle",
    "eval",
    "exec",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
}


@over_every_file
def test_what_is_nowhere_to_be_found(file):
    for line, name in imports(file):
        assert name.split(".")[0] not in FORBIDDEN_MODULES, f"{file.name}:{line}: {name}"
    for node in ast.walk(tree(file)):
        where = f"{file.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, (
                f"{where}: {ast.unparse(node.func)}"
            )
            for keyword in node.keywords:
                value = keyword.value
                off = isinstance(value, ast.Constant) and value.value is False
                assert keyword.arg != "trust_remote_code" or off, f"{where}: trust_remote_code"
                on = isinstance(value, ast.Constant) and value.value is True
                assert keyword.arg not in ("allow_pickle", "shell") or not on, (
                    f"{where}: {keyword.arg}"
                )
        assert not isinstance(node, ast.Assert), (
            f"{where}: `python -O` drops an assert, so a user must never need one"
        )


@over_every_file
def test_every_from_pretrained_is_on_its_guard(file):
    """Weights come from safetensors, and code from nowhere; a tokenizer or config has no weights to
    say so of."""
    for node in ast.walk(tree(file)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "from_pretrained"
        ):
            given = {k.arg for k in node.keywords}
            owner = ast.unparse(node.func.value)
            if "gguf_file" in given:
                # the packaged model: from an installed package's own file, which holds no code
                continue
            assert owner == "PeftModel" or "trust_remote_code" in given, (
                f"{file.name}:{node.lineno}: {owner}"
            )
            assert "Model" not in owner or "use_safetensors" in given, (
                f"{file.name}:{node.lineno}: {owner}"
            )


@over_every_file
def test_every_file_says_what_it_is(file):
    if file.name != "__init__.py" or ast.parse(file.read_text()).body:
        assert (ast.get_docstring(tree(file)) or "").strip(), f"{file} opens with no docstring"


#: What opens a file, and where alone the rooms that read runs may do so. Everything else there goes
#: through the doors that check what they read: `files.read_document` and `unseal` (JSON),
#: `tables.unseal`, `RunFolder` (cells, edits), `scratch`.
OPENS = {
    "read_json",
    "read_text",
    "read_bytes",
    "read_parquet",
    "read_csv",
    "load_file",
    "safe_open",
}
ROOMS_OF_RUNS = ("store", "report", "audits", "evidence", "inspect", "api", "agents", "cli")
DOORS = (
    "store/files.py",
    "store/tables.py",
    "store/scratch.py",
    "store/legacy.py",  # folders of 0.1, which had no checksum
    "store/lock.py",  # who writes now: no number
    "store/objects.py",
    "store/remote.py",
    # bytes to be hashed, or copied as they are
    "store/cells.py",
    "store/folder.py",
    "audits/bundle.py",
    "audits/probe/monitor.py",
    "inspect/export.py",
    "report/drawing.py",  # the page's style sheet
    "report/page.py",  # its own script
)


@over_every_file
def test_a_run_is_read_through_its_doors(file):
    here = file.relative_to(PACKAGE).as_posix()
    if place(file) not in ROOMS_OF_RUNS or here in DOORS:
        return
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            assert name not in OPENS, (
                f"{here}:{node.lineno}: {name} reads without a check; files.read_document,"
                " tables.unseal or the RunFolder"
            )


ABSENT = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] in {names} else find(name, *rest))
import auditgap.cli, auditgap.audits.latent.worker, auditgap.audits.probe.monitor, auditgap.training.objective
import auditgap.sweep, auditgap.report.page, auditgap.judges
missing = sorted(m for m in sys.modules if m.split(".")[0] in {names})
if missing:
    raise SystemExit(str(missing))
from auditgap.errors import UsageError
from auditgap.sweep import ray
try:
    with ray.cluster(None):
        pass
except UsageError as error:
    print(error)
"""


def test_the_core_imports_with_the_optional_parts_absent():
    names = {
        "ray",
        "vllm",
        "deepspeed",
        "peft",
        "inspect_ai",
        "s3fs",
        "matplotlib",
        "plotly",
        "lifelines",
    }
    done = subprocess.run(
        [sys.executable, "-O", "-c", ABSENT.format(names=names)],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=PACKAGE.parent,
        env=warm.optimised(dict(os.environ)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "pip install" in done.stdout and len(done.stdout.splitlines()) == 1
