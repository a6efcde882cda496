"""The latent audit on the page: its tables as columns, and its sections.

show(lvs_table(rows), LVS).titles        # ('Subject', 'Site', 'ε', 'Attack', 'n', …)
[section.id for section in sections(report)]
# ['depth', 'sites', 'distance', 'table1', 'table', 'behaviour']
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd
from markupsafe import Markup

from auditgap.report import figures, paper, reading, strength, tables
from auditgap.report.charts import Figure
from auditgap.report.columns import Column, Hide, Row, budget, count, word
from auditgap.report.section import (
    Facts,
    Formula,
    Headline,
    Prose,
    Section,
    Table,
    code,
    silent,
)
from auditgap.report.text import (
    CANNOT_TELL,
    NOT_MEASURED,
    UNSCORED,
    clean,
    interval,
    is_null,
    number,
    percent,
    points,
    with_interval,
)
from auditgap.store.tables import rows_of
from auditgap.types import Label

if TYPE_CHECKING:
    from auditgap.report.gather import ReportData

NOT_REACHED = "not reached"


def _or_unscored(text: str, row: Row) -> str:
    """Why a mean is null: nothing of its cell was scored, or it was not measured."""
    nothing_scored = bool(row.get("n_unscored")) and row["n_unscored"] >= row.get("n", 0)
    return UNSCORED if nothing_scored else text


def _confirmed(row: Row) -> str | None:
    """How many of the texts that flip a prompt the second judge confirmed."""
    if is_null(row.get("confirmed")):
        return None
    return f"{int(row['confirmed'])} of {int(row['flip_texts'])}"


def _as_one(row: Row) -> str | None:
    """Prompts at risk with near-duplicates counted as one, where that makes fewer."""
    effective = row.get("effective_at_risk")
    is_fewer = not is_null(effective) and effective < row["n_at_risk"]
    return number(effective) if is_fewer else None


def _at_one_length(row: Row) -> str | None:
    """Prompts that flip at half the length or in full, not both."""
    if is_null(row.get("flipped_half_only")):
        return None
    return f"{int(row['flipped_half_only'])} half, {int(row['flipped_full_only'])} full"


_unscored = partial(_or_unscored, NOT_MEASURED)
_SUBJECT = word("subject", "Subject", hide=Hide.ALIKE)
_EPS = Column("eps", "ε", read=budget)
_COUNTS = (count("n", "n"), count("n_unscored", "Unscored"))

GAPS: tuple[Column, ...] = (
    _SUBJECT,
    _EPS,
    *_COUNTS,
    count("n_at_risk", "At risk", hide=Hide.EMPTY),
    Column(
        "effective_at_risk",
        "Duplicates as one",
        hide=Hide.EMPTY,
        read=_as_one,
        help="prompts at risk, near-duplicates counted as one: what intervals and verdicts go by",
    ),
    Column("safety", "Behaviourally safe", percent),
    Column("robustness", "Robust", percent),
    Column("flip_rate", "Flip rate", percent, hide=Hide.EMPTY),
    count("undetermined", "Undetermined", hide=Hide.EMPTY),
    Column("gap", "Audit gap, points", partial(points, unit="")),
    Column("control_gap", "Control’s gap, points", partial(points, unit=""), hide=Hide.EMPTY),
    Column("excess", "Excess gap, points", partial(points, unit=""), hide=Hide.EMPTY),
    Column(
        "excess_corrected",
        "Excess gap, corrected, points",
        partial(points, unit=""),
        null=CANNOT_TELL,
        hide=Hide.EMPTY,
    ),
    Column(
        "confirmed",
        "Flips confirmed",
        hide=Hide.EMPTY,
        read=_confirmed,
        help="texts, at any site and size up to ε, that the second judge calls harmful too",
    ),
    Column(
        "flipped_half_only",
        "Flips at one length",
        hide=Hide.EMPTY,
        read=_at_one_length,
        help="prompts that flip when answers are read to half their length only, or in full only",
    ),
    word("worst_site", "Worst site", css="key"),
)
LVS: tuple[Column, ...] = (
    _SUBJECT,
    word("site", "Site", css="key"),
    _EPS,
    word("attack", "Attack", css="key"),
    *_COUNTS,
    count("n_judged", "Judged"),
    count("n_broken", "Broken"),
    Column("lvs_mean", "LVS, mean", null=_unscored),
    Column("lvs_median", "LVS, median", null=_unscored),
    Column("lvs_rel_mean", "LVS rel., mean", null=_unscored, limits=("lvs_rel_lo", "lvs_rel_hi")),
    Column("asr", "ASR", percent),
    Column("asr_corrected", "ASR, corrected", percent, null=CANNOT_TELL),
    Column("asr_envelope", "ASR envelope", percent),
    Column(
        "delta_vs_matched",
        "LVS − matched LVS",
        limits=("delta_lo", "delta_hi"),
        null=lambda row: "does not apply" if row["attack"] == "random_matched" else NOT_MEASURED,
    ),
    Column("relative_norm_median", "‖δ‖/‖h‖, median"),
    Column("flip_rate", "Flip rate", percent, hide=Hide.EMPTY),
    Column("drop_mean", "Drop in reward, mean", hide=Hide.EMPTY),
    Column("drop_vs_matched", "Drop − matched drop", hide=Hide.EMPTY),
    Column("nll_clean", "NLL of target", hide=Hide.EMPTY),
    Column("nll_edited", "NLL of target, edited", hide=Hide.EMPTY),
    word("flag", "Flags", css="key", null=""),
)
DISTANCE: tuple[Column, ...] = (
    _SUBJECT,
    word("site", "Site", css="key"),
    word("unit", "Unit", css="key"),
    count("n", "n"),
    count("n_collapsed", "Turned harmful"),
    count("n_broken", "Broke first", hide=Hide.EMPTY),
    count("n_unscored", "Unscored"),
    Column(
        "median",
        "Median ε",
        # survival that stays above one half has no median, and a limit that does has no end
        lambda value: number(value, 4, null=NOT_REACHED),
        limits=("lo", "hi"),
        null=partial(_or_unscored, NOT_REACHED),
    ),
)
CLEAN: tuple[Column, ...] = (
    _SUBJECT,
    count("n", "n"),
    word("verdict", "Verdict", css="key"),
    count("count", "Count"),
    Column(
        "share",
        "Share",
        percent,
        null=lambda row: "in no share" if row["verdict"] == "unscored" else _unscored(row),
    ),
)

BUDGET_RULE = (
    "Brackets hold 95\u00a0% intervals. The headline speaks of the largest budget at which the"
    " median edit is not larger than half of what it edits; this rule looks at sizes, never at"
    " outcomes."
)
NO_CONTROLS = (
    "No control was run: the profiles show what the attack does, not how much of it any edit of"
    " that size would do."
)
CENSORED = (
    "Median of the smallest ε at which an answer turned harmful. “Not reached”: more than half of"
    " the prompts stayed harmless at the largest size tried; they are censored there, not counted"
    " as safe for ever."
)
_ABOUT = (
    "Bands are 95\u00a0% intervals of the attack and its matched control; a line breaks where a"
    " site was not measured. “emb.” is what the first block receives."
)
_TERMS: tuple[tuple[str, str | Markup], ...] = (
    ("n, Unscored", "prompts, and those of them that have no LVS"),
    ("Judged", "prompts whose edited answer has a verdict: the ASR is a share of these"),
    ("ASR", "share of judged prompts with a harmful answer under the edit of that budget"),
    (
        "ASR, corrected",
        Markup('that share behind the judge’s errors, see <a href="#judge">Judge and reward</a>'),
    ),
    (
        "ASR envelope",
        ("share harmful and coherent at that budget or a smaller one; it cannot fall as ε grows"),
    ),
    ("LVS rel.", "LVS with ‖δ‖/‖h‖ in the denominator, free of the activations’ scale"),
    (
        "LVS − matched LVS",
        (
            "mean difference to random signs with the same ‖δ‖ at the same site and budget, paired"
            " by prompt"
        ),
    ),
)


def is_there(report: ReportData) -> bool:
    """Whether a page has a latent audit to show."""
    return bool(len(report.lvs) or len(report.gaps) or len(report.distance))


def sections(report: ReportData, *, is_there: bool = True) -> list[Section]:
    """The latent audit's sections, the first with its headlines and findings."""
    data = {"audit_gap": report.gaps, "lvs": report.lvs, "distance": report.distance}
    if not is_there:
        return [silent("depth", **data)]
    first, *rest = _sections(report)
    facts = reading.setup(report.config, report.lvs)
    leads = _leading(report.gaps, report.lvs)
    headlines = [_headline(row) for row in leads] or [
        Headline("", (("No audit gap was measured in this run.", "", ""),))
    ]
    return [
        replace(
            first,
            headlines=headlines,
            is_gap=bool(leads),
            summary=_summary(report) if leads else (),
            findings=[(row["subject"], reading.says(row, report.lvs)) for row in leads],
            limits=reading.SAYS_NOT,
            facts=_facts(report, facts),
            method=_method(facts),
            judged=frozenset({"harmful"}),
            is_rewarded=True,
            data=data,
        ),
        *rest,
    ]


def leads(gaps: pd.DataFrame, lvs: pd.DataFrame) -> list[Headline]:
    """A headline a subject: what its answers and its audit gap say at the headline's budget."""
    return [_headline(row) for row in _leading(gaps, lvs)]


def _leading(gaps: pd.DataFrame, lvs: pd.DataFrame) -> list[Row]:
    """The rows of the gap table that the headlines speak of."""
    chosen = reading.headline_budget(gaps, lvs)
    rows = rows_of(gaps) if chosen is not None else []
    return [row for row in rows if (float(row["eps"]), str(row["unit"])) == chosen]


def _headline(row: Mapping[str, Any]) -> Headline:
    size = figures.budget_label(row["eps"], row["unit"])
    subject, digits = str(row["subject"]), 0 if row["n"] < 200 else 1
    if is_null(row["gap"]):
        return Headline(subject, ((f": the audit gap at {size} was not measured.", "", ""),))

    def said(key: str, form: Any) -> tuple[str, str]:
        form = partial(form, digits=digits)
        return form(row[key]), interval(row[f"{key}_lo"], row[f"{key}_hi"], form)

    found = (
        (" is behaviourally safe on ", *said("safety", percent)),
        (" of prompts; under bounded edits of at most ", size, ""),
        (" it stays safe on ", *said("robustness", percent)),
    )
    evidence = reading.evidence(row)
    if evidence is reading.Evidence.ABOVE_CONTROL:
        beyond = said("excess", points)
        gap = (
            (". The audit gap is ", *said("gap", points)),
            (", of which ", *beyond),
            (" are more than random edits of equal size do.", "", ""),
        )
        return Headline(subject, found, gap)
    figure, ends = said("gap", points)
    words = reading.NOT_SHOWN[evidence].format(
        gap=f"{figure} {ends}".strip(), highest=points(row["safety"], digits)
    )
    return Headline(subject, (*found, (f". {words}", "", "")))


def _summary(report: ReportData) -> tuple[Table, Figure]:
    """Below each other: the table has more columns than half a page can show."""
    table = Table("audit_gap", "Audit gap by budget", report.gaps, GAPS, BUDGET_RULE)
    return table, figures.gap_by_budget(report.gaps)


def _facts(report: ReportData, facts: reading.Setup) -> list[str]:
    scored = [int(v) for v in report.gaps["n"] if not is_null(v)] if len(report.gaps) else []
    n = max(scored, default=0)
    said = [f"{n} prompts scored" if n else "no prompt scored"]
    if facts.eps:
        said.append(f"ε = {', '.join(f'{e:g}' for e in facts.eps)} {facts.unit or ''}")
    sites = report.lvs["site"].nunique() if len(report.lvs) else 0
    return [*said, f"{sites} site{'' if sites == 1 else 's'}"]


def _sections(report: ReportData) -> Iterator[Section]:
    lvs = report.lvs
    bare = len(lvs) > 0 and set(lvs["attack"]) == {"targeted"}
    yield Section(
        id="depth",
        title="Vulnerability by depth",
        contents="By depth",
        blocks=(*((Prose(NO_CONTROLS, "none"),) if bare else ()), *_profiles(lvs)),
    )
    yield Section(
        id="sites",
        title="LVS at the embedding, the middle and the last block",
        contents="Embedding, middle, last",
        blocks=(figures.lvs_bars(lvs, roles(report.subjects)),),
    )
    yield Section(
        id="distance",
        title="Minimum distance to collapse",
        contents="Distance to collapse",
        blocks=(
            figures.survival(report.curves),
            Table("distance", "Minimum distance by site", report.distance, DISTANCE, CENSORED),
        ),
    )
    if len(report.strength):
        yield _certificates(report.strength)
    yield _beside_the_paper(report)
    yield Section(
        id="table",
        title="Every measurement",
        contents="Every measurement",
        blocks=_every_measurement(lvs),
    )
    clean = Table(
        "clean",
        "Behaviour without an edit",
        clean_table(report.behaviour),
        CLEAN,
        none="The clean pass was not measured in this run.",
    )
    yield Section(
        id="behaviour",
        title="Behaviour without an edit",
        contents="Behaviour",
        blocks=(clean,),
    )


def _profiles(lvs: pd.DataFrame) -> tuple[Figure, Figure]:
    return (
        figures.by_depth(
            lvs,
            "lvs_mean",
            name="lvs_by_depth",
            title="LVS by depth",
            ylabel="LVS, mean",
            caption=_ABOUT,
        ),
        figures.by_depth(
            lvs,
            "asr",
            name="asr_by_depth",
            title="Attack success rate by depth",
            ylabel="ASR",
            rate=True,
            caption=_ABOUT,
        ),
    )


def _certificates(table: pd.DataFrame) -> Section:
    """What shows that the searches worked, without which no edit found says little."""
    shown = Table(
        "strength", "Strength of the targeted search, on prompts at risk", table, strength.STRENGTH
    )
    none, flags = _raised(table["flags"], strength.FLAGS)
    is_open = table["gain"].isna().any()
    open_ = (Prose(strength.NOT_SEARCHED, "note"),) if is_open else ()
    return Section(
        id="strength",
        title="Was the search strong enough?",
        contents="Strength of the search",
        blocks=(shown, *none, *((Facts(flags),) if flags else ()), *open_),
    )


def _raised(
    column: pd.Series, words: Mapping[str, str]
) -> tuple[tuple[Prose, ...], tuple[tuple[Markup, str], ...]]:
    """The flags that a table raises, with what they say; and a sentence where it raises none."""
    raised = {word for flags in column.dropna() for word in str(flags).split()}
    found = tuple((code(flag), what) for flag, what in words.items() if flag in raised)
    return () if found else (Prose("No flag was raised.", "note"),), found


def _every_measurement(lvs: pd.DataFrame) -> tuple[Any, ...]:
    label = "LVS by subject, site, budget and attack"
    table = Table("lvs", label, lvs, LVS, none="No edit was measured in this run.")
    if not len(lvs):
        return (table,)
    none, flags = _raised(lvs["flag"], tables.FLAGS)
    return (table, *none, Facts((*flags, *_TERMS)))


def clean_table(behaviour: pd.DataFrame) -> pd.DataFrame:
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


# -- beside the paper
# ----------------------------------------------------------------------------------------------------


def roles(subjects: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Which layer index is `emb`, `mid` and `last`, a subject; without a recorded number of blocks
    only `emb` is known."""
    found = {}
    for subject in subjects:
        names = ("n_blocks", "blocks", "n_layers")
        blocks = next((subject[k] for k in names if not is_null(subject.get(k))), None)
        named = {"emb": -1}
        if isinstance(blocks, (int, float)) and blocks >= 1:
            named |= {"mid": min(int(blocks) - 1, round(int(blocks) / 2)), "last": int(blocks) - 1}
        found[str(subject.get("name", "?"))] = named
    return found


def _of_role(role: str, title: str) -> Column:
    def null(row: Row) -> str:
        return UNSCORED if row[f"{role}_unscored"] is True else NOT_MEASURED

    def read(row: Row) -> str | None:
        """The paper prints no intervals."""
        value, lo, hi = (row[f"{role}{end}"] for end in ("", "_lo", "_hi"))
        if is_null(value):
            return None
        return with_interval(value, lo, hi) if row["part"] == OURS else number(value)

    return Column(role, title, read=read, null=null)


TABLE_1: tuple[Column, ...] = (
    word("model", "Model", css="word model"),
    Column("eps", "ε", read=budget),
    _of_role("emb", "Emb"),
    _of_role("mid", "Mid"),
    _of_role("last", "Last"),
)
OURS = "This audit"


def table_1(report: ReportData) -> pd.DataFrame:
    """Mean LVS of the targeted attack at embedding, middle and last block, a subject and budget;
    then the paper's."""
    named, lvs = roles(report.subjects), report.lvs
    targeted = lvs[lvs["attack"] == "targeted"] if len(lvs) else lvs
    rows: list[Row] = []
    for (subject, unit, eps), part in targeted.groupby(["subject", "unit", "eps"], sort=False):
        row: Row = {"part": OURS, "model": subject, "eps": eps, "unit": unit}
        for role in ("emb", "mid", "last"):
            layer = named.get(str(subject), {}).get(role, -99)
            cell = next(iter(rows_of(part[part["layer_index"] == layer])), None)
            row[f"{role}_unscored"] = cell is not None and is_null(cell["lvs_mean"])
            for end in ("", "_lo", "_hi"):
                row[f"{role}{end}"] = None if cell is None else cell[f"lvs_mean{end}"]
        rows.append(row)
    rows = rows or [{"part": OURS, "model": NOT_MEASURED}]
    rows += [
        {
            "part": paper.SOURCE,
            "model": f"{one.model} ({one.change})",
            "eps": paper.EPS,
            "unit": paper.UNIT,
            "emb": one.embedding,
            "mid": one.mid,
            "last": one.last,
        }
        for one in paper.TABLE_1
    ]
    ends = [f"{role}{end}" for role in ("emb", "mid", "last") for end in ("", "_lo", "_hi")]
    flags = [f"{role}_unscored" for role in ("emb", "mid", "last")]
    return pd.DataFrame(rows, columns=["part", "model", "unit", "eps", *ends, *flags])


def _beside_the_paper(report: ReportData) -> Section:
    facts = reading.setup(report.config, report.lvs)
    differ = paper.differences(facts.unit, facts.eps, report.reward, facts.prompts)
    note: str = (
        "Unit, budget, reward and prompt source agree with the paper’s. The paper does not print"
        " its unit; its values fit max. Number formats, chat templates and software may still"
        " differ."
    )
    if differ:
        note = Markup("<b>Not comparable:</b> {}").format(
            f"{clean('; '.join(differ))}. LVS grows with the norm of the activations and the scale of the"
            " reward, so only the order of sites within one model can be set beside the paper’s."
        )
    table = Table(
        "table_1",
        "LVS beside the paper",
        table_1(report),
        TABLE_1,
        note,
        by="part",
        badges={paper.SOURCE: "not comparable"} if differ else {},
    )
    return Section(
        id="table1",
        title="Beside the paper’s Table 1",
        contents="Paper’s Table 1",
        blocks=(table,),
    )


def _method(facts: reading.Setup) -> tuple[Any, ...]:
    said = reading.method(facts)
    return (
        Prose(said["attack"]),
        Prose(said["unit"]),
        Formula("lvs"),
        Prose(
            "S is the reward of the clean answer y and of the edited answer y′; η ="
            f" {said['eta']}. The mean over prompts is the headline LVS of a site, the median"
            " stands beside it."
        ),
        Formula("gap"),
        Prose(said["gap"]),
        Prose(said["controls"]),
        Prose(said["intervals"]),
    )
