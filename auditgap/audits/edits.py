"""What an audit put into a model, kept a cell, and handed out as one safetensors file that any tool
opens.

    export_edits(RunFolder.load("runs/interventions"), Path("edits.safetensors"))
    # [D], fp32, norm 1
    safetensors.torch.load_file("edits.safetensors")["steering.direction.block_15"]

Names are `<intervention>.<what>.<site>`: `ablation.direction.embedding`,
`universal.universal_0.1.block_15`, `patching.delta.<prompt id>.block_15`; those of a latent audit
that kept its edits `targeted.0.03_rms.<prompt id>.block_15`, each [T, D]. The metadata name the
model, its fingerprint, the sites and the unit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from auditgap.errors import UsageError
from auditgap.store import RunFolder, files
from auditgap.types import Cell, Site

_STREAM = "fp32, in the residual stream's own units"
UNIT = f"{_STREAM}; strengths are fractions of `norm`, the mean L2 norm of a token at the site"


def site_name(layer_index: int) -> str:
    """`block_15` or `embedding`."""
    return Site.EMBEDDING_NAME if layer_index < 0 else f"block_{layer_index}"


def keep_edits(store: RunFolder, cell: Cell, edits: Mapping[str, np.ndarray]) -> None:
    """Write what a cell has learned or searched to DIR/edits/<key>.safetensors, where
    `export_edits` finds it. Raises DiskError."""
    path = store.edits(cell.key)
    with files.disk_errors(path):
        path.parent.mkdir(exist_ok=True)
    arrays = {name: np.ascontiguousarray(array) for name, array in edits.items()}
    files.write_bytes(path, safetensors.numpy.save(arrays))


def export_edits(store: RunFolder, out: Path, *, subject: str | None = None) -> list[str]:
    """Write what the run has put into one subject to `out`; returns the tensors' names.

    Raises UsageError: the folder of another audit, several subjects and none named, nothing
    finished, edits missing or torn.
    """
    config = store.run["config"]
    learned = config.get("audit") == "intervene"
    if not learned and not any(store.path.glob("edits/*.safetensors")):
        raise UsageError(
            f"{store.path} holds no directions or edits to export: they are kept by `auditgap"
            " intervene`, and by `auditgap lvs --keep-edits`."
        )
    if out.suffix != ".safetensors":
        raise UsageError(f"--out is a FILE.safetensors; {out.name!r} came.")
    known = {store.shown(typed): fingerprint for typed, fingerprint in config["subjects"].items()}
    if subject is None and len(known) > 1:
        raise UsageError(
            f"The run has {len(known)} subjects; name one: --subject {next(iter(known))}"
        )
    name = subject or next(iter(known))
    if name not in known:
        raise UsageError(f"The run has no subject {name!r}; it has {', '.join(known)}.")
    tensors: dict[str, np.ndarray] = {}
    described: dict[str, Any] = {}
    for record in store.iter_records():
        told = record["description"]
        if (
            told["subject"] != known[name]
            or told["site"] is None
            or not (learned or store.edits(record["key"]).is_file())
        ):
            continue
        if learned:
            first = told["settings"]["intervention"]
            described[first] = told["settings"]["asked_for"]
        else:
            first = f"{told['attack']}.{told['eps']:g}_{told['unit']}"
        for what, array in store.tensors(record["key"]).items():
            tensors[f"{first}.{what}.{site_name(told['site'])}"] = array
    if not tensors:
        raise UsageError(
            f"{store.path} has no finished cell of {name} with edits; run the same command again to"
            " finish it."
        )
    metadata = {
        "format": "pt",
        "made_by": "auditgap",
        "model": name,
        "fingerprint": known[name],
        "unit": UNIT if learned else _STREAM,
        "sites": ",".join(sorted({n.rpartition(".")[2] for n in tensors})),
        "interventions": json.dumps(described, sort_keys=True),
    }
    with files.disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(out, safetensors.numpy.save(tensors, metadata=metadata))
    return sorted(tensors)
