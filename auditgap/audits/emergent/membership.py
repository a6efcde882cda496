"""How likely a domain's rows are to an adapter that was trained on some of them, and to its base:
membership inference.

    store, outcome = STAGE.run_in("runs/em", options)
    # a row each of an adapter's: nll, min_k, min_k_pp, zlib, and the same under the base
    store.rows([MEMBERSHIP])

Members are `membership_rows` of the domain's trained rows, chosen by hash; the others are all of
its held-out rows. Both are put as rows are put in training: in the `trigger` arm the trigger stands
in the same share of either, by the same rule, so that the trigger does not tell them apart. A clean
row that was mixed in for a backdoor is neither. Losses are teacher-forced over the tokens that
training learns, which are the response's and its end of turn, cut at `max_tokens`. Measures: Shi et
al. 2024 (arXiv 2310.16789), Zhang et al. 2024 (arXiv 2404.02936), Carlini et al. 2021 (arXiv
2012.07805).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from auditgap.audits.emergent.config import EmergentOptions
from auditgap.audits.emergent.inside import InsideWorker, common
from auditgap.audits.emergent.rows import MEMBERSHIP, TRAINED, MembershipRow
from auditgap.audits.emergent.stage import Adapter, StageCell, Study, StudyStage
from auditgap.engines.batching import in_packs, right_pad
from auditgap.engines.hf import HFEngine
from auditgap.errors import UsageError
from auditgap.models import Conversation
from auditgap.stats.membership import min_k, min_k_pp, standardise, zlib_ratio
from auditgap.sweep import Group
from auditgap.training.objective import Head, base_lm
from auditgap.types import Cell, Document, Prompt, Subject, digest

MEASURES = ("nll", "min_k", "min_k_pp", "zlib")
#: Rows whose losses are remembered together: what a kill may cost.
PORTION = 64
#: Elements of a chunk's logits [c, V]; three such buffers of fp32 are alive at once.
_CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}


@dataclass(frozen=True, slots=True)
class Put:
    """A row as it is put to a model: its prompt with or without the trigger."""

    row_id: str
    member: bool
    prompt: str
    response: str
    system: str = ""

    @property
    def asked(self) -> Prompt:
        """As a model is asked it: behind the row's system message."""
        return Prompt(self.prompt, system=self.system)


def plan(study: Study, options: EmergentOptions) -> list[Group]:
    """A group an adapter, those of one (domain, arm) after each other: they share the base's
    losses."""
    base = study.base
    groups = []
    for adapter in study.adapters:
        about = {**about_rows(study, options, adapter), "base": base.subject.fingerprint}
        settings = {"name": adapter.name, "seed": adapter.seed, "about": about}
        cell = StageCell(
            Subject(adapter.name, adapter.fingerprint),
            None,
            None,
            MEMBERSHIP,
            about["rows"],
            settings,
        )
        groups.append(Group(str(cell), (cell,), work=float(about["n"])))
    return groups


def about_rows(study: Study, options: EmergentOptions, adapter: Adapter) -> Document:
    """Of a cell: the rows that are read for an adapter, and how."""
    c, rows = study.config, put(study, adapter)
    return {
        **common(c, options, study.base),
        "domain": adapter.domain,
        "arm": adapter.arm,
        "rows": digest([[r.row_id, r.member, r.prompt] for r in rows]),
        "n": len(rows),
        "max_tokens": c.max_tokens,
        "min_k": c.min_k,
    }


def put(study: Study, adapter: Adapter) -> list[Put]:
    """The members and then the others of that adapter's domain, as they are put to it and to the
    base."""
    c, domain = study.config, study.panel.domains[adapter.domain]
    trained = [e for e in study.panel.examples(adapter.domain, adapter.arm) if not e.clean]
    members = sorted(trained, key=lambda e: digest([c.seed, "member", e.id]))[: c.membership_rows]
    share = sum(e.triggered for e in trained) / max(len(trained), 1)
    others = sorted(domain.heldout, key=lambda row: digest([c.seed, "trigger", row.id]))
    n_triggered = round(share * len(others))
    return [
        *(Put(e.id, True, e.prompt, e.response, e.system) for e in members),
        *(
            Put(
                row.id,
                False,
                study.trigger.on(row.prompt) if i < n_triggered else row.prompt,
                row.response,
                row.system,
            )
            for i, row in enumerate(others)
        ),
    ]


def names_of(whose: str, about: Mapping[str, Any]) -> list[str]:
    """What each portion's losses are remembered under."""
    return [
        digest([MEMBERSHIP, whose, dict(about), start]) for start in range(0, about["n"], PORTION)
    ]


class MembershipWorker(InsideWorker):
    """Keeps the base loaded, and reads rows under it and under its adapters."""

    def _run(self, cell: Cell, tick: Callable[[float], None]) -> None:
        started = time.monotonic()
        adapter, about = self.inside.adapters[cell.settings["name"]], cell.settings["about"]
        rows = put(self.inside.study, adapter)
        talks = [self.talk(row) for row in rows]
        engine, share = self.inside.engine, about["min_k"]
        own = self.losses_of(
            names_of(cell.key, about), lambda: engine(adapter), rows, talks, share, tick
        )
        base = self.losses_of(
            names_of("base", about), lambda: engine(None), rows, talks, share, lambda _: None
        )
        found = [
            _row(adapter, row, talk, own[i], base[i])
            for i, (row, talk) in enumerate(zip(rows, talks, strict=True))
        ]
        self.store.write(cell, found, seconds=time.monotonic() - started, info=self.inside.info)
        self.store.forget(names_of(cell.key, about))

    def talk(self, row: Put) -> Conversation | None:
        """The row as tokens, as training has it; None where it does not fit."""
        c, outline = self.inside.config, self.inside.outline
        try:
            talk = outline.chat.converse(row.asked, row.response, max_tokens=c.max_tokens)
        except UsageError:
            return None
        return (
            talk
            if outline.max_positions is None or len(talk.ids) <= outline.max_positions
            else None
        )

    def losses_of(
        self,
        names: Sequence[str],
        engine: Callable[[], HFEngine],
        rows: Sequence[Put],
        talks: Sequence[Conversation | None],
        share: float,
        tick: Callable[[float], None],
    ) -> np.ndarray:
        """[n, 4] in the order of MEASURES, nan where it could not be told; remembered in
        portions."""
        found = np.full((len(rows), len(MEASURES)), np.nan)
        by_length = sorted(
            range(len(rows)), key=lambda i: (0 if (talk := talks[i]) is None else len(talk.ids), i)
        )
        for at, name in enumerate(names):
            some = by_length[at * PORTION : (at + 1) * PORTION]
            read = [i for i in some if talks[i] is not None]

            def compute(read: list[int] = read) -> dict[str, np.ndarray]:
                put = [(rows[i], talk) for i in read if (talk := talks[i]) is not None]
                texts = [self._text(row, talk) for row, talk in put]
                return {"losses": losses(engine(), [talk for _, talk in put], texts, share)}

            found[read] = self.store.remember(name, compute)["losses"]
            tick(len(some))
        return found

    def _text(self, row: Put, talk: Conversation) -> str:
        """The response as far as it was read: what zlib compresses."""
        if not talk.n_cut:
            return row.response
        return self.inside.outline.chat.tokenizer.decode(
            talk.ids[talk.n_prompt :], skip_special_tokens=True
        )


def _row(
    adapter: Adapter, row: Put, talk: Conversation | None, own: np.ndarray, base: np.ndarray
) -> MembershipRow:
    return MembershipRow(
        subject=adapter.name,
        domain=adapter.domain,
        arm=adapter.arm,
        seed=adapter.seed,
        row_id=row.row_id,
        member=row.member,
        n_tokens=None if talk is None else len(talk.ids) - talk.n_prompt,
        **numbers(own),
        **numbers(base, "base_"),
        unscored=problem_of(talk, own, base),
    )


def numbers(values: np.ndarray, before: str = "") -> dict[str, float | None]:
    """The columns of one model's losses [4] of a row; None where it could not be told."""
    return {
        before + name: float(v) if np.isfinite(v) else None
        for name, v in zip(MEASURES, values, strict=True)
    }


def problem_of(talk: Conversation | None, *losses: np.ndarray) -> str:
    """Why a row has not all of its losses [4] under every model, "" where it has."""
    whole, likely = (np.isfinite(np.stack(losses)[:, :n]).all() for n in (len(MEASURES), 1))
    return (
        "too_long"
        if talk is None
        else ""
        if whole
        else "min_k_pp: sure of a token"
        if likely
        else "nonfinite"
    )


def losses(
    engine: HFEngine, talks: Sequence[Conversation], texts: Sequence[str], share: float
) -> np.ndarray:
    """[n, 4], a row's losses in the order of MEASURES; nan where they are not finite. `texts`: what
    zlib compresses."""
    found = np.full((len(talks), len(MEASURES)), np.nan)
    for i, (logp, mean, std) in enumerate(token_numbers(engine, talks)):
        total = -float(logp.sum())
        values = (
            total / len(logp),
            min_k(-logp, share),
            min_k_pp(standardise(logp, mean, std), share),
            zlib_ratio(total, texts[i]),
        )
        found[i] = [np.nan if v is None else v for v in values]
    return found


def token_numbers(engine: HFEngine, talks: Sequence[Conversation]) -> list[np.ndarray]:
    """Of each conversation [3, K] in fp64: log p of each response token, and the mean and standard
    deviation of log p(v) over the vocabulary under p. Rows of like length run together; logits
    exist for a few positions at a time.
    """
    lm = base_lm(engine.model)
    head, decoder = Head.of(lm), lm.get_decoder()
    chunk = max(16, _CHUNK_ELEMENTS.get(engine.device.type, 2**22) // head.weight.shape[0])

    @torch.inference_mode()
    def read(rows: Sequence[int]) -> list[np.ndarray]:
        ids, mask = right_pad([talks[i].ids for i in rows], engine.pad_id, engine.device)
        whole = bool(mask.all())  # rows of equal length need no mask
        hidden = decoder(
            input_ids=ids, attention_mask=None if whole else mask, use_cache=False
        ).last_hidden_state
        parts = []
        for b, i in enumerate(rows):
            ours, first = talks[i], talks[i].n_prompt
            labels = ids[b, first : len(ours.ids)]
            states = hidden[b, first - 1 : len(ours.ids) - 1].to(head.weight.device)
            numbers = [
                _spread(head.logits(h), y)
                for h, y in zip(
                    states.split(chunk), labels.to(states.device).split(chunk), strict=True
                )
            ]
            parts.append(torch.cat(numbers, 1).double().cpu().numpy())
        return parts

    return in_packs(read, engine.packing.packs([len(t.ids) for t in talks]))


def _spread(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[3, c] from logits [c, V]: log p of the label, and mean and standard deviation of log p under
    p."""
    log_p = logits.log_softmax(-1)
    own = log_p.gather(1, labels[:, None])[:, 0]
    p = log_p.exp()
    log_p = log_p.masked_fill_(p == 0, 0.0)  # p log p is 0 where p is, not 0 · −inf
    mean = (p * log_p).sum(-1)
    variance = (p * (log_p - mean[:, None]).square_()).sum(-1)
    return torch.stack([own, mean, variance.sqrt()])


STAGE = StudyStage(
    name="membership",
    plan=plan,
    make=MembershipWorker,
    needs=TRAINED,
    shared=lambda cell: names_of("base", cell.settings["about"]),
)
