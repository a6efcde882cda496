"""A report's sections: values made of text, tables and figures, from which everything else follows.

    Section(
        id="distance",
        title="Minimum distance to collapse",
        contents="Distance to collapse",
        blocks=(figure, Table("distance", "Minimum distance by site", distance, DISTANCE)),
        limits=("It does not say …",),
    )

The page, its contents, what it says and does not say, report.json and the CSV files of its tables
and figures are comprehensions over sections, so that none of them can forget one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import pandas as pd
from markupsafe import Markup

from auditgap.report.charts import Figure
from auditgap.report.columns import PAGE, Column, DisplayTable, show
from auditgap.report.text import called, clean

#: More rows than this scroll in a window of their own.
TALL = 14


@dataclass(frozen=True, slots=True)
class Prose:
    """A paragraph; `css` is `note`, `none` (nothing to show) or `warn`. Markup is our own."""

    text: str
    css: str = ""


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading inside a section, with a badge behind it."""

    text: str
    badge: str = ""


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True, slots=True)
class Facts:
    """Terms and what they are."""

    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Listing:
    """Text as it stands, such as a command."""

    text: str


@dataclass(frozen=True, slots=True)
class Formula:
    """A formula of `templates/formulas/`, by its name."""

    name: str


@dataclass(frozen=True, slots=True)
class Split:
    """Blocks side by side where there is room; `even`: both halves are as wide."""

    left: Sequence[Block]
    right: Sequence[Block]
    even: bool = False


@dataclass(frozen=True)
class Table:
    """A table: `data` goes into report.json and a CSV file under `name`, `columns` are read.

    A table without a name is in report.json at another place. `of` picks the rows that are read, where not all are. `note` stands under the table, `none` in
    its place where it has no rows. `by`: the column by which rows are grouped.
    """

    name: str
    label: str
    data: pd.DataFrame
    columns: Sequence[Column]
    note: str = ""
    none: str = ""
    of: Callable[[pd.DataFrame], pd.DataFrame] = lambda table: table
    by: str = ""
    badges: Mapping[str, str] = field(default_factory=dict)  #: behind a group's title
    names: Mapping[str, str] = field(default_factory=dict)  #: what the page calls subjects
    css: str = ""

    @property
    def parts(self) -> list[tuple[str, DisplayTable]]:
        """The groups of rows, each with its title; one without a title where nothing groups
        them."""
        rows = self.of(self.data)
        if "subject" in rows and self.names:
            rows = rows.assign(subject=rows["subject"].map(partial(called, self.names)))
        if not self.by:
            return [("", show(rows, self.columns))]
        return [
            (str(name), show(part, self.columns))
            for name, part in rows.groupby(self.by, sort=False)
        ]

    @property
    def folds(self) -> list[list[tuple[str, DisplayTable]]]:
        """The parts as tables that fit a wide page, one below the other; each has the columns that
        name its rows."""
        parts = self.parts
        if len({part.titles for _, part in parts}) != 1:
            return [parts] if parts else []
        every = replace(parts[0][1], rows=tuple(row for _, part in parts for row in part.rows))
        return [[(name, part.only(cut)) for name, part in parts] for cut in every.cuts(PAGE)]

    @property
    def is_tall(self) -> bool:
        return len(self.of(self.data)) > TALL


@dataclass(frozen=True, slots=True)
class Findings:
    """Where a section's findings stand, unless the page's reading has them."""


@dataclass(frozen=True, slots=True)
class Headlines:
    """Where a section's headlines stand, unless they are the page's."""


Block = (
    Prose
    | Heading
    | Bullets
    | Facts
    | Listing
    | Formula
    | Split
    | Table
    | Figure
    | Findings
    | Headlines
)


@dataclass(frozen=True, slots=True)
class Headline:
    """One subject's headline: `parts` are (words before, figure, its interval), an empty figure
    being none; `shown` follows them: parts that state a gap which the evidence shows, in colour."""

    subject: str
    parts: tuple[tuple[str, str, str], ...]
    shown: tuple[tuple[str, str, str], ...] = ()
    answer: str = ""  #: before them, on a page: what the evidence shows, in one sentence

    def plain(self) -> str:
        """As one line for a terminal, figures without spaces inside, the answer before the rest."""
        said = "".join(
            f"{words}{figure}{' ' if ends else ''}{ends}"
            for words, figure, ends in (*self.parts, *self.shown)
        )
        answer = f"{self.subject}: {self.said} " if self.answer else ""
        return tight(answer + self.subject + said)

    @property
    def said(self) -> str:
        """The answer as it goes on behind the subject's name."""
        return self.answer[:1].lower() + self.answer[1:]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section of the page, and what it gives to the rest of the report."""

    id: str
    title: str
    contents: str  #: its name in the table of contents
    blocks: Sequence[Block]
    headlines: Sequence[Headline] = ()
    is_gap: bool = False  #: whether its headlines state an audit gap
    findings: Sequence[tuple[str, Sequence[str]]] = ()  #: (subject, sentences)
    limits: Sequence[str] = ()  #: what it does not say
    facts: Sequence[str] = ()  #: under the page's title, where this is its first section
    method: Sequence[Block] = ()
    judge: Sequence[Block] = ()  #: what it adds to the section on the judge
    #: tasks of judge cards that correct its shares; None where no judge has a say in it
    judged: frozenset[str] | None = None
    is_rewarded: bool = False  #: whether a reward has a say in it
    #: tables that are in report.json though no block shows them as they are
    data: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    covers: Sequence[str] = ()  #: entries of a run's info that it shows, `key` or `key.inner`


def silent(id: str, **data: pd.DataFrame) -> Section:
    """A section that is not on the page: its tables are there for programs, and empty."""
    return Section(id=id, title="", contents="", blocks=(), data=data)


def shown(sections: Iterable[Section]) -> list[Section]:
    """The sections that are on the page."""
    return [section for section in sections if section.blocks]


def blocks_in(blocks: Iterable[Block]) -> Iterator[Block]:
    """All blocks, those inside others too."""
    for block in blocks:
        yield block
        if isinstance(block, Split):
            yield from blocks_in((*block.left, *block.right))


def blocks_of(section: Section) -> Iterator[Block]:
    """Everything that a section puts on the page, wherever it stands."""
    return blocks_in((*section.blocks, *section.method, *section.judge))


def words_of(sections: Iterable[Section]) -> str:
    """What the page of these sections says of its own, without the figures and names in it."""
    said: list[str] = []
    for section in shown(sections):
        said.append(section.title)
        for block in blocks_of(section):
            if isinstance(block, Prose | Heading):
                said.append(block.text)
            elif isinstance(block, Bullets):
                said += block.items
            elif isinstance(block, Table):
                said += [block.label, block.note, *(column.title for column in block.columns)]
            elif isinstance(block, Figure):
                said += [block.title, block.caption]
    return "\n".join(said)


def tables_of(sections: Sequence[Section]) -> dict[str, pd.DataFrame]:
    """Every table of these sections by its name, as report.json and the CSV files have it."""
    found: dict[str, pd.DataFrame] = {}
    for section in sections:
        found |= section.data
        found |= {table.name: table.data for table in tables_in([section])}
    return found


def tables_in(sections: Iterable[Section]) -> list[Table]:
    """The tables with a name that are on the page."""
    blocks = (block for section in sections for block in blocks_of(section))
    return [block for block in blocks if isinstance(block, Table) and block.name]


def figures_of(sections: Sequence[Section]) -> dict[str, Figure]:
    """Every figure of these sections by its name."""
    return {
        block.name: block
        for section in sections
        for block in blocks_of(section)
        if isinstance(block, Figure)
    }


def leading(sections: Sequence[Section]) -> Section | None:
    """The section that the page speaks of first: the first that found anything."""
    found = shown(sections)
    return next((s for s in found if s.findings), found[0] if found else None)


def at_the_top(sections: Sequence[Section]) -> list[Section]:
    """Sections whose headlines are the page's: those that state an audit gap, else all."""
    stated = [s for s in sections if s.headlines]
    return [s for s in stated if s.is_gap] or stated


def answers(sections: Sequence[Section]) -> list[str]:
    """The page's headlines as lines for a terminal."""
    return [line.plain() for section in at_the_top(sections) for line in section.headlines]


def placed(sections: Sequence[Section]) -> list[Section]:
    """The sections with their findings and headlines where they stand: at the top of the page, or
    in the section."""
    first, top = leading(sections), at_the_top(sections)
    found = []
    for section in sections:
        blocks: list[Block] = []
        for block in section.blocks:
            if isinstance(block, Findings):
                blocks += () if section is first else map(Prose, _paragraphs(section.findings))
            elif not isinstance(block, Headlines):
                blocks.append(block)
            elif all(section is not other for other in top):
                blocks += [Prose(headline_text(line)) for line in section.headlines]
        found.append(replace(section, blocks=blocks))
    return found


def _paragraphs(findings: Sequence[tuple[str, Sequence[str]]]) -> Iterator[str]:
    for subject, sentences in findings:
        if subject:
            yield named(subject) + clean(f". {' '.join(sentences)}")
        else:
            yield from sentences


def renamed(section: Section, names: Mapping[str, str]) -> Section:
    """The section with its subjects called so, wherever it sets them apart: in headlines, findings,
    tables and over figures. Data keep the names that were typed."""

    def block(one: Block) -> Block:
        if isinstance(one, Split):
            return replace(one, left=[*map(block, one.left)], right=[*map(block, one.right)])
        if isinstance(one, Table):
            return replace(one, names=names)
        if isinstance(one, Figure):
            return replace(one, groups=tuple((called(names, n), drawn) for n, drawn in one.groups))
        return one

    return replace(
        section,
        blocks=[block(one) for one in section.blocks],
        headlines=[replace(h, subject=called(names, h.subject)) for h in section.headlines],
        findings=[(called(names, name), said) for name, said in section.findings],
    )


def named(name: object) -> Markup:
    """Somebody's name, set apart."""
    return Markup('<span class="name">{}</span>').format(clean(name))


def headline_text(line: Headline) -> Markup:
    """A headline with its figures in bold."""
    said = named(line.subject) if line.subject else Markup("")
    for parts, form in ((line.parts, "<b>{}</b>"), (line.shown, '<strong class="gap">{}</strong>')):
        for words, figure, ends in parts:
            said += clean(words)
            said += Markup(form).format(clean(figure)) if figure else ""
            said += Markup(' <span class="ci">{}</span>').format(clean(ends)) if ends else ""
    return said


def answer_text(line: Headline) -> Markup:
    """What a headline's evidence shows, behind its subject's name."""
    if not line.subject:
        return Markup("{}").format(clean(line.answer))
    return named(line.subject) + ": " + clean(line.said)


def code(words: str) -> Markup:
    """A word of a table's cells or of the command line."""
    return Markup("<code>{}</code>").format(words)


def tight(text: str) -> str:
    """Text for a terminal, without the page's spaces inside its figures."""
    return re.sub("\u00a0(?=[a-z])", " ", text).replace("\u00a0", "").replace("\u2009", "")
