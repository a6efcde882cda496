"""Commands, schemas and Python functions are made from the configs: one place for a setting's name, type,
default and help."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import typer
import warm
from cli_tree import TREE, options
from typer.testing import CliRunner

import auditgap
from auditgap.audits import AUDITS
from auditgap.audits.latent.config import LatentConfig, RunOptions
from auditgap.audits.settings import (
    CompareSettings,
    GradeSettings,
    JudgeEvalSettings,
    ReportSettings,
)
from auditgap.audits.whole_config import WholeSettings
from auditgap.cli import app, main
from auditgap.cli.configs import CONFIGS, json_schema
from auditgap.cli.options import ALIASES, Asked, command
from auditgap.config import flag_of, preset, presets
from auditgap.errors import UsageError

KINDS = {kind.__name__: kind for audit in AUDITS.values() for kind in (audit.config, audit.options)}
#: The commands that are no audit and yet made from a config.
BESIDE = {
    "audit": WholeSettings,
    "compare": CompareSettings,
    "grade": GradeSettings,
    "judge eval": JudgeEvalSettings,
    "report": ReportSettings,
}
KINDS |= {kind.__name__: kind for kind in BESIDE.values()}
MADE = {
    "em run" if a.command == "em" else a.command: (a.config, a.options)
    for a in AUDITS.values()
    if a.command in TREE
} | {name: (kind,) for name, kind in BESIDE.items()}


def asked(*words: str, kinds: tuple = (LatentConfig, RunOptions)) -> Asked:
    """What a command made from these configs is asked with these words."""
    found: list[Asked] = []
    one = typer.Typer()
    command(one, "go", *kinds, about="Go.")(found.append)
    done = CliRunner().invoke(one, list(words))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return found[0]


def helped(name: str) -> str:
    """A command's help as one line, on a terminal wide enough that nothing breaks."""
    env = {"COLUMNS": "400", "TERMINAL_WIDTH": "400", "NO_COLOR": "1"}
    done = CliRunner().invoke(app, [*name.split(), "--help"], env=env, prog_name="auditgap")
    assert done.exit_code == 0, done.output
    return " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize("name", KINDS)
def test_every_setting_of_every_config_says_what_it_is(name):
    kind = KINDS[name]
    silent = [key for key, field in kind.model_fields.items() if flag_of(field) is None]
    assert not silent, f"{name} has fields without a Flag: {silent}"


@pytest.mark.parametrize("name", MADE)
def test_the_help_has_every_setting_with_the_configs_own_default(name):
    text = helped(name)
    for kind in MADE[name]:
        for key, field in kind.model_fields.items():
            flag = flag_of(field)
            assert flag.help in text, key
            if flag.positional:
                continue
            assert f"--{flag.name or key.replace('_', '-')} " in text, key
            if isinstance(field.default, bool):
                assert f"--no-{flag.name or key.replace('_', '-')} " in text, key
            if flag.default:
                assert f"[default: ({flag.default})]" in text, key
            elif isinstance(field.default, (int, float, str)) and not isinstance(
                field.default, bool
            ):
                assert f"[default: {field.default}]" in text, key


@pytest.mark.parametrize("name", [n for n in TREE if n])
def test_no_help_text_is_read_as_markup(name):
    text = helped(name)
    for one in TREE[name].params:
        if one.name != "help" and not getattr(one, "hidden", False) and getattr(one, "help", None):
            said = " ".join(one.help.replace("\\[", "[").split())
            assert said in text, f"{name} {one.name}"


def test_no_option_is_lost():
    """Every option that version 0.1 understood is understood still."""
    before = json.loads((Path(__file__).parent / "options_0_1.json").read_text("utf-8"))
    lost = {
        name: sorted(set(words.split()) - options(name))
        for name, words in before.items()
        if name not in TREE or set(words.split()) - options(name)
    }
    assert len(before) == 38 and not lost


#: What shows nothing but a file's text, a schema, a job's log or pip's.
WITHOUT_JSON = {"init", "mcp", "presets page", "schema", "setup", "submit"}


def test_every_command_that_shows_something_can_show_json():
    leaves = {name for name, one in TREE.items() if not hasattr(one, "commands")}
    assert {name for name in leaves if "--json" not in options(name)} == WITHOUT_JSON


@pytest.mark.parametrize("audit", AUDITS.values(), ids=lambda a: a.command)
def test_every_audit_has_the_same_common_options(audit):
    name = "em run" if audit.command == "em" else audit.command
    common = "--device --dtype --seed --out --json --dry-run --config --set --retry-failed"
    assert set(common.split()) <= options(name)


class TestWhatIsTyped:
    def test_only_what_was_typed_is_given(self):
        got = asked("./m", "--steps", "3", "--eps", "0.1,0.2")
        assert got.flags == {"models": ("./m",), "steps": 3, "eps": "0.1,0.2"}
        assert not got.dry_run and not got.as_json and got.file is None

    def test_a_default_that_is_typed_wins_over_the_file(self, tmp_path):
        (tmp_path / "a.yaml").write_text("models: [m]\nsteps: 7\ndistance: true\n")
        got = asked("--config", str(tmp_path / "a.yaml"), "--steps", "10", "--no-distance")
        config, _ = AUDITS["latent"].read(got.file, got.flags)
        assert (config.steps, config.distance, config.models) == (10, False, ("m",))

    def test_set_and_options_together(self):
        got = asked("m", "--set", "steps=4", "--set", "bisections=1", "--steps", "5", "--json")
        assert got.flags["steps"] == 5 and got.flags["bisections"] == 1 and got.as_json

    def test_the_words_of_other_tools_are_understood_and_not_shown(self):
        got = asked("--model", "a", "--model", "b", "--tasks", "xstest", "-o", "runs/x")
        assert got.flags == {"models": ("a", "b"), "prompts": "xstest", "out": "runs/x"}
        text = helped("lvs")
        own = options("lvs", hidden=False)
        for word in {w for words in ALIASES.values() for w in words} - own:
            assert f" {word} " not in text

    def test_a_batch_of_rows_is_told_from_one_of_tokens(self):
        with pytest.raises(UsageError, match=r"use --batch-tokens.*--batch-size 8 came"):
            asked("m", "--batch-size", "8")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_schema_is_one_and_has_help_and_defaults(name):
    schema = json_schema(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"] and not schema["additionalProperties"]
    if name == "lvs":
        steps = schema["properties"]["steps"]
        assert steps["default"] == 10 and steps["description"] == "PGD steps"
        with pytest.raises(jsonschema.ValidationError, match="stepz"):
            jsonschema.validate({"stepz": 3}, schema)
        jsonschema.validate({"models": "a,b", "eps": [0.1], "layers": 5, "seed": 0}, schema)


@pytest.mark.parametrize("name", presets())
def test_a_presets_sections_keep_to_the_schemas(name):
    commands = {"monitor": "train monitor", "dissociate": "train dissociate"}
    found = preset(name)
    sections = {k: v for k, v in found.items() if k not in ("about", "why", "fixed", "criteria")}
    assert sections
    for section, values in sections.items():
        jsonschema.validate(values or {}, json_schema(commands.get(section, section)))


def test_the_schema_of_nothing(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["schema", "lvz"])
    assert stop.value.code == 2 and "Did you mean 'lvs'?" in capsys.readouterr().err


LIGHT = """
import sys
from auditgap.cli import main
for words in (["--help"], ["lvs", "--help"], ["audit", "--help"], ["em", "run", "--help"], ["schema", "lvs"]):
    try:
        main(words)
    except SystemExit as stop:
        assert not stop.code, words
heavy = ("torch", "transformers", "pandas", "scipy", "sklearn", "pyarrow")
print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""


def test_help_and_schema_cost_no_torch():
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and done.stderr.strip().splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("auditgap lvs --uni", "--unit"),
        ("auditgap lvs --unit ", "absolute"),
        ("auditgap ev", "evaluate"),
        ("auditgap em ju", "judge"),
    ],
)
def test_a_shell_completes(words, found):
    env = {
        **os.environ,
        "_AUDITGAP_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    with warm.cold():  # a shell starts it so
        done = subprocess.run(
            [sys.executable, "-m", "auditgap"],
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert found in done.stdout.split(), done.stdout + done.stderr


class TestPython:
    @pytest.mark.parametrize("audit", AUDITS.values(), ids=lambda a: a.command)
    def test_every_audit_is_a_function_that_shows_its_settings(self, audit):
        verb = getattr(auditgap, audit.command.replace("-", "_"))
        assert verb.__name__ in dir(auditgap)
        shown = inspect.signature(verb).parameters
        for kind in (audit.config, audit.options):
            for key, field in kind.model_fields.items():
                flag = flag_of(field)
                assert f"{key}: {flag.help}" in verb.__doc__
                if not flag.positional and not field.is_required():
                    assert shown[key].default == field.get_default()
                    assert shown[key].annotation == field.annotation

    def test_the_whole_audits_too(self):
        shown = inspect.signature(auditgap.audit).parameters
        assert {*WholeSettings.model_fields, "progress"} == set(shown)

    @pytest.mark.parametrize("name", ["compare", "judge eval"])
    def test_and_what_is_no_audit(self, name):
        shown = inspect.signature(getattr(auditgap, name.replace(" ", "_"))).parameters
        assert set(BESIDE[name].model_fields) == set(shown)
        assert name.replace(" ", "_") in dir(auditgap)
        for key, one in shown.items():
            if one.kind == one.KEYWORD_ONLY:
                assert one.default == BESIDE[name].model_fields[key].get_default()

    def test_arguments_and_names_meet(self):
        with pytest.raises(TypeError, match="base came twice"):
            auditgap.probe("./a", base="./b", triples="demo")
        with pytest.raises(TypeError, match="too many"):
            auditgap.em("./a", "./b")
        with pytest.raises(UsageError, match="stepz"):
            auditgap.lvs("./a", stepz=3)

    def test_a_module_is_no_verb(self):
        with pytest.raises(AttributeError):
            auditgap.nothing  # noqa: B018 - the access is what is tested
