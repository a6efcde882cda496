"""The tools for an agent that inspect_ai runs.

from auditgap.agents.inspect_tools import tools

react(tools=tools("runs"))                        # reads
react(tools=tools("runs", may_attack=True))       # and attacks
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any, get_type_hints

import anyio

from auditgap.agents import Toolbox
from auditgap.errors import AuditgapError, UsageError
from auditgap.inspect import MISSING

try:
    from inspect_ai.tool import Tool, ToolDef, ToolError
except ImportError as error:
    raise UsageError(MISSING) from error


def tools(home: str | Path, *, may_attack: bool = False) -> list[Tool]:
    """The tools of `Toolbox` over one folder of runs; answers are JSON, and a refusal is a sentence
    that the agent reads."""
    return [_tool(act) for act in Toolbox(Path(home), may_attack).tools()]


def _tool(act: Callable[..., object]) -> Tool:
    hints = get_type_hints(act, include_extras=True)
    said = {
        name: next((note.description for note in getattr(hint, "__metadata__", ())), None) or name
        for name, hint in hints.items()
        if name != "return"
    }

    @wraps(act)
    async def execute(*given: Any, **named: Any) -> str:
        try:
            # it reads files and may run a model: never on the loop that serves others
            found = await anyio.to_thread.run_sync(partial(act, *given, **named))
        except AuditgapError as error:
            raise ToolError(str(error)) from error
        return json.dumps(found)

    about = " ".join((act.__doc__ or "").split())
    return ToolDef(execute, name=act.__name__, description=about, parameters=said).as_tool()
