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
    cells/<checksum>.parquet rows of a group's cells, in its footer their records; a cell of a group at work has a small one alone
    generations/<checksum>.parquet   prompts and completions of the same cells; folder 0700, files 0600
    scratch/<name>.safetensors  work inside a cell that a kill must not lose; deleted when the cell is written
    edits/<key>.safetensors  what was put into the subject, where the audit keeps it
    *.corrupt                damaged things, set aside and done again

A file of cells is named by the checksum of its bytes and names that of its texts; a cell's key is
the checksum of its description; run.json and plan.json carry their own. Every reader checks what it
reads: what was changed or torn is a sentence, and never another number. How files of cells come and
go: `auditgap.store.cells`. Folders of auditgap 0.1 and 0.2, which had a folder a cell, are read and
resumed (`auditgap.store.legacy`).

A place is a path or a URL of object storage (s3://bucket/runs/llama, by way of a working copy:
`auditgap.store.remote`). A kill at any moment leaves finished cells finished; the same command
again does the rest. Nothing here is pickled.
"""

from auditgap.store.files import DiskError
from auditgap.store.folder import RunFolder
from auditgap.store.merge import merge, merge_grids
from auditgap.store.session import SCHEMA
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
