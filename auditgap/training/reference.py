"""The frozen reference, run once: its final hidden states of every row, on disk, and its head in
memory.

    cache = HiddenCache.build(loaded, talks, folder=store / "reference", device="cuda:0")
    # [2, 96, D], padded with zeros
    batch["ref_hidden"] = cache.batch([4, 17], length=96)

The KL term compares the model in training with its own base at every position. The base does not
change, so its final hidden states are computed once before the training (every rank its share of
the rows) and projected chunk by chunk later; a second model in memory is never needed. Prompts
cannot be read off these files, but answers may be, so they are as private as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import torch
from safetensors import safe_open

from auditgap.engines.batching import in_packs, packs, right_pad
from auditgap.errors import AuditgapError
from auditgap.models import Conversation, LoadedModel
from auditgap.models.kept import is_whole, keep
from auditgap.store import files
from auditgap.training import ranks
from auditgap.training.lending import together
from auditgap.types import digest

#: Of a file; at 512 tokens of an 8B model about a gigabyte.
_ROWS_A_PART = 256
#: Tokens that run together, of the hidden states here and of what a monitor is fitted on.
BATCH_TOKENS = 4096


class HiddenCache:
    """Final hidden states [T, D] of rows by number, in the base's dtype, read from disk as they are
    asked for."""

    def __init__(self, parts: Sequence[Path]) -> None:
        self._files = [safe_open(part, framework="pt") for part in parts]
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 - not a dict

    def __len__(self) -> int:
        return len(self._where)

    def row(self, index: int) -> torch.Tensor:
        return self._where[str(index)].get_tensor(str(index))

    def batch(
        self, rows: Sequence[int], length: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """[B, `length`, D] of these rows, zeros where a row has ended."""
        found = [self.row(i) for i in rows]
        out = torch.zeros(len(found), length, found[0].shape[1], dtype=found[0].dtype)
        for b, hidden in enumerate(found):
            out[b, : len(hidden)] = hidden
        return out.to(device)

    @overload
    @classmethod
    def build(
        cls,
        loaded: LoadedModel,
        talks: Sequence[Conversation],
        *,
        folder: Path,
        fingerprint: str,
        dtype: str,
    ) -> HiddenCache: ...
    @overload
    @classmethod
    def build(
        cls,
        loaded: None,
        talks: Sequence[Conversation],
        *,
        folder: Path,
        fingerprint: str,
        dtype: str,
    ) -> HiddenCache | None: ...
    @classmethod
    def build(
        cls,
        loaded: LoadedModel | None,
        talks: Sequence[Conversation],
        *,
        folder: Path,
        fingerprint: str,
        dtype: str,
    ) -> HiddenCache | None:
        """What is in `folder` for this base and these rows, computed first where it is missing (by
        all ranks together).

        With `loaded` None nothing is computed: None when something is missing, so that the caller
        can load the base.
        """
        key = digest([fingerprint, dtype, [list(talk.ids) for talk in talks]])
        parts = ranks.decided(lambda: _whole(folder, key))
        if parts:
            return cls(parts)
        if loaded is None:
            return None
        ranks.only_main(
            lambda: folder.mkdir(parents=True, exist_ok=True, mode=files.PRIVATE_FOLDER)
        )
        mine = list(range(ranks.rank(), len(talks), ranks.world()))
        portions = [mine[at : at + _ROWS_A_PART] for at in range(0, len(mine), _ROWS_A_PART)] or [
            []
        ]
        of = f"{len(portions)}-{ranks.rank()}-of-{ranks.world()}"
        # part by part, so that neither memory nor a kill takes more than one
        with together(loaded.model):
            for number, rows in enumerate(portions):
                part = folder / f"{key}-{number}-of-{of}.safetensors"
                if not _opens(part):
                    found = final_hidden(loaded, [talks[i] for i in rows])
                    keep(part, {str(i): h.contiguous() for i, h in zip(rows, found, strict=True)})
        ranks.wait()
        parts = ranks.decided(lambda: _whole(folder, key))
        if not parts:
            raise ranks.shared(
                AuditgapError(
                    f"Not every rank's part of the reference is in {folder}; ranks need one folder"
                    " that all of them see."
                )
            )
        return cls(parts)


def _whole(folder: Path, key: str) -> list[Path]:
    """The parts of one complete set, whatever number of ranks wrote it; [] when there is none."""
    found: dict[int, dict[int, tuple[int, list[Path]]]] = {}
    for path in sorted(folder.glob(f"{key}-*.safetensors")):
        _, of, rank, world = _numbers(path)
        if _opens(path):
            found.setdefault(world, {}).setdefault(rank, (of, []))[1].append(path)
    for world, by_rank in sorted(found.items()):
        if len(by_rank) == world and all(len(parts) == of for of, parts in by_rank.values()):
            return [part for _, parts in by_rank.values() for part in parts]
    return []


def _numbers(path: Path) -> tuple[int, int, int, int]:
    """(part, parts, rank, ranks) of a part's name."""
    part, parts, rank, world = path.stem.replace("-of-", "-").split("-")[1:]
    return int(part), int(parts), int(rank), int(world)


def _opens(path: Path) -> bool:
    """Whether it is there and whole; a torn one is deleted, to be made again."""
    if is_whole(path):
        return True
    path.unlink(missing_ok=True)
    return False


@torch.no_grad()
def final_hidden(
    loaded: LoadedModel, talks: Sequence[Conversation], *, batch_tokens: int = BATCH_TOKENS
) -> list[torch.Tensor]:
    """Each row's final (normed) hidden states [T, D] on the CPU, in the model's dtype."""
    decoder = loaded.model.get_decoder()

    def run(rows: Sequence[int]) -> list[torch.Tensor]:
        ids, mask = right_pad([talks[i].ids for i in rows], 0, loaded.device)
        hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return [hidden[b, : len(talks[i].ids)].cpu() for b, i in enumerate(rows)]

    return in_packs(
        run, packs([len(talk.ids) for talk in talks], batch_tokens=batch_tokens, pad_tolerance=0.06)
    )
