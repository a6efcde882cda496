"""Does one domain's direction move another domain's model: the table of steered answers.

transfer_table(RunFolder.load("runs/em").rows(["em_steer"]))    # a row a (source, target)
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from auditgap import stats
from auditgap.report.emergent_values import (
    WHO,
    by_prompt,
    counted,
    ends,
    framed,
    groups,
    mean,
    share,
    with_ends,
)
from auditgap.stats import Paired

EDIT, CONTROL, CLEAN = "edit", "control", "clean"
ADD, ABLATE = "add", "ablate"
_PAIR = (*WHO, "source", "domain", "arm", "block", "by", "strength")
TRANSFER_COLUMNS: tuple[str, ...] = (
    *WHO,
    "source",
    "target",
    "arm",
    "block",
    "by",
    "strength",
    "n",
    "n_edit",
    "n_control",
    "rated",
    "rated_control",
    *with_ends("alignment", "alignment_control", "alignment_clean", "difference"),
    "p",
    "p_holm",
    *with_ends(
        "em_rate",
        "em_rate_control",
        "em_rate_difference",
        "coherence",
        "coherence_control",
        "coherence_clean",
    ),
    "reason",
)


def transfer_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Steering transfer: one row a (judge, source domain, target domain and arm, block, what was
    done, strength), with exactly `TRANSFER_COLUMNS`.

    - `rows`: ratings of steered answers (`em_steer`), whose `steer` says edit, control or clean; a
    target's `clean` rows serve all
      sources.
    - `by`: the direction was added (`add`) or projected out (`ablate`, which has no strength and
      whose control takes as much off along a random direction).
    - `difference`: mean alignment steered with the source's direction minus under random directions
    of its norm, paired by prompt
      (each side a mean over draws and seeds), over `n` prompts; negative: the direction misaligns.
      `p_holm`: over all of a judge's rows of one `by`.
    - `em_rate` (`below_50`), its control and their difference paired by prompt; `coherence` of all
    three, since an answer that is
      broken is not misaligned. `rated` of `n_edit` answers were rated.
    """
    if "steer" not in rows.columns or "outcome" not in rows.columns:
        return framed([], TRANSFER_COLUMNS, nullable=["block"])
    answers, table = counted(rows[rows["steer"].notna()]), []
    answers["by"] = answers["by"].fillna(ADD) if "by" in answers else ADD
    for _, family in groups(answers, WHO):
        clean = {
            key: part for key, part in family[family["steer"] == CLEAN].groupby(["domain", "arm"])
        }
        for _, steered in groups(family[family["steer"] != CLEAN], ("by",)):
            some = []
            for who, part in groups(steered, _PAIR):
                target = who.pop("domain")
                some.append(
                    {
                        **who,
                        "target": target,
                        **_transferred(part, clean.get((target, who["arm"]), part.iloc[:0])),
                    }
                )
            for row, p in zip(some, stats.holm([row["p"] for row in some]), strict=True):
                row["p_holm"] = p
            table += some
    return framed(table, TRANSFER_COLUMNS, nullable=["block"])


def _transferred(part: pd.DataFrame, clean: pd.DataFrame) -> dict[str, Any]:
    edit, control = part[part["steer"] == EDIT], part[part["steer"] == CONTROL]
    moved, rate = _paired(edit, control, "alignment"), _paired(edit, control, "hit")
    row: dict[str, Any] = {
        "n": moved.n,
        "n_edit": len(edit),
        "n_control": len(control),
        "rated": int(edit["hit"].notna().sum()),
        "rated_control": int(control["hit"].notna().sum()),
        "p": moved.p,
        **ends("difference", moved.difference),
        **ends("em_rate_difference", rate.difference),
        "reason": "" if moved.p is not None else _unpaired(edit, moved.n),
    }
    for end, side in (("", edit), ("_control", control), ("_clean", clean)):
        prompts = side["prompt_id"]
        for what in ("alignment", "coherence"):
            row |= ends(f"{what}{end}", mean(side[what], prompts))
        if end != "_clean":
            row |= ends(f"em_rate{end}", share(side["hit"], prompts))
    return row


def _unpaired(edit: pd.DataFrame, n: int) -> str:
    why = edit["reason"][edit["hit"].isna() & (edit["reason"].fillna("") != "")]
    because = f": {why.value_counts().index[0]}" if len(why) else ""
    return f"{n} prompts were rated both steered and under the control; 2 are needed{because}"


def _paired(first: pd.DataFrame, second: pd.DataFrame, what: str) -> Paired:
    sides = [by_prompt(side[what], side["prompt_id"]) for side in (first, second)]
    both = pd.concat(sides, axis=1, keys=["first", "second"]).dropna()
    return stats.paired_means(both["first"], both["second"])
