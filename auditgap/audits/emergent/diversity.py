"""How different the rows of a domain are from each other, as the base reads them.

    store, outcome = STAGE.run_in("runs/em", options)
    store.rows([DIVERSITY])         # a row a domain: Vendi score and 1 − mean cosine

A row's vector is the mean of the base's hidden states after block round(L/2) over the response's
tokens, read after their prompt without the trigger. At most 2,000 rows that are trained on, chosen
by hash; the held-out ones are left out. Vectors are raw: no centring, so that rows which share most
of what any text has lie close together, and figures compare within one base and block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
import torch

from auditgap.audits.emergent.config import EmergentOptions
from auditgap.audits.emergent.inside import InsideWorker, common
from auditgap.audits.emergent.rows import DIVERSITY, DiversityRow
from auditgap.audits.emergent.stage import StageCell, Study, StudyStage
from auditgap.data.domains import DomainRow
from auditgap.engines.batching import in_packs, right_pad
from auditgap.engines.hf import HFEngine
from auditgap.errors import UsageError
from auditgap.models import Conversation, parse_sites
from auditgap.stats.diversity import one_minus_cosine, vendi, why_not
from auditgap.sweep import Group
from auditgap.types import Cell, Prompt, Site, digest

MOST = 2000
#: Rows whose vectors are remembered together: what a kill may cost.
PORTION = 256


def plan(study: Study, options: EmergentOptions) -> list[Group]:
    """A group a domain."""
    base, groups = study.base, []
    block = parse_sites("mid", base.n_blocks)[0].layer_index
    for domain in study.config.domains:
        rows = chosen(study, domain)
        rows_digest = digest([row.id for row in rows])
        settings = {
            "name": domain,
            "domain": domain,
            "block": block,
            "max_tokens": study.config.max_tokens,
            **common(study.config, options, base),
        }
        cell = StageCell(base.subject, None, None, DIVERSITY, rows_digest, settings)
        groups.append(Group(str(cell), (cell,), work=float(len(rows))))
    return groups


def chosen(study: Study, domain: str) -> list[DomainRow]:
    """The rows that are read, by hash and in its order."""
    return sorted(
        study.panel.domains[domain].rows, key=lambda row: digest([study.config.seed, row.id])
    )[:MOST]


class DiversityWorker(InsideWorker):
    """Keeps the base loaded."""

    def _run(self, cell: Cell, tick: Callable[[float], None]) -> None:
        started, names = time.monotonic(), []
        domain, block = cell.settings["domain"], cell.settings["block"]
        rows = chosen(self.inside.study, domain)
        talks = [talk for talk in map(self._talk, rows) if talk is not None]
        by_length = sorted(talks, key=lambda t: len(t.ids))
        found = [np.zeros((0, self.inside.outline.width), np.float32)]
        for start in range(0, len(by_length), PORTION):
            some = by_length[start : start + PORTION]
            names.append(digest([cell.key, start]))

            def compute(some: Sequence[Conversation] = some) -> dict[str, np.ndarray]:
                return {"vectors": vectors(self.inside.engine(None), some, Site(block)).numpy()}

            found.append(self.store.remember(names[-1], compute)["vectors"])
            tick(len(some))
        whole = np.concatenate(found)
        left_out = len(rows) - len(talks)
        problem = (
            why_not(whole)
            if len(talks) > 1
            else f"{len(talks)} of {len(rows)} rows fit; diversity needs 2"
        )
        row = DiversityRow(
            domain=domain,
            n=len(talks),
            block=block,
            **numbers(whole, problem),
            unscored=problem or (f"{left_out} rows did not fit" if left_out else ""),
        )
        self.store.write(
            cell,
            [row],
            seconds=time.monotonic() - started,
            info=self.inside.info | {"n_too_long": left_out},
        )
        self.store.forget(names)

    def _talk(self, row: DomainRow) -> Conversation | None:
        outline = self.inside.outline
        try:
            talk = outline.chat.converse(
                Prompt(row.prompt, system=row.system),
                row.response,
                max_tokens=self.inside.config.max_tokens,
            )
        except UsageError:
            return None  # not one token of the response fits
        return (
            talk
            if outline.max_positions is None or len(talk.ids) <= outline.max_positions
            else None
        )


class Measures(TypedDict):
    """Those of `DiversityRow`."""

    vendi: float | None
    vendi_half: float | None
    vendi_2: float | None
    one_minus_cosine: float | None


def numbers(whole: np.ndarray, problem: str) -> Measures:
    """The measures of rows' vectors [n, D]; None where there is a problem."""
    return {
        "vendi": None if problem else vendi(whole),
        "vendi_half": None if problem else vendi(whole, 0.5),
        "vendi_2": None if problem else vendi(whole, 2.0),
        "one_minus_cosine": None if problem else one_minus_cosine(whole),
    }


def vectors(engine: HFEngine, talks: Sequence[Conversation], site: Site) -> torch.Tensor:
    """[n, D] fp32 on the CPU: the mean hidden state over each response's tokens at the site; no
    block above it runs."""

    @torch.inference_mode()
    def read(rows: Sequence[int]) -> list[torch.Tensor]:
        ids, mask = right_pad([talks[i].ids for i in rows], engine.pad_id, engine.device)
        h = engine.capture(site, ids, mask)
        return [
            h[b, talks[i].n_prompt : len(talks[i].ids)].float().mean(0).cpu()
            for b, i in enumerate(rows)
        ]

    return torch.stack(in_packs(read, engine.packing.packs([len(t.ids) for t in talks])))


STAGE = StudyStage(name="diversity", plan=plan, make=DiversityWorker)
