"""What the engine tells vLLM's process: wishes, and the edits that they name.

wish(ids, 32, on=on(rendered, edit))     # {"ids", "max", …, "edit": [first, last]}
named([one], [edit])                     # the same with the edit's name before its positions
for load, coded in loads(edits): …       # as many as the child holds at a time
edits_message([edit], coded)             # the edits, and their bytes
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from auditgap.engines.coded import Coded
from auditgap.engines.vllm.edits import coded_of, layers_of, own_of, pack, span_of, terms_of
from auditgap.models import Rendered
from auditgap.types import ConstantEdit, Document, Edit

#: An edit of a prompt's positions, of every position, or none.
AnyEdit = Edit | ConstantEdit | None
#: An edit's terms as they travel, by name.
CodedTerms = dict[str, Coded]

#: Bytes of edits that are in the child at a time.
_EDIT_BYTES = 1 << 28


def wish(
    ids: Sequence[int],
    n: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    top: int = 0,
    score: int = 0,
    on: tuple[int, int | None] | None = None,
) -> Document:
    """What `process.Served.speak` takes, but that `edit` has the positions `on` and no name yet."""
    return {
        "ids": list(ids),
        "max": n,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "top": top,
        "score": score,
        "edit": on,
    }


def on(rendered: Rendered, edit: AnyEdit) -> tuple[int, int | None] | None:
    """The positions that an edit is on, behind that prompt."""
    return None if edit is None else span_of(edit, len(rendered.ids))


def named(wishes: Sequence[Document], edits: Sequence[AnyEdit]) -> list[Document]:
    """The wishes with the names of their edits, as `edits_message` calls them."""
    names = _names(edits)
    return [
        {**one, "edit": [names[id(edit)], *one["edit"]] if edit is not None else None}
        for one, edit in zip(wishes, edits, strict=True)
    ]


def edits_message(
    edits: Sequence[AnyEdit], coded: Mapping[int, CodedTerms]
) -> tuple[list[Document], list[bytes]]:
    """Each edit once, as `process.Served.speak` takes it, and the bytes of its terms, which `coded`
    has by the edit's identity."""
    described, payloads, names = [], [], _names(edits)
    for edit in {id(edit): edit for edit in edits}.values():
        if edit is None:
            continue
        packed = {what: pack(term) for what, term in coded[id(edit)].items()}
        payloads += [payload for _, payload in packed.values()]
        described.append(
            {
                "name": names[id(edit)],
                "layers": layers_of(edit),
                "terms": {what: shape for what, (shape, _) in packed.items()},
                "own": own_of(edit),
                "decodes": span_of(edit, 0)[1] is None,
            }
        )
    return described, payloads


def _names(edits: Sequence[AnyEdit]) -> dict[int, str]:
    """By an edit's identity: one that is shared has one name."""
    return {id(edit): str(n) for n, edit in enumerate(edits) if edit is not None}


def loads(edits: Sequence[AnyEdit]) -> Iterator[tuple[list[int], dict[int, CodedTerms]]]:
    """Indices in order, cut where the edits of a part would take more than _EDIT_BYTES; with each
    part its edits as they travel, by identity."""
    load: list[int] = []
    coded: dict[int, CodedTerms] = {}
    size = 0
    for i, edit in enumerate(edits):
        if edit is not None and id(edit) not in coded:
            terms = {what: coded_of(term) for what, term in terms_of(edit).items()}
            new = sum(term.nbytes for term in terms.values())
            if load and size + new > _EDIT_BYTES:
                yield load, coded
                load, coded, size = [], {}, 0
            coded[id(edit)] = terms
            size += new
        load.append(i)
    if load:
        yield load, coded
