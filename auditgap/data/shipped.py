"""What the documentation names by its path and is no part of the package: examples, DeepSpeed's
configs, launchers. A wheel carries them; a checkout has them beside the package.

    [example.path for example in listed()]       # ['examples/demo', 'examples/emergent', …]
    copy("examples/emergent", Path.cwd())        # ./examples/emergent, as the docs name it
"""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from auditgap.errors import UsageError, did_you_mean

#: Where a wheel has them; setup.py puts them there.
INSIDE = Path(__file__).parents[1] / "shipped"
_CHECKOUT = INSIDE.parents[1]


@dataclass(frozen=True, slots=True)
class Example:
    """A file or folder by the path that the documentation names, and its first sentence."""

    path: str
    what: str


def listed() -> list[Example]:
    """Everything that can be copied, in the order of its names."""
    root, folders = _root()
    paths = [p for folder in folders for p in sorted((root / folder).iterdir())]
    return [
        Example(path.relative_to(root).as_posix(), _first_words(path))
        for path in paths
        if not path.name.startswith((".", "_"))
    ]


def copy(name: str, to: Path) -> list[Path]:
    """Copy an example below `to`, at its own path; the files written. A file that is there already
    and differs is kept.

    Raises UsageError for an unknown name and where a file would be overwritten.
    """
    known = [example.path for example in listed()]
    path = name.rstrip("/")
    if path not in known:
        path = next((p for p in known if Path(p).name == path), path)
    if path not in known:
        raise UsageError(
            f"There is no example {name!r}.{did_you_mean(name, known)} All: auditgap examples"
        )
    source = _root()[0] / path
    written = []
    for file in _files(source):
        target = to / path / file.relative_to(source) if source.is_dir() else to / path
        if target.exists():
            if target.read_bytes() != file.read_bytes():
                raise UsageError(f"{target} is there and differs; move it away, then copy again.")
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        written.append(target)
    return written


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for one in sorted(path.rglob("*")):
        if one.is_file() and "__pycache__" not in one.parts:
            yield one


def _root() -> tuple[Path, list[str]]:
    """Where they lie, and the folders that are carried. Raises UsageError where neither is so."""
    if INSIDE.is_dir():
        return INSIDE, sorted(path.name for path in INSIDE.iterdir())
    project = _CHECKOUT / "pyproject.toml"
    if not project.is_file():
        raise UsageError(
            "This installation carries no examples; install the wheel of auditgap again."
        )
    told = tomllib.loads(project.read_text(encoding="utf-8"))
    return _CHECKOUT, sorted(told["tool"]["auditgap"]["shipped"])


def _first_words(path: Path) -> str:
    """The first sentence of a file, or of a folder's README or first script."""
    if path.is_dir():
        inner = [*path.glob("README.md"), *sorted(path.glob("*.py")), *sorted(path.glob("*.y*ml"))]
        return _first_words(inner[0]) if inner else ""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        zero = json.loads(text).get("zero_optimization", {})
        more = ", offloaded to the CPU" if any("offload" in key for key in zero) else ""
        return f"DeepSpeed with ZeRO stage {zero.get('stage')}{more}"
    if path.suffix == ".ipynb":
        text = "".join(json.loads(text)["cells"][0]["source"])
    first: list[str] = []
    for line in text.splitlines():
        words = line.lstrip("#\"' ").rstrip("\"' ")
        if words and not line.startswith(("#!", "#SBATCH", "from ", "import ")):
            first.append(words)
        elif first:
            break
        if first and (line.startswith("# ") and path.suffix in (".md", ".ipynb")):
            break
    return re.split(r"(?<=\.)\s", " ".join(first), maxsplit=1)[0].rstrip(".:")
