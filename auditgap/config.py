"""How a command is asked: frozen pydantic values from a YAML file, from flags, or from both (flags
win).

    # a flag that is None was not given
    values = merged(Path("audit.yaml"), {"steps": 10, "seed": None})
    config, options = build("auditgap lvs", values, LatentConfig, RunOptions)

A field that carries a `Flag` is also an option of the command, a keyword of the Python function and
a described property of the JSON schema; name, type, default and help stand in the field alone:

    steps: Annotated[int, Flag("PGD steps", Topic.ATTACK)] = Field(default=10, ge=1)

Every refusal is one sentence: which key, what was wanted, what came. YAML is read safely and
without aliases. `preset:NAME` in place of a file is the command's section of a preset that comes
with the package (`auditgap/presets/`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, overload

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from pydantic.fields import FieldInfo

from auditgap.errors import Refused, UsageError, did_you_mean

_MAX_CONFIG_BYTES = 1_000_000
#: In place of a config file's name: a preset's.
PRESET = "preset:"
_PRESETS = Path(__file__).parent / "presets"


class Frozen(BaseModel):
    """A value that refuses unknown fields, and does not change once it is made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: fields that are newer than configs on disk, with what a config without them means. A field
    #: that has this value is not written, so that such a config is the same as ever
    unwritten: ClassVar[Mapping[str, Any]] = {}

    @model_serializer(mode="wrap")
    def _as_ever(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {
            name: value
            for name, value in write(self).items()
            if name not in self.unwritten or value != self.unwritten[name]
        }


class Topic(StrEnum):
    """What a setting is about: the panels of `--help`, in this order."""

    WHAT = "Models and data"
    ATTACK = "Attack"
    TRAINING = "Training"
    JUDGING = "Judging"
    WHERE = "Where it runs"
    OUTPUT = "Output"


@dataclass(frozen=True, slots=True)
class Flag:
    """How a config's field is shown: `help` is a phrase or a sentence, `default` says what None (or
    an empty value) stands for. `name` is the option's where it is not the field's; a `positional`
    field is an argument; `choices` are those of a text whose type does not say them; `metavar` is
    what stands for a value in `--help`."""

    help: str
    topic: Topic = Topic.WHAT
    default: str | None = None
    name: str | None = None
    positional: bool = False
    choices: tuple[str, ...] = ()
    metavar: str | None = None

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        """The field's JSON schema with the help as its description."""
        choices = {"enum": list(self.choices)} if self.choices else {}
        return {**handler(core_schema), "description": self.help, **choices}


def sentence(phrase: str) -> str:
    """A help's phrase with its full stop."""
    return phrase if not phrase or phrase.endswith((".", "…")) else f"{phrase}."


def flag_of(field: FieldInfo) -> Flag | None:
    """The `Flag` that a field carries."""
    return next((one for one in field.metadata if isinstance(one, Flag)), None)


def listed(value: Any) -> Any:
    """`a,b` and [a, b] alike, as a tuple."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


_Scalar = str | float
#: In a field's annotation: `a,b` as it is typed, and a list as YAML and Python have it.
COMMAS = BeforeValidator(listed, json_schema_input_type=_Scalar | list[_Scalar])


def joined(value: Any) -> Any:
    """A list as `a,b` and a number as its text; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value) if isinstance(value, (int, float)) else value


#: The same the other way round: the field is one text, and a list is taken too.
AS_COMMAS = BeforeValidator(joined, json_schema_input_type=_Scalar | list[_Scalar])


def overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`["lr=1e-5", "lora.rank=4"]` as a mapping, values read as YAML. Raises UsageError for what is
    no KEY=VALUE."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise UsageError(f"--set takes KEY=VALUE, for example --set lr=1e-5; {pair!r} came.")
        try:
            value = parse_yaml(text)
        except DuplicateKey as error:
            raise UsageError(f"--set {key}: {error.problem}; a key has one value.") from None
        except yaml.YAMLError:
            value = text
        if isinstance(value, str):
            with suppress(ValueError):
                value = float(value)  # YAML 1.1 reads 1e-5 as text
        *path, last = key.split(".")
        place = values
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise UsageError(f"--set {key}: {part} was set to a value before.")
        place[last] = value
    return values


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
#: Keys that must have a value, each with the sentence for when it has none.
Needs = Mapping[str, str]


@overload
def build(
    values: Mapping[str, Any], part: type[_Model], /, *, needs: Needs = ...
) -> tuple[_Model]: ...
@overload
def build(
    values: Mapping[str, Any],
    first: type[_Model],
    second: type[_Second],
    /,
    *,
    needs: Needs = ...,
) -> tuple[_Model, _Second]: ...
@overload
def build(
    values: Mapping[str, Any], *parts: type[_Model], needs: Needs = ...
) -> tuple[_Model, ...]: ...
def build(
    values: Mapping[str, Any], *parts: type[BaseModel], needs: Needs = MappingProxyType({})
) -> tuple[Any, ...]:
    """One value a part, each from the keys that are its own. `needs`: keys that must have a value,
    each with the sentence for when it has none.

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
    for key, sentence in needs.items():
        if not values.get(key):
            raise UsageError(sentence)
    try:
        return tuple(
            part(**{k: v for k, v in values.items() if k in part.model_fields}) for part in parts
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "config"
        came = str(first.get("input"))[:80]
        words = re.findall(r"'([^']*)'", str(first.get("ctx", {}).get("expected", "")))
        raise UsageError(
            f"{where}: {first['msg'].lower()}; {came!r} came.{did_you_mean(came, words)}"
        ) from None


class DuplicateKey(yaml.constructor.ConstructorError):
    """A mapping in which a key stands twice: YAML has the last one count, and nobody would know."""


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without aliases, which small configs do not need and YAML bombs do, and without
    keys that stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode):
                key = self.construct_object(name)
                if key in seen:
                    problem = f"the key {name.value!r} stands twice"
                    raise DuplicateKey(None, None, problem, name.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.constructor.ConstructorError(
                None, None, "aliases are not read here", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)


class _AliasedLoader(yaml.SafeLoader):
    """Safe YAML with aliases, which stay one object however often they come, and without merges,
    which copy."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(name.tag == "tag:yaml.org,2002:merge" for name, _ in node.value):
            raise yaml.constructor.ConstructorError(
                None, None, "merges (<<) are not read here", node.start_mark
            )


def parse_yaml(text: str, *, aliases: bool = False) -> Any:
    """What a text of YAML says: the one way in which any is read here. `aliases`: of a file that
    somebody else wrote, where what they stand for is looked at and never walked through. Raises
    yaml.YAMLError; ValueError for a date or number that is none; RecursionError."""
    return yaml.load(text, Loader=_AliasedLoader if aliases else _PlainLoader)


def read_yaml(
    file: Path, option: str = "--config", example: str = "models: [smollm2]"
) -> dict[str, Any]:
    """The mapping in a YAML file that `option` names. Raises UsageError: no file, too large, not
    UTF-8, not readable, no mapping, a key that stands twice."""
    if not file.is_file():
        raise UsageError(f"{option} {file}: no such file.")
    if file.stat().st_size > _MAX_CONFIG_BYTES:
        raise UsageError(
            f"{option} {file} is larger than {_MAX_CONFIG_BYTES:,} bytes; that is no audit config."
        )
    try:
        values = parse_yaml(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UsageError(f"{option} {file} is not UTF-8 text.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{option} {file} is not readable YAML: {' '.join(str(error).split())[:200]}"
        ) from None
    if not isinstance(values, dict):
        raise UsageError(
            f"{option} {file} must be a mapping of keys to values, for example `{example}`."
        )
    return values
