"""What pyproject.toml cannot say: the folders that it names under `[tool.auditgap] shipped` go into
the wheel, so that an installed package has the examples that its documentation names
(`auditgap examples`)."""

import shutil
import tomllib
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


class WithExamples(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        told = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))
        for folder in told["tool"]["auditgap"]["shipped"]:
            shutil.copytree(
                HERE / folder,
                Path(self.build_lib) / "auditgap" / "shipped" / folder,
                ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "runs"),
                dirs_exist_ok=True,
            )


setup(cmdclass={"build_py": WithExamples})
