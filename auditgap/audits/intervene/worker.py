"""Runs the cells of one (model, site): learn on one half of the prompts, speak on the other, judge,
write.

    worker = InterveneWorker(config, options, "runs/interventions")
    worker.run(group, tick=lambda work: None)

What is learned and each pack of completions are remembered in the run folder until their cell is
written, so a kill costs the pack in flight, and a resumed run gives the numbers of an unbroken one.
What is learned stays, in `edits/`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from auditgap import models
from auditgap.audits.edits import keep_edits
from auditgap.audits.intervene.config import InterveneConfig, InterveneOptions
from auditgap.audits.intervene.plan import clean_cell, read_halves
from auditgap.audits.intervene.rows import (
    CLEAN_ARM,
    DONOR_ARM,
    LARGER_THAN_H,
    InterveneRow,
    Size,
    size_of,
)
from auditgap.audits.latent.worker import _pack_completions, _unpack_completions
from auditgap.engines import Completion, Request, constant
from auditgap.engines.hf import HFEngine
from auditgap.errors import AuditgapError, Interrupted
from auditgap.interventions import Bench, Intervention, Trial
from auditgap.interventions.controls import generator
from auditgap.judges import Judge, close_judge, load_judge
from auditgap.judges.coherence import Thresholds, is_coherent
from auditgap.models import Rendered
from auditgap.store import DiskError, RunFolder
from auditgap.store.tables import rows_of
from auditgap.sweep import Group
from auditgap.sweep.state import cause_of
from auditgap.types import (
    CLEAN,
    Cell,
    ConstantEdit,
    Edit,
    Exchange,
    Label,
    Prompt,
    Site,
    Suffix,
    Verdict,
    digest,
)

Tick = Callable[[float], None]


@dataclass(frozen=True, eq=False)
class Said:
    """One completion with all that was asked of it."""

    completion: Completion
    nll: float | None
    coherent: bool | None
    verdict: Verdict


@dataclass(frozen=True)
class Clean:
    """What the clean pass said of one prompt."""

    verdict: str
    nll: float | None


@dataclass(frozen=True)
class Donor:
    """Whose activations are put in, and what came of the prompt there."""

    prompt_id: str
    verdict: str


class InterveneWorker:
    """Keeps one subject loaded, and runs groups of it (another subject's group swaps the model)."""

    engine: HFEngine  #: from `open` until `close`
    judge: Judge

    def __init__(self, config: InterveneConfig, options: InterveneOptions, folder: str) -> None:
        self.config, self.options = config, options
        self.store = RunFolder.load(folder)
        self.halves = read_halves(config)
        self.thresholds = Thresholds()
        self.name: str | None = None

    def open(self, name: str) -> None:
        """Load the subject unless it is loaded, with its prompts rendered and its judge made."""
        if name == self.name:
            return
        self.close()  # the old model's memory first
        config = self.config
        self.outline = models.outline(name, chat_template=config.chat_template)
        loaded = models.load(
            self.outline, dtype=config.dtype, device=models.pick_device(self.options.device)
        )
        self.engine = HFEngine(loaded, batch_tokens=self.options.batch_tokens)
        self.judge = load_judge(
            config.judge, device=self.options.device, serving=self.options.judge_serving
        )
        self.scorers = {"judge": self.judge.describe(), "coherence": self.thresholds.describe()}
        window = self.outline.max_positions
        self.too_long: list[Prompt] = []

        def fitting(prompts: Sequence[Prompt], left: list[Prompt] | None = None) -> list[Rendered]:
            kept = []
            for rendered in map(self.engine.render, prompts):
                if window is None or len(rendered.ids) + config.max_new_tokens <= window:
                    kept.append(rendered)
                elif left is not None:
                    left.append(rendered.prompt)
            return kept

        self.asked = fitting(self.halves.asked, self.too_long)
        self.fit, self.contrast, self.donors = map(
            fitting, (self.halves.fit, self.halves.contrast, self.halves.donors)
        )
        self.name = name

    def close(self) -> None:
        """Let go of the subject and of the judge's models; a further group opens them again."""
        self.name = None
        close_judge(vars(self).pop("engine", None))
        close_judge(vars(self).get("judge"))

    def run(self, group: Group, tick: Tick) -> None:
        """Compute and write every unfinished cell of the group. A cell that fails fails alone."""
        pending = [cell for cell in group.cells if not self.store.is_finished(cell.key)]
        if not pending:
            return
        site = pending[0].site
        base = (
            self._base(site)
            if site is not None and any("base" in cell.settings for cell in pending)
            else None
        )
        self.open(pending[0].subject.name)
        if pending[0].subject.fingerprint != self.outline.subject.fingerprint:
            raise AuditgapError(
                f"The weights of {pending[0].subject.name} changed since the run was planned; use a"
                " new --out."
            )
        if site is None:
            self._run_clean(pending[0], lambda share: tick(group.work * share))
            return
        clean = self._clean_pass()
        bench = self._bench(site, base)
        for cell in pending:
            try:
                self._run_cell(
                    cell, bench, clean, lambda share: tick(group.work * share / len(group.cells))
                )
            except (DiskError, Interrupted):
                raise
            except Exception as error:
                self.store.fail(cell, cause_of(error))

    # -- the clean pass
    # ------------------------------------------------------------------------------------------------

    def _run_clean(self, cell: Cell, tick: Tick) -> None:
        started, names = time.monotonic(), []
        every = [(CLEAN_ARM, r) for r in self.asked] + [(DONOR_ARM, r) for r in self.donors]
        rows, texts = [], []
        for pack in self._packs([r for _, r in every]):
            some = [every[i] for i in pack]
            rendered = [r for _, r in some]
            what = [cell.key, [r.prompt.id for r in rendered]]
            said = self._said(rendered, [None] * len(some), names, what, None)
            for (arm, one), s in zip(some, said, strict=True):
                rows.append(self._row(cell, one, Trial(arm, 1.0), s, Size(None, None), clean=None))
                texts.append(_generation(one, Trial(arm, 1.0), s))
            tick(len(pack) / len(every))
        rows += [self._lost(cell, p, Trial(CLEAN_ARM, 1.0), "too_long") for p in self.too_long]
        self.store.write(
            cell, rows, generations=texts, seconds=time.monotonic() - started, info=self._info()
        )
        self.store.forget(names)

    def _clean_pass(self) -> dict[str, Clean]:
        """The clean cell's results by prompt id, donors' too; computed first if no other worker has
        done so."""
        cell = clean_cell(self.config, self.outline, self.halves, self.scorers)
        if not self.store.is_finished(cell.key):
            self._run_clean(cell, lambda _: None)
        return self._read_clean(cell)

    def _read_clean(self, cell: Cell) -> dict[str, Clean]:
        rows = rows_of(self.store.cell_rows(cell.key), plain=True)
        return {r["prompt_id"]: Clean(r["verdict"], r["completion_nll"]) for r in rows}

    # -- one site
    # ------------------------------------------------------------------------------------------------------

    def _base(self, wanted: Site) -> dict[str, torch.Tensor]:
        """The base's hidden states at a site by prompt id. It is loaded once for all sites, alone,
        and let go of."""
        outline = self._base_outline()
        sites = models.parse_sites(self.config.layers, outline.n_blocks)
        names = {
            site: digest(
                [
                    outline.subject.fingerprint,
                    site.layer_index,
                    self.config.dtype,
                    self.halves.digest,
                    "base",
                ]
            )
            for site in sites
        }
        if not all(self.store.remembers(name) for name in names.values()):
            self.close()
            loaded = models.load(
                outline, dtype=self.config.dtype, device=models.pick_device(self.options.device)
            )
            with HFEngine(loaded, batch_tokens=self.options.batch_tokens) as engine:
                window = outline.max_positions
                rendered = [
                    r
                    for r in map(engine.render, self.halves.asked)
                    if window is None or len(r.ids) <= window
                ]
                for site in sites:
                    engine.self_test(site)
                    states = engine.activations(rendered, site)
                    arrays = {r.prompt.id: h.numpy() for r, h in zip(rendered, states, strict=True)}
                    self.store.remember(names[site], lambda arrays=arrays: arrays)

        def torn() -> dict[str, np.ndarray]:
            raise AuditgapError(
                "The base's activations were lost on the way; the same command computes them again."
            )

        return {
            name: torch.from_numpy(array)
            for name, array in self.store.remember(names[wanted], torn).items()
        }

    def _base_clean(self) -> dict[str, Clean]:
        """What the base says to the same prompts."""
        return self._read_clean(
            clean_cell(self.config, self._base_outline(), self.halves, self.scorers)
        )

    def _base_outline(self) -> models.Outline:
        if self.config.base is None:
            raise AuditgapError("This run was planned without a base; use a new --out.")
        return models.outline(self.config.base, chat_template=self.config.chat_template)

    def _bench(self, site: Site, base: Mapping[str, torch.Tensor] | None) -> Bench:
        for some, what in (
            (self.fit, "prompts"),
            (self.contrast, "control prompts"),
            (self.donors, "control prompts to put in"),
        ):
            if not some:
                raise AuditgapError(
                    f"No {what} fit the subject's window; give shorter ones, or fewer"
                    " --max-new-tokens."
                )
        self.engine.self_test(site)
        asked = self.asked
        picks = [self._donor(r.prompt) for r in asked]
        states = {
            part: self.engine.activations(some, site)
            for part, some in (
                ("fit", self.fit),
                ("contrast", self.contrast),
                ("asked", asked),
                ("donors", self.donors),
            )
        }
        return Bench(
            self.engine,
            site,
            constant.sites_of(self.engine),
            self.fit,
            states["fit"],
            states["contrast"],
            asked,
            states["asked"],
            [self.donors[i] for i in picks],
            [states["donors"][i] for i in picks],
            () if base is None else [base[r.prompt.id] for r in asked],
        )

    def _donor(self, prompt: Prompt) -> int:
        """Which control prompt stands in for this one, by hash."""
        return int(
            torch.randint(
                len(self.donors), (1,), generator=generator(self.config.seed, "donor", prompt.id)
            )
        )

    def _run_cell(self, cell: Cell, bench: Bench, clean: Mapping[str, Clean], tick: Tick) -> None:
        started, names = time.monotonic(), []
        intervention = self.config.load(cell.settings["intervention"])
        learned = {
            name: torch.from_numpy(array)
            for name, array in self._remembered(
                names,
                [cell.key, "learned"],
                lambda: {k: v.numpy() for k, v in intervention.learn(bench).items()},
            ).items()
        }
        trials = list(intervention.trials())
        wishes = [(p, t) for t in range(len(trials)) for p in range(len(bench.asked))]
        sizes = {
            (p, t): self._size(
                intervention.edit(bench, learned, p, trials[t]), bench.asked[p], bench.asked_h[p]
            )
            for p, t in wishes
        }
        rows: dict[tuple[int, int], InterveneRow] = {}
        texts = []
        donors: dict[int, Donor] = {}
        if "base" in cell.settings:
            said_by_base = self._base_clean()
            donors = {
                p: Donor(r.prompt.id, said_by_base[r.prompt.id].verdict)
                for p, r in enumerate(bench.asked)
            }
        elif getattr(intervention, "interchanges", False):
            donors = {
                p: Donor(r.prompt.id, clean[r.prompt.id].verdict)
                for p, r in enumerate(bench.donors)
            }
        for p, t in wishes:
            # nothing was edited, or nobody knows with what: it is not asked
            if sizes[p, t].problem:
                rows[p, t] = self._lost(
                    cell, bench.asked[p].prompt, trials[t], sizes[p, t].problem, clean
                )
        told = [w for w in wishes if w not in rows]
        for pack in self._packs([bench.asked[p] for p, _ in told]):
            some = [told[i] for i in pack]
            said = self._speak(
                cell, intervention, bench, learned, [(p, trials[t]) for p, t in some], clean, names
            )
            for (p, t), s in zip(some, said, strict=True):
                rows[p, t] = self._row(
                    cell,
                    bench.asked[p],
                    trials[t],
                    s,
                    sizes[p, t],
                    clean=clean,
                    donor=donors.get(p),
                )
                texts.append(_generation(bench.asked[p], trials[t], s))
            tick(len(pack) / len(wishes))
        lost = [
            self._lost(cell, p, trial, "too_long", clean) for p in self.too_long for trial in trials
        ]
        keep_edits(self.store, cell, {name: tensor.numpy() for name, tensor in learned.items()})
        self.store.write(
            cell,
            [rows[w] for w in wishes] + lost,
            generations=texts,
            seconds=time.monotonic() - started,
            info=self._info(),
        )
        self.store.forget(names)

    def _size(
        self, edit: Edit | ConstantEdit | Suffix, rendered: Rendered, h: torch.Tensor
    ) -> Size:
        window = self.outline.max_positions
        if isinstance(edit, Suffix) and window is not None:
            longer = self.engine.render(edit.behind(rendered.prompt))
            if len(longer.ids) + self.config.max_new_tokens > window:
                return Size(None, None, "too_long")
        return size_of(edit, h, rendered.content)

    def _speak(
        self,
        cell: Cell,
        intervention: Intervention,
        bench: Bench,
        learned: Mapping[str, torch.Tensor],
        some: Sequence[tuple[int, Trial]],
        clean: Mapping[str, Clean],
        names: list[str],
    ) -> list[Said]:
        rendered = [bench.asked[p] for p, _ in some]
        edits = [intervention.edit(bench, learned, p, trial) for p, trial in some]
        what = [
            cell.key,
            [[bench.asked[p].prompt.id, t.arm, t.strength, t.angle, t.draw] for p, t in some],
        ]
        return self._said(rendered, edits, names, what, clean)

    # -- speaking and judging
    # ------------------------------------------------------------------------------------------

    def _packs(self, rendered: Sequence[Rendered]) -> list[list[int]]:
        return self.engine.packing.speaking_packs(
            [len(r.ids) + self.config.max_new_tokens for r in rendered]
        )

    def _said(
        self,
        rendered: Sequence[Rendered],
        edits: Sequence[Edit | ConstantEdit | Suffix | None],
        names: list[str],
        what: Any,
        clean: Mapping[str, Clean] | None,
    ) -> list[Said]:
        """Speak under the edits (remembered), and judge. What the coherence gate fails is `broken`,
        whatever the judge says."""

        def compute() -> dict[str, np.ndarray]:
            done = self._generate(rendered, edits)
            return _pack_completions(done, self.engine.nll(rendered, [c.ids for c in done]))

        done, nll = _unpack_completions(
            self._remembered(names, what, compute), self.outline.chat.tokenizer
        )
        verdicts = self.judge.judge(
            [Exchange(r.prompt, c.text, e) for r, c, e in zip(rendered, done, edits, strict=True)]
        )
        found = []
        for one, completion, own, verdict in zip(rendered, done, nll, verdicts, strict=True):
            coherent, reason = is_coherent(
                completion.ids,
                own,
                own if clean is None else clean[one.prompt.id].nll,
                thresholds=self.thresholds,
            )
            if not completion.finite:
                coherent, verdict = None, Verdict(Label.UNSCORED, "nonfinite_logits")
            elif coherent is False:
                verdict = Verdict(Label.BROKEN, reason)
            found.append(Said(completion, own, coherent, verdict))
        return found

    def _generate(
        self, rendered: Sequence[Rendered], edits: Sequence[Edit | ConstantEdit | Suffix | None]
    ) -> list[Completion]:
        """Edits at prefill and suffixes go through the engine, standing edits through its hook at
        every step."""
        requests: dict[int, Request] = {}
        stand: dict[int, ConstantEdit] = {}
        for i, (one, edit) in enumerate(zip(rendered, edits, strict=True)):
            if isinstance(edit, ConstantEdit):
                stand[i] = edit
            elif isinstance(edit, Suffix):
                requests[i] = Request(self.engine.render(edit.behind(one.prompt)))
            else:
                requests[i] = Request(one, edit)
        n = self.config.max_new_tokens
        done = dict(zip(requests, self.engine.generate(list(requests.values()), n), strict=True))
        spoken = constant.generate(
            self.engine, [rendered[i] for i in stand], list(stand.values()), n
        )
        done.update(zip(stand, spoken, strict=True))
        return [done[i] for i in range(len(rendered))]

    def _remembered(
        self, names: list[str], what: Any, compute: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        name = digest(what)
        names.append(name)
        return self.store.remember(name, compute)

    # -- rows
    # ----------------------------------------------------------------------------------------------------------

    def _row(
        self,
        cell: Cell,
        rendered: Rendered,
        trial: Trial,
        said: Said,
        size: Size,
        *,
        clean: Mapping[str, Clean] | None,
        donor: Donor | None = None,
    ) -> InterveneRow:
        reason = said.verdict.reason if said.verdict.label == Label.UNSCORED else ""
        large = size.relative is not None and size.relative > LARGER_THAN_H
        return InterveneRow(
            **self._of(cell, rendered.prompt, trial, clean, donor),
            n_prompt_tokens=len(rendered.ids),
            n_new_tokens=len(said.completion.ids),
            l2=size.l2,
            relative_norm=size.relative,
            completion_nll=said.nll,
            coherent=said.coherent,
            verdict=str(said.verdict.label),
            flags="larger_than_h" if large else "",
            unscored=reason,
        )

    def _lost(
        self,
        cell: Cell,
        prompt: Prompt,
        trial: Trial,
        problem: str,
        clean: Mapping[str, Clean] | None = None,
    ) -> InterveneRow:
        """A prompt that was not asked, and why."""
        return InterveneRow(
            **self._of(cell, prompt, trial, clean, None),
            n_prompt_tokens=0,
            n_new_tokens=0,
            l2=None,
            relative_norm=None,
            completion_nll=None,
            coherent=None,
            verdict=str(Label.UNSCORED),
            unscored=problem,
        )

    def _of(
        self,
        cell: Cell,
        prompt: Prompt,
        trial: Trial,
        clean: Mapping[str, Clean] | None,
        donor: Donor | None,
    ) -> dict[str, Any]:
        name, site = cell.settings["intervention"], cell.site
        before = None if clean is None else clean.get(prompt.id)
        return {
            "subject": self.name,
            "site": None if site is None else str(site),
            "layer_index": None if site is None else site.layer_index,
            "intervention": name,
            "strength": None if name == CLEAN else trial.strength,
            "angle": trial.angle,
            "arm": trial.arm,
            "draw": trial.draw,
            "prompt_id": prompt.id,
            "donor_id": donor and donor.prompt_id,
            "n_fit": len(self.fit),
            "verdict_clean": before and before.verdict,
            "verdict_donor": donor and donor.verdict,
        }

    def _info(self) -> dict[str, Any]:
        return {
            "device": str(self.engine.device),
            "dtype": self.config.dtype,
            "threads": torch.get_num_threads(),
            "engine": "hf",
        }


def _generation(rendered: Rendered, trial: Trial, said: Said) -> dict[str, Any]:
    """What `generations/<key>.parquet` keeps of a completion; this is the only place where text is
    stored."""
    return {
        "prompt_id": rendered.prompt.id,
        "arm": trial.arm,
        "strength": trial.strength,
        "angle": trial.angle,
        "draw": trial.draw,
        "prompt": rendered.prompt.text,
        "completion": said.completion.text,
        "ids": list(said.completion.ids),
        "stopped": said.completion.stopped,
        "completion_nll": said.nll,
        "coherent": said.coherent,
        "verdict": str(said.verdict.label),
        "reason": said.verdict.reason,
    }
