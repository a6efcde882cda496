"""Refusals are no asserts: what is said to bad input, to judges' replies and to hostile folders
holds under `python -O`.

The tests of those cases run once more, in a process (and children) without asserts and with hash
seeds at random. pytest rewrites the asserts of tests themselves, so they still bite; the first test
makes sure of that.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import children
import warm

#: Of cases 29–48, the quick files. test_cli.py starts `python -O` for a whole run, security/ has
#: its own.
FILES = [
    "test_config.py",
    "judges/test_llm_parse.py",
    "judges/test_llm_fence.py",
    "judges/test_judge_table.py",
    "data/test_prompts.py",
    "data/test_ledger.py",
]


def pytest_without_asserts(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = children.environment(
        PYTHONOPTIMIZE="1", PYTHONHASHSEED="random", TOKENIZERS_PARALLELISM="false"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--durations=0",
        *arguments,
    ]
    return subprocess.run(
        command,
        env=warm.optimised(environment),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_asserts_of_tests_bite_without_asserts(tmp_path):
    (tmp_path / "test_canary.py").write_text(
        "def test_it():\n    assert not __debug__\n\ndef test_that():\n    assert 1 == 2\n"
    )
    done = pytest_without_asserts("test_canary.py", cwd=tmp_path)
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr


def test_bad_input_is_refused_without_asserts():
    done = pytest_without_asserts(
        "-x", *(f"tests/{name}" for name in FILES), cwd=children.TESTS.parent
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 300
