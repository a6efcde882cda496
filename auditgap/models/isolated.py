"""How a child is started that runs a stranger's program: a chat template, a pattern.

subprocess.run(**isolated(program, "3.0", "1073741824"), input=question)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TypedDict


class Start(TypedDict):
    """Of `subprocess.Popen`."""

    args: list[str]
    env: dict[str, str]


def isolated(program: Path, *bounds: str, **variables: str) -> Start:
    """The program with its bounds and our `sys.path` as arguments, without site: no code of the
    user's start-up files runs, and a start takes a tenth of a second. No secret is in its
    environment; `variables` are added to it."""
    return {
        "args": [
            sys.executable,
            "-I",
            "-S",
            str(program),
            *bounds,
            *(path or os.getcwd() for path in sys.path),
        ],
        "env": {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"} | variables,
    }
