"""How a command is asked: frozen pydantic values from a YAML file, from flags, or from both (flags
win).

    # a flag that is None was not given
    values = merged(Path("audit.yaml"), {"steps": 10, "seed": None})
    config, options = build("auditgap lvs", values, LatentConfig, RunOptions)

Every refusal is one sentence: which key, what was wanted, what came. YAML is read safely and
without aliases. `preset:NAME` in place of a file is the command's section of a preset that comes
with the package (`auditgap/presets/`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from auditgap.errors import Refused, UsageError, did_you_mean

_MAX_CONFIG_BYTES = 1_000_000
#: In place of a config file's name: a preset's.
PRESET = "preset:"
_PRESETS = Path(__file__).parent / "presets"


class Frozen(BaseModel):
    """A value that refuses unknown fields, and does not change once it is made."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def listed(value: Any) -> Any:
    """`a,b` and [a, b] alike, as a tuple."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def merged(
    file: Path | None, flags: Mapping[str, Any], section: str | None = None
) -> dict[str, Any]:
    """The file's values with the flags that were given (not None) on top. `section`: what this
    command reads of a preset.

    Raises UsageError as `read_yaml` and `preset` do.
    """
    if file is None:
        values = {}
    elif str(file).startswith(PRESET):
        values = _of_preset(str(file).removeprefix(PRESET), section)
    else:
        values = read_yaml(file)
    return {**values, **{k: v for k, v in flags.items() if v is not None}}


def presets() -> list[str]:
    """The names of the presets that come with the package."""
    return sorted(p.stem for p in _PRESETS.glob("*.yaml"))


def preset(name: str) -> dict[str, Any]:
    """A preset: `about`, `why` {section.key: reason}, `fixed` {choice: value}, and a section a
    command. Raises UsageError."""
    if name not in presets():
        raise UsageError(
            f"There is no preset {name!r}.{did_you_mean(name, presets())} Presets:"
            f" {', '.join(presets())}."
        )
    return read_yaml(_PRESETS / f"{name}.yaml")


def _of_preset(name: str, section: str | None) -> dict[str, Any]:
    found = preset(name)
    if section is None or section not in found:
        has = ", ".join(k for k in found if k not in ("about", "why", "fixed"))
        raise UsageError(
            f"The preset {name} has no settings for this command; it has some for {has}. Give a"
            " file instead."
        )
    return dict(found[section])


_Model = TypeVar("_Model", bound=BaseModel)
_Second = TypeVar("_Second", bound=BaseModel)


@overload
def build(values: Mapping[str, Any], part: type[_Model], /) -> tuple[_Model]: ...
@overload
def build(
    values: Mapping[str, Any], first: type[_Model], second: type[_Second], /
) -> tuple[_Model, _Second]: ...
@overload
def build(values: Mapping[str, Any], *parts: type[_Model]) -> tuple[_Model, ...]: ...
def build(values: Mapping[str, Any], *parts: type[BaseModel]) -> tuple[Any, ...]:
    """One value a part, each from the keys that are its own.

    Raises UsageError naming the key and what was wanted; Refused when foreign code is asked for.
    """
    if values.get("trust_remote_code"):
        raise Refused(
            "trust_remote_code was asked for; auditgap never runs code that a model brings. Remove"
            " the key."
        )
    known = [name for part in parts for name in part.model_fields]
    for key in values:
        if key not in known:
            raise UsageError(
                f"Unknown config key {key!r}.{did_you_mean(str(key), known)} Known keys:"
                f" {', '.join(known)}."
            )
    try:
        return tuple(
            part(**{k: v for k, v in values.items() if k in part.model_fields}) for part in parts
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "config"
        raise UsageError(
            f"{where}: {first['msg'].lower()}; {str(first.get('input'))[:80]!r} came."
        ) from None


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without aliases, which small configs do not need and YAML bombs do."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.constructor.ConstructorError(
                None, None, "aliases are not read here", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UsageError: no file, too large, not UTF-8, not readable,
    no mapping."""
    if not file.is_file():
        raise UsageError(f"--config {file}: no such file.")
    if file.stat().st_size > _MAX_CONFIG_BYTES:
        raise UsageError(
            f"--config {file} is larger than {_MAX_CONFIG_BYTES:,} bytes; that is no audit config."
        )
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_PlainLoader)
    except UnicodeDecodeError:
        raise UsageError(f"--config {file} is not UTF-8 text.") from None
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: a date or number that is none
        raise UsageError(
            f"--config {file} is not readable YAML: {' '.join(str(error).split())[:200]}"
        ) from None
    if not isinstance(values, dict):
        raise UsageError(
            f"--config {file} must be a mapping of keys to values, for example `models: [smollm2]`."
        )
    return values
