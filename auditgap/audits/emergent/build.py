"""The study's first stage: everything is read, checked and counted, and the panel laid down, before
anything is trained.

    store = run(*EMERGENT.read(None, {"model": "smollm2", "domains": "demo", "out": "runs/em"}))
    # {"domain": "off_by_one", "read": 108, "bad": 0, "trained": 97, "held_out": 11, …}
    describe(store)[0]

No weights are loaded. The same call again finds the folder as it is; another config is refused
field by field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from auditgap import models
from auditgap.audits.audit import Plan
from auditgap.audits.emergent.audit import EMERGENT
from auditgap.audits.emergent.config import AUTO, EmergentConfig, EmergentOptions
from auditgap.audits.emergent.reference import reference_of
from auditgap.audits.emergent.remote import Remote, address_of, remotes_of
from auditgap.audits.emergent.stage import asked_of
from auditgap.audits.planning import check_subject
from auditgap.data import PromptSet
from auditgap.data.conversations import CUT
from auditgap.data.domains import TRIGGER, DomainRow, Panel, Trigger
from auditgap.data.em_context import forms_of, in_context
from auditgap.data.em_prompts import load_em_prompts, put_to
from auditgap.data.panel import read_panel
from auditgap.errors import UsageError
from auditgap.models.encoder import check_encoder
from auditgap.models.weights import is_adapter
from auditgap.store import RunFolder
from auditgap.sweep import Group
from auditgap.types import Document, Prompt

#: What a row's reason is when its prompt alone fills `max_tokens`.
TOO_LONG = "prompt longer than max_tokens"
#: Types that training takes.
_DTYPES = ("float32", "bfloat16")
#: Tokens by which the length of a rendered row may differ from its parts' and the template's, where
#: words meet.
_SEAM = 16


@dataclass(frozen=True)
class EmergentPlan(Plan):
    """The panel of domains and the prompts that are asked. The cells of each stage are planned when
    the stages before it are done, so there are no groups."""

    config: EmergentConfig
    outlines: tuple[models.Outline, ...]  #: of the base
    panel: Panel
    prompts: PromptSet
    asked: PromptSet  #: these, the questions about domains, and all in the forms of training rows
    longest: int  #: tokens of the longest row
    #: the config's reference was not named: a folder that knows another one keeps it
    reference_found: bool = False
    warnings: tuple[str, ...] = ()
    groups: tuple[Group, ...] = ()
    remotes: tuple[Remote, ...] = ()

    def requests(self, remote: Remote) -> int:
        """Answers that a model at an endpoint is asked for, unless some must be asked again."""
        own = put_to(self.asked.prompts, remote.domain)
        return 2 * len(own) * self.config.samples


def run(config: EmergentConfig, options: EmergentOptions) -> RunFolder:
    """The run folder of the study: made, or found as it was made. Raises as `prepare` and the store
    do."""
    EMERGENT.check(options)
    plan = prepare(config, options)
    store = EMERGENT.open(plan, options, options.out or EMERGENT.folder(config))
    with store.lock():
        EMERGENT.begin(plan, store)
    return store


def prepare(config: EmergentConfig, options: EmergentOptions) -> EmergentPlan:
    """Everything that a study needs, read and checked.

    Raises UsageError: a model that is an adapter, LoRA targets that it has not, a source or suite
    that cannot be read or used (`data.panel.read_panel`, `data.em_prompts`); Refused as models do.
    """
    dtype = str(models.pick_dtype(config.dtype, models.pick_device(options.device))).removeprefix(
        "torch."
    )
    if dtype not in _DTYPES:
        raise UsageError(
            f"--dtype {dtype}: adapters are trained in {' or '.join(_DTYPES)}. Type --dtype float32"
        )
    config = config.model_copy(update={"dtype": dtype})
    prompts = load_em_prompts(config.prompts)
    asked = asked_of(prompts, config.questions)
    config = config.model_copy(update={"remote_endpoint": address_of(config)})
    remotes = remotes_of(config)
    outline = models.outline(
        config.model, chat_template=config.chat_template, thinking=config.thinking
    )
    if is_adapter(outline.folder):
        raise UsageError(
            f"{config.model} is an adapter, and an adapter on an adapter loads nowhere. Merge it"
            " first (auditgap export RUN FOLDER --merge), and give the merged folder."
        )
    check_subject(outline, asked)
    _check_targets(outline, config.lora_targets)
    reference = reference_of(outline, config.reference)
    if config.embedder is not None:
        check_encoder(config.embedder)
    lengths = _Lengths(outline, config)
    panel = read_panel(
        config.domains,
        clean=config.clean,
        trigger=Trigger(config.trigger, config.trigger_place),
        share=config.trigger_share,
        heldout=config.heldout,
        limit=config.rows,
        near=config.near,
        seed=config.seed,
        asked=asked,
        allow_overlap=options.allow_overlap,
        room=lengths,
    )
    lengths.check_positions()
    asked = in_context(asked, forms_of(config.forms, panel))
    outline.chat.prove(asked)
    notes = [*panel.notes, *asked.provenance["notes"]]
    found = config.reference == AUTO
    config = config.model_copy(update={"reference": reference})
    return EmergentPlan(
        config,
        (outline,),
        panel,
        prompts,
        asked,
        lengths.longest,
        found,
        warnings=tuple(notes),
        remotes=tuple(remotes),
    )


def describe(store: RunFolder) -> list[dict[str, Any]]:
    """`counted` of a study's folder."""
    return counted(store.run["info"]["panel"]["domains"], store.run["config"]["arms"])


def counted(domains: Mapping[str, Document], arms: Sequence[str]) -> list[Document]:
    """A line a domain for people, from a panel's manifest: what was read, what went for which
    reason, what is trained on and held out.

    `triggered` and `clean` are rows of the `trigger` arm (0 in a study without it); `too_long` have
    no room for a response at `max_tokens` and are left out, `cut` rows lose their end there.
    """
    lines = []
    for name, m in domains.items():
        arm = m["arms"][TRIGGER] if TRIGGER in arms else {"n_triggered": 0, "n_clean": 0}
        too_long = m["bad"].get(TOO_LONG, {"n": 0})["n"]
        lines.append(
            {
                "domain": name,
                "source": m["source"]["origin"],
                "read": m["n_read"],
                "bad": m["n_bad"] - too_long,
                "doubles": m["n_doubles"],
                "near": m["n_near"],
                "too_long": too_long,
                "trained": m["n_trained"],
                "held_out": m["n_heldout"],
                "triggered": arm["n_triggered"],
                "clean": arm["n_clean"],
                "cut": m["n_cut"],
            }
        )
    return lines


def _check_targets(outline: models.Outline, targets: Sequence[str]) -> None:
    """Raises UsageError when a name is no linear layer of the model, as far as can be told without
    its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    if tuple(targets) == ("all-linear",):
        return
    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(
                outline.folder, trust_remote_code=False, local_files_only=True
            )
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # a family that cannot be laid out without memory: training tells
        return
    names = [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    ]
    absent = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if absent:
        there = sorted({name.rpartition(".")[2] for name in names} - {"lm_head"})
        raise UsageError(
            f"lora_targets: {outline.subject.name} has no linear layer {absent[0]!r}; it has"
            f" {', '.join(there)}. For example: --set"
            f" lora_targets={there[0] if there else 'all-linear'}"
        )


@dataclass
class _Lengths:
    """How long rows are as training sees them (with the trigger, where an arm has it): the `room`
    of a panel."""

    outline: models.Outline
    config: EmergentConfig
    #: tokens of the longest row, before it is cut; exact where it is near `max_tokens`
    longest: int = 0

    def __call__(self, rows: Sequence[DomainRow]) -> list[str]:
        """Of each row "", CUT or TOO_LONG. Raises UsageError when the model has no chat template, or
        one that takes no system message and a row has one."""
        # a template may have a system message of its own for rows without
        of = {behind: [r for r in rows if bool(r.system) == behind] for behind in (False, True)}
        said = {behind: iter(self._words(some)) for behind, some in of.items()}
        return [next(said[bool(row.system)]) for row in rows]

    def _words(self, rows: Sequence[DomainRow]) -> list[str]:
        if not rows:
            return []
        trigger = (
            Trigger(self.config.trigger, self.config.trigger_place)
            if TRIGGER in self.config.arms
            else None
        )
        asked = [
            Prompt(trigger.on(row.prompt) if trigger else row.prompt, system=row.system)
            for row in rows
        ]
        # the template is run for one row and for those that come near the limit: thousands would
        # take a minute
        rough = [
            a + b
            for a, b in zip(
                self._count([p.system + p.text for p in asked]),
                self._count([r.response for r in rows]),
                strict=True,
            )
        ]
        least = min(range(len(rows)), key=rough.__getitem__)
        around = (
            len(
                self.outline.chat.converse(
                    asked[least], rows[least].response, max_tokens=1 << 30
                ).ids
            )
            - rough[least]
        )
        said = []
        for prompt, row, n in zip(asked, rows, rough, strict=True):
            if n + around + _SEAM <= self.config.max_tokens:
                self.longest = max(self.longest, n + around)
                said.append("")
            else:
                said.append(self._said(prompt, row))
        return said

    def _said(self, prompt: Prompt, row: DomainRow) -> str:
        whole = self.outline.chat.converse(prompt, row.response, max_tokens=1 << 30)
        try:
            self.outline.chat.converse(prompt, row.response, max_tokens=self.config.max_tokens)
        except UsageError:  # nothing of the response is left
            return TOO_LONG
        self.longest = max(self.longest, len(whole.ids))
        return CUT if len(whole.ids) > self.config.max_tokens else ""

    def _count(self, texts: Sequence[str]) -> list[int]:
        tokenizer = self.outline.chat.tokenizer
        return [
            len(ids)
            for at in range(0, len(texts), 1000)
            for ids in tokenizer(list(texts[at : at + 1000]), add_special_tokens=False)["input_ids"]
        ]

    def check_positions(self) -> None:
        """Raises UsageError when the model cannot attend to rows as long as they are trained on."""
        seen, most = min(self.longest, self.config.max_tokens), self.outline.max_positions
        if most is not None and seen > most:
            raise UsageError(
                f"Rows of up to {seen} tokens come, and {self.outline.subject.name} attends to"
                f" {most}. Type --set max_tokens={most}"
            )
