"""The run folder: every number that an audit finds, on disk the moment it is found, beside the
description that made it.

    store = RunFolder.open("out", config={"steps": 10}, info={"versions": {"torch": "2.13.0"}})
    with store.lock():                                    # one writer
        store.plan(cells)
        for cell in cells:
            # content and checksum decide, never a clock
            if not store.is_finished(cell.key):
                store.write(cell, rows, generations=texts, seconds=12.5)
    table = RunFolder.load("out").rows(attacks=["targeted"])

On disk:

    run.json                 config (what affects numbers), info, one entry a session
    plan.json                the cells that were planned
    cells/<key>/             rows.parquet and record.json, renamed into place together; record.json alone: the cell failed
    generations/<key>.parquet   prompts and completions; folder 0700, files 0600
    scratch/<name>.safetensors  work inside a cell that a kill must not lose; deleted when the cell is written
    index/*.parquet          of a large run: rows of many cells in one file, for the next reader; a cache, to be deleted at will
    *.corrupt                torn things, set aside and done again

A place is a path or a URL of object storage (s3://bucket/runs/llama, by way of a working copy:
`auditgap.store.remote`). A kill at any moment leaves finished cells finished; the same command
again does the rest. Nothing here is pickled.
"""

from auditgap.store.files import DiskError
from auditgap.store.folder import SCHEMA, RunFolder
from auditgap.store.merge import merge, merge_grids
from auditgap.store.status import RunStatus, cases_of, grid_status
from auditgap.store.tables import schema_of

__all__ = [
    "SCHEMA",
    "DiskError",
    "RunFolder",
    "RunStatus",
    "cases_of",
    "grid_status",
    "merge",
    "merge_grids",
    "schema_of",
]
