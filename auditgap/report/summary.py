"""The first screen of a report as a document of its own: who, when, the answer, the verdicts, the
limits, what to do next.

    page.write(sections, frame, home, copies=Copies(summary=True))   # summary.html and summary.md beside report.html
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from auditgap.report.columns import escaped, show, word
from auditgap.report.frame import Frame
from auditgap.report.section import (
    Block,
    Bullets,
    Heading,
    Prose,
    Section,
    Table,
    answer_text,
    at_the_top,
    blocks_in,
    headline_text,
)

#: The verdict table without markup in its cells.
_VERDICTS = (
    word("question", "Question"),
    word("criterion", "What a pass asks for"),
    word("answer", "Verdict"),
    word("figure", "Figure"),
)


def markdown(sections: Sequence[Section], frame: Frame) -> str:
    """The first screen for a reader of text."""
    lines = [f"# {_plain(frame.title)}", ""]
    lines += [f"- {key}: {_plain(value)}" for key, value in frame.about]
    lines += [f"- {_plain(fact)}" for fact in frame.facts]
    for section in at_the_top(sections):
        for line in section.headlines:
            lines += ["", f"**{_plain(answer_text(line))}**"] if line.answer else []
            lines += ["", _plain(headline_text(line))] if line.parts else []
    lines += [said for line in frame.lead for said in ("", _plain(line))]
    lines += ["", *_blocks([*frame.first, *frame.notes])]
    return "\n".join(lines).rstrip() + "\n"


def _blocks(blocks: Sequence[Block]) -> Iterator[str]:
    for block in blocks_in(blocks):
        if isinstance(block, Heading):
            yield from ("", f"## {_plain(block.text)}", "")
        elif isinstance(block, Bullets):
            yield from (f"- {_plain(item)}" for item in block.items)
        elif isinstance(block, Prose):
            yield from ("", _plain(block.text))
        elif isinstance(block, Table):
            for name, rows in (
                block.data.groupby(block.by, sort=False) if block.by else [("", block.data)]
            ):
                yield from ("", f"## {_plain(name)}", "") if name else ("", "## Verdicts", "")
                yield from show(rows, _VERDICTS).markdown()


def _plain(words: object) -> str:
    """Text, or markup without its tags, as Markdown that draws nothing of its own."""
    said = words.striptags() if hasattr(words, "striptags") else str(words)  # type: ignore[attr-defined]
    return escaped(said).replace("\u00a0", " ").replace("\u2009", "")
