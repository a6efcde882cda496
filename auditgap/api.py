"""The same from Python: what the commands do, with results as dataframes.

    import auditgap

    found = auditgap.lvs("smollm2", prompts="harmbench", limit=16, out="runs/smollm2")
    # a pandas.DataFrame, nothing rounded
    found.table[["site", "attack", "asr", "delta_vs_matched"]]
    audit = auditgap.audit("./tuned", base="./base", profile="smoke", out="runs/tuned")
    # a DataFrame: question, answer, figure, reason
    audit.verdicts

Every audit has a function, with its settings as keywords (Shift-Tab shows them, as `auditgap lvs
--help` does); a call on a folder that is there resumes it. Errors are `auditgap.errors`: UsageError (a sentence), Refused (for safety),
PartlyFailed (some cells failed; the rest is stored).
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pandas as pd

from auditgap.audits import AUDITS, Audit, run
from auditgap.audits.latent.audit import DISTANCE, DISTANCE_TITLE
from auditgap.audits.settings import CompareSettings, JudgeEvalSettings
from auditgap.audits.whole_config import WholeSettings
from auditgap.config import build
from auditgap.errors import PartlyFailed, UsageError
from auditgap.signatures import called, described, settings_of
from auditgap.store import RunFolder
from auditgap.store.tables import unseal
from auditgap.types import ATTACKS, CLEAN, LONGER

if TYPE_CHECKING:
    from auditgap.judges.card import JudgeCard
    from auditgap.report.drawing import Drawing, Profile
    from auditgap.sweep import Progress

__all__ = [
    "VERBS",
    "AuditResult",
    "CompareResult",
    "Result",
    "audit",
    "compare",
    "distance",
    "em",
    "evaluate",
    "intervene",
    "judge_eval",
    "load",
    "lvs",
    "probe",
    "sft_curve",
]


@dataclass(frozen=True)
class Result:
    """A run folder that a command has written. Shares are 0–1; what was not measured is null."""

    path: Path
    failed: Mapping[str, str]  #: cell → cause

    @property
    def store(self) -> RunFolder:
        """The folder itself: cells, records, generations."""
        return RunFolder.load(self.path)

    @property
    def table(self) -> pd.DataFrame:
        """The run's main table: `lvs.parquet` of attacks, `behaviour.parquet` of questions;
        columns as in the reference. Raises UsageError where the folder has none, or several."""
        from auditgap.audits import AUDITS

        audit = self.store.run["config"].get("audit")
        name = AUDITS[audit].main_table if audit in AUDITS else None
        path = self.path / f"{name}.parquet"
        if name is None or not path.is_file():
            known = ", ".join(path.stem for path in self._table_files) or "none"
            raise UsageError(
                f"{self.path} ({audit or 'a training run'}) has no single table. Its tables are:"
                f" {known}; read one as `.tables[NAME]`."
            )
        return unseal(path)

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table that the folder holds, by name."""
        return {path.stem: unseal(path) for path in self._table_files}

    @property
    def _table_files(self) -> list[Path]:
        return sorted(self.path.glob("*.parquet"))

    @property
    def rows(self) -> pd.DataFrame:
        """One row a prompt and cell, as stored; no text."""
        return self.store.rows()

    @property
    def gaps(self) -> pd.DataFrame:
        """The audit gap of each subject and budget, of a run of `lvs`. Raises UsageError for one of
        something else."""
        from auditgap.report import gather, tables

        make = {"gaps": tables.audit_gaps}
        return gather.tables_of([self._latent()], [*ATTACKS, LONGER, CLEAN], make)["gaps"]

    @property
    def distances(self) -> pd.DataFrame:
        """The median distance to collapse of each subject and site, of `distance` or
        `lvs(distance=True)`; empty where it was not searched for. Raises as `gaps`."""
        from auditgap.report import tables

        rows = self._latent().rows(["distance"])
        return tables.distance_table(rows) if "distance" in rows else pd.DataFrame()

    @property
    def verdicts(self) -> pd.DataFrame:
        """The lines of the verdict table that this run answers, by our criteria; columns as of
        `AuditResult.verdicts`."""
        from auditgap.audits import pages
        from auditgap.report.verdict_lines import table_of

        return table_of(pages.with_verdicts(pages.from_store([self.store])).verdicts)

    @property
    def figures(self) -> dict[str, Drawing]:
        """The figures of its report by name, which a notebook shows; `.save(path)` writes an SVG,
        `.data` has the numbers."""
        from auditgap.audits import pages
        from auditgap.report.drawing import Drawing

        found = pages.figures_of(pages.from_store([self.store]))
        return {name: Drawing(figure) for name, figure in found.items()}

    def profile(self, measure: str = "lvs") -> Profile:
        """`lvs` or `asr` by depth, attack beside controls: `.table`, `.plot()`. Raises UsageError
        for another measure, and as `gaps`."""
        from auditgap.report.drawing import Profile

        self._latent()
        if (name := f"{measure}_by_depth") not in (figures := self.figures):
            raise UsageError(f"A profile is of lvs or asr; {measure!r} came.")
        return Profile(figures[name].figure)

    def _latent(self) -> RunFolder:
        store = self.store
        if (name := store.run["config"].get("audit")) != "latent":
            raise UsageError(
                f"{self.path} is the folder of {name or 'a training run'}; only a run of `lvs` or"
                " `distance` has gaps and distances."
            )
        return store

    def _repr_html_(self) -> str:
        """The main table, or the names of all, under the folder's name: what a notebook shows."""
        failed = f", {len(self.failed)} cells failed" if self.failed else ""
        head = f"<p><code>{html.escape(str(self.path))}</code>{failed}</p>"
        try:
            return head + self.table.to_html(max_rows=20, notebook=True)
        except UsageError as error:
            return f"{head}<p>{html.escape(str(error))}</p>"

    @property
    def report(self) -> Path:
        """The HTML page."""
        return self.path / "report.html"

    def raise_failures(self) -> Result:
        """Itself. Raises PartlyFailed with the causes when cells failed."""
        if self.failed:
            lines = "\n".join(f"  {cell}: {cause}" for cell, cause in sorted(self.failed.items()))
            raise PartlyFailed(
                f"{len(self.failed)} cells failed, the others are in {self.path}:\n{lines}"
            )
        return self


@dataclass(frozen=True)
class AuditResult:
    """A whole audit's folder."""

    path: Path
    failed: Mapping[str, str]
    overall: str  #: how many verdicts came out how, in one sentence

    @property
    def report(self) -> Path:
        """The HTML page."""
        return self.path / "report.html"

    @property
    def data(self) -> dict[str, Any]:
        """report.json."""
        from auditgap.audits import whole

        return whole.report_of(self.path)

    def _repr_html_(self) -> str:
        """The verdict table under the folder's name: what a notebook shows."""
        head = f"<p><code>{html.escape(str(self.path))}</code>: {html.escape(self.overall)}</p>"
        return head + self.verdicts.to_html(index=False, notebook=True)

    @property
    def verdicts(self) -> pd.DataFrame:
        """The verdict table: subject, question, answer, figure, reason."""
        return pd.DataFrame(self.data["verdicts"])

    @property
    def gaps(self) -> pd.DataFrame:
        """The audit gap of each subject and budget; empty where no attack ran."""
        return pd.DataFrame(self.data["tables"].get("audit_gap", []))

    def table(self, name: str) -> pd.DataFrame:
        """A table of report.json by its name: audit_gap, lvs, distance, asked, sft_summary, …
        Raises KeyError."""
        return pd.DataFrame(self.data["tables"][name])

    @property
    def parts(self) -> dict[str, Result]:
        """The parts' own run folders by name: evaluate, probe, lvs, sft-curve, as far as they
        ran."""
        from auditgap.audits import whole

        return {store.path.name: load(store.path) for store in whole.stores(self.path)}


@dataclass(frozen=True, eq=False)
class CompareResult:
    """Models side by side, as `auditgap compare` writes them."""

    report: Path  #: the HTML page; its tables lie beside it
    table: (
        pd.DataFrame
    )  #: a row a model, measure, site and budget, beside the base; nothing rounded
    says: Sequence[str]  #: the differences in sentences

    def _repr_html_(self) -> str:
        """The sentences under the page's name: what a notebook shows."""
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in self.says)
        return f"<p><code>{html.escape(str(self.report))}</code></p><ul>{lines}</ul>"


class Verb(Protocol):
    """An audit as a function: what a type checker knows of it; `inspect.signature` has all its
    settings."""

    def __call__(
        self,
        *named: str,
        out: str | Path | None = None,
        progress: Callable[[], Progress] | None = None,
        **settings: Any,
    ) -> Result: ...


def _verb(of: Audit, command: str, title: str, **fixed: Any) -> Verb:
    """The function that runs an audit, with `fixed` settings that it does not take."""
    kinds = (of.config, of.options)

    def call(
        *named: str,
        out: str | Path | None = None,
        progress: Callable[[], Progress] | None = None,
        **settings: Any,
    ) -> Result:
        asked = settings_of(named, kinds, {"out": out, **settings})
        config, options = of.read(None, {**asked, **fixed})
        store, outcome = run(of, config, options, progress=progress)
        return Result(store.path, outcome.failed)

    described(call, command, title, kinds, Result)
    return call


#: What runs each audit, by the name that it has here.
VERBS: Mapping[str, Verb] = {
    called(of.command): _verb(of, of.command, of.title) for of in AUDITS.values()
}
lvs = VERBS["lvs"]
evaluate = VERBS["evaluate"]
probe = VERBS["probe"]
intervene = VERBS["intervene"]
sft_curve = VERBS["sft_curve"]
em = VERBS["em"]
distance = _verb(AUDITS["latent"], "distance", DISTANCE_TITLE, **DISTANCE)


def audit(
    model: str | None = None,
    *,
    base: str | None = None,
    out: str | Path | None = None,
    progress: Callable[[], Progress] | None = None,
    **settings: Any,
) -> AuditResult:
    from auditgap.audits import whole

    named = () if model is None else (model,)
    asked = settings_of(named, (WholeSettings,), {"base": base, "out": out, **settings})
    done = whole.run(*whole.read_config(None, asked), progress=progress)
    return AuditResult(done.out, done.failed, done.overall)


described(
    audit,
    "audit",
    'The whole audit of one model. A part\'s own settings are a mapping: `lvs={"steps": 20}`.',
    (WholeSettings,),
    AuditResult,
)


def compare(*folders: str, out: str | Path | None = None, **settings: Any) -> CompareResult:
    from auditgap.audits import comparing
    from auditgap.report.compare_tables import says

    asked = settings_of(folders, (CompareSettings,), {"out": out, **settings})
    given = {key: value for key, value in asked.items() if value is not None}
    done = comparing.run(*build(given, CompareSettings))
    return CompareResult(done.page, done.found.table, tuple(says(done.found)))


described(
    compare,
    "compare",
    "Models side by side, from the run folders of their audits.",
    (CompareSettings,),
    CompareResult,
    follows=False,
)


def judge_eval(judge: str, *, out: str | Path | None = None, **settings: Any) -> JudgeCard:
    from auditgap.audits import judge_eval as evaluation

    asked = settings_of((judge,), (JudgeEvalSettings,), {"out": out, **settings})
    return evaluation.run(evaluation.read(None, asked))


described(
    judge_eval,
    "judge eval",
    "How far a judge can be trusted, against people's labels: its card.",
    (JudgeEvalSettings,),
    "JudgeCard",
    follows=False,
)


def load(path: str | Path) -> Result:
    """A run folder that is there, finished or not. Raises UsageError when it is none."""
    store = RunFolder.load(path)
    return Result(
        store.path, {key: str(record.get("cause", "")) for key, record in store.failures().items()}
    )
