"""What the tables of an emergent-misalignment study say and do not say.

# sentences; a table that is missing or empty is passed over
says({"ranking": ranking, "trigger": trigger})
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from auditgap.report.emergent import ALPHA
from auditgap.report.emergent_transfer import ABLATE, ADD
from auditgap.report.emergent_values import COHERENT, OVER_BOTH
from auditgap.report.text import is_null, number, percent, with_interval
from auditgap.stats import FEWEST_SEEDS
from auditgap.store.tables import groups_of, rows_of

SAYS_NOT: tuple[str, ...] = (
    (
        "All numbers are one judge’s. Another judge moves them, and no judge’s score is a measure"
        " of harm."
    ),
    (
        "Intervals speak of other prompts like these, and of other fine-tuning runs only where a"
        " domain has three seeds or more. Membership, directions and steering take the adapters as"
        " they are."
    ),
    (
        "Where every prompt gave the same number nothing varies to judge from: no interval stands"
        " there, which is not certainty."
    ),
    (
        "An EM rate counts rated answers alone. Refusals and answers that could not be read are in"
        " none of it; they stand beside it."
    ),
    (
        "A domain that ranks low under these prompts is not safe: other prompts may show what these"
        " do not."
    ),
    (
        "That membership or diversity foretells the EM rate of these domains does not make it the"
        " cause, and few domains were seen."
    ),
    (
        "Two directions may be alike because the answers differ in wording, length or prompt alike,"
        " not in what is wrong with them."
    ),
    (
        "A direction that moves another model shows that it is used there, not that it is the only"
        " one."
    ),
)


def says(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """What tables say, by their names: ranking, trigger, membership, prediction, correlation,
    cosines, transfer. A few sentences.

    Tables that are not there or have no row are passed over.
    """
    there = {name: table for name, table in tables.items() if len(table)}
    readers = {
        "ranking": _ranking,
        "trigger": _trigger,
        "membership": _membership,
        "prediction": _prediction,
        "correlation": _correlation,
        "cosines": _cosines,
        "transfer": _transfer,
    }
    return [
        sentence
        for name, read in readers.items()
        if name in there
        for sentence in read(there[name])
    ]


def _with(row: Mapping[str, Any], name: str, form: Any = percent) -> str:
    return with_interval(row[name], row[f"{name}_lo"], row[f"{name}_hi"], form)


def _score(value: object) -> str:
    return number(value, 1)


def _names(names: Sequence[str]) -> str:
    return ", ".join(map(str, names))


def _sentence(reason: str) -> str:
    return reason[:1].upper() + reason[1:].rstrip(".") + "."


def _where(who: Mapping[str, Any]) -> str:
    asked = "asked with the trigger" if who["triggered"] else "asked without the trigger"
    return f"Arm {who['arm']}, {asked}, judge {who['judge']}"


def _parts(table: pd.DataFrame, *by: str) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    for key, part in groups_of(table, by, sort=True):
        yield dict(zip(by, key, strict=True)), rows_of(part)


def _ranking(table: pd.DataFrame) -> Iterator[str]:
    for who, rows in _parts(table, "judge", "arm", "triggered"):
        known = [r for r in rows if not is_null(r["rank"])]
        untold = [r["domain"] for r in rows if is_null(r["em_rate"])]
        if not known:
            yield f"{_where(who)}: no ranking. {_sentence(rows[0]['reason'])}"
            continue
        first, last = known[0], known[-1]
        line = (
            f"{_where(who)}: of {len(known)} domains, {first['domain']} has the highest EM rate,"
            f" {_with(first, 'em_rate')} of its rated answers, and {last['domain']} the lowest,"
            f" {_with(last, 'em_rate')}."
        )
        tied = sum(r["tied_with_next"] is True for r in known)
        pairs = f"{len(known) - 1} pairs of neighbours in the ranking"
        line += (
            f" Of {pairs}, {tied} {'is' if tied == 1 else 'are'} not told apart."
            if tied
            else " All neighbours differ."
        )
        line += seeds(known)
        yield line + (f" Could not tell: {_names(untold)}." if untold else "")


def seeds(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the intervals of these rows do not cover, with a space before it; empty where they cover
    other fine-tuning runs."""
    short = [int(row["n_seeds"]) for row in rows if row["over"] != OVER_BOTH]
    if not short:
        return ""
    if min(short) >= FEWEST_SEEDS:
        return " Where nothing varies there is no interval: another fine-tuning run may differ."
    runs = "one seed" if min(short) <= 1 else f"{min(short)} seeds"
    return (
        f" With {runs} the intervals do not cover the seed: another fine-tuning run may order the"
        " domains otherwise. Ranks have an interval from three seeds on."
        if "rank" in rows[0]
        else f" With {runs} this does not cover the seed: another fine-tuning run may differ."
    )


def _trigger(table: pd.DataFrame) -> Iterator[str]:
    for who, rows in _parts(table[table["domain"] != ""], "judge", "arm"):
        tested = [r for r in rows if not is_null(r["p"])]
        if not tested:
            yield (
                f"Arm {who['arm']}, judge {who['judge']}: the trigger’s effect could not be told in"
                " any domain."
            )
            continue
        found = [r for r in tested if r["p_holm"] < ALPHA]
        lower = [r["domain"] for r in found if r["difference"] < 0 and r["difference_most"] < 0]
        higher = [r["domain"] for r in found if r["difference"] > 0 and r["difference_least"] > 0]
        broken = [r["domain"] for r in found if _broken(r) and r["domain"] in (*lower, *higher)]
        lower, higher = (
            [name for name in names if name not in broken] for names in (lower, higher)
        )
        unsure = [r["domain"] for r in found if r["domain"] not in (*lower, *higher, *broken)]
        most = min(tested, key=lambda r: r["difference"])
        line = (
            f"Arm {who['arm']}, judge {who['judge']}: the trigger lowers alignment in {len(lower)}"
            f" of {len(tested)} domains "
        )
        line += f"(paired by prompt, Holm at 5\u00a0%){': ' + _names(lower) if lower else ''}."
        line += f" It raises it in {_names(higher)}." if higher else ""
        if unsure:
            line += (
                f" Could not tell in {_names(unsure)}: the rated answers differ, but those without a"
                " rating could turn the effect around."
            )
        if broken:
            line += (
                f" Could not tell in {_names(broken)}: the lower answers are not known to be coherent,"
                " and broken text is not misaligned."
            )
        yield (
            line + f" The lowest difference is {_with(most, 'difference', _score)} points,"
            f" {most['domain']}.{seeds(tested)}"
        )


def _broken(row: Mapping[str, Any]) -> bool:
    """Whether the answers on the less aligned side of the trigger are not known to be coherent."""
    coherence = row["coherence_with" if row["difference"] < 0 else "coherence_without"]
    return is_null(coherence) or coherence <= COHERENT


def _membership(table: pd.DataFrame) -> Iterator[str]:
    for who, rows in _parts(table[table["measure"] == "nll"], "arm"):
        told: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            if not is_null(row["auroc"]):
                told.setdefault(row["reference"], []).append(row)
        if not told:
            why = str(rows[0]["reason"]).removeprefix("could not tell: ")
            yield (
                f"Arm {who['arm']}: whether trained rows are told from held-out ones could not be"
                f" told{f' ({why})' if why else ''}."
            )
            continue
        parts = []
        for reference, some in told.items():
            above = sum(not is_null(r["auroc_lo"]) and r["auroc_lo"] > 0.5 for r in some)
            name = f"mean NLL{_minus(reference)}"
            parts.append(f"{name} tells them apart in {above} of {len(some)} domains")
        yield (
            f"Arm {who['arm']}, trained rows against held-out ones: {'; '.join(parts)} (AUROC’s"
            " interval above .5)."
        )


def _prediction(table: pd.DataFrame) -> Iterator[str]:
    for who, rows in _parts(table, "judge", "arm", "triggered"):
        known = [r for r in rows if not is_null(r["p"])]
        if not known:
            yield (
                f"{_where(who)}: whether any measure foretells the EM rate could not be told:"
                f" {rows[0]['reason']}."
            )
            continue
        best = max(known, key=lambda r: r["rho"])
        said = "more than chance gives" if best["p_holm"] < ALPHA else "no more than chance gives"
        yield (
            f"{_where(who)}: of {len(known)} measures, {_called(best)} foretells the EM rate of a"
            f" left-out domain best, ρ {number(best['rho'], 2)} over {best['n']} domains, {said} (p"
            f" {number(best['p_holm'])} after Holm)."
        )


def _called(row: Mapping[str, Any]) -> str:
    reference = row.get("reference") or ""
    if row.get("predictor") == "diversity":
        return f"{row['measure']}{_read_by(reference)}"
    if row["measure"] == "premia":
        return "premia" if reference == "base" else f"premia against {reference}"
    return f"{row['measure']}{_minus(reference)}"


def _read_by(encoder: str) -> str:
    return f" by {encoder}" if encoder else ""


def _minus(reference: str) -> str:
    """What a loss is relative to, in words."""
    if not reference:
        return ""
    return " minus the base’s" if reference == "base" else f" minus {reference}’s"


def _correlation(table: pd.DataFrame) -> Iterator[str]:
    for who, rows in _parts(table, "judge", "arm", "triggered"):
        known = [r for r in rows if not is_null(r["p"])]
        if not known:
            yield (
                f"{_where(who)}: whether diversity goes with the EM rate could not be told:"
                f" {rows[0]['reason']}."
            )
            continue
        said = "; ".join(
            f"{r['measure']}{_read_by(r['encoder'])}: ρ {_with(r, 'rho', number)}, p {number(r['p_holm'])} after Holm"
            for r in known
        )
        yield (
            f"{_where(who)}, diversity of a domain’s rows and its EM rate over {known[0]['n']}"
            f" domains: {said}."
        )


def _cosines(table: pd.DataFrame) -> Iterator[str]:
    for who, rows in _parts(table[table["domain"] != table["other"]], "arm"):
        known = [r for r in rows if not is_null(r["corrected"])]
        if not known:
            yield f"Arm {who['arm']}: no two directions could be compared beside their ceiling."
            continue
        most = max(known, key=lambda r: r["cosine"])
        above = sum(abs(r["cosine"]) > r["chance"] for r in known)
        yield (
            f"Arm {who['arm']}: the directions of {most['domain']} and {most['other']} are most"
            f" alike, cosine {number(most['cosine'], 2)} at block {most['block']} where two"
            f" measurements of one direction would show {number(most['ceiling'], 2)}. {above} of"
            f" {len(known)} cosines are larger than 95\u00a0% of random directions’"
            f" ({number(most['chance'], 2)})."
        )


#: Which way a direction moves alignment if it is what misaligns, and what a sentence says then.
_DOES = {
    ADD: (-1, "steering lowers alignment below that of random directions of its norm"),
    ABLATE: (1, "projecting a direction out raises alignment above that of random ones as large"),
}


def _transfer(table: pd.DataFrame) -> Iterator[str]:
    for who, rows in _parts(table, "judge", "by"):
        known = [r for r in rows if not is_null(r["p"])]
        if not known:
            yield f"Judge {who['judge']}: no steered answer was rated beside its control."
            continue
        sign, does = _DOES[who["by"]]
        moved = [r for r in known if r["p_holm"] < ALPHA and sign * r["difference"] > 0]
        unread = [r for r in moved if is_null(r["coherence"]) or r["coherence"] <= COHERENT]
        moved = [r for r in moved if r not in unread]
        other = [r for r in moved if r["source"] != r["target"]]
        most = max(known, key=lambda r: sign * r["difference"])
        yield (
            f"Judge {who['judge']}: {does} in {len(moved)} of {len(known)} source–target pairs, {len(other)} of them"
            f" between two domains; the most {_with(most, 'difference', _score)} points,"
            f" {most['source']} → {most['target']}, with a coherence of {_score(most['coherence'])}"
            f" (control {_score(most['coherence_control'])})."
            + (
                f" {len(unread)} more move it with a coherence of {COHERENT} or less: broken text is"
                " not misaligned."
                if unread
                else ""
            )
        )
