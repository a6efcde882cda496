"""One byte of a finished run changed, again and again: does every reader notice?

    make fuzz                             # 2,000 changes; FLIPS=200 SEED=3: these
    python tests/fuzz.py 200 3

A change is held when every reader gives what it gave before, or refuses with a sentence, or the run
says that it is not whole (`status`, and with it exit 3). It is silent when a reader gives something
else and nothing is said: then a number may be another. The changes are of every kind of file that a
reader opens, at its head, in the middle and at its end, of four classes: a bit, a byte, a digit for
a digit and a letter for a letter, so that text stays text. Files for people (.csv, .md, .html) have
no reader; `auditgap verify` checks those.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from toy_runs import write_toy_run

from auditgap.audits import bundle, reduce
from auditgap.audits.table import audit_of
from auditgap.cli.show import document
from auditgap.errors import AuditgapError
from auditgap.report.verdict_lines import Criteria
from auditgap.store import RunFolder, files
from auditgap.types import canonical

#: Of a folder's files those that a reader opens, by their kind.
READ = ("run.json", "plan.json", "report.json", "*.parquet", "cells/*", "generations/*", "edits/*")
CLASSES = ("bit", "byte", "digit", "letter")


def finished_run(folder: Path) -> Path:
    """A whole run with edits, tables and a report, made up without a model."""
    some = {"sites": (0, 15), "eps": (0.03,), "n": 6, "unscored": 1}
    store = write_toy_run(folder, config={"audit": "latent"}, **some)
    edited = [cell["key"] for cell in store.planned() if "targeted" in cell["cell"]]
    (folder / "edits").mkdir()
    for n, key in enumerate(edited):
        arrays = {"delta": np.full((2, 8), 0.5 + n, np.float32)}
        store.edits(key).write_bytes(safetensors.numpy.save(arrays))
    store = _with_edits(folder, edited)
    with store.lock():
        store.settle(store.keys())
    reduce(store)
    bundle.write([store], out=folder, criteria=Criteria(), title="A made-up run")
    return folder


def _with_edits(folder: Path, keys: list[str]) -> RunFolder:
    """The run with the checksums of the edits in the records of their cells."""
    import run_folders

    for key in keys:
        data = (folder / "edits" / f"{key}.safetensors").read_bytes()

        def named(cell, data=data):
            record = {**cell.record, "edits": files.sha256(data)}
            return type(cell)(record, cell.rows, cell.texts)

        run_folders.remake(folder, key, named)
    return RunFolder.load(folder)


def readings(folder: Path) -> Mapping[str, Callable[[], str]]:
    """Everything that reads a run, by name; what it gives is one text."""

    def store() -> RunFolder:
        return RunFolder.load(folder)

    def rows() -> str:
        return store().rows().to_json(double_precision=15)

    def texts() -> str:
        run = store()
        keys = [record["key"] for record in run.records() if record["generations"]]
        return "".join(run.generations(key).to_json() for key in keys)

    def edits() -> str:
        run = store()
        arrays = (run.tensors(r["key"]) for r in run.records() if r["edits"])
        return "".join(str({k: a.tolist() for k, a in found.items()}) for found in arrays)

    def shown() -> str:
        run = store()
        return files.to_json(document(audit_of(run), run, {})).decode("ascii")

    def report() -> str:
        return canonical(files.unseal(folder / "report.json", required=False))

    def run() -> str:
        found = store()
        return canonical([found.run, found.info, found.planned(), found.records()])

    return {
        "run": run,
        "rows": rows,
        "texts": texts,
        "edits": edits,
        "tables": shown,
        "report": report,
    }


def given(folder: Path) -> tuple[dict[str, str], bool]:
    """What each reader gives ("!" and a sentence: it refuses), and whether the run says that it is
    whole."""
    found = {}
    for name, read in readings(folder).items():
        try:
            found[name] = read()
        except AuditgapError as error:
            found[name] = f"!{error}"
    try:
        status = RunFolder.load(folder).status()
        whole = status.finished >= status.planned and not status.corrupt
    except AuditgapError:
        whole = False
    return found, whole


@dataclass(frozen=True)
class Flip:
    """One byte of a file, and what stands there instead."""

    path: Path
    at: int
    byte: int
    kind: str

    def __str__(self) -> str:
        return f"{self.path.parent.name}/{self.path.name[:24]} byte {self.at}, a {self.kind}"


def flips(folder: Path, n: int, seed: int) -> Iterator[Flip]:
    """`n` changes, the same for a seed: every kind of file in turn, then a file of it, a third of
    the file, a class of change, and the place."""
    draw = random.Random(seed)
    found = [sorted(p for p in folder.glob(kind) if p.is_file()) for kind in READ]
    data = {path: path.read_bytes() for some in found for path in some}
    for number in range(n):
        path = draw.choice(found[number % len(found)])
        third, kind = (number // len(found)) % 3, CLASSES[number // len(found) // 3 % len(CLASSES)]
        size = len(data[path])
        at = draw.randrange(size * third // 3, max(size * third // 3 + 1, size * (third + 1) // 3))
        at, byte = _changed(data[path], at, kind, draw)
        yield Flip(path, at, byte, kind)


def _changed(data: bytes, at: int, kind: str, draw: random.Random) -> tuple[int, int]:
    """The place, and another byte of that class for it; the next place that has one of the class."""
    wanted = {"digit": b"0123456789", "letter": b"abcdefghijklmnopqrstuvwxyz"}.get(kind)
    if wanted is not None:
        near = next((i for i in range(at, len(data)) if data[i] in wanted), None)
        if near is not None:
            return near, draw.choice([b for b in wanted if b != data[near]])
    if kind == "byte":
        return at, draw.choice([b for b in range(256) if b != data[at]])
    return at, data[at] ^ (1 << draw.randrange(8))


@dataclass(frozen=True)
class Outcome:
    """What became of the changes."""

    said: Counter[str]  #: held without a word, refused, not whole
    silent: list[str]
    crashed: list[str]

    def __str__(self) -> str:
        n = self.said.total() + len(self.silent) + len(self.crashed)
        counts = ", ".join(f"{count} {what}" for what, count in sorted(self.said.items()))
        return f"{n} changes: {counts}; {len(self.silent)} silent, {len(self.crashed)} tracebacks"


def fuzz(folder: Path, n: int, seed: int = 0) -> Outcome:
    """Change and read `n` times; the folder is afterwards as it was."""
    before, whole = given(folder)
    if not whole or any(text.startswith("!") for text in before.values()):
        raise SystemExit(f"the run to be changed is not whole: {before}")
    outcome = Outcome(Counter(), [], [])
    for flip in flips(folder, n, seed):
        data = flip.path.read_bytes()
        flip.path.write_bytes(data[: flip.at] + bytes([flip.byte]) + data[flip.at + 1 :])
        try:
            after, whole = given(folder)
        except Exception as error:
            outcome.crashed.append(f"{flip}: {type(error).__name__}: {error}")
        else:
            differs = [k for k, text in after.items() if text != before[k] and text[:1] != "!"]
            refused = [k for k, text in after.items() if text.startswith("!")]
            if whole and differs:
                outcome.silent.append(f"{flip}: {', '.join(differs)} read otherwise")
            else:
                how = "refused" if refused else "unchanged" if whole else "not whole"
                outcome.said[how] += 1
        finally:
            flip.path.write_bytes(data)
    return outcome


def main(words: list[str]) -> int:
    n, seed = (*map(int, words), *(2000, 0)[len(words) :])[:2]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        outcome = fuzz(finished_run(Path(place) / "run"), n, seed)
    for line in (*outcome.silent, *outcome.crashed):
        print(line)
    print(outcome)
    return int(bool(outcome.silent or outcome.crashed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
