"""What pyproject.toml cannot say: the folders that it names under `[tool.auditgap] shipped` go into
the wheel, so that an installed package has the examples that its documentation names
(`auditgap examples`); and the package's description is README.md without the pictures and links
into the checkout, which lead nowhere on a package index."""

import re
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


#: A picture (with the line's end) or a link whose target is a file of the checkout.
PICTURE = re.compile(r"!\[[^]]*]\((?!https?:)[^)]*\)\n*")
LINK = re.compile(r"\[([^]]*)]\((?!https?:|#)[^)]*\)")

readme = (HERE / "README.md").read_text(encoding="utf-8")
setup(
    cmdclass={"build_py": WithExamples},
    long_description=LINK.sub(r"\1", PICTURE.sub("", readme)),
    long_description_content_type="text/markdown",
)
