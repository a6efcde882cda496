"""Honest runs of many shapes, put through `verify`: none may be accused.

    make honest                # 200 shapes
    make honest SHAPES=50      # the first fifty

A shape is drawn from its number: on how many machines its cells were made, in which order and in how
many sittings, or by the actors of a Ray cluster, whether their files were joined, where the folder
was moved to, how another machine writes numbers, which of its files were handed over.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path

import signed_run
from signed_run import Signed, typed

from auditgap.audits.latent.audit import LATENT
from auditgap.evidence import cells
from auditgap.store import RunFolder, files, merge
from auditgap.sweep import Group
from auditgap.sweep import ray as sweep_ray
from auditgap.types import Prompt

#: How other machines write a number; the shortest still tells 1e-9 of it apart.
NUMBERS: tuple[Callable[[float], str], ...] = (
    repr,
    "{:.16e}".format,
    "{:.17g}".format,
    "{:.12g}".format,
    "{:+.15f}".format,
)
#: What need not be handed over with a run.
SPARE = ("report.html", "report.json", "lvs.parquet", "lvs.md", "lvs.csv", "SHA256SUMS", "figures")


def shaped(number: int, signed: Signed, to: Path) -> Signed:
    """The run of `signed` once more, in the shape of this number, attested; below `to`."""
    draw = random.Random(number)
    if is_on_ray(number):
        run = on_ray(signed, to)
    else:
        run = made(draw, signed, to) if draw.random() < 0.5 else signed.copied(to / "copy")
    for change in draw.sample(
        (resumed, moved, settled, rewritten, handed_over), draw.randint(1, 4)
    ):
        run = change(draw, run, to)
    return run


def is_on_ray(number: int) -> bool:
    return number % 8 == 3


def made(draw: random.Random, signed: Signed, to: Path) -> Signed:
    """Anew, on one to three machines, each in one sitting or two."""
    n = draw.randint(1, 3)
    owner = [draw.randrange(n) for _ in range(1000)]
    parts = []
    for machine in range(n):
        part = to / f"machine{machine}"
        first = draw.random() < 0.5
        for sitting in (0, 1) if first else (1,):
            signed_run.run(
                signed.config,
                part,
                keep=lambda i, m=machine, s=sitting: owner[i] == m and (s == 1 or i % 2 == 0),
                settled=draw.random() < 0.5,
            )
        parts.append(part)
    draw.shuffle(parts)
    store = merge(parts, to / "whole") if n > 1 else RunFolder.load(parts[0])
    LATENT.reduce(store)
    out = Path(store.place)
    assert typed("attest", out, "--plan", signed.plan, "--key", signed.key) == 0
    return replace(signed.copied(to / "copy"), out=out)


class Writer:
    """Writes a group's cells as a worker on Ray does, each as soon as it has it."""

    def __init__(
        self, store: RunFolder, numbers: dict[str, int], prompts: Sequence[Prompt]
    ) -> None:
        self.store, self.numbers, self.prompts = store, numbers, prompts

    def run(self, group: Group, tick: Callable[[float], None]) -> None:
        for cell in group.cells:
            signed_run.write(self.store, cell, self.prompts, self.numbers[cell.key])
            tick(1.0)


@contextmanager
def actors() -> Iterator[None]:
    """One cluster for every shape that is made on it; its workers find the modules that this
    process has found."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    try:
        with sweep_ray.cluster(cpus=2):
            yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def on_ray(signed: Signed, to: Path) -> Signed:
    """Anew, by two actors of a real cluster (`actors`, where it is open), which write into one
    folder at once."""
    asked, options = LATENT.read(signed.config, {})
    planned = LATENT.prepare(asked, options)
    store = LATENT.open(planned, options, to / "on-ray")
    numbers = {cell.key: i for i, cell in enumerate(planned.cells)}
    prompts = planned.prompts
    with store.lock():
        store.plan(planned.cells)
        for groups in planned.passes:
            done = sweep_ray.run(groups, partial(Writer, store, numbers, prompts), store, workers=2)
            assert not done.failed
    LATENT.reduce(store)
    assert typed("attest", store.path, "--plan", signed.plan, "--key", signed.key) == 0
    return replace(signed.copied(to / "copy"), out=store.path)


def resumed(draw: random.Random, run: Signed, to: Path) -> Signed:
    """The same command once more, which finds nothing to do."""
    config, options = LATENT.read(run.config, {})
    LATENT.open(LATENT.prepare(config, options), options, run.out)
    return run


def moved(draw: random.Random, run: Signed, to: Path) -> Signed:
    """Under another name, by moving or by copying."""
    new = to / draw.choice(("elsewhere", "a name with spaces", "日本", "x" * 100))
    (shutil.move if draw.random() < 0.5 else shutil.copytree)(run.out, new)
    return replace(run, out=new)


def settled(draw: random.Random, run: Signed, to: Path) -> Signed:
    """The cells' files joined, as at the end of a group."""
    store = RunFolder.load(run.out)
    with store.lock():
        store.settle(draw.sample(sorted(store.keys()), draw.randint(1, len(store.keys()))))
    return run


def rewritten(draw: random.Random, run: Signed, to: Path) -> Signed:
    """Numbers, spaces and line ends as another machine writes them."""
    for name in ("run.json", "plan.json", "report.json", str(cells.LEAVES)):
        if (run.out / name).is_file():
            document = files.unseal(run.out / name)
            sealed = files.seal(document, indent=draw.choice((None, 1, 4)))
            (run.out / name).write_bytes(sealed)
    written, end = draw.choice(NUMBERS), draw.choice(("\n", "\r\n"))
    csv = run.out / "lvs.csv"
    if csv.is_file():
        lines = [
            line if i == 0 else ",".join(_rewritten(word, written) for word in line.split(","))
            for i, line in enumerate(csv.read_text("utf-8").splitlines())
        ]
        csv.write_bytes((end.join(lines) + end).encode())
    return run


def _rewritten(word: str, written: Callable[[float], str]) -> str:
    try:
        return written(float(word))
    except ValueError:
        return word


def handed_over(draw: random.Random, run: Signed, to: Path) -> Signed:
    """Without some of what the cells come to again."""
    for name in draw.sample(SPARE, draw.randint(1, len(SPARE))):
        path = run.out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return run


def main(n: int) -> int:
    accused = 0
    with tempfile.TemporaryDirectory() as folder, actors():
        signed = signed_run.make(Path(folder) / "signed")
        for number in range(n):
            to = Path(folder) / str(number)
            to.mkdir()
            with redirect_stdout(StringIO()):  # what the commands say
                found = shaped(number, signed, to).findings()
            if found:
                accused += 1
                print(f"shape {number}: {found[0]}")
            shutil.rmtree(to)
    print(f"{n} honest runs, {accused} accused")
    return int(accused > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200))
