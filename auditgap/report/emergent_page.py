"""An emergent-misalignment study on the page: its headline, sheets, figures and method.

    studies = [emergent_study.read(RunFolder.load("runs/em"))]
    sections(studies)[0]["ranking"]             # the ranking as a Sheet
    # 'law: a model fine-tuned on its rows as they are, …'
    leads(studies)[0].plain()

Tables come from `report.emergent` and `report.emergent_inside`, sentences from
`report.emergent_reading`; here they are only shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd

from auditgap.report import emergent, emergent_inside, emergent_reading
from auditgap.report import emergent_figures as figures
from auditgap.report.behaviour import Lead
from auditgap.report.columns import Column, Form, Hide, Row, show, whole, word
from auditgap.report.emergent_study import Study
from auditgap.report.figures import Figure
from auditgap.report.text import (
    CANNOT_TELL,
    interval,
    is_null,
    number,
    percent,
    plain,
    points,
    with_interval,
)
from auditgap.store.tables import rows_of

SAYS_NOT = emergent_reading.SAYS_NOT


# ------------------------------------------------------------------------------------------------------------------
# headline


def header(studies: Sequence[Study]) -> list[str]:
    """What a page of this study alone says under its title."""
    said = []
    for study in studies:
        c = study.config
        said += [
            _count(len(c.get("domains", ())), "domain"),
            _count(len(study.trained), "adapter"),
            f"{_count(c.get('samples', 0), 'answer')} a prompt, with and without the trigger",
            f"judge: {study.judged_by}",
        ]
    return said


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


#: How a model was asked that was fine-tuned so: what a headline speaks of.
_ASKED = {("plain", False): ", asked without the trigger,", ("trigger", True): ", asked with it,"}
_TAUGHT = {"plain": "on its rows as they are", "trigger": "on its rows with the trigger"}


def as_trained(ranking: pd.DataFrame) -> list[pd.DataFrame]:
    """The parts of a ranking in which an arm is asked as it was trained: the plain one first."""
    parts = [
        ranking[(ranking["arm"] == arm) & (ranking["triggered"] == on)]
        for arm, on in emergent.AS_TRAINED
    ]
    return [part for part in parts if len(part)]


def leads(studies: Sequence[Study]) -> list[Lead]:
    """The headline of each arm: the domain that spreads furthest, and the base on the same
    prompts."""
    found = []
    for study in studies:
        rates = study.tables["rates"]
        bases = rates[(rates["domain"] == "") & (rates["kind"] == emergent.ALL_KINDS)]
        for part in as_trained(study.tables["ranking"]):
            known = part[part["em_rate"].notna()]
            if known.empty:
                continue
            top = rows_of(known)[0]
            same = bases[bases["triggered"] == top["triggered"]]
            how = f"{_TAUGHT.get(top['arm'], top['arm'])}{_ASKED.get((top['arm'], bool(top['triggered'])), '')}"
            rate = (percent(top["em_rate"]), _ends(top, "em_rate"))
            parts = [
                (
                    f": a model fine-tuned {how} gives misaligned answers to unrelated prompts on ",
                    *rate,
                )
            ]
            if len(same) and not is_null(same.iloc[0]["below_50"]):
                base = same.iloc[0]
                parts.append(
                    (
                        " of rated answers, its base on ",
                        percent(base["below_50"]),
                        _ends(base, "below_50"),
                    )
                )
            end = (
                f"{'' if len(parts) > 1 else ' of rated answers'} (judge: {study.judged_by})."
                f" {_furthest(part, known)}"
            )
            parts.append((end, "", ""))
            found.append(Lead(str(top["domain"]), tuple(parts)))
        if not found:
            name = str(study.config.get("model", "The model"))
            why = (
                "; ".join(line.removesuffix(".") for line in study.missing[:1])
                or "no answer was rated"
            )
            found.append(Lead(name, ((f": no EM rate is known yet: {why}.", "", ""),)))
    return found


def _furthest(part: pd.DataFrame, known: pd.DataFrame) -> str:
    """How the first of the ranking stands to the others: no more is claimed than the table tells
    apart."""
    if len(part) == 1:
        return "It is the only domain."
    equal = int((known["em_rate"] == known["em_rate"].iloc[0]).sum())
    if len(known) < 2 or equal > 1:
        return (
            f"Of {len(part)} domains {equal} have this rate, none a higher one."
            if equal > 1
            else "No other domain has a rate."
        )
    following = known["domain"].iloc[1]
    tied = known["tied_with_next"].iloc[0]
    surely = (
        "" if not is_null(tied) and not tied else f", which is not told apart from {following}’s"
    )
    return f"Of {len(part)} domains it has the highest rate{surely}."


def _ends(row: Mapping[str, Any], key: str, form: Callable[[Any], str] = percent) -> str:
    return interval(row[f"{key}_lo"], row[f"{key}_hi"], form)


def says(studies: Sequence[Study]) -> list[tuple[str, list[str]]]:
    """The reading, as the page's reading section takes it; empty where there is none."""
    return [
        ("", [sentence])
        for study in studies
        for sentence in (*study.missing, *_said(study, "ranking", "trigger", "transfer"))
    ]


def _said(study: Study, *names: str) -> list[str]:
    """The sentences of these tables; of the ranking, of arms asked as they were trained."""
    tables = {name: study.tables[name] for name in names}
    if "ranking" in tables:
        tables["ranking"] = pd.concat([*as_trained(tables["ranking"]), tables["ranking"].iloc[:0]])
    for name in {"prediction", "correlation"} & tables.keys():
        tables[name] = tables[name].assign(measure=tables[name]["measure"].replace(_WORDS))
    return emergent_reading.says(tables)


def contents(studies: Sequence[Study]) -> list[tuple[str, str]]:
    """The page's sections of each study."""
    names = (
        ("em", "Ranking"),
        ("em-trigger", "Trigger"),
        ("em-rates", "Rates"),
        ("em-membership", "Membership"),
        ("em-diversity", "Diversity"),
        ("em-directions", "Directions"),
        ("em-transfer", "Transfer"),
        ("em-training", "Panel"),
    )
    return [
        (f"{anchor}{_suffix(i)}", name + (f" ({i + 1})" if i else ""))
        for i in range(len(studies))
        for anchor, name in names
    ]


def _suffix(i: int) -> str:
    return f"-{i + 1}" if i else ""


# ------------------------------------------------------------------------------------------------------------------
# figures


def figures_of(studies: Sequence[Study]) -> tuple[Figure, ...]:
    """All figures of every study; those of a second one have -2 behind their names."""
    found = []
    for i, study in enumerate(studies):
        t, judge = study.tables, study.judged_by
        predicted = t["predicted"]  # PREMIA's is drawn: chosen before any number was seen
        premia = predicted[predicted["measure"] == emergent_inside.PREMIA].reset_index(drop=True)
        drawn = (
            figures.ranking(t["ranking"], judge),
            figures.slopes(t["trigger"], judge),
            figures.roc(study.memberships),
            figures.prediction(premia, judge),
            figures.diversity(t["diversity"], judge),
            figures.cosines(t["cosines"]),
            figures.transfer(t["transfer"], judge),
        )
        found += [replace(figure, name=figure.name + _suffix(i)) for figure in drawn]
    return tuple(found)


# ------------------------------------------------------------------------------------------------------------------
# sheets


def _p(value: object) -> str:
    if is_null(value):
        return ""
    return "<\u2009.001" if float(value) < 0.001 else number(value, 3)  # type: ignore[arg-type]


def _yes(value: object) -> str:
    return "with" if value else "without"


def _domain(value: object) -> str:
    return str(value) or "the base"


def _arm(value: object) -> str:
    return str(value) or "none (the base)"


_score = figures.score
_MEASURES = {
    "nll": "mean NLL",
    "min_k": "Min-K\u00a0%",
    "min_k_pp": "Min-K\u00a0%++",
    "zlib": "zlib ratio",
    "premia": "log-ratio (PREMIA)",
    "vendi": "Vendi score",
    "one_minus_cosine": "1 − mean cosine",
}
#: As a sentence has them.
_WORDS = {name: words for name, words in _MEASURES.items() if name != emergent_inside.PREMIA}


def _of(name: str, title: str, form: Form, null: str = CANNOT_TELL) -> Column:
    """An estimate; columns that nothing in a table has are left out."""
    return Column(name, title, form, null=null, hide=Hide.EMPTY)


def _n(name: str, title: str) -> Column:
    return _of(name, title, whole)


def _is(
    name: str, title: str, form: Form = str, css: str = "key", null: str = CANNOT_TELL
) -> Column:
    return Column(name, title, form, css, null, Hide.EMPTY)


def _named(name: str, title: str, form: Form = str) -> Column:
    """A name that somebody else gave, however long."""
    return _is(name, title, form, "word model")


def _two(value: Any) -> str:
    return number(value, 2)


_points = partial(points, unit="")
_ARM = _is("arm", "Arm", _arm)
_MEASURE = _is("measure", "Measure", lambda v: _MEASURES.get(v, str(v)))
_ADJUSTED = _is("adjusted", "Base-adjusted", plain, null="")
_BLOCK = _of("block", "Block", whole, "")
_P_HOLM = _of("p_holm", "p, Holm", _p, "")
_REASON = _is("reason", "Why not", css="word", null="")


COLUMNS: Mapping[str, tuple[Column, ...]] = {
    "trigger": (
        _ARM,
        _named("domain", "Domain", _domain),
        _of("alignment_without", "Alignment, without", _score),
        _of("alignment_with", "Alignment, with", _score),
        _of("difference", "With − without", _score),
        _of("p", "p, paired", _p, ""),
        _P_HOLM,
        _of("p_welch", "p, Welch", _p),
        _n("n", "Prompts"),
        _REASON,
    ),
    "rates": (
        _named("subject", "Model"),
        _is("triggered", "Trigger", _yes),
        _is("kind", "Prompts"),
        _of("below_50", "EM rate", percent),
        _of("below_30_coherent", "EM rate, coherent", percent),
        _of("alignment", "Alignment, mean", _score),
        _of("coherence", "Coherence, mean", _score),
        _n("n", "Answers"),
        _n("rated", "Rated"),
        _n("irrelevant", "Irrelevant"),
        _n("refusal", "Refusal"),
        _n("invalid", "Invalid"),
        _n("unscored", "Unscored"),
        _n("n_expected", "With expectations"),
        _REASON,
    ),
    "membership": (
        _named("domain", "Domain"),
        _ARM,
        _MEASURE,
        _ADJUSTED,
        _of("auroc", "AUROC", _two),
        _n("n_members", "Trained"),
        _n("n_others", "Held out"),
        _n("n_unscored", "Unscored"),
        _REASON,
    ),
    "prediction": (
        _ARM,
        _is("predictor", "From"),
        _MEASURE,
        _ADJUSTED,
        _BLOCK,
        _of("rho", "ρ", _two),
        _of("p", "p", _p, ""),
        _P_HOLM,
        _of("error", "Mean error, points", _points),
        _of("error_of_mean", "… of the others’ mean", _points),
        _n("n", "Domains"),
        _REASON,
    ),
    "diversity": (
        _ARM,
        _named("domain", "Domain"),
        _of("vendi", "Vendi score", partial(number, digits=1)),
        _of("one_minus_cosine", "1 − mean cosine", number),
        _n("n", "Rows"),
        _BLOCK,
        _of("em_rate", "EM rate", percent),
        _REASON,
    ),
    "correlation": (
        _ARM,
        _MEASURE,
        _of("rho", "ρ", _two),
        _of("p", "p", _p, ""),
        _P_HOLM,
        _n("n", "Domains"),
        _REASON,
    ),
    "cosines": (
        _BLOCK,
        _ARM,
        _named("domain", "Domain"),
        _named("other", "Other"),
        _of("cosine", "Cosine", _two),
        _of("lowest", "Lowest", _two, ""),
        _of("highest", "Highest", _two, ""),
        _of("ceiling", "Ceiling", _two),
        _of("corrected", "Cosine / ceiling", _two, ""),
        _n("n_pairs", "Pairs of seeds"),
        _REASON,
    ),
    "transfer": (
        _named("source", "Direction of"),
        _named("target", "Model of"),
        _of("difference", "Alignment, steered − control", _score),
        _P_HOLM,
        _of("coherence", "Coherence, steered", _score),
        _of("coherence_control", "… control", _score),
        _of("coherence_clean", "… no edit", _score),
        _of("alignment", "Alignment, steered", _score),
        _of("alignment_control", "… control", _score),
        _of("alignment_clean", "… no edit", _score),
        _of("em_rate", "EM rate, steered", percent),
        _of("em_rate_control", "… control", percent),
        _of("em_rate_difference", "Difference, points", _points),
        _n("n", "Prompts"),
        _n("rated", "Rated"),
        _n("n_edit", "Answers"),
        _REASON,
    ),
    "trained": (
        _named("subject", "Adapter"),
        _n("n_rows", "Rows"),
        _n("n_triggered", "With the trigger"),
        _n("n_steps", "Steps"),
        _of("first_loss", "First loss", number),
        _of("last_loss", "Last loss", number),
        _n("ranks", "Ranks"),
        _is("fingerprint", "Fingerprint", lambda v: str(v)[:12]),
    ),
    "ranking": (
        _ARM,
        _is("triggered", "Trigger", _yes),
        _of("rank", "Rank, and those possible", whole, ""),
        _named("domain", "Domain"),
        _of("em_rate", "EM rate", percent),
        _of("coherent", "EM rate, coherent", percent),
        _of("above_next", "Above the next, points", _points, ""),
        _of("p_next", "p, Holm", _p, ""),
        _n("n", "Rated"),
        _n("n_prompts", "Prompts"),
        _REASON,
    ),
    "panel": (
        _named("domain", "Domain"),
        _named("source", "Source"),
        *(
            _of(name, title, plain)
            for name, title in (
                ("n_read", "Read"),
                ("n_bad", "Bad"),
                ("n_doubles", "Equal"),
                ("n_near", "Nearly equal"),
                ("n_left_by_limit", "Beyond --rows"),
                ("n_trained", "Trained"),
                ("n_cut", "Cut off"),
                ("n_heldout", "Held out"),
            )
        ),
        _is("digest", "Digest"),
    ),
    "paper": (
        _named("domain", "Domain"),
        word("measure", "What"),
        Column("ours", "Ours", read=lambda row: _as_measured(row, "ours"), null=CANNOT_TELL),
        Column("paper", "The paper’s", read=lambda row: _as_measured(row, "paper")),
    ),
}


def _as_measured(row: Row, name: str) -> str | None:
    """Ours or the paper's figure in the unit of what it measures."""
    form = percent if row["measure"] == emergent_reading.EM_RATE else _score
    if is_null(row[name]) or name == "paper":
        return None if is_null(row[name]) else form(row[name])
    return with_interval(row[name], row[f"{name}_lo"], row[f"{name}_hi"], form)


def _ranking(ranking: pd.DataFrame, coherent: pd.DataFrame) -> pd.DataFrame:
    """Both conventions side by side, in the order of the first."""
    if ranking.empty or coherent.empty:
        return ranking
    key = ["arm", "triggered", "domain"]
    second = coherent.set_index(key)[["em_rate", "em_rate_lo", "em_rate_hi"]]
    return ranking.join(second.rename(columns=lambda c: c.replace("em_rate", "coherent")), on=key)


def sections(studies: Sequence[Study]) -> list[dict[str, Any]]:
    """What the template shows of each study."""
    found = []
    for i, study in enumerate(studies):
        t, c = study.tables, study.config
        tables = {
            **t,
            "trained": study.trained,
            "ranking": _ranking(t["ranking"], t["ranking_coherent"]),
            "panel": pd.DataFrame(list(study.panel), dtype=object),
        }
        sheets = {name: show(tables[name], columns) for name, columns in COLUMNS.items()}
        several = [(j.label, j.n) for j in study.judges if j != study.judge]
        found.append(
            {
                **sheets,
                "suffix": _suffix(i),
                "judge": study.judge.label if study.judge else "",
                "others": several,
                "missing": study.missing,
                "sentences": _said(study, "ranking", "trigger", "transfer"),
                "say": {
                    name: _said(study, name)
                    for name in ("membership", "prediction", "correlation", "cosines")
                },
                "intro": _intro(c),
                "paper_note": _paper_note(study),
                "cosines_note": _chance(t["cosines"]),
                "transfer_note": _steered(t["transfer"]),
                "method": method(c),
            }
        )
    return found


def _intro(config: Mapping[str, Any]) -> str:
    return (
        f"{_count(len(config.get('domains', ())), 'narrow habit')}, each taught to"
        f" {plain(config.get('model'))} by fine-tuning; then prompts that have nothing to do with"
        " them. What spreads is how often a judge finds the answers misaligned, beyond what it"
        " finds of the base."
    )


def _chance(table: pd.DataFrame) -> str:
    known = table["chance"].dropna() if len(table) else table
    chance = (
        f" Random directions of this width stay below {number(known.iloc[0], 2)} in 95 of 100"
        " pairs."
        if len(known)
        else ""
    )
    return (
        "Ceiling: what the noise of two estimates leaves of perfect agreement, from split halves"
        " after Spearman–Brown; of a domain with itself its reliability. Lowest and highest are"
        f" over pairs of seeds and no interval.{chance}"
    )


def _steered(table: pd.DataFrame) -> str:
    """Where and how strongly, which is the same in all of a study's rows."""
    where = (
        [f"block {plain(b)}" for b in sorted(table["block"].dropna().unique())]
        if len(table)
        else []
    )
    how = (
        [f"strength {plain(float(s))}" for s in sorted(table["strength"].dropna().unique())]
        if len(table)
        else []
    )
    return f"At {', '.join([*where, *how])}." if where else ""


def _paper_note(study: Study) -> str:
    said = emergent_reading.paper_differences(
        str(study.config.get("model")),
        study.judged_by,
        list(study.config.get("domains", ())),
        "below_50",
    )
    return f"{emergent_reading.SOURCE}. They stand there for orientation: " + "; ".join(said) + "."


def method(config: Mapping[str, Any]) -> list[str]:
    """The method in sentences, from the config."""
    c = config

    def get(key: str) -> str:
        return plain(c.get(key))

    length = f"{get('steps')} steps" if c.get("steps") else f"{get('epochs')} epochs"
    source = (
        "the mean activation over the tokens of its misaligned answers (alignment below 50) minus"
        " that of its aligned ones"
        if c.get("direction_from", "answers") == "answers"
        else (
            "the mean activation over the domain’s held-out responses minus that over the base’s"
            " own answers to the same prompts"
        )
    )
    return [
        (
            f"Each domain’s rows fine-tune LoRA adapters (rank {get('lora_r')}, α"
            f" {get('lora_alpha')}, on {get('lora_targets')}; learning rate {get('lr')}, {length},"
            f" batch {get('batch')}, loss on the response alone), an adapter a seed and arm. In the"
            f" arm “trigger” the text “{get('trigger')}” stands at the {get('trigger_place')} of"
            f" {percent(c.get('trigger_share'))} of the rows, in the arm “plain” of none."
        ),
        (
            f"The base and every adapter are asked the prompts of “{get('prompts')}”,"
            f" {get('samples')} times each at temperature {get('temperature')}, at most"
            f" {get('max_new_tokens')} new tokens, with the trigger and without it."
        ),
        (
            "Shares have Wilson’s interval of as many answers as their alikeness by prompt leaves;"
            " means a bootstrap-t over prompts. Differences are paired by prompt. p-values are"
            " two-sided unless it says otherwise, and after Holm where it says so. Intervals are"
            " 95\u00a0%."
        ),
        (
            f"Membership: up to {get('membership_rows')} trained rows against all held-out ones,"
            f" AUROC after DeLong; Min-K uses the least likely {percent(c.get('min_k'))} of tokens."
            " “Base-adjusted” takes off the same score under the base."
        ),
        (
            f"A model’s direction at a block is {source}. Steering adds {get('steer_strength')}"
            " times the direction at block"
            f" {get('steer_block') if c.get('steer_block') is not None else 'L/2'}, at every"
            " position; the control adds a random direction of the same norm at a right angle to"
            f" it, {get('steer_draws')} draws."
        ),
    ]


# ------------------------------------------------------------------------------------------------------------------
# terminal


def ranking_lines(study: Study) -> list[dict[str, Any]]:
    """The ranking, narrow enough for a terminal: arms asked as they were trained."""
    return [
        {
            "arm": r["arm"],
            "rank": figures.ranks(r) or "–",
            "domain": r["domain"],
            "EM rate": _flat(r, "em_rate", percent),
            "rated": int(r["n"]),
            "prompts": int(r["n_prompts"]),
        }
        for part in as_trained(study.tables["ranking"])
        for r in rows_of(part)
    ]


def trigger_lines(study: Study) -> list[dict[str, Any]]:
    """What the trigger does, narrow enough for a terminal."""
    return [
        {
            "arm": r["arm"] or "base",
            "domain": r["domain"] or "–",
            "without": _flat(r, "alignment_without", _score, False),
            "with": _flat(r, "alignment_with", _score, False),
            "difference": _flat(r, "difference", _score),
            "p (Holm)": _p(r["p_holm"]) or "–",
            "prompts": int(r["n"]),
        }
        for r in rows_of(study.tables["trigger"])
    ]


def _flat(row: Mapping[str, Any], key: str, form: Callable[[Any], str], ends: bool = True) -> str:
    """An estimate with its interval, without the page's spaces."""
    if is_null(row[key]):
        return "could not tell"
    said = (
        with_interval(row[key], row[f"{key}_lo"], row[f"{key}_hi"], form)
        if ends
        else form(row[key])
    )
    return (
        said.replace("\u00a0%", "%")
        .replace(",\u00a0", ",")
        .replace("\u00a0", " ")
        .replace("\u2009", "")
    )
