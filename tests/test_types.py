"""Results are typed as a user sees them; `make types`, which CI runs too, checks the package
itself."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECKER = Path(sys.executable).with_name("basedpyright")

STUBS = Path(sysconfig.get_path("purelib")) / "pandas-stubs"

pytestmark = pytest.mark.skipif(
    not CHECKER.is_file() or not STUBS.is_dir(),
    reason="no type checker here; type: pip install basedpyright pandas-stubs",
)


USE = """
from pathlib import Path
from typing import assert_type

import pandas as pd

import auditgap

found = auditgap.lvs("smollm2", prompts="harmbench", limit=16, out="runs/smollm2")
assert_type(found.table, pd.DataFrame)
assert_type(found.raise_failures().rows, pd.DataFrame)
assert_type(auditgap.evaluate("smollm2").report, Path)
assert_type(auditgap.distance("smollm2", "./tuned").failed["cell"], str)
assert_type(auditgap.load(Path("runs/smollm2")).store.rows(), pd.DataFrame)
audit = auditgap.audit("./tuned", base="./base", profile="smoke", out=Path("runs/tuned"))
assert_type(audit.verdicts, pd.DataFrame)
assert_type(audit.table("audit_gap"), pd.DataFrame)
assert_type(audit.parts["lvs"].table, pd.DataFrame)
"""

MISUSE = """
import auditgap

auditgap.lvs(3)
auditgap.load("runs/smollm2").rows.columns + auditgap.load
auditgap.audit("./tuned", base=3)
auditgap.evaluate("smollm2").tabel
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the checker has to say, (file, line, words) each, of a right and a wrong use of the
    package."""
    folder = tmp_path_factory.mktemp("types")
    (folder / "use.py").write_text(USE, encoding="utf-8")
    (folder / "misuse.py").write_text(MISUSE, encoding="utf-8")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "pyright"
    ]
    config = {**settings, "include": [str(folder)], "extraPaths": [str(ROOT)]}
    (folder / "pyrightconfig.json").write_text(json.dumps(config), encoding="utf-8")
    done = subprocess.run(
        [CHECKER, "--project", folder, "--pythonpath", sys.executable, "--outputjson"],
        capture_output=True,
        text=True,
        timeout=500,
    )
    found = json.loads(done.stdout)
    if found["summary"]["filesAnalyzed"] < 2:
        raise RuntimeError(done.stdout + done.stderr)
    return [
        (Path(d["file"]), d["range"]["start"]["line"] + 1, d["message"])
        for d in found["generalDiagnostics"]
    ]


def test_results_are_typed_as_a_user_sees_them(said):
    assert [found for found in said if found[0].name == "use.py"] == []


def test_a_wrong_use_is_found(said):
    assert {line for file, line, _ in said if file.name == "misuse.py"} == {4, 5, 6, 7}
