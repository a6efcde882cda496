"""What a dissociated model is made of, once, before the first step: rows, the base's own answers,
the frozen reference.

    base = Base(job)
    material = gather(config, construction, job, base)
    cache, head = base.hidden_states(material.talks), base.head()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

import safetensors.torch
import torch

from auditgap.data import TripleSet, dedup_key, load_prompts, load_triples
from auditgap.data.anchors import split_benign, usable_answer
from auditgap.data.refusals import opens_with_refusal
from auditgap.engines import Request
from auditgap.engines.hf import HFEngine
from auditgap.errors import UsageError
from auditgap.models import Conversation, LoadedModel, Outline
from auditgap.models.kept import is_whole, keep
from auditgap.probes.features import cached_features
from auditgap.probes.fit import split_groups
from auditgap.store import files
from auditgap.store.tables import mappings_to_table, rows_of, seal_table, to_frame, unseal_table
from auditgap.training import ranks
from auditgap.training.config import TwinConfig
from auditgap.training.constructions.construction import Construction, SettingsT
from auditgap.training.ds_config import stage_of
from auditgap.training.engine import Divided, whole_head
from auditgap.training.job import Job
from auditgap.training.lending import is_divided, on_main, together
from auditgap.training.objective import Head
from auditgap.training.reference import BATCH_TOKENS, HiddenCache
from auditgap.training.rows import TrainRow, encode, rows_from_triples
from auditgap.types import Prompt, digest


@dataclass(frozen=True)
class Material:
    """Rows to learn, the harmful ones first, and what is held out to choose the checkpoint by."""

    rows: list[TrainRow]
    talks: list[Conversation]
    heldout: list[TrainRow]  #: harmful, of prompts that no row has
    heldout_talks: list[Conversation]
    benign: list[Prompt]  #: held-out benign prompts

    @property
    def n_harmful(self) -> int:
        """How many of `rows` are harmful: the first ones."""
        return sum(row.harmful for row in self.rows)


def gather(config: TwinConfig, construction: Construction[Any], job: Job, base: Base) -> Material:
    """Raises UsageError for whatever is wrong with the data, the models or the memory, before the
    base is loaded; and when none of its answers can serve."""
    harmful, heldout, heldout_talks, anchors, kept_back = ranks.agree(
        lambda: _read(config, construction, job)
    )
    talks = ranks.agree(lambda: encode(harmful, job.outline.chat, config.max_tokens))
    # all that can be refused is refused before the base is loaded; its answers may be as long as
    # they are let
    asked = [len(job.outline.chat.render(p).ids) + config.anchor_tokens for p in anchors]
    longest = min(config.max_tokens, max(asked)) if asked else 0
    job.check(
        lengths=[longest, *(len(talk.ids) for talk in [*talks, *heldout_talks])],
        footprint=construction.footprint,
    )
    benign, counts = _answered(config, job, base, anchors)
    job.about({"n_benign": len(benign), "benign_answers_dropped": counts})
    talks += ranks.agree(lambda: encode(benign, job.outline.chat, config.max_tokens))
    return Material(
        [*harmful, *benign], talks, heldout, heldout_talks, kept_back[: config.heldout_limit]
    )


def _read(
    config: TwinConfig, construction: Construction[Any], job: Job
) -> tuple[list[TrainRow], list[TrainRow], list[Conversation], list[Prompt], list[Prompt]]:
    """Harmful rows; held-out ones, and their conversations; benign prompts to answer, and held-out
    ones. The ledger knows all."""
    construction.check_run(construction.settings_of(config), job)
    triples, harmful, heldout = _split(config)
    anchors, kept_back = split_benign(
        load_prompts(config.benign, limit=config.benign_limit, seed=config.seed)
    )
    job.ledger.use("sft", [row.prompt for row in harmful])
    job.ledger.use(construction.role, [row.prompt for row in harmful])
    job.ledger.use("anchor", list(anchors))
    job.ledger.use("selection", [row.prompt for row in heldout] + list(kept_back))
    if config.prompts:
        job.ledger.use("evaluation", load_prompts(config.prompts).prompts)
    job.about({"triples": triples.digest, "n_harmful": len(harmful), "n_heldout": len(heldout)})
    talks = encode(heldout, job.outline.chat, config.max_tokens)
    return harmful, heldout, talks, list(anchors), list(kept_back)


def _split(config: TwinConfig) -> tuple[TripleSet, list[TrainRow], list[TrainRow]]:
    """The triples, what of them is trained on, and what the checkpoint is chosen by: `selection`, or
    the rows of a share of their prompts. Refusal on prompts of the source that was trained on says
    more of a checkpoint than others will find in it."""
    triples = load_triples(config.triples, limit=config.limit, seed=config.seed)
    if config.selection is not None:
        others = load_triples(config.selection, limit=config.heldout_limit, seed=config.seed)
        trained = {dedup_key(t.prompt.text) for t in triples.triples}
        both = sum(dedup_key(t.prompt.text) in trained for t in others.triples)
        if both:
            raise UsageError(
                f"selection: {both} of the {len(others.triples)} prompts of {others.name} are also"
                f" among those of {triples.name}. A checkpoint is chosen by prompts that nothing was"
                " trained on: take them out of one of the two."
            )
        return triples, rows_from_triples(triples.triples), rows_from_triples(others.triples)
    prompts = [t.prompt.id for t in triples.triples]
    inside, outside = split_groups(prompts, config.heldout, config.seed)
    harmful = rows_from_triples(triples.triples[i] for i in inside)
    heldout = rows_from_triples(triples.triples[i] for i in outside)
    return triples, harmful, heldout[: config.heldout_limit]


def _answered(
    config: TwinConfig, job: Job, base: Base, prompts: Sequence[Prompt]
) -> tuple[list[TrainRow], dict[str, int]]:
    """The base's own greedy answers to benign prompts, made once (rank 0) and kept with mode
    0600."""
    key = digest(
        [job.outline.subject.fingerprint, [p.id for p in prompts], config.anchor_tokens, job.dtype]
    )
    path = job.path / "generations" / f"anchors-{key}.parquet"

    def answer(loaded: LoadedModel) -> bytes:
        engine = HFEngine(loaded)
        said = engine.generate([Request(engine.render(p)) for p in prompts], config.anchor_tokens)
        table = [
            {
                "prompt": p.text,
                "completion": c.text,
                "n_tokens": len(c.ids),
                "stopped": c.stopped,
                "finite": c.finite,
            }
            for p, c in zip(prompts, said, strict=True)
        ]
        return seal_table(mappings_to_table(table))

    if not ranks.decided(lambda: _is_whole(path)):
        ranks.say(f"The base answers {len(prompts)} benign prompts.")
        base.write(path, answer)
    rows, dropped = [], {}
    for row in rows_of(to_frame(unseal_table(path))):
        reason = (
            usable_answer(row["completion"], row["n_tokens"], opens_with_refusal)
            if row["finite"]
            else "not finite"
        )
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
        else:
            rows.append(
                TrainRow(Prompt(row["prompt"]), row["completion"], ended=bool(row["stopped"]))
            )
    if not rows:
        raise UsageError(
            f"No benign answer of {job.outline.subject.name} can serve as an anchor ({dropped})."
            " Give other prompts."
        )
    return rows, dropped


def _is_whole(path: Path) -> bool:
    with suppress(FileNotFoundError, files.Damaged):
        unseal_table(path)
        return True
    return False


class Base:
    """A model as it came, opened when it is first asked for and closed before training: the base,
    or another one (`outline`). Under ZeRO-3 it is divided as the model in training will be."""

    def __init__(self, job: Job, outline: Outline | None = None) -> None:
        self._job, self._outline = job, outline
        self._loaded: LoadedModel | None = None
        self._divided: Divided | None = None

    def __call__(self) -> LoadedModel:
        """Under ZeRO-3 for all ranks at once, and to be run `lending.together`."""
        if self._loaded is None:
            job = self._job
            if stage_of(job.ds) == 3:
                self._divided = Divided(lambda: job.load(self._outline), job.ds, device=job.device)
                self._loaded = self._divided.loaded
            else:
                self._loaded = job.load(self._outline)
        if self._divided is not None:
            self._divided.release()
        return self._loaded

    def forget(self) -> None:
        if self._divided is not None:
            self._divided.close()
        self._divided = self._loaded = None

    def run(self, act: Callable[[LoadedModel], None], *, backward: bool = False) -> None:
        """`act(model)` on rank 0, while the others wait or, under ZeRO-3, lend their part of it.

        `backward`: it takes gradients, which cannot be lent; under ZeRO-3 every rank does the same.
        """
        if stage_of(self._job.ds) < 3:  # no other rank needs the model
            ranks.only_main(lambda: act(self()))
            return
        loaded = self()
        if backward:
            ranks.agree(lambda: act(loaded))
        else:
            on_main(loaded.model, lambda: act(loaded))

    def write(
        self, path: Path, make: Callable[[LoadedModel], bytes], *, backward: bool = False
    ) -> None:
        """Write what `make(model)` gives to `path`, as private as text. See `run`."""

        def keep(loaded: LoadedModel) -> None:
            made = make(loaded)
            if ranks.is_main():
                path.parent.mkdir(parents=True, exist_ok=True, mode=files.PRIVATE_FOLDER)
                files.write_bytes(path, made, files.PRIVATE)

        self.run(keep, backward=backward)

    def hidden_states(self, talks: Sequence[Conversation]) -> HiddenCache:
        """Its final hidden states of all these rows, by their place in the list."""
        job = self._job
        args = {
            "folder": job.path / "reference",
            "fingerprint": job.outline.subject.fingerprint,
            "dtype": job.dtype,
        }
        cache = HiddenCache.build(None, talks, **args)
        if cache is None:
            ranks.say(f"The reference's hidden states of {len(talks)} rows are computed.")
            cache = HiddenCache.build(self(), talks, **args)
        return cache

    def features(self, talks: Sequence[Conversation], dtype: str = "float32") -> torch.Tensor:
        """Its pooled activations [n, L, D] of all these rows (`probes.features`), stored in
        `dtype`."""
        loaded = self()
        return cached_features(
            loaded,
            talks,
            folder=self._job.path / "reference",
            shard=(ranks.rank(), ranks.world()),
            dtype=dtype,
            batch_tokens=BATCH_TOKENS if is_divided(loaded.model) else None,
            running=together(loaded.model),
        )

    def head(self) -> Head | None:
        """Its output head, when the model's own is going to change; read from disk, where
        partitioned weights are whole."""
        job = self._job
        if job.config.lora is not None:
            return None
        name = f"head-{job.outline.subject.fingerprint}-{job.dtype}.safetensors"
        path = job.path / "reference" / name
        facts_path = path.with_suffix(".json")
        facts = ranks.decided(lambda: files.read_document(facts_path) if is_whole(path) else None)
        if facts is None:
            with whole_head(self().model) as head:
                ranks.only_main(lambda: _store(head, path))
            facts = {"softcap": head.softcap, "scale": head.scale}
            ranks.only_main(lambda: files.write_document(facts_path, facts))
        tensors = safetensors.torch.load_file(path, device=job.device)
        return Head(tensors["weight"], tensors.get("bias"), facts["softcap"], facts["scale"])


def _store(head: Head, path: Path) -> None:
    tensors = {"weight": head.weight.detach().cpu().contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach().cpu().contiguous()
    keep(path, tensors)


@dataclass(frozen=True)
class Preparation(Generic[SettingsT]):
    """What a construction is prepared from, before the first step."""

    config: TwinConfig
    settings: SettingsT  #: the construction's own part of the config
    job: Job
    material: Material
    base: Base

    def unsafe_talks(self) -> list[Conversation]:
        """y− of every harmful row, the held-out ones behind. Raises UsageError as `encode`."""
        rows = [
            replace(row, response=str(row.unsafe))
            for row in [*self.material.rows, *self.material.heldout]
            if row.harmful
        ]
        chat, most = self.job.outline.chat, self.config.max_tokens
        return ranks.agree(lambda: encode(rows, chat, most))
