"""Completions under edits of every kind: at prefill, at every position, or behind the prompt.

done = generate(session, rendered, [steer, None])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from auditgap.audits.intervene.learned import AnyEdit
from auditgap.audits.session import Session
from auditgap.engines import Completion, Request, constant
from auditgap.engines.hf import HFEngine
from auditgap.models import Rendered
from auditgap.types import ConstantEdit, Edit, Suffix


def generate(
    session: Session, rendered: Sequence[Rendered], edits: Sequence[AnyEdit]
) -> list[Completion]:
    """Completions, each under its edit; a suffix is behind its prompt."""
    put, under = list(rendered), list(edits)
    for i, edit in enumerate(edits):
        if isinstance(edit, Suffix):
            put[i], under[i] = session.render(edit.behind(rendered[i].prompt)), None
    if session.stage.in_vllm:
        spoken = session.stage.vllm.generate_under(put, under, session.new_tokens)
        return [session.cut(r, c) for r, c in zip(put, spoken, strict=True)]
    # edits at prefill go through the engine, constant edits through its hook at every step
    everywhere = {i: edit for i, edit in enumerate(under) if isinstance(edit, ConstantEdit)}
    others = [i for i in range(len(put)) if i not in everywhere]
    requests = [Request(put[i], cast(Edit | None, under[i])) for i in others]
    done = dict(zip(others, session.generate(requests), strict=True))
    edited = constant.generate(
        cast(HFEngine, session.stage.engine),
        [put[i] for i in everywhere],
        list(everywhere.values()),
        session.new_tokens,
    )
    cut = [session.cut(rendered[i], c) for i, c in zip(everywhere, edited, strict=True)]
    done.update(zip(everywhere, cut, strict=True))
    return [done[i] for i in range(len(rendered))]
