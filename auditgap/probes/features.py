"""What a probe reads of a conversation: the mean activation of every block, [L, D], extracted once
and kept on disk.

    talks = [loaded.chat.converse(t.prompt, t.unsafe) for t in triples]
    # [n, L, D]; read back the next time
    features = cached_features(loaded, talks, folder=Path("features"))

Pooled while the model runs (`probes.pooling`), so no block's [B, T, D] is kept. Files are
safetensors named by a hash of the model's fingerprint, every token id and the dtype:
`features-<key>-<rank>-of-<world>.safetensors` holds rows rank, rank + world, …
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from auditgap.engines.batching import packs, right_pad
from auditgap.engines.fitting import halving
from auditgap.errors import AuditgapError, UsageError
from auditgap.models import Conversation, LoadedModel
from auditgap.probes.pooling import pooled
from auditgap.store import files
from auditgap.types import digest

STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Shard = tuple[int, int]


def shard_rows(n: int, shard: Shard) -> range:
    """The rows of rank r of w: r, r + w, r + 2w, …"""
    rank, world = shard
    if not 0 <= rank < world:
        raise UsageError(f"A shard is (rank, world) with 0 ≤ rank < world; {shard} came.")
    return range(rank, n, world)


@torch.no_grad()
def extract(
    loaded: LoadedModel,
    conversations: Sequence[Conversation],
    *,
    batch_tokens: int | None = None,
    shard: Shard = (0, 1),
    tick: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Pooled activations [n, L, D], fp32 on the CPU, of this shard's conversations, in their order.

    For each block the mean over all real positions, prompt, template and response alike (arXiv
    2606.08044, section 4). Rows of like length run together, padded on the right, where a causal
    model cannot see; a pack that does not fit in memory is halved. `tick(rows)` is called after
    each pack. Raises AuditgapError when a single row does not fit in memory, UsageError when one is
    longer than the model reads.
    """
    mine = [conversations[i] for i in shard_rows(len(conversations), shard)]
    longest, window = max((len(c.ids) for c in mine), default=0), loaded.max_positions
    if window is not None and longest > window:
        raise UsageError(
            f"A conversation of {longest} tokens came; {loaded.subject.name} reads {window}. Type"
            f" --max-tokens {window}."
        )
    out = torch.empty(len(mine), loaded.n_blocks, loaded.width)
    pad = loaded.tokenizer.pad_token_id
    if pad is None or pad >= loaded.model.get_input_embeddings().num_embeddings:
        pad = 0

    def run(rows: Sequence[int]) -> list[torch.Tensor]:
        ids, mask = right_pad([mine[i].ids for i in rows], pad, loaded.device)
        with pooled(loaded.blocks, mask) as pool:
            whole = bool(mask.all())  # rows of equal length need no mask, and run faster without
            loaded.model(
                input_ids=ids,
                attention_mask=None if whole else mask,
                use_cache=False,
                logits_to_keep=1,
            )
        return list(pool.value().cpu())

    budget = batch_tokens or (2048 if loaded.device.type == "cpu" else 16384)
    training = loaded.model.training
    loaded.model.eval()
    try:
        for pack in packs([len(c.ids) for c in mine], batch_tokens=budget, pad_tolerance=0.06):
            for row, value in zip(pack, halving(run, pack), strict=True):
                out[row] = value
            if tick is not None:
                tick(len(pack))
    finally:
        loaded.model.train(training)
    return out


def features_key(loaded: LoadedModel, conversations: Sequence[Conversation], dtype: str) -> str:
    """The hash that names these features: model (its fingerprint and the dtype it runs in), token
    ids, stored dtype."""
    ids = files.sha256(repr([c.ids for c in conversations]).encode())
    return digest([loaded.subject.fingerprint, str(loaded.dtype), ids, dtype])


def cached_features(
    loaded: LoadedModel,
    conversations: Sequence[Conversation],
    *,
    folder: Path,
    dtype: str = "float32",
    shard: Shard = (0, 1),
    batch_tokens: int | None = None,
    tick: Callable[[int], None] | None = None,
    patience: float = 3600.0,
    running: AbstractContextManager[None] | None = None,
) -> torch.Tensor:
    """All conversations' features [n, L, D] in `dtype` (float32 or bfloat16), from `folder` where
    they are, else extracted.

    `running` is open while the model runs (where ranks have a part of it each). With `shard` (rank,
    world) each rank extracts its own rows into its own file, then reads
    everybody's; the ranks need one folder that all of them see. A whole set that another number of
    ranks left serves too. A file that is truncated or does not have its checksum is set aside as
    *.corrupt and made again. One rank alone gets its file memory-mapped. Raises AuditgapError when
    another rank's file does not come within `patience` seconds, UsageError for another dtype.
    """
    if dtype not in STORED:
        raise UsageError(f"Features are stored as {' or '.join(STORED)}; {dtype!r} came.")
    folder, n = Path(folder), len(conversations)
    key = features_key(loaded, conversations, dtype)
    with files.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    shape = (loaded.n_blocks, loaded.width)
    whole = _joined(folder, key, n, shape, STORED[dtype])
    if whole is not None:
        if tick is not None:
            tick(len(shard_rows(n, shard)))
        return whole
    mine = _path(folder, key, shard)
    with running or nullcontext():
        if _read(mine, (len(shard_rows(n, shard)), *shape), STORED[dtype]) is None:
            if mine.exists():
                files.set_aside(mine)
            found = extract(
                loaded, conversations, batch_tokens=batch_tokens, shard=shard, tick=tick
            ).to(STORED[dtype])
            # activations say what was read: as private as the text
            files.write_bytes(
                mine,
                safetensors.torch.save({"features": found}, {"sha256": _checksum(found)}),
                files.PRIVATE,
            )
    # Files are waited for and not a barrier: a collective would time out where one rank had its
    # file and another had not.
    deadline = time.monotonic() + patience
    while (
        absent := [r for r in range(shard[1]) if not _path(folder, key, (r, shard[1])).is_file()]
    ) and shard[1] > 1:
        if time.monotonic() > deadline:
            raise AuditgapError(
                f"Rank {absent[0]} of {shard[1]} left no features in {folder} within {patience:.0f}"
                " s. Give a folder that every rank sees, or look for that rank's own error."
            )
        time.sleep(0.2)
    whole = _joined(folder, key, n, shape, STORED[dtype])
    if whole is None:
        raise AuditgapError(
            f"A features file in {folder} is torn. Run the same command again: what is whole is"
            " kept."
        )
    return whole


def _path(folder: Path, key: str, shard: Shard) -> Path:
    return folder / f"features-{key}-{shard[0]}-of-{shard[1]}.safetensors"


def _joined(
    folder: Path, key: str, n: int, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor | None:
    """All rows from the first whole set of shards there is, of whatever number; None when none is
    whole."""
    for world in sorted(
        {int(p.stem.rsplit("-", 1)[1]) for p in folder.glob(f"features-{key}-0-of-*.safetensors")}
    ):
        parts = []
        for rank in range(world):
            part = _read(
                _path(folder, key, (rank, world)),
                (len(shard_rows(n, (rank, world))), *shape),
                dtype,
            )
            if part is None:
                break
            parts.append(part)
        if len(parts) < world:
            continue
        if world == 1:
            return parts[0]
        out = torch.empty(n, *shape, dtype=dtype)
        for rank, part in enumerate(parts):
            out[rank::world] = part
        return out
    return None


def _read(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
    """The file's features, memory-mapped; None when it is absent, truncated, or not what it says it
    is."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = file.get_tensor("features")
            stored = (file.metadata() or {}).get("sha256")
    except (safetensors.SafetensorError, OSError):
        return None
    whole = tuple(found.shape) == shape and found.dtype == dtype and _checksum(found) == stored
    return found if whole else None


def _checksum(features: torch.Tensor) -> str:
    raw = (
        features.contiguous().flatten().view(torch.uint8)
        if features.numel()
        else torch.empty(0, dtype=torch.uint8)
    )
    return files.sha256(raw.numpy().data)  # hashed where it lies: no copy
