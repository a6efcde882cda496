"""Cells of run folders that auditgap 0.1 wrote: a folder a cell. Read for one release, never
written.

    cells/<key>/record.json, rows.parquet        generations/<key>.parquet

They count like the cells of any file (`auditgap.store.cellfile`), and stay where they are when a
run goes on.
"""

from __future__ import annotations

import os
from pathlib import Path

from auditgap.store import files
from auditgap.store.cellfile import ENDING, STATES, About, CellFile
from auditgap.store.files import Damaged
from auditgap.types import canonical, digest


def read(folder: Path | str, key: str, *, known: bool = False) -> CellFile:
    """The folder of one cell as a file of one cell; `known` makes no difference. Raises Damaged,
    FileNotFoundError."""
    path = f"{folder}/{key}"
    record = files.read_json(f"{path}/record.json")
    if not isinstance(record, dict) or record.get("status") not in STATES:
        if not os.path.exists(path):
            raise FileNotFoundError(path)
        raise Damaged(path, "its record.json is missing or torn")
    if not record.get("key") == key == digest(record.get("description")):
        raise Damaged(path, "its record.json describes another cell")
    data = b""
    if record["status"] == "done":
        try:
            data = files.read(f"{path}/rows.parquet")
        except OSError:
            raise Damaged(path, "its rows.parquet is missing") from None
        if files.sha256(data) != record.get("sha256"):
            raise Damaged(path, "its rows.parquet does not have the checksum of its record")
    texts = record.get("generations")
    record = {**record, "description": canonical(record["description"]).encode("ascii")}
    if not texts:
        return CellFile(key, data, lambda: About({key: record}, None, None))
    about = About({key: record}, f"{key}{ENDING}", texts["sha256"])
    return CellFile(key, data, lambda: about)
