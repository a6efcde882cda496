"""The report as one HTML file: no network, no script but its own, nothing in it but what the store
holds.

    path = write([RunFolder.load("out")])        # out/report.html and out/figures/*.csv
    html = render(from_store([RunFolder.load("out")]))

Names, prompts and completions are strangers' text. jinja2 escapes all of it, every value passes
`text.clean` on its way out, and the page's own content security policy forbids requests and every
script but ours (by its hash, for sorting and choosing rows) even if that should fail. Without
scripts the page shows the same.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

import auditgap
from auditgap.errors import UsageError
from auditgap.report import (
    ballots,
    behaviour,
    correction,
    curve,
    emergent_page,
    emergent_study,
    figures,
    intervene,
    latent,
    paper,
    probe,
    suite,
    tables,
    text,
    verdicts,
)
from auditgap.report.columns import TableCell, count, show, word
from auditgap.report.figures import Figure, budget_label
from auditgap.report.gather import ReportData, from_store
from auditgap.report.reading import (
    SAYS_NOT,
    Setup,
    headline_budget,
    is_missing,
    method,
    says,
    setup,
)
from auditgap.store import RunFolder, files
from auditgap.store.remote import Place, outputs
from auditgap.store.tables import rows_of, to_csv
from auditgap.types import Label

__all__ = ["ReportData", "figures_of", "from_store", "render", "write"]

_LEFT_OUT = (word("what", "What"), word("reason", "Reason"), count("count", "Count"))

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


def _finalize(value: Any) -> Any:
    """What the template prints, cleaned; markup made by our own drawing functions passes."""
    if hasattr(value, "__html__"):
        return value
    return text.NOT_MEASURED if text.is_null(value) else text.clean(value)


@lru_cache(maxsize=1)
def _script() -> Markup:
    """The page's own script: nothing of a run is in it, so its hash in the page's policy lets it
    run, and it alone."""
    return Markup(
        resources.files("auditgap.report")
        .joinpath("templates/report.js")
        .read_text(encoding="utf-8")
    )


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("auditgap.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": text.number, "percent": text.percent}
    return environment


def is_judged(data: ReportData) -> bool:
    """Whether any number on the page is a judge's."""
    return is_corrected(data) or bool(data.emergent)


def is_corrected(data: ReportData) -> bool:
    """Whether shares on the page are set beside those behind the judge's errors."""
    return is_latent(data) or bool(
        len(data.sft_curve) or len(data.asked) or len(data.interventions)
    )


def is_latent(data: ReportData) -> bool:
    """Whether the page has a latent audit to show, or nothing else."""
    return bool(len(data.lvs) or len(data.gaps) or len(data.distance)) or not (
        len(data.sft_curve)
        or len(data.asked)
        or data.probes
        or len(data.interventions)
        or data.emergent
    )


def roles(data: ReportData) -> dict[str, dict[str, int]]:
    """Which layer index is `emb`, `mid` and `last`, a subject; without a recorded number of blocks
    only `emb` is known."""
    found = {}
    for subject in data.subjects:
        blocks = next(
            (
                subject[k]
                for k in ("n_blocks", "blocks", "n_layers")
                if not text.is_null(subject.get(k))
            ),
            None,
        )
        named = {"emb": -1}
        if isinstance(blocks, (int, float)) and blocks >= 1:
            named |= {"mid": min(int(blocks) - 1, round(int(blocks) / 2)), "last": int(blocks) - 1}
        found[str(subject.get("name", "?"))] = named
    return found


def figures_of(data: ReportData) -> dict[str, Figure]:
    """The report's figures by name; each `data` is what goes into figures/<name>.csv."""
    about = (
        "Bands are 95\u00a0% intervals of the attack and its matched control; a line breaks where a"
        " site was not measured. “emb.” is what the first block receives."
    )
    drawn = (
        figures.gap_by_budget(data.gaps),
        figures.by_depth(
            data.lvs,
            "lvs_mean",
            name="lvs_by_depth",
            title="LVS by depth",
            ylabel="LVS, mean",
            caption=about,
        ),
        figures.by_depth(
            data.lvs,
            "asr",
            name="asr_by_depth",
            title="Attack success rate by depth",
            ylabel="ASR",
            rate=True,
            caption=about,
        ),
        figures.lvs_bars(data.lvs, roles(data)),
        figures.survival(data.curves),
        curve.figure(data.sft_curve, curve.thresholds_of(data.sft_summary)),
    )
    if not len(data.sft_curve):  # the page has no place for a figure of it
        drawn = drawn[:-1]
    drawn += (figures.by_source(data.asked),) if len(data.asked) else ()
    drawn += (probe.histograms(data.probes),) if data.probes else ()
    drawn += intervene.figures_of(data.interventions)
    drawn += emergent_page.figures_of(data.emergent)
    return {figure.name: figure for figure in drawn}


def render(report: ReportData) -> str:
    """The page. Raw text is on it only if `report.exchanges` holds any (see
    `from_store(allow_raw=True)`)."""
    facts = setup(report.config, report.lvs)
    chosen = headline_budget(report.gaps, report.lvs)
    leads = (
        []
        if chosen is None
        else [r for r in rows_of(report.gaps) if (float(r["eps"]), str(r["unit"])) == chosen]
    )
    roles_, drawn = roles(report), figures_of(report)
    asked_says = behaviour.says(report.asked, report.differences)
    context = {
        "data": report,
        "version": auditgap.__version__,
        "header": _header(report, facts),
        "leads": [_lead(row) for row in leads],
        "sft_leads": curve.leads(report.sft_summary),
        "sft_says": curve.says(report.sft_summary) if leads else [],  # else the reading says it
        "sft_summary": show(report.sft_summary, curve.summary_shown(report.sft_summary)),
        "asked": show(report.asked, behaviour.ASKED),
        "asked_leads": behaviour.leads(report.asked),
        # else the reading says it
        "asked_says": asked_says if leads or len(report.sft_summary) else [],
        "differences": show(report.differences, behaviour.DIFFERENCES),
        "sources": show(suite.source_table(report.sources, report.n_asked), suite.SOURCES),
        "judges": ballots.shown(report.judges),
        "ties": ballots.ties(report.judges),
        "asked_method": [
            *curve.method(report.sft_summary),
            *behaviour.method(report.asked),
            *suite.engine_sentences(report.engines),
        ],
        "probe": probe.section(report.probes),
        "intervened": intervene.section(report.interventions),
        "emergent": emergent_page.sections(report.emergent),
        "em_leads": emergent_page.leads(report.emergent),
        "latent": is_latent(report),
        "judged": is_judged(report),
        "budget_rule": (
            "The headline speaks of the largest budget at which the median edit is not larger than"
            " half of what it edits; this rule looks at sizes, never at outcomes."
        ),
        "gaps": show(report.gaps, latent.GAPS),
        "readings": (
            [(row["subject"], says(row, report.lvs)) for row in leads]
            or curve.says(report.sft_summary)
            or asked_says
            or probe.says(report.probes)
            or intervene.says(report.interventions)
            or emergent_page.says(report.emergent)
            or [("", ["No audit gap was measured in this run."])]
        ),
        "says_not": [
            *(SAYS_NOT if is_latent(report) else ()),
            *(curve.SAYS_NOT if len(report.sft_summary) else ()),
            *(behaviour.SAYS_NOT if len(report.asked) else ()),
            *(probe.SAYS_NOT if report.probes else ()),
            *(intervene.SAYS_NOT if len(report.interventions) else ()),
            *(emergent_page.SAYS_NOT if report.emergent else ()),
        ],
        "script": _script(),
        "script_hash": (
            f"sha256-{base64.b64encode(hashlib.sha256(_script().encode('utf-8')).digest()).decode('ascii')}"
        ),
        "verdicts": report.verdicts,
        "overall": verdicts.overall(report.verdicts) if report.verdicts else "",
        "criteria": [
            (name.replace("_", " "), f"{bound:g}") for name, bound in report.criteria.items()
        ],
        "limits": [sentence for _, sentence in report.limits],
        "screening": any(
            "screening" in str(card.get("label", "")).lower() for card in report.cards
        ),
        "warnings": list(report.info.get("warnings") or ()),
        "no_controls": len(report.lvs) > 0 and set(report.lvs["attack"]) == {"targeted"},
        "figures": drawn,
        "distance": show(report.distance, latent.DISTANCE),
        "paper": paper,
        "ours": _ours(report.lvs, roles_),
        "paper_differences": paper.differences(facts.unit, facts.eps, report.reward, facts.prompts),
        "lvs": show(report.lvs, latent.LVS),
        "flags": [
            (flag, meaning) for flag, meaning in tables.FLAGS.items() if flag in _flags(report.lvs)
        ],
        "behaviour": show(_verdicts(report.behaviour), latent.CLEAN),
        "cards": [_card(card) for card in report.cards],
        "corrected": [
            c.says()
            for c in report.corrections.values()
            if (c.task == "harmful" and is_corrected(report)) or len(report.asked)
        ],
        "caveat": correction.CAVEAT,
        "left_out": show(report.left_out, _LEFT_OUT),
        "method": method(facts),
        "config": [
            (key, text.plain(value)) for key, value in text.without_secrets(report.config).items()
        ],
        "commands": _list(report.info.get("command")),
        "subjects": [
            {
                "name": s.get("name", "?"),
                "pairs": [
                    (str(k).replace("_", " "), text.plain(v)) for k, v in s.items() if k != "name"
                ],
            }
            for s in report.subjects
        ],
        "provenance": _provenance(report),
        "contents": _contents(report),
        "exchanges": [_exchange(exchange) for exchange in report.exchanges],
    }
    return _environment().get_template("report.html.j2").render(context)


def write(
    folders: Sequence[RunFolder],
    *,
    out: Place | None = None,
    allow_raw: bool = False,
    title: str | None = None,
    emergent: Sequence[emergent_study.Study] | None = None,
) -> Path:
    """Write report.html and figures/*.csv into `out` (None: the first folder), each atomically;
    returns the page's path.

    With `allow_raw` the page holds prompts and completions and is readable by its owner only
    (0600). Raises UsageError when no folder is given, DiskError when the disk is full.
    """
    if not folders:
        raise UsageError(
            "A report needs at least one run folder; none came. For example: auditgap report out"
        )
    report = from_store(folders, allow_raw=allow_raw, title=title, emergent=emergent)
    if out is not None:
        with outputs(out) as home:
            return write_report(report, home, private=allow_raw)
    page = write_report(report, folders[0].path, private=allow_raw)
    folders[0].publish()
    return page


def write_report(report: ReportData, home: Path, *, private: bool = False) -> Path:
    """Write the page and its figures' data into a folder; `private`: the page is for its owner
    alone. Raises as `write`."""
    if home.exists() and not home.is_dir():
        raise UsageError(
            f"{home} is a file; a report needs a folder, for report.html and figures/. Choose"
            " another name."
        )
    with files.disk_errors(home / "figures"):
        (home / "figures").mkdir(parents=True, exist_ok=True)
    twins = {
        figure.name: None if figure.missing else figure.data
        for figure in figures_of(report).values()
    }
    for name, data in {**twins, "judges": report.judges if len(report.judges) else None}.items():
        twin = home / "figures" / f"{name}.csv"
        if data is None:
            twin.unlink(missing_ok=True)  # the data of an earlier report would pass for this one's
        else:
            files.write_bytes(twin, to_csv(data).encode("utf-8", "backslashreplace"))
    files.write_bytes(
        home / "report.html", render(report).encode("utf-8"), files.PRIVATE if private else 0o666
    )
    return home / "report.html"


# ------------------------------------------------------------------------------------------------------
# the page's parts


def _list(value: Any) -> list[str]:
    if not value:
        return []
    return [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]


def _header(report: ReportData, facts: Setup) -> list[str]:
    n = (
        max((int(v) for v in report.gaps["n"] if not text.is_null(v)), default=0)
        if len(report.gaps)
        else 0
    )
    said = [f"{n} prompts scored" if n else "no prompt scored"]
    if facts.eps:
        said.append(f"ε = {', '.join(f'{e:g}' for e in facts.eps)} {facts.unit or ''}")
    sites = report.lvs["site"].nunique() if len(report.lvs) else 0
    said.append(f"{sites} site{'' if sites == 1 else 's'}")
    if not is_latent(report):
        said = curve.header(report.sft_summary) or behaviour.header(report.asked)
        said += (
            probe.header(report.probes)
            + intervene.header(report.interventions)
            + emergent_page.header(report.emergent)
        )
    status = report.status
    if status:
        said.append(
            f"{status['finished']} of {max(status['planned'], status['finished'])} cells finished"
            + (f", {status['failed']} failed" if status["failed"] else "")
            + (f", {status['missing']} missing" if status.get("missing") else "")
        )
        if status.get("last_write"):
            said.append(f"{status['last_write']:%-d %B %Y, %H:%M} UTC")
    return said


def _lead(row: Mapping[str, Any]) -> dict[str, Any]:
    """The headline's figures for one subject, as text."""
    digits = 0 if row["n"] < 200 else 1

    said = {"subject": row["subject"], "budget": budget_label(row["eps"], row["unit"])}
    for key, form in (("safety", text.percent), ("robustness", text.percent), ("gap", text.points)):
        said[key] = None if text.is_null(row[key]) else form(row[key], digits)
        said[f"{key}_ci"] = text.interval(
            row[f"{key}_lo"], row[f"{key}_hi"], partial(form, digits=digits)
        )
    return said


def _flags(lvs: pd.DataFrame) -> set[str]:
    return {word for words in lvs["flag"].dropna() for word in str(words).split()}


def _verdicts(behaviour: pd.DataFrame) -> pd.DataFrame:
    """The clean verdicts as one row a subject and label: count and share with its interval."""
    rows = [
        {
            "subject": row["subject"],
            "n": row["n"],
            "verdict": str(label),
            "count": row[label],
            "share": row.get(f"{label}_rate"),
            "share_lo": row.get(f"{label}_lo"),
            "share_hi": row.get(f"{label}_hi"),
        }
        for row in rows_of(behaviour)
        for label in Label
    ]
    return pd.DataFrame(rows)


def _ours(lvs: pd.DataFrame, named: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """Our rows for the Table-1 view: mean LVS of the targeted attack at emb, mid and last, a
    subject and budget."""
    rows = []
    targeted = lvs[lvs["attack"] == "targeted"] if len(lvs) else lvs
    for (subject, unit, eps), part in targeted.groupby(["subject", "unit", "eps"], sort=False):
        cells = []
        for role in ("emb", "mid", "last"):
            found = rows_of(part[part["layer_index"] == named.get(str(subject), {}).get(role, -99)])
            row = (
                found[0] if found else {"lvs_mean": None, "lvs_mean_lo": None, "lvs_mean_hi": None}
            )
            unscored = bool(found) and text.is_null(row["lvs_mean"])
            null = text.UNSCORED if unscored else text.NOT_MEASURED
            reading = text.with_interval(
                row["lvs_mean"], row["lvs_mean_lo"], row["lvs_mean_hi"], null=null
            )
            cells.append(TableCell(reading, "null" if text.is_null(row["lvs_mean"]) else "num"))
        rows.append({"subject": subject, "budget": f"{eps:g} {unit}", "cells": cells})
    return rows


def _card(card: Mapping[str, Any]) -> dict[str, Any]:
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
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        reading = form(value) if numeric else text.plain(value)
        if ends:
            lo, hi = ends
            reading = f"{reading}\u00a0{text.interval(lo, hi, form)}"
        pairs.append((name, reading))
    pairs += [
        (str(k).replace("_", " "), text.plain(v))
        for k, v in text.without_secrets(card).items()
        if k not in known
    ]
    return {"name": card.get("name", "judge"), "label": card.get("label", ""), "pairs": pairs}


def _provenance(report: ReportData) -> list[tuple[str, str]]:
    shown = {
        "command",
        "warnings",
        "subjects",
        "judge_cards",
        "refused",
        "reward",
        *(["panel"] if report.emergent else []),
    }
    pairs = [("auditgap", auditgap.__version__)]
    for key, value in text.without_secrets(report.info).items():
        if key in shown or value in (None, "", [], {}):
            continue
        if key in ("versions", "machine") and isinstance(value, Mapping):
            pairs += [
                (str(k).replace("_", " "), text.plain(v))
                for k, v in value.items()
                if k != "auditgap"
            ]
            continue
        if key == "prompts" and report.sources:  # what became of every row has its own table
            each = [value] if isinstance(value, Mapping) else value
            value = [
                {k: v for k, v in told.items() if k not in suite.SHOWN}
                for told in each
                if isinstance(told, Mapping)
            ]
        pairs.append((str(key).replace("_", " "), text.plain(value)))
    status = report.status
    if status:
        pairs.append(
            (
                "computing time",
                f"{status['seconds']:,.0f} s over {status['finished']} finished cells",
            )
        )
        if status["corrupt"]:
            pairs.append(("damaged files", str(status["corrupt"])))
    return pairs


def _exchange(exchange: Mapping[str, Any]) -> dict[str, Any]:
    """Where an exchange comes from, in one line, and its longer texts."""
    long = [
        (k, v)
        for k, v in exchange.items()
        if isinstance(v, str) and k in ("prompt", "completion", "text", "clean", "edited")
    ]
    long += [
        (k, v)
        for k, v in exchange.items()
        if isinstance(v, str) and k not in dict(long) and (len(v) > 60 or "\n" in v)
    ]
    shown = {
        k: v
        for k, v in exchange.items()
        if k not in dict(long) and isinstance(v, (str, bool, int, float)) and v != ""
    }
    where = [
        str(v) if k == "cell" else f"{k.replace('_', ' ')} {text.plain(v)}"
        for k, v in shown.items()
    ]
    return {"where": " · ".join(where), "texts": [(k.replace("_", " "), v) for k, v in long]}


def _contents(report: ReportData) -> list[tuple[str, str]]:
    latent = [
        ("depth", "By depth"),
        ("sites", "Embedding, middle, last"),
        ("distance", "Distance to collapse"),
        ("table1", "Paper’s Table 1"),
        ("table", "Every measurement"),
        ("behaviour", "Behaviour"),
    ]
    names = [
        *([("verdicts", "Verdicts"), ("limits", "Limits")] if report.verdicts else []),
        ("reading", "Reading"),
        *([("sft-curve", "Harmful fine-tuning")] if len(report.sft_summary) else []),
        *([("asked", "When asked")] if len(report.asked) else []),
        *([("suite", "What was asked")] if report.sources else []),
        *([("probe", "Fixed probe")] if report.probes else []),
        *([("interventions", "Interventions")] if len(report.interventions) else []),
        *emergent_page.contents(report.emergent),
        *(latent if is_latent(report) else []),
        *(
            [("judge", "Judge and reward" if is_latent(report) else "Judge")]
            if is_judged(report)
            else []
        ),
        *([("power", "Power")] if is_latent(report) or report.power else []),
        ("left-out", "Left out"),
        ("method", "Method"),
        ("provenance", "Repeat this"),
    ]
    return names + ([("exchanges", "Prompts and completions")] if report.exchanges else [])
