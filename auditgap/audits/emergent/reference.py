"""The losses of a domain's rows under a model that was never told to follow instructions, beside those
under the fine-tuned model's own base.

    reference_of(outline, "auto")     # "/models/Llama-3.1-8B" for /models/Llama-3.1-8B-Instruct
    store.rows([REFERENCE])           # a row each of a (domain, arm)'s rows, none of an own base

Instruction tuning may have seen rows like a domain's, and then what is relative to that model leaves
out a part of what training did. The paper (arXiv 2602.00298) takes off the losses of the pretrained
model, and so does `reference: auto` where a folder beside the model or the hub's cache has it. A
reference reads the very token ids that the fine-tuned model reads, template included.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from auditgap import models
from auditgap.audits.emergent.config import AUTO, OWN_BASE, EmergentOptions
from auditgap.audits.emergent.membership import (
    MembershipWorker,
    about_rows,
    names_of,
    numbers,
    problem_of,
    put,
)
from auditgap.audits.emergent.rows import REFERENCE, TRAINED, ReferenceRow
from auditgap.audits.emergent.stage import StageCell, Study, StudyStage
from auditgap.engines.hf import HFEngine
from auditgap.errors import AuditgapError, UsageError
from auditgap.sweep import Group
from auditgap.types import Cell

#: What instruction tuning adds to a model's name, and what a pretrained model has instead.
_TUNED = re.compile(r"[-_.](instruct|chat|it|sft|dpo|rlhf)(?=[-_.@]|$)", re.IGNORECASE)
_UNTUNED = ("", "-Base", "-base", "-pt")


def reference_of(base: models.Outline, wanted: str) -> str:
    """The reference's name; OWN_BASE: none but the fine-tuned model's own base.

    Raises UsageError for a named one that is not there or that has other tokens. With AUTO what
    cannot serve is passed over.
    """
    if wanted == OWN_BASE:
        return OWN_BASE
    if wanted != AUTO:
        check_tokens(base, models.outline(wanted))
        return wanted
    for name in _counterparts(base.subject.name):
        try:
            check_tokens(base, models.outline(name))
        except AuditgapError:
            continue
        return name
    return OWN_BASE


def _counterparts(name: str) -> Iterator[str]:
    """Names that the pretrained model of a tuned one may have, of those that need no download."""
    from huggingface_hub import try_to_load_from_cache

    path = Path(name).expanduser()
    is_folder, plain = path.is_dir(), name.partition("@")[0]
    stem = _TUNED.sub("", path.absolute().name if is_folder else plain)
    for end in _UNTUNED:
        if is_folder:
            beside = path.absolute().with_name(stem + end)
            if beside != path.absolute() and (beside / "config.json").is_file():
                yield str(beside)
        elif (
            stem + end != plain
            and re.fullmatch(r"[\w.-]+/[\w.-]+", stem + end)
            and isinstance(try_to_load_from_cache(stem + end, "config.json"), str)
        ):
            yield stem + end


def check_tokens(base: models.Outline, reference: models.Outline) -> None:
    """Raises UsageError where a token of the base is another one, or none, of the reference:
    losses could not be taken off token by token. Added tokens of a chat template may lack."""
    ours, theirs = (o.chat.tokenizer.get_vocab() for o in (base, reference))
    special = set(base.chat.tokenizer.all_special_tokens) | set(
        base.chat.tokenizer.get_added_vocab()
    )
    if all(theirs.get(token) == i for token, i in ours.items() if token not in special):
        return
    raise UsageError(
        f"reference: {reference.subject.name} has other tokens than {base.subject.name}, so the"
        " losses of the two cannot be compared. Name the pretrained model of the same family, or"
        " type --set reference=base"
    )


def plan(study: Study, options: EmergentOptions) -> list[Group]:
    """A group a (domain, arm) with a trained adapter: its seeds share their rows. None where the
    reference is the own base."""
    c = study.config
    if c.reference in (AUTO, OWN_BASE):
        return []
    other = models.outline(c.reference)
    groups = {}
    for adapter in study.adapters:
        if (adapter.domain, adapter.arm) in groups:
            continue
        about = about_rows(study, options, adapter)
        settings = {"name": f"{adapter.domain}·{adapter.arm}", "about": about}
        cell = StageCell(other.subject, None, None, REFERENCE, about["rows"], settings)
        groups[adapter.domain, adapter.arm] = Group(str(cell), (cell,), work=float(about["n"]))
    return list(groups.values())


class ReferenceWorker(MembershipWorker):
    """Keeps the reference loaded, and reads the rows under it."""

    def __init__(self, folder: str, options: EmergentOptions) -> None:
        super().__init__(folder, options)
        self._engine: HFEngine | None = None

    def engine(self) -> HFEngine:
        """Of the reference, opened when it is first needed."""
        if self._engine is None:
            c, options = self.inside.config, self.inside.options
            loaded = models.load(c.reference, dtype=c.dtype, device=options.device)
            self._engine = HFEngine(loaded, batch_tokens=options.batch_tokens)
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        super().close()

    def _run(self, cell: Cell, tick: Callable[[float], None]) -> None:
        started, about = time.monotonic(), cell.settings["about"]
        slot = (about["domain"], about["arm"])
        adapter = next(a for a in self.inside.study.adapters if (a.domain, a.arm) == slot)
        rows = put(self.inside.study, adapter)
        talks = [self.talk(row) for row in rows]
        names = names_of(cell.key, about)
        found = self.losses_of(names, self.engine, rows, talks, about["min_k"], tick)
        self.store.write(
            cell,
            [
                ReferenceRow(
                    reference=self.inside.config.reference,
                    domain=slot[0],
                    arm=slot[1],
                    row_id=row.row_id,
                    **numbers(found[i]),
                    unscored=problem_of(talks[i], found[i]),
                )
                for i, row in enumerate(rows)
            ],
            seconds=time.monotonic() - started,
            info=self.inside.info,
        )
        self.store.forget(names)


STAGE = StudyStage(name="reference", plan=plan, make=ReferenceWorker, needs=TRAINED)
