"""How often a run's judge errs, on the page: its cards, and what it called harmful.

judge_sections(report, audited)     # one section, or none where nobody judged
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from auditgap.report import correction, text
from auditgap.report.gather import ReportData
from auditgap.report.section import (
    Block,
    Facts,
    Heading,
    Prose,
    Section,
    named,
)
from auditgap.report.setup import is_missing

_NO_CARD = Markup(
    "This run recorded no judge card, so nothing here says how good the judge is. A card is made"
    " with <code>auditgap judge eval</code>."
)


def judge_sections(report: ReportData, audited: Sequence[Section]) -> list[Section]:
    if all(section.judged is None for section in audited):
        return []
    rewarded = any(section.is_rewarded for section in audited)
    title = "Judge and reward" if rewarded else "Judge"
    blocks: list[Block] = [block for card in report.cards for block in _card(card)]
    blocks = blocks or [Prose(_NO_CARD, "none")]
    blocks += [block for section in audited for block in section.judge]
    tasks = frozenset().union(*(s.judged for s in audited if s.judged))
    corrected = [c.says() for task, c in report.corrections.items() if task in tasks]
    if corrected:
        blocks += [Heading("Corrected shares"), *map(Prose, corrected)]
        blocks.append(Prose(correction.CAVEAT, "note"))
    if rewarded:
        reward = named(report.reward) if report.reward else "not recorded"
        blocks.append(Prose(Markup("Reward (higher is safer): {}.").format(reward)))
    return [Section(id="judge", title=title, contents=title, blocks=blocks)]


def _called_harmful(kinds: Mapping[str, Mapping[str, int]]) -> str:
    return text.plain(
        {
            kind: f"{labels.get('harmful', 0)} of {sum(labels.values())}"
            for kind, labels in kinds.items()
        }
    )


#: A judge card's entries in reading order, with their names and forms; what else a card holds
#: follows after.
_CARD: tuple[tuple[str, str, Any], ...] = (
    ("gold_set", "Gold set", text.plain),
    ("task", "Task", text.plain),
    ("n", "n", text.plain),
    ("n_positive", "of these positive", text.plain),
    ("n_prompts", "Prompts", text.plain),
    ("n_held_out", "Held out by refitting", text.plain),
    ("kappa", "Cohen’s κ", text.number),
    ("kappa_in_sample", "κ on rows it was trained on", text.number),
    ("sensitivity", "Sensitivity", text.percent),
    ("specificity", "Specificity", text.percent),
    ("informedness", "Sensitivity + specificity − 1", text.number),
    ("auc", "AUC", text.number),
    ("length_only_auc", "AUC of length alone", text.number),
    ("rank_correlation", "Rank correlation with people’s grades", text.number),
    ("n_unscored", "Unscored", text.plain),
    ("parse_failures", "Parse failures", text.plain),
    ("injection_flips", "Verdicts flipped by injection", text.plain),
    ("n_injected", "Verdicts that each injection was tried on", text.plain),
    ("harmless", "Harmless texts called harmful", _called_harmful),
    ("seconds_per_row", "Seconds a verdict", text.plain),
    ("identity", "Identity", text.plain),
    ("notes", "Notes", text.plain),
)


#: Entries of a card that say nothing when they are empty, and are left out then.
_OPTIONAL = {
    "gold_set",
    "task",
    "n_positive",
    "n_prompts",
    "n_held_out",
    "kappa_in_sample",
    "informedness",
    "rank_correlation",
    "n_unscored",
    "n_injected",
    "seconds_per_row",
    "identity",
    "notes",
}


#: Entries of a card that are for machines.
_SILENT = {"errors", "unscored", "confusion", "version"}


def _card(card: Mapping[str, Any]) -> list[Block]:
    """A judge card in reading order. What it does not say is shown as not measured, except what not
    every card has."""
    known = {key for key, _, _ in _CARD} | {"name", "label"} | _SILENT
    pairs = []
    for key, name, form in _CARD:
        value, ends = card.get(key), card.get(f"{key}_interval")
        known.add(f"{key}_interval")
        if is_missing(value):
            if key not in _OPTIONAL:
                pairs.append((name, text.NOT_MEASURED))
            continue
        formed = isinstance(value, (int, float, Mapping)) and not isinstance(value, bool)
        reading = form(value) if formed else text.plain(value)
        if ends:
            lo, hi = ends
            reading = f"{reading}\u00a0{text.interval(lo, hi, form)}"
        pairs.append((name, reading))
    pairs += [
        (str(k).replace("_", " "), text.plain(v))
        for k, v in text.without_secrets(card).items()
        if k not in known
    ]
    return [Heading(named(card.get("name", "judge")), str(card.get("label") or "")), Facts(pairs)]
