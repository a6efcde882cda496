"""`auditgap report`, `status`, `grade`, `inspect`, `mcp` and `export-edits`: what is done with a run folder
afterwards, whichever audit made it.

    auditgap status runs/smollm2
    auditgap grade runs/smollm2 --judge keyword
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from auditgap.audits.options import openai_for_endpoints
from auditgap.audits.settings import GradeSettings, ReportSettings
from auditgap.cli import grid, show
from auditgap.cli.options import AsJson, Asked, command, examples
from auditgap.cli.screen import answer, confirm, print_json, print_table, quiet, say
from auditgap.config import build, merged
from auditgap.errors import UsageError

if TYPE_CHECKING:
    from auditgap.report.page import Copies

PANEL = "Runs and reports"


def add(app: typer.Typer) -> None:
    _add_report(app)
    for name, act, lines in (
        (
            "status",
            status,
            ("auditgap status runs/smollm2 --json", "auditgap status runs/tuned --watch"),
        ),
        ("clean", clean, ("auditgap clean runs/smollm2", "auditgap clean runs --yes")),
        (
            "inspect",
            inspect,
            ("auditgap inspect runs/behaviour --out behaviour.eval && inspect view --log-dir .",),
        ),
        ("mcp", mcp, ("auditgap mcp runs", "auditgap mcp runs --allow-attacks")),
        (
            "export-edits",
            export_edits,
            ("auditgap export-edits runs/interventions --out directions.safetensors",),
        ),
    ):
        app.command(name, epilog=examples(lines), rich_help_panel=PANEL)(act)
    _add_grade(app)


def _add_report(app: typer.Typer) -> None:
    @command(
        app,
        "report",
        ReportSettings,
        about=(
            "Rewrite the tables and the HTML report of one or more run folders, or of a whole"
            " audit's. Exits with 3 if planned cells are missing from the tables."
        ),
        examples_of=(
            "auditgap report runs/base runs/tuned --out runs/both",
            "auditgap report runs/tuned --summary --pdf",
        ),
        panel=PANEL,
        plans=False,
    )
    def report(asked: Asked) -> None:
        from auditgap.audits import whole

        needs = {"folders": "Report which runs? For example: auditgap report runs/smollm2"}
        (wanted,) = build(merged(asked.file, asked.flags), ReportSettings, needs=needs)
        if wanted.pdf:
            from auditgap.report.pdf import browser

            browser()  # or say at once that there is none
        if len(wanted.folders) == 1 and whole.is_whole(Path(wanted.folders[0])):
            return _report_whole(wanted, asked.as_json)
        if wanted.public:
            raise UsageError("--public works with one folder, that of an `auditgap audit`.")
        return _report_runs(wanted, asked.as_json)


def _report_whole(wanted: ReportSettings, as_json: bool) -> None:
    from auditgap.audits import reduce, whole

    folder, copies = Path(wanted.folders[0]), _copies(wanted)
    parts, path = whole.stores(folder), Path(wanted.out or folder)
    for store in parts:
        reduce(store, allow_raw=wanted.allow_raw)
    options = whole.WholeOptions(allow_raw=wanted.allow_raw, public=wanted.public)
    whole.report(folder, options=options, out=path, copies=copies)
    page = path / "report.html"
    answer(as_json, _written(page, copies.beside), report=str(page))
    show.complete(parts, whole.not_begun(folder))


def _report_runs(wanted: ReportSettings, as_json: bool) -> None:
    from auditgap.audits import pages, reduce
    from auditgap.report.page import Copies
    from auditgap.store import RunFolder
    from auditgap.store.remote import within

    stores, copies = [RunFolder.load(folder) for folder in wanted.folders], _copies(wanted)
    for store in stores:
        reduce(store, allow_raw=wanted.allow_raw)
    # else it has just been written
    if len(stores) > 1 or wanted.out is not None or copies != Copies():
        pages.write(stores, allow_raw=wanted.allow_raw, out=wanted.out, copies=copies)
    where = within(wanted.out or stores[0].place, "report.html")
    missing = sum(store.status().missing for store in stores)
    answer(as_json, _written(where, copies.beside), report=str(where), missing=missing)
    show.complete(stores)


def _copies(wanted: ReportSettings) -> Copies:
    from auditgap.report.page import Copies

    return Copies(wanted.summary, wanted.pdf, wanted.latex)


def _written(page: Path | str, beside: list[str]) -> str:
    """Where the report is, and what lies beside it."""
    return f"Report: {page}" + (f"\nBeside it: {', '.join(beside)}" if beside else "")


def _add_grade(app: typer.Typer) -> None:
    @command(
        app,
        "grade",
        GradeSettings,
        about=(
            "Judge a run's stored completions again, without generating; the new tables and report"
            " go to DIR/grades/."
        ),
        examples_of=(
            "auditgap grade runs/smollm2 --judge keyword",
            "auditgap grade runs/behaviour --judge refusal=gpt-4.1-mini --judge-endpoint"
            " https://api.openai.com/v1",
        ),
        panel=PANEL,
        plans=False,
    )
    def grade(asked: Asked) -> None:
        quiet()
        from auditgap.audits import Grading, audit_of, regrade
        from auditgap.engines import Serving
        from auditgap.store import RunFolder

        values = merged(asked.file, asked.flags)
        openai_for_endpoints(values, GradeSettings.model_fields)
        needs = {
            "folder": "Grade which run? For example: auditgap grade runs/smollm2 --judge keyword"
        }
        (by,) = build(values, GradeSettings, needs=needs)
        serving = Serving(
            engine=by.judge_engine,
            base_url=by.judge_endpoint,
            device=by.device,
            thinking_tokens=by.judge_thinking_tokens,
        )
        store = regrade(
            by.folder,
            Grading(
                judge=by.judge,
                reward=by.reward,
                device=by.device,
                serving=serving,
                max_unscored=by.max_unscored,
            ),
        )
        graded = RunFolder.load(by.folder)
        audit = audit_of(graded)
        show.show(audit, store, as_json=asked.as_json)
        show.complete([graded])
        show.enough(audit, store, by.max_unscored)


def status(
    folder: Annotated[str, typer.Argument(help="A run folder, or a grid's.")],
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Go on until it is over: who works on it, cells a minute, time left, the gap so"
            " far, failures.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show a run's progress, while it runs or after, from any machine that can read its folder."""
    if watch:
        from auditgap.cli.watch import watch as watching

        return watching(folder)
    from dataclasses import asdict

    from auditgap.store import RunFolder, cases_of
    from auditgap.sweep.progress import duration

    if cases := cases_of(folder):
        return grid.show_status(folder, cases, as_json)
    store = RunFolder.load(folder)
    now = store.status()
    failures = {key: record.get("cause", "") for key, record in store.failures().items()}
    if as_json:
        print_json({**asdict(now), "failures": failures})
        return
    running = (
        f"running (pid {now.running.get('pid')} on {now.running.get('host')})"
        if now.running
        else "not running"
    )
    left = f", about {duration(now.eta_seconds)} left" if now.eta_seconds is not None else ""
    say(
        f"{folder}: {now.finished} of {now.planned} cells done, {now.failed} failed,"
        f" {running}{left}."
    )
    if store.unchecked:
        say(store.unchecked)
    if now.corrupt:
        say(
            f"{now.corrupt} damaged files: the same command sets them aside (*.corrupt) and computes"
            " their cells again."
        )
    for key, cause in failures.items():
        say(f"  {key}: {cause}")


def clean(
    folder: Annotated[Path, typer.Argument(help="A run folder, or a folder of several.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
    as_json: AsJson = False,
) -> None:
    """List what of a run may be deleted, and delete it after a question: scratch, checkpoints of
    finished trainings, what was set aside. Never records, tables, texts or models."""
    from auditgap.store.leavings import leavings

    found = leavings(folder)
    rows = [{"MB": f"{one.size / 1e6:.1f}", "path": one.path, "what": one.what} for one in found]
    if as_json:
        print_json([{"path": one.path, "what": one.what, "bytes": one.size} for one in found])
    elif not found:
        say(f"Nothing of {folder} can be spared.")
    else:
        print_table(rows)
    if not found or (as_json and not yes):
        return
    total = sum(one.size for one in found)
    confirm(f"Delete these {len(found)} ({total / 1e6:.1f} MB)?", yes)
    for one in found:
        one.delete()
    if not as_json:
        say(f"Deleted: {total / 1e6:.1f} MB.")


def inspect(
    folder: Annotated[str, typer.Argument(help="A run folder of `lvs`, `distance` or `evaluate`.")],
    to: Annotated[
        Path | None,
        typer.Option(
            "--out", help="FILE.eval or FILE.json", show_default="the folder's name .eval, in it"
        ),
    ] = None,
    subject: Annotated[
        str | None, typer.Option(help="Subject, if the run has several; a log holds one.")
    ] = None,
    allow_raw: Annotated[
        bool, typer.Option("--allow-raw", help="Include prompts and completions in the log.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Export a run as an inspect_ai log for `inspect view`: one sample per prompt, with verdicts,
    rates and intervals."""
    from auditgap.inspect.export import write_log
    from auditgap.store import RunFolder

    store = RunFolder.load(folder)
    name = f"{Path(store.place).name}.eval"
    write_log(store, to or store.path / name, subject=subject, allow_raw=allow_raw)
    store.publish()
    answer(as_json, f"Log: {to or store.at(name)}", log=str(to or store.at(name)))


def mcp(
    folder: Annotated[Path, typer.Argument(help="Folder of runs; nothing outside it is read.")],
    allow_attacks: Annotated[
        bool,
        typer.Option("--allow-attacks", help="Also let agents attack models; writes into FOLDER."),
    ] = False,
) -> None:
    """Serve runs to auditor agents over MCP, on stdin and stdout: they list sites, read verdicts
    and tables. Read-only; prompts and completions are never shown."""
    quiet()
    from auditgap.agents import Toolbox
    from auditgap.agents.server import serve

    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder. For example: auditgap mcp runs")
    serve(Toolbox(folder, allow_attacks))


def export_edits(
    folder: Annotated[
        str, typer.Argument(help="A run folder of `intervene`, or of `lvs --keep-edits`.")
    ],
    to: Annotated[Path, typer.Option("--out", help="FILE.safetensors")],
    subject: Annotated[str | None, typer.Option(help="Subject, if the run has several.")] = None,
    as_json: AsJson = False,
) -> None:
    """Export a run's directions and δ as one safetensors file, with names and metadata that
    describe them."""
    from auditgap.audits.edits import export_edits as export
    from auditgap.store import RunFolder

    names = export(RunFolder.load(folder), to, subject=subject)
    answer(
        as_json,
        f"{len(names)} tensors, {names[0]} to {names[-1]}.\nEdits: {to}",
        edits=str(to),
        tensors=list(names),
    )
