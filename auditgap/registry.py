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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from auditgap.errors import AuditgapError, UsageError, did_you_mean


@dataclass(frozen=True, slots=True)
class Listed:
    """A line of `auditgap ls …`. `problem` says why the thing cannot be used here, or is empty."""

    name: str
    description: str
    problem: str = ""
    licence: str = ""

    @property
    def available(self) -> bool:
        return not self.problem

    def row(self) -> dict[str, str]:
        licence = {"licence": self.licence} if self.licence else {}
        available = self.problem or "yes"
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
                f" {', '.join(_members(kind))} are wanted."
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


def _cause(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _members(kind: type) -> list[str]:
    """The public attributes and methods() of a protocol or class, in the order it has them."""
    fields = [name for name in kind.__annotations__ if not name.startswith("_")]
    return fields + [
        f"{name}()" for name, value in vars(kind).items() if callable(value) and name[0] != "_"
    ]
