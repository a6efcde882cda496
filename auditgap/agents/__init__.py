"""The audit as tools for an auditor agent: list runs and sites, read verdicts and tables, attack.

    tools = Toolbox(Path("runs"))
    tools.list_sites("smollm2")                      # [{"site": "embedding", "layer_index": -1}, …]
    tools.read_table("tuned/lvs", "lvs", limit=5)    # rows, nothing rounded

`server` offers them over MCP and `inspect_tools` as tools of inspect_ai. No runs or prompts outside
the folder are read (models are opened wherever they are, as by the commands), and nothing is written
unless `may_attack` is set; prompts and completions are never shown, as no table holds any. What a
tool says of a run is data: names in it are strangers' text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import pandas as pd
from pydantic import Field

from auditgap.errors import UsageError
from auditgap.types import Document

if TYPE_CHECKING:
    from auditgap.api import Result

#: Rows of a table that one answer holds, and prompts of one attack, at most.
MOST_ROWS, MOST_PROMPTS = 200, 50

Model = Annotated[str, Field(description="a model folder, an adapter, or a hub id")]
Run = Annotated[str, Field(description="a run's folder, as list_runs names it")]


@dataclass(frozen=True)
class Toolbox:
    """What an agent may do below one folder."""

    home: Path
    may_attack: bool = False

    def tools(self) -> list[Callable[..., object]]:
        """The tools that are allowed."""
        reading = [self.list_runs, self.list_sites, self.read_verdicts, self.read_table]
        return [*reading, *([self.attack] if self.may_attack else [])]

    def list_runs(self) -> list[Document]:
        """List the finished and unfinished runs: folder, audit, models, cells done."""
        from auditgap.store import RunFolder

        found = []
        for path in sorted(self.home.glob("**/run.json")):
            store = RunFolder.load(path.parent)
            now, config = store.status(), store.run["config"]
            found.append(
                {
                    "run": path.parent.relative_to(self.home).as_posix(),
                    "audit": config.get("audit"),
                    "models": list(config.get("models") or ()),
                    "finished": now.finished,
                    "planned": now.planned,
                    "failed": now.failed,
                }
            )
        return found

    def list_sites(self, model: Model) -> list[Document]:
        """List the sites of a model at which hidden states can be edited. Reads no weights."""
        from auditgap.models import outline, parse_sites

        sites = parse_sites("all", outline(model).n_blocks)
        return [{"site": str(site), "layer_index": site.layer_index} for site in sites]

    def read_verdicts(self, run: Run) -> list[Document]:
        """Read a run's verdicts: question, answer (pass, fail, could not tell, not measured),
        figure, and the reason with what would settle it."""
        from auditgap.store.tables import rows_of

        if (whole := self._whole(run)) is not None:
            return whole["verdicts"]
        return rows_of(self._result(run).verdicts, plain=True)

    def read_table(
        self,
        run: Run,
        table: Annotated[str, Field(description="its name; an unknown one lists those there are")],
        limit: Annotated[int, Field(ge=1, le=MOST_ROWS, description="rows at most")] = 50,
        skip: Annotated[int, Field(ge=0, description="rows to leave out first")] = 0,
    ) -> Document:
        """Read rows of a run's table, shares 0 to 1 and nothing rounded. It holds no prompts and no
        completions."""
        from auditgap.store.tables import rows_of

        whole = self._whole(run)
        if whole is not None:
            tables = {name: pd.DataFrame(rows) for name, rows in whole["tables"].items()}
        else:
            tables = self._result(run).tables
        if table not in tables:
            raise UsageError(f"{run} has no table {table!r}. Its tables: {', '.join(tables)}.")
        rows = rows_of(tables[table].iloc[skip : skip + limit], plain=True)
        return {"table": table, "rows_in_all": len(tables[table]), "rows": rows}

    def attack(
        self,
        model: Model,
        run: Annotated[str, Field(description="the new run's folder; one that is there resumes")],
        prompts: Annotated[
            str, Field(description="a named set, such as harmbench, or a file among the runs")
        ] = "harmbench",
        layers: Annotated[str, Field(description="sites")] = "embedding,mid,last",
        limit: Annotated[int, Field(ge=1, le=MOST_PROMPTS, description="prompts")] = 12,
        judge: Annotated[str, Field(description="who judges the answers")] = "builtin",
    ) -> Document:
        """Attack a model's hidden states with bounded edits and their controls, and judge what it
        says. Takes minutes to hours; answers with the verdicts and the audit gap by budget."""
        import auditgap
        from auditgap.data.sources import SOURCES
        from auditgap.store.tables import rows_of

        if not self.may_attack:
            raise UsageError("Attacks are off here. Whoever starts the tools may allow them.")
        asked = prompts if prompts in SOURCES else str(self._inside(prompts))
        found = auditgap.lvs(
            model, out=self._inside(run), prompts=asked, layers=layers, limit=limit, judge=judge
        )
        return {
            "failed": dict(found.failed),
            "verdicts": rows_of(found.verdicts, plain=True),
            "gaps": rows_of(found.gaps, plain=True),
        }

    def _inside(self, run: str) -> Path:
        home = self.home.resolve()
        path = (home / run).resolve()
        if path == home or not path.is_relative_to(home):
            raise UsageError(f"{run!r} is not inside the folder of runs that these tools may use.")
        return path

    def _whole(self, run: str) -> Document | None:
        """report.json of a whole audit's folder."""
        from auditgap.audits import whole

        path = self._inside(run)
        return whole.report_of(path) if whole.is_whole(path) else None

    def _result(self, run: str) -> Result:
        from auditgap.api import load

        return load(self._inside(run))
