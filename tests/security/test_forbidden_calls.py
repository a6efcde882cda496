"""What may stand nowhere in the code that users run: the doors through which a file becomes a
program.

A rule is named with a sample that it must find, so that no rule can be blind. `ALLOWED` is the
whole list of exceptions. tests/test_architecture.py holds the package to more; here are also
launchers/, ray_jobs/ and benchmarks/.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from auditgap import config

ROOT = Path(__file__).parents[2]
FILES = [
    p
    for folder in ("auditgap", "launchers", "ray_jobs", "benchmarks")
    for p in sorted((ROOT / folder).rglob("*.py"))
]

#: (file, what) -> why it is safe there.
ALLOWED = {
    ("auditgap/config.py", "yaml.load"): "with a loader that is a SafeLoader: see the test below",
    **{
        ("auditgap/data/age.py", module): "reads one member of the user's own file, in memory"
        for module in ("zipfile", "tarfile")
    },
}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call, by its dotted name as it is written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def called(*names: str) -> Callable[[ast.AST], Iterator[str]]:
    """A rule: one of these is called, by its whole name or as the last part of a longer one when it
    begins with a dot."""

    def rule(tree: ast.AST) -> Iterator[str]:
        for name, _ in calls(tree):
            if name in names or any(n.startswith(".") and name.endswith(n) for n in names):
                yield name

    return rule


def keyword(name: str, *values: object) -> Callable[[ast.AST], Iterator[str]]:
    """A rule: a call passes this keyword with one of the values, or with anything that is no
    constant."""

    def rule(tree: ast.AST) -> Iterator[str]:
        for call, node in calls(tree):
            for given in node.keywords:
                if given.arg == name and (
                    not isinstance(given.value, ast.Constant) or given.value.value in values
                ):
                    yield f"{call}({name}=)"

    return rule


def imported(*modules: str) -> Callable[[ast.AST], Iterator[str]]:
    def rule(tree: ast.AST) -> Iterator[str]:
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            yield from (n for n in names if n.split(".")[0] in modules)

    return rule


RULES = {
    "pickles": (
        imported("pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"),
        "import pickle",
    ),
    "torch.load": (
        called("torch.load", "torch.save", "torch.jit.load", "torch.hub.load"),
        "torch.load('x')",
    ),
    "pandas": (called("pd.read_pickle", ".to_pickle", "pd.eval"), "frame.to_pickle('x')"),
    "numpy": (keyword("allow_pickle", True), "np.load(x, allow_pickle=True)"),
    "weights": (keyword("weights_only", False), "f(weights_only=False)"),
    "yaml.load": (
        called("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"),
        "yaml.load(text)",
    ),
    "evaluated text": (
        called("eval", "exec", "compile", "__import__", "builtins.eval"),
        "eval('1')",
    ),
    "foreign code": (keyword("trust_remote_code", True, "True", 1), "f(trust_remote_code=flag)"),
    "a shell": (keyword("shell", True), "run('x', shell=True)"),
    "a shell by name": (
        called("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
        "os.system('x')",
    ),
    "no certificates": (keyword("verify", False), "get(x, verify=False)"),
    "no certificates by name": (
        called("ssl._create_unverified_context"),
        "ssl._create_unverified_context()",
    ),
    "archives": (imported("zipfile", "tarfile"), "import tarfile"),
    "archives by name": (called("shutil.unpack_archive", ".extractall"), "x.extractall()"),
    "Ray without a token": (
        keyword("dashboard_host", "0.0.0.0", "::"),
        "ray.init(dashboard_host='0.0.0.0')",
    ),
    "xml": (imported("xml", "lxml"), "import xml.etree.ElementTree"),
}


@pytest.mark.parametrize("rule", RULES)
def test_it_stands_nowhere(rule):
    find, sample = RULES[rule]
    assert list(find(ast.parse(sample))), "the rule sees what it is for"
    found = [
        (path.relative_to(ROOT).as_posix(), what)
        for path in FILES
        for what in find(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not [f for f in found if f not in ALLOWED], found


def test_every_exception_is_used():
    """A list that nobody needs any more is a door left open."""
    for (name, what), why in ALLOWED.items():
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        assert why and any(what in find(tree) for find, _ in RULES.values())


def test_the_yaml_loader_makes_plain_values_only(tmp_path):
    assert issubclass(config._PlainLoader, yaml.SafeLoader)
    for text in (
        "!!python/object/apply:os.system ['true']",
        "!!python/name:os.system",
        "a: !!python/tuple [1]",
    ):
        with pytest.raises(yaml.YAMLError):
            yaml.load(text, Loader=config._PlainLoader)


def test_files_are_there_to_look_at():
    assert len(FILES) > 100 and {p.relative_to(ROOT).parts[0] for p in FILES} == {
        "auditgap",
        "launchers",
        "ray_jobs",
        "benchmarks",
    }
