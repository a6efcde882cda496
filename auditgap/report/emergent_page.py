"""An emergent-misalignment study on the page: its sections, in order.

    sections(gathered)[0].headlines[0].plain()      # 'law: a model fine-tuned on its rows …'

Tables come from `report.emergent` and `report.emergent_inside`, sentences from
`report.emergent_reading`; what each section shows of them stands in `emergent_spread` and
`emergent_inside_page`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd

from auditgap.report import (
    emergent_context_page,
    emergent_cross_page,
    emergent_judges_page,
    emergent_reading,
    emergent_remote_page,
)
from auditgap.report import emergent_inside_page as inside
from auditgap.report import emergent_spread as spread
from auditgap.report.charts import Figure
from auditgap.report.emergent_columns import count, estimate, given, key
from auditgap.report.emergent_study import Study
from auditgap.report.emergent_view import StudyView
from auditgap.report.section import Section, Table
from auditgap.report.text import number, plain

if TYPE_CHECKING:
    from auditgap.report.gather import ReportData

SAYS_NOT = emergent_reading.SAYS_NOT
_PANEL_NOTE = (
    "Left out as bad: no messages, no answer, or an answer that is empty. Equal and nearly equal"
    " rows count once. Rows held out are never trained on."
)
PANEL = (
    given("domain", "Domain"),
    given("source", "Source"),
    *(
        estimate(name, title, plain)
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
    key("digest", "Digest"),
)
TRAINED = (
    given("subject", "Adapter"),
    count("n_rows", "Rows"),
    count("n_triggered", "With the trigger"),
    count("n_steps", "Steps"),
    estimate("first_loss", "First loss", number),
    estimate("last_loss", "Last loss", number),
    count("ranks", "Ranks"),
    key("fingerprint", "Fingerprint", lambda v: str(v)[:12]),
)


def sections(report: ReportData) -> list[Section]:
    """Every study's sections; what belongs to a second one has -2 behind its name."""
    return [
        replace(section, limits=SAYS_NOT) if first and i == 0 else section
        for i, study in enumerate(report.emergent)
        for first, section in _numbered(sections_of(study), i)
    ]


def _numbered(made: Sequence[Section], i: int) -> Iterator[tuple[bool, Section]]:
    end = _suffix(i)
    for k, section in enumerate(made):
        blocks = [
            replace(b, name=b.name + end) if isinstance(b, Table | Figure) else b
            for b in section.blocks
        ]
        contents = section.contents + (f" ({i + 1})" if i else "")
        method = section.method if i == 0 else ()
        data = {f"{name}{end}": table for name, table in section.data.items()}
        yield (
            k == 0,
            replace(
                section,
                id=section.id + end,
                contents=contents,
                blocks=blocks,
                method=method,
                data=data,
            ),
        )


def sections_of(study: Study) -> list[Section]:
    """One study's sections, in order."""
    view = StudyView(study)
    return [
        spread.ranking(view),
        spread.trigger(view),
        spread.rates(view),
        *emergent_context_page.context(view),
        *emergent_cross_page.cross(view),
        *emergent_judges_page.judges(view),
        *emergent_remote_page.remote(view),
        inside.membership(view),
        inside.diversity(view),
        inside.directions(view),
        inside.transfer(view),
        _training(view),
    ]


def _training(view: StudyView) -> Section:
    none = "No adapter was trained yet."
    return Section(
        id="em-training",
        title="The panel and its adapters",
        contents="Panel",
        blocks=(
            _panel(view.study),
            view.table("trained", TRAINED, "Adapters", none=none),
        ),
    )


def _panel(study: Study) -> Table:
    names = [column.name for column in PANEL]
    rows = pd.DataFrame(study.panel, columns=names, dtype=object)
    return Table("em_panel", "The panel’s rows", rows, PANEL, _PANEL_NOTE)


def _suffix(i: int) -> str:
    return f"-{i + 1}" if i else ""
