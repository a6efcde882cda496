"""What a wheel holds and what it says of itself. An editable install finds every file anyway, a
wheel only those that pyproject.toml names."""

from __future__ import annotations

import re
import tomllib
from distutils.core import run_setup
from email import message_from_string
from io import StringIO
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from setuptools import Distribution

from auditgap import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture
def distribution(monkeypatch) -> Distribution:
    """The package as setuptools reads it from setup.py and pyproject.toml."""
    monkeypatch.chdir(ROOT)
    read = run_setup("setup.py", stop_after="init")
    read.parse_config_files()
    return read


def test_every_file_of_the_package_is_in_the_wheel(distribution):
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    packed = set(map(Path, build.get_output_mapping().values()))
    there = {
        file.relative_to(ROOT)
        for file in (ROOT / "auditgap").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert packed == there and len(there) > 200


def test_the_description_of_the_package_leads_nowhere_that_an_index_has_not(distribution):
    """In a wheel's METADATA no picture and no link is relative to the checkout; the words stay."""
    written = StringIO()
    distribution.metadata.write_pkg_file(written)
    told = message_from_string(written.getvalue())
    text = told.get_payload()
    assert isinstance(text, str) and told["Description-Content-Type"] == "text/markdown"
    targets = re.findall(r"]\(([^)]*)\)", text)
    assert [target for target in targets if not target.startswith("https://")] == []
    assert "which command do I want?" in text and "pip install auditgap" in text
    assert "![" in (ROOT / "README.md").read_text("utf-8") and "![" not in text


def test_weights_in_the_package_are_few_and_small():
    held = {
        file.relative_to(ROOT / "auditgap").as_posix(): file.stat().st_size
        for file in (ROOT / "auditgap").rglob("*.safetensors")
    }
    assert set(held) == {
        "judges/builtin.safetensors",
        "models/demo/model.safetensors",
        "models/smollm2_refuses/adapter_model.safetensors",
    }
    assert sum(held.values()) < 7e6


def test_the_version_stands_in_one_place(distribution):
    assert distribution.get_version() == __version__ and Version(__version__)
    versions = [
        line.split()[1]
        for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("## ")
    ]
    assert versions[:2] == ["Unreleased", __version__]


def test_a_pinned_version_meets_the_floor():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    floors = [Requirement(line) for line in chain(project["dependencies"], *extras)]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {pin.name: pin for pin in map(Requirement, filter(None, map(without_comment, lines)))}
    both = [floor for floor in floors if floor.name in pins]
    assert len(both) > 10
    for floor in both:
        [pin] = pins[floor.name].specifier
        assert floor.specifier.contains(pin.version), f"{floor} against {pin}"


def without_comment(line: str) -> str:
    return line.partition("#")[0].strip()
