"""A Python function's signature and docstring, made from the configs that it fills in, so that
Shift-Tab shows what `--help` does.

    described(call, "compare", "Models side by side.", (CompareSettings,), CompareResult)
    settings_of(("runs/base", "runs/twin"), (CompareSettings,), {"out": None})
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

from pydantic.fields import FieldInfo

from auditgap.config import Frozen, flag_of
from auditgap.types import Document


def _fields(*kinds: type[Frozen]) -> dict[str, FieldInfo]:
    return {key: field for kind in kinds for key, field in kind.model_fields.items()}


def _several(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple


def called(command: str) -> str:
    """A command's name in Python."""
    return command.replace("-", "_").replace(" ", "_")


def described(
    call: Callable[..., Any],
    command: str,
    title: str,
    kinds: Sequence[type[Frozen]],
    returns: Any,
    *,
    follows: bool = True,
) -> None:
    """Gives the function of a command the name that it has in Python, and the signature and the
    docstring that its configs' fields make; one that `follows` its cells takes a `progress`."""
    fields = _fields(*kinds)
    flags = {key: flag for key, field in fields.items() if (flag := flag_of(field))}
    arguments = [key for key, flag in flags.items() if flag.positional]
    kind = inspect.Parameter
    parameters = [
        kind(key, kind.VAR_POSITIONAL, annotation=str)
        if _several(fields[key])
        else kind(key, kind.POSITIONAL_OR_KEYWORD, annotation=fields[key].annotation)
        for key in arguments
    ]
    for key, field in fields.items():
        if key not in arguments:
            default = kind.empty if field.is_required() else field.get_default()
            parameters.append(
                kind(key, kind.KEYWORD_ONLY, default=default, annotation=field.annotation)
            )
    if follows:
        shown = "Callable[[], Progress] | None"
        parameters.append(kind("progress", kind.KEYWORD_ONLY, default=None, annotation=shown))
    call.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
    call.__name__ = call.__qualname__ = called(command)
    settings = "\n".join(
        f"    {key}: {flag.help}{f' [{flag.default}]' if flag.default else ''}"
        for key, flag in flags.items()
    )
    failed = "; failed cells are in `failed`" if follows else ""
    call.__doc__ = (
        f"{title}\n\nAs `auditgap {command}`. Raises UsageError, Refused,"
        f" Interrupted{failed}.\n\n{settings}\n"
    )


def settings_of(
    named: Sequence[str], kinds: Sequence[type[Frozen]], settings: Mapping[str, Any]
) -> Document:
    """The settings with the positional arguments under their fields' names. Raises TypeError for
    one too many."""
    given = {k: _text(v) if k == "out" else v for k, v in settings.items()}
    rest = list(named)
    for key, field in _fields(*kinds).items():
        if (flag := flag_of(field)) and flag.positional and rest:
            if key in given:
                raise TypeError(f"{key} came twice: as an argument and by name.")
            given[key] = tuple(rest) if _several(field) else rest[0]
            rest = [] if _several(field) else rest[1:]
    if rest:
        raise TypeError(f"{len(rest)} positional arguments too many: {', '.join(map(str, rest))}.")
    return given


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)
