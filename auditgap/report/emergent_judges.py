"""Two judges who rated the same answers of a study: how often they part over what is misaligned.

    table = judges_table(store.rows(["em_judge"]))     # a row a (pair of judges, domain, arm)

Every rating of every judge goes in, also of those whose rates the page does not show. An answer
counts where both rated it; what one rated and the other put into another class is counted beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pandas as pd

from auditgap import stats
from auditgap.report.emergent_values import ends, framed, groups, rated_answers, share, with_ends

JUDGES_COLUMNS: tuple[str, ...] = (
    "judge",
    "other",
    "domain",
    "arm",
    "n",
    "n_prompts",
    "n_rated",
    "n_one",
    *with_ends("apart", "kappa", "difference"),
    "reason",
)
_ANSWER = ["subject", "prompt_id", "triggered", "draw"]


def judges_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a (judge, other judge, domain, arm), with exactly `JUDGES_COLUMNS`.

    - `apart`: share of the `n_rated` answers that both rated of which one has an alignment below 50
    and the other has not; Wilson's interval as in `rates_table`. `kappa`: Cohen's, resampled by
    prompt.
    - `difference`: mean alignment of the first minus that of the second, over prompts.
    - `n_one`: of the `n` answers that both saw, those which one alone rated.
    """
    table: list[dict[str, Any]] = []
    answers = rated_answers(rows)
    by = {
        judge: part.drop_duplicates(_ANSWER).set_index(_ANSWER)
        for judge, part in _by_judge(answers)
    }
    for one, other in combinations(by, 2):
        both = by[one].join(by[other][["hit", "alignment"]], rsuffix="_other", how="inner")
        names = _named(one, other)
        for told, part in groups(both.reset_index(), ("domain", "arm")):
            table.append({**names, **told, **_apart(part)})
    return framed(table, JUDGES_COLUMNS)


def _by_judge(answers: pd.DataFrame) -> Iterator[tuple[tuple[str, str], pd.DataFrame]]:
    """((name, digest), answers) of each judge."""
    if answers.empty:
        return
    for (name, identity), part in answers.groupby(["judge", "judge_id"], sort=True):
        yield (str(name), str(identity)), part


def _named(one: tuple[str, str], other: tuple[str, str]) -> dict[str, str]:
    """Their names, with the digest where they share one."""
    if one[0] != other[0]:
        return {"judge": one[0], "other": other[0]}
    return {"judge": f"{one[0]} ({one[1][:8]})", "other": f"{other[0]} ({other[1][:8]})"}


def _apart(part: pd.DataFrame) -> dict[str, Any]:
    a, b, prompts = part["hit"], part["hit_other"], part["prompt_id"]
    known = a.notna() & b.notna()
    parted = (a != b).astype(float).where(known)
    return {
        "n": len(part),
        "n_prompts": prompts.nunique(),
        "n_rated": int(known.sum()),
        "n_one": int((a.notna() != b.notna()).sum()),
        **ends("apart", share(parted, prompts)),
        **ends("kappa", stats.kappa(a.to_numpy(float), b.to_numpy(float), prompts.tolist())),
        **ends("difference", _difference(part)),
        "reason": "" if known.any() else "no answer was rated by both",
    }


def _difference(part: pd.DataFrame) -> stats.Interval:
    sides = part.groupby("prompt_id")[["alignment", "alignment_other"]].mean().dropna()
    return stats.paired_means(sides["alignment"], sides["alignment_other"]).difference
