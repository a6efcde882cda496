"""A command made from configs: its options, their types, defaults and help are the fields'.

    @command(app, "evaluate", BehaviourConfig, BehaviourOptions, about=title, examples=examples)
    def evaluate(asked: Asked) -> None:
        config, options = BEHAVIOUR.read(asked.file, asked.flags)

Only what was typed is in `asked.flags`, so that a YAML file's values stand where nothing was. Every
such command has `--config` and `--set` as well; `--dry-run` and `--json` unless it says otherwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape

from auditgap.audits.within import seconds_of
from auditgap.config import Flag, Frozen, flag_of, overrides, sentence
from auditgap.errors import UsageError, did_you_mean
from auditgap.types import Document

#: What other tools of the field call a setting: understood, and not shown.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "models": ("--model",),
    "model": ("--model",),
    "base": ("--base",),
    "subjects": ("--model",),
    "suite": ("--tasks",),
    "prompts": ("--tasks", "--dataset"),
    "out": ("--output-path", "--output-dir", "--output", "-o"),
    "max_new_tokens": ("--max-gen-toks", "--max-tokens"),
    "batch": ("--batch-size",),
    "lr": ("--learning-rate",),
    "lora_r": ("--lora-rank",),
    "endpoint": ("--base-url",),
    "tensor_parallel": ("--tensor-parallel-size",),
    "gpu_memory": ("--gpu-memory-utilization",),
    "eps": ("--epsilon",),
}


@dataclass(frozen=True)
class Asked:
    """What was typed: the config's file, the settings by field, and what is done with them."""

    file: Path | None
    flags: Document
    dry_run: bool = False
    as_json: bool = False
    fail_on: str | None = None  #: one of `FAIL_ON`
    yes: bool = False  #: a long run begins without a question
    seconds: float | None = None  #: into which the audit is to be fitted


#: At which verdicts a command ends with an exit code of its own.
FAIL_ON = ("fail", "could-not-tell")
File = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML with any of these settings, or preset:NAME; options win.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Any setting by its key in the YAML; may be repeated."
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Show what would run and what it would cost, without running it."
    ),
]
FailOn = Annotated[
    str | None,
    typer.Option(
        "--fail-on",
        metavar="fail|could-not-tell",
        help="Exit with 1 if a verdict is fail; with could-not-tell also with 5 if one could not"
        " be told.",
        autocompletion=lambda: list(FAIL_ON),
    ),
]
Yes = Annotated[
    bool, typer.Option("--yes", "-y", help="Begin a run of more than four hours without asking.")
]
Time = Annotated[
    str | None,
    typer.Option(
        "--time",
        metavar="2h",
        help="Fit controls, sites and prompts to this time, and say what power is left; what is"
        " asked for by name stays as it is.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def examples(lines: Sequence[str]) -> str:
    """The examples under a command's help, one a line."""
    return "\n\n".join(("Examples:" if len(lines) > 1 else "Example:", *map(escape, lines)))


def group(about: str) -> typer.Typer:
    """An app of several commands."""
    return typer.Typer(
        help=about,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )


def command(
    app: typer.Typer,
    name: str,
    *kinds: type[Frozen],
    about: str,
    examples_of: Sequence[str] = (),
    panel: str | None = None,
    only: Sequence[str] | None = None,
    leave: Sequence[str] = (),
    plans: bool = True,
    judges: bool = False,
    long: bool = False,
    fits: bool = False,
    extra: Sequence[inspect.Parameter] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers the decorated function as a command that has the kinds' fields as its options.

    `only` and `leave` choose among them, `plans` gives it a `--dry-run`, `judges` a `--fail-on`, `long`
    a `--yes`, `fits` a `--time`, and `extra` are parameters of its own, which the function gets by name after the `Asked`.
    """
    fields = {
        key: (field, flag)
        for kind in kinds
        for key, field in kind.model_fields.items()
        if (flag := flag_of(field)) and key not in leave and (only is None or key in only)
    }
    common = {"file_": File, "set_": Set} | ({"dry_run_": DryRun} if plans else {})
    common |= {"fail_on_": FailOn} if judges else {}
    common |= {"yes_": Yes} if long else {}
    common |= {"time_": Time} if fits else {}
    common["as_json_"] = AsJson

    def register(act: Callable[..., None]) -> Callable[..., None]:
        def run(context: typer.Context, **values: Any) -> None:
            own = {one.name: values.pop(one.name) for one in extra}
            act(_asked(context, values, fields), **own)

        params = [_parameter(key, *fields[key]) for key in _in_order(fields)]
        taken = {word for _, options in params for word in options}
        shown = [
            inspect.Parameter(
                key,
                inspect.Parameter.KEYWORD_ONLY,
                default=None if key in ("file_", "set_", "fail_on_", "time_") else False,
                annotation=kind,
            )
            for key, kind in common.items()
        ]
        signature = [
            inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
            *extra,
            *shown,
            *(one for one, _ in params),
            *_aliases(fields, taken),
        ]
        run.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
        run.__doc__ = about
        app.command(
            name, epilog=examples(examples_of) if examples_of else None, rich_help_panel=panel
        )(run)
        return act

    return register


def _asked(
    context: typer.Context, values: Document, fields: Mapping[str, tuple[FieldInfo, Flag]]
) -> Asked:
    """What of the values was typed, aliases under their field's name."""
    typed: Document = {}
    for key, value in values.items():
        source = context.get_parameter_source(key)
        if value in (None, ()) or source is None or source.name == "DEFAULT":
            continue
        field = key.partition("__")[0]
        if field not in fields:
            continue
        if isinstance(value, list):
            value = (*typed.get(field, ()), *value)
        typed[field] = value
    fail_on = values.get("fail_on_")
    if fail_on is not None and fail_on not in FAIL_ON:
        raise UsageError(
            f"--fail-on takes {' or '.join(FAIL_ON)}; {fail_on!r}"
            f" came.{did_you_mean(fail_on, FAIL_ON)}"
        )
    return Asked(
        values["file_"],
        {**overrides(values["set_"] or ()), **typed},
        values.get("dry_run_", False),
        values["as_json_"],
        fail_on,
        values.get("yes_", False),
        None if values.get("time_") is None else seconds_of(values["time_"]),
    )


def _in_order(fields: Mapping[str, tuple[FieldInfo, Flag]]) -> list[str]:
    """Arguments first, then topic by topic: the order of the help."""
    topics = list(type(next(iter(fields.values()))[1].topic)) if fields else []
    return sorted(
        fields,
        key=lambda key: (
            not fields[key][1].positional,
            topics.index(fields[key][1].topic),
        ),
    )


def _parameter(key: str, field: FieldInfo, flag: Flag) -> tuple[inspect.Parameter, list[str]]:
    """The typer parameter of a field, and the option's names."""
    kind, choices, several = _typed(field.annotation)
    choices = choices or flag.choices
    help_text = escape(sentence(flag.help))
    if flag.positional:
        argument = typer.Argument(help=help_text)
        annotation = Annotated[(list[str] if several else kind) | None, argument]  # type: ignore[valid-type]
        return _keyword(key, None, annotation), []
    word = flag.name or key.replace("_", "-")
    names = [f"--{word}/--no-{word}" if kind is bool else f"--{word}"]
    option = typer.Option(
        *names,
        help=help_text,
        rich_help_panel=flag.topic.value,
        show_default=flag.default or True,
        metavar=flag.metavar or ("|".join(choices) if choices else "A,B" if several else None),
        autocompletion=_completion(choices) if choices else None,
    )
    default = _default(field)
    annotation = Annotated[kind if kind is bool and default is not None else kind | None, option]  # type: ignore[valid-type]
    return _keyword(key, default, annotation), names[0].split("/")


def _keyword(key: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(
        key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _typed(annotation: Any) -> tuple[type, tuple[str, ...], bool]:
    """What typer is to read (a text where the config takes it apart), the choices, and whether it is
    a list."""
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
        return _typed(kinds[0]) if len(kinds) == 1 else (str, (), False)
    if get_origin(annotation) is Literal:
        return str, get_args(annotation), False
    if get_origin(annotation) is tuple:
        return str, (), True
    if get_origin(annotation) is Mapping:  # KEY=VALUE, as often as it is typed
        return list[str], (), False
    return (annotation if annotation in (bool, int, float, Path) else str), (), False


def _default(field: FieldInfo) -> Any:
    """The field's own default as it would be typed; None where there is none to show."""
    if field.is_required() or field.default in (None, (), {}):
        return None
    if isinstance(field.default, tuple):
        return ",".join(map(str, field.default))
    return field.default


def _completion(choices: Sequence[str]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def _aliases(
    fields: Mapping[str, tuple[FieldInfo, Flag]], taken: set[str]
) -> Iterator[inspect.Parameter]:
    """Hidden options that mean a field; none where the word is an option's own."""
    seen = set(taken)
    for key, (field, _) in fields.items():
        words = [word for word in ALIASES.get(key, ()) if word not in seen]
        seen |= set(words)
        if not words:
            continue
        kind, _, several = _typed(field.annotation)
        listed = several and fields[key][1].positional
        option = typer.Option(*words, hidden=True)
        annotation = Annotated[(list[str] if listed else kind) | None, option]  # type: ignore[valid-type]
        yield _keyword(f"{key}__alias", None, annotation)
    if "batch_tokens" in fields and "--batch-size" not in seen:
        refusal = typer.Option("--batch-size", hidden=True, callback=_tokens_not_rows)
        yield _keyword("batch_size__alias", None, Annotated[str | None, refusal])


def _tokens_not_rows(value: str | None) -> None:
    if value is not None:
        raise UsageError(
            "A batch is counted in tokens here, not in prompts: use --batch-tokens, for example"
            f" --batch-tokens 4096; --batch-size {value} came."
        )
