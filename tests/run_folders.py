"""Reach into a run folder as a disk, a hand or an earlier release would.

file_of(out, key)                 # the file that a cell stands in
lose(out, key)                    # as if it had never been done
remake(out, key, lambda cell: …)  # another cell in its place, whole by every checksum
age(out)                          # the folder as auditgap 0.1 would have written it
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from auditgap.store import RunFolder, files, tables
from auditgap.store.cellfile import StoredCell
from auditgap.store.cells import CellFiles


def known(folder: Path) -> CellFiles:
    cells = CellFiles(Path(folder))
    cells.refresh()
    return cells


def file_of(folder: Path, key: str) -> Path:
    return Path(folder) / "cells" / known(folder).entry(key).file


def texts_of(folder: Path, key: str) -> Path:
    return Path(folder) / "generations" / known(folder).open(key).texts


def lose(folder: Path, *keys: str) -> None:
    for key in keys:
        remake(folder, key, lambda _: None)


def remake(folder: Path, key: str, change: Callable[[StoredCell], StoredCell | None]) -> None:
    """Write the file of a cell anew, with what `change` makes of the cell, or without it."""
    cells = known(folder)
    old = cells.open(key)
    parts = [change(cells.cell(k)) if k == key else cells.cell(k) for k in old.records]
    files.remove(Path(folder) / "cells" / old.name)
    if old.texts is not None:
        files.remove(Path(folder) / "generations" / old.texts)
    cells = CellFiles(Path(folder))
    if left := [part for part in parts if part is not None]:
        cells.put(left)


def lose_all(folder: Path, attack: str) -> None:
    """Lose every cell of this attack."""
    found = RunFolder.load(folder).records()
    lose(folder, *(r["key"] for r in found if r["description"]["attack"] == attack))


def contents(folder: Path) -> dict[str, tuple[dict, dict]]:
    """Record and rows of every finished cell, whatever files they stand in."""
    store = RunFolder.load(folder)
    return {r["key"]: (r, store.cell_rows(r["key"]).to_dict("list")) for r in store.records()}


def states(folder: Path) -> dict[str, str]:
    return {key: entry.state for key, entry in known(folder).entries().items()}


def age(folder: Path) -> None:
    """Write the run as auditgap 0.1 did: a folder a cell, no checksum in any document."""
    folder = Path(folder)
    cells = known(folder)
    found = {key: cells.cell(key) for key in cells.entries()}
    for path in [*folder.glob("cells/*.parquet"), *folder.glob("generations/*.parquet")]:
        path.unlink()
    for key, cell in found.items():
        record = {k: v for k, v in cell.record.items() if k != "edits"} | {"schema": 1}
        place = folder / "cells" / key
        place.mkdir()
        if cell.texts is not None:
            data = tables.to_bytes(cell.texts)
            files.write_bytes(folder / "generations" / f"{key}.parquet", data, files.PRIVATE)
            record["generations"] = {"sha256": files.sha256(data), "n": len(cell.texts)}
        if cell.rows is not None:
            data = tables.to_bytes(cell.rows, compression="none")
            (place / "rows.parquet").write_bytes(data)
            record["sha256"] = files.sha256(data)
        (place / "record.json").write_bytes(files.to_json(record))
    for name in ("run.json", "plan.json"):
        if (folder / name).exists():
            document = json.loads((folder / name).read_text())
            del document[files.CHECKSUM]
            if name == "run.json":
                document["schema"] = 1
            (folder / name).write_bytes(files.to_json(document))


def edit_json(path: Path, change: Callable[[dict], dict]) -> None:
    """Change a sealed document and seal it again."""
    document = files.unseal(path)
    path.write_bytes(files.seal(change(document)))


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to
