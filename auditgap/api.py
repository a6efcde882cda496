"""The same from Python: what the commands do, with results as dataframes.

    import auditgap

    found = auditgap.lvs("smollm2", prompts="harmbench", limit=16, out="runs/smollm2")
    # a pandas.DataFrame, nothing rounded
    found.table[["site", "attack", "asr", "delta_vs_matched"]]
    audit = auditgap.audit("./tuned", base="./base", profile="smoke", out="runs/tuned")
    # a DataFrame: question, answer, figure, reason
    audit.verdicts

Every keyword is the config key of that name (`auditgap lvs --help`); a call on a folder that is
there resumes it. Errors are `auditgap.errors`: UsageError (a sentence), Refused (for safety),
PartlyFailed (some cells failed; the rest is stored).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from auditgap.errors import PartlyFailed, UsageError
from auditgap.store import RunFolder

if TYPE_CHECKING:
    from auditgap.sweep import Progress

__all__ = ["AuditResult", "Result", "audit", "distance", "evaluate", "load", "lvs"]


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
        return pd.read_parquet(path)

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table that the folder holds, by name."""
        return {path.stem: pd.read_parquet(path) for path in self._table_files}

    @property
    def _table_files(self) -> list[Path]:
        return sorted(self.path.glob("*.parquet"))

    @property
    def rows(self) -> pd.DataFrame:
        """One row a prompt and cell, as stored; no text."""
        return self.store.rows()

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
        return json.loads((self.path / "report.json").read_text(encoding="utf-8"))

    @property
    def verdicts(self) -> pd.DataFrame:
        """The verdict table: subject, question, answer, figure, reason."""
        return pd.DataFrame(self.data["verdicts"])

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


def audit(
    model: str,
    *,
    base: str | None = None,
    profile: str = "standard",
    out: str | Path | None = None,
    progress: Callable[[], Progress] | None = None,
    **settings: Any,
) -> AuditResult:
    """The whole audit of one model, as `auditgap audit`. A part's own settings are a mapping:
    `lvs={"steps": 20}`.

    Raises UsageError, Refused, Interrupted; what fails in a part is in `failed`.
    """
    from auditgap.audits import whole

    asked = {"model": model, "base": base, "profile": profile, "out": _text(out), **settings}
    done = whole.run(*whole.read_config(None, asked), progress=progress)
    return AuditResult(done.out, done.failed, done.overall)


def lvs(
    *models: str,
    out: str | Path | None = None,
    progress: Callable[[], Progress] | None = None,
    **settings: Any,
) -> Result:
    """Latent Vulnerability Scores, as `auditgap lvs`. Raises UsageError, Refused, Interrupted;
    failed cells are in `failed`."""
    from auditgap.audits import latent

    config, options = latent.read_config(None, {"models": models, "out": _text(out), **settings})
    store, outcome = latent.run(config, options, progress=progress)
    return Result(store.path, outcome.failed)


def distance(
    *models: str,
    out: str | Path | None = None,
    progress: Callable[[], Progress] | None = None,
    **settings: Any,
) -> Result:
    """Minimum distance to collapse, as `auditgap distance`. Raises as `lvs`."""
    return lvs(*models, out=out, progress=progress, **{**settings, "attacks": (), "distance": True})


def evaluate(
    *models: str,
    out: str | Path | None = None,
    progress: Callable[[], Progress] | None = None,
    **settings: Any,
) -> Result:
    """What models say when asked, as `auditgap evaluate`. Raises as `lvs`."""
    from auditgap.audits import behaviour

    config, options = behaviour.read_config(None, {"models": models, "out": _text(out), **settings})
    store, outcome = behaviour.run(config, options, progress=progress)
    return Result(store.path, outcome.failed)


def load(path: str | Path) -> Result:
    """A run folder that is there, finished or not. Raises UsageError when it is none."""
    store = RunFolder.load(path)
    return Result(
        store.path, {key: str(record.get("cause", "")) for key, record in store.failures().items()}
    )


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)
