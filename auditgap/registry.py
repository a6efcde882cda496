"""What can be named: a table of lines a kind, and beside them what other packages bring.

    INTERVENTIONS = Registry(
        "intervention",
        {"angle": Entry("turned by an angle", "auditgap.interventions.angle:Angle")},
        group="auditgap.interventions",
    )
    INTERVENTIONS["angle"].load()            # the class; its module is imported only now
    INTERVENTIONS.listed()                   # what `auditgap ls interventions` shows
    # Unknown intervention 'angel'. Did you mean 'angle'? Known interventions: angle.
    raise INTERVENTIONS.unknown("angel")

A package adds to a table by an entry point in the table's group. A plug-in cannot replace a line of
the table, and one that fails is named with its cause.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from auditgap.errors import AuditgapError, UsageError, did_you_mean


@dataclass(frozen=True, slots=True)
class Listed:
    """A line of `auditgap ls …`. `problem` says why the thing cannot be used here, or is empty;
    `needs` what has to be done or named first."""

    name: str
    description: str
    problem: str = ""
    licence: str = ""
    needs: str = ""

    @property
    def available(self) -> bool:
        return not self.problem

    def row(self) -> dict[str, str]:
        licence = {"licence": self.licence} if self.licence else {}
        available = self.problem or (f"with {self.needs}" if self.needs else "yes")
        return {"name": self.name, "what": self.description, **licence, "available": available}


@dataclass(frozen=True, slots=True)
class Line:
    """What one name of a table stands for: at the least, a description."""

    description: str

    def form(self, name: str) -> str:
        """How it is typed, where that is more than its name."""
        return name

    def problem(self) -> str:
        """Why it cannot be used here; empty when it can."""
        return ""

    def listed(self, name: str) -> Listed:
        return Listed(self.form(name), self.description, self.problem())


@dataclass(frozen=True, slots=True)
class Entry(Line):
    """A line whose object is imported when it is first used. `home`: "module:object", or the object
    itself."""

    home: Any = None

    def load(self) -> Any:
        if not isinstance(self.home, str):
            return self.home
        module, _, name = self.home.partition(":")
        return getattr(importlib.import_module(module), name)


L = TypeVar("L", bound=Line)
T = TypeVar("T")


class Registry(dict[str, L]):
    """A table of lines by name. `noun` is what a line is called in errors; `group` is the group of
    entry points in which other packages add to it, empty where they cannot; `brings` is what such a
    point names, by default something to call."""

    def __init__(
        self, noun: str, lines: Mapping[str, L], *, group: str = "", brings: Any = Callable
    ) -> None:
        super().__init__(lines)
        self.noun, self.group, self.brings = noun, group, brings

    def plugins(self) -> dict[str, importlib.metadata.EntryPoint]:
        """The entry points of this table's group, those with a name of the table's own too."""
        if not self.group:
            return {}
        return {point.name: point for point in importlib.metadata.entry_points(group=self.group)}

    def unknown(self, name: str, instead: str = "") -> UsageError:
        """The error for a name that is not here. `instead`: what else can be given."""
        plugins = [plugin for plugin in self.plugins() if plugin not in self]
        head = re.split("[=:(]", name, maxsplit=1)[0]
        forms = [line.form(own) for own, line in self.items()] + plugins
        names = [*self, *plugins]
        hint = did_you_mean(name, names) or did_you_mean(head, names)
        return UsageError(
            f"Unknown {self.noun} {name!r}.{hint} Known"
            f" {self.noun}s: {', '.join(forms)}{instead and f'; or {instead}'}."
        )

    def plugged(self, name: str, make: Callable[[Any], Any], kind: type[T]) -> T:
        """What `make` returns for the object that the plug-in `name` brings.

        Raises UsageError: no such plug-in; one that fails; one that is not of `kind`.
        """
        point = self.plugins().get(name)
        if point is None:
            raise self.unknown(name)
        try:
            made = make(point.load())
        except AuditgapError:
            raise
        except Exception as error:  # whatever another package's code raises is named as its fault
            raise UsageError(
                f"The {self.noun} {name!r} comes from a plug-in that fails: {_cause(error)}"
                f" ({point.value})."
            ) from error
        if not isinstance(made, kind):
            raise UsageError(
                f"The plug-in {point.value} gave a {type(made).__name__}, which is no {self.noun}:"
                f" {_wanted(kind)}."
            )
        return made

    def listed(self) -> list[Listed]:
        """Every line and every plug-in, those that cannot be used with the cause."""
        own = [line.listed(name) for name, line in self.items()]
        return own + [self._plugin_listed(point) for point in self.plugins().values()]

    def _plugin_listed(self, point: importlib.metadata.EntryPoint) -> Listed:
        plain = f"plug-in {point.value}"
        if point.name in self:
            problem = f"the name {point.name} is taken by auditgap's own {self.noun}"
            return Listed(point.name, plain, problem)
        try:
            found = point.load()
            if isinstance(found, Line):
                return found.listed(point.name)
        except Exception as error:  # as above
            return Listed(point.name, plain, _cause(error))
        if not isinstance(found, self.brings):
            return Listed(point.name, plain, f"a {type(found).__name__} is no {self.noun}")
        return Listed(point.name, (found.__doc__ or "").strip().partition("\n")[0] or plain)


class Objects(Mapping[str, T]):
    """The objects that a table's lines stand for, by name, and after them those of the plug-ins
    that can be used. An object is imported when it is asked for.

        AUDITS = Objects(Registry("audit", {...}, group="auditgap.audits"), Audit)
        AUDITS["latent"].title

    A plug-in that fails is left out, and raises UsageError when it is asked for by its name.
    """

    def __init__(self, table: Registry[Entry], kind: type[T]) -> None:
        self.table, self.kind = table, kind
        self._plugins: dict[tuple[str, ...], dict[str, T]] = {}  # by the path of packages

    def __getitem__(self, name: str) -> T:
        if name in self.table:
            return self.table[name].load()
        if name in (usable := self._usable()):
            return usable[name]
        if name in self.table.plugins():
            return self._open(name)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter((*self.table, *self._usable()))

    def __len__(self) -> int:
        return len(self.table) + len(self._usable())

    def _usable(self) -> Mapping[str, T]:
        """Those of plug-ins, looked for once: to read what is installed takes tens of ms."""
        path = tuple(sys.path)
        if path not in self._plugins:
            found = self._plugins[path] = {}
            for name in self.table.plugins():
                if name not in self.table:
                    with suppress(UsageError):
                        found[name] = self._open(name)
        return self._plugins[path]

    def _open(self, name: str) -> T:
        found = self.table.plugged(name, lambda made: made, self.kind)
        if (own := getattr(found, "name", name)) != name:
            raise UsageError(
                f"The entry point {name!r} of {self.table.group} brings the {self.table.noun}"
                f" {own!r}; an entry point has the name of what it brings."
            )
        return found


def _cause(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _wanted(kind: type) -> str:
    """What something must have to be of that kind: of a protocol, its public attributes and
    methods() in their order."""
    if not getattr(kind, "_is_protocol", False):
        return f"a value of {kind.__module__}.{kind.__qualname__} is wanted"
    fields = [name for name in kind.__annotations__ if not name.startswith("_")]
    methods = [n for n, value in vars(kind).items() if callable(value) and not n.startswith("_")]
    return f"{', '.join((*fields, *(f'{name}()' for name in methods)))} are wanted"
