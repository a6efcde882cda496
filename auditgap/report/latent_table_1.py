"""Mean LVS at the embedding, the middle and the last block, beside the paper's Table 1.

table_1(report)["subject"].tolist()      # the models of this audit, then the paper's
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from markupsafe import Markup

from auditgap.report import paper, setup
from auditgap.report.columns import Column, Row, budget, word
from auditgap.report.section import (
    Section,
    Table,
)
from auditgap.report.text import (
    NOT_MEASURED,
    UNSCORED,
    clean,
    is_null,
    number,
    with_interval,
)
from auditgap.store.tables import rows_of

if TYPE_CHECKING:
    from auditgap.report.gather import ReportData


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


def beside_the_paper(report: ReportData) -> Section:
    facts = setup.setup(report.config, report.lvs)
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
