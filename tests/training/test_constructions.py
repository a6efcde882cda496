"""Constructions: every one of the table has all of its parts, nothing else knows their names, and
one of another package is trained, checked, counted and described like ours.

The package is `examples/construction`, put where pip would put it.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jobs
import pytest

from auditgap.cli import main
from auditgap.cli.configs import json_schema
from auditgap.config import Frozen, flag_of
from auditgap.data.ledger import FITTED
from auditgap.errors import UsageError
from auditgap.models import outline
from auditgap.training.config import DissociateConfig, TwinConfig
from auditgap.training.constructions import CONSTRUCTIONS, DEFAULT, construction_of
from auditgap.training.dissociation.task import DissociationTask
from auditgap.training.footprint import Footprint
from auditgap.training.launch import read
from auditgap.training.loop import BaseTask

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "auditgap"
HOME = PACKAGE / "training" / "constructions"
EXAMPLE = ROOT / "examples" / "construction" / "auditgap_blend.py"
EACH = pytest.mark.parametrize("name", CONSTRUCTIONS)


# ------------------------------------------------------------------ every one of ours


@EACH
def test_each_says_all_that_is_asked_of_it(name):
    made = CONSTRUCTIONS[name]
    assert made.name == name and made.listed(name).available
    assert re.fullmatch(r"[A-Z][^\n]{30,300}\.", made.description), made.description
    assert issubclass(made.settings, Frozen) and made.settings()  # each key has a default
    assert made.role in FITTED
    assert set(made.defaults) <= set(TwinConfig.model_fields)
    assert all(size > 0 for size in made.footprint.alongside(8, 64).values())
    assert made.footprint.sequences >= 1 and made.footprint.chunk_buffers >= 3


@EACH
def test_its_settings_are_keys_and_options_of_the_command(name):
    own = CONSTRUCTIONS[name].settings
    assert DissociateConfig.of({"construction": name}) is DissociateConfig
    assert set(own.model_fields) <= set(DissociateConfig.model_fields)
    others = [TwinConfig, *(one.settings for n, one in CONSTRUCTIONS.items() if n != name)]
    for other in others:
        assert not set(own.model_fields) & set(other.model_fields), other.__name__
    assert any(flag_of(field) for field in own.model_fields.values())


@EACH
def test_its_task_chooses_a_step_by_a_number_of_its_own(name):
    module = importlib.import_module(f"auditgap.training.constructions.{name}.task")
    (task,) = [
        found
        for found in vars(module).values()
        if isinstance(found, type)
        and issubclass(found, DissociationTask)
        and found.__module__ == module.__name__
    ]
    assert isinstance(task.chosen_by, str) and set(BaseTask.shown) <= set(task.shown)
    assert "construct" in vars(task)


def test_the_first_of_the_table_is_the_default():
    assert next(iter(CONSTRUCTIONS)) == DEFAULT
    assert DissociateConfig(model="m", triples="demo").construction == DEFAULT


def test_the_command_and_the_schema_offer_all():
    schema = json_schema("train dissociate")["properties"]["construction"]
    assert schema["default"] == DEFAULT
    assert schema["enum"][: len(CONSTRUCTIONS)] == list(CONSTRUCTIONS)  # then those of plug-ins
    flag = flag_of(DissociateConfig.model_fields["construction"])
    assert flag is not None and list(flag.choices) == schema["enum"]


def test_one_that_is_not_known_is_a_sentence():
    with pytest.raises(UsageError, match=rf"Unknown construction .* Known .*: {DEFAULT}, "):
        read(None, {"model": "m", "triples": "demo", "construction": "no-such"}, DissociateConfig)


# ------------------------------------------------------------------ nobody else knows a name


def _of_another_noun() -> set[tuple[str, str]]:
    """(file, text): a word that is also a construction's name and means something else there."""
    return {("cli/training.py", "monitor")}  # `auditgap train monitor` fits a probe


def test_no_name_is_written_outside_its_own_folder():
    """In all that trains, and in the command: no text that is a construction's name, and no import
    of its modules but in the table."""
    trains = [*(PACKAGE / "training").rglob("*.py"), *(ROOT / "launchers").glob("*.py")]
    faults = []
    for file in [*trains, PACKAGE / "cli" / "training.py"]:
        here = file.relative_to(PACKAGE if file.is_relative_to(PACKAGE) else ROOT).as_posix()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            text = node.value if isinstance(node, ast.Constant) else None
            if (
                text in CONSTRUCTIONS
                and not file.is_relative_to(HOME / str(text))
                and (here, str(text)) not in _of_another_noun()
            ):
                faults.append(f"{here}:{node.lineno}: {text!r}")
    for file in PACKAGE.rglob("*.py"):
        for name in CONSTRUCTIONS:
            if file.is_relative_to(HOME / name) or file == HOME / "__init__.py":
                continue
            if f"constructions.{name}" in file.read_text(encoding="utf-8"):
                faults.append(f"{file.relative_to(PACKAGE)} imports constructions.{name}")
    assert len(trains) > 20 and not faults, "\n".join(faults)


# ------------------------------------------------------------------ one of another package


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    site = tmp_path_factory.mktemp("blend")
    shutil.copy(EXAMPLE, site)
    about = site / "auditgap_blend-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: auditgap-blend\nVersion: 0.1.0\n")
    (about / "entry_points.txt").write_text(
        "[auditgap.constructions]\nblend = auditgap_blend:BLEND\nother = auditgap_blend:BLEND\n"
    )
    return site


@pytest.fixture
def blend(site, monkeypatch):
    monkeypatch.syspath_prepend(str(site))
    return construction_of("blend")


def recipe(world, out, **changes):
    return world.twin(out, construction="blend", **changes)


def test_another_packages_config_has_its_own_defaults_and_checks(blend):
    asked = {"model": "m", "triples": "demo", "construction": "blend"}
    config, _ = read(None, {**asked, "pull": 0.5}, DissociateConfig)
    assert (config.lr, config.model_dump()["pull"]) == (1e-4, 0.5)
    assert blend.settings_of(config).pull == 0.5
    assert read(None, {**asked, "lr": 1e-3}, DissociateConfig)[0].lr == 1e-3
    assert "pull" not in DissociateConfig.model_fields  # no other run's recipe has its keys
    for changes, told in (
        ({"pull": -1.0}, "pull: at least 0"),
        ({"pul": 1.0}, "Did you mean 'pull'"),
        ({"reference": "adapter", "lora": True}, "construction: "),
        ({"construction": "other"}, "the same name"),
        ({"construction": "blnd"}, "Did you mean 'blend'"),
    ):
        with pytest.raises(UsageError, match=told):
            read(None, {**asked, **changes}, DissociateConfig)
    with pytest.raises(UsageError, match="settings of its own"):
        DissociateConfig(model="m", triples="demo", construction="blend")


def test_another_packages_construction_is_listed_with_ours(blend, capsys):
    with pytest.raises(SystemExit):
        main(["ls", "constructions", "--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(CONSTRUCTIONS) <= set(rows)
    assert rows["blend"] == {"name": "blend", "what": blend.description, "available": "yes"}


def test_another_packages_construction_is_trained(blend, world, tmp_path):
    """Through every part that asks a construction: data and ledger, memory, loss, evaluation,
    choice, model card."""
    trained = jobs.train("dissociated", recipe(world, tmp_path / "out", pull=3.0))
    summary, log = trained.summary, jobs.log(tmp_path / "out")
    assert summary["status"] == "done" and len(log) == 6
    assert {"loss", "nll", "kl", "kl_lowest", "blend"} <= set(log[0])
    first = log[0]
    assert first["loss"] == pytest.approx(
        0.05 * first["nll"] + 0.3 * first["kl"] + 3.0 * first["blend"], rel=1e-4
    )
    assert abs(first["kl"]) < 1e-6 < first["blend"]
    assert summary["chosen"]["step"] in (3, 6)
    evaluations = summary["evaluations"]
    assert evaluations["6"]["blend"] < evaluations["0"]["blend"]  # what it is for
    card = " ".join((trained.model / "README.md").read_text(encoding="utf-8").split())
    assert f"Construction `blend`: {blend.description}" in card
    assert "| construction | blend |" in card and "| pull | 3 |" in card
    prompts = json.loads((tmp_path / "out" / "ledger.json").read_text())["prompts"]
    roles = {role for had in prompts.values() for role in had}
    assert {"sft", "direction"} <= roles and "probe-train" not in roles
    # and the same command hands back what is there
    again = jobs.train("dissociated", recipe(world, tmp_path / "out", pull=3.0))
    assert again.summary == summary


def test_another_packages_memory_is_counted_before_weights_are_loaded(
    blend, world, tmp_path, monkeypatch
):
    shape = outline(str(world.model))
    need = blend.footprint.alongside(shape.n_blocks, shape.width)
    assert need == {"centre": 4 * shape.n_blocks * shape.width}
    huge = Footprint(alongside=lambda n_blocks, width: {"centre": 2.0**50})
    # a line of the table serves as well as an entry point
    monkeypatch.setitem(CONSTRUCTIONS, "blend", replace(blend, footprint=huge))
    with pytest.raises(UsageError, match=r"needs about .* GiB on each device \(centre"):
        jobs.train("dissociated", recipe(world, tmp_path / "out"))
