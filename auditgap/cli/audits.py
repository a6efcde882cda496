"""`auditgap probe` and `auditgap evaluate`: audits that have few options; the latent one's stand
beside the root.

    auditgap probe ./base ./twin --triples triples.jsonl --out runs/probe
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from auditgap.cli.screen import err, given, inert, interval, out, print_table, quiet
from auditgap.errors import PartlyFailed

Config = Annotated[
    Path | None,
    typer.Option("--config", help="YAML with any of these options, or preset:NAME; flags win."),
]
Out = Annotated[
    str | None, typer.Option("--out", help="The run's folder; the same command on it resumes.")
]
Limit = Annotated[int | None, typer.Option(help="Use N, chosen by hash [all]")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other key of the config."),
]

PROBE_EXAMPLE = "Example: auditgap probe ./base ./twin --triples triples.jsonl --out runs/probe"


def probe(
    base: Annotated[
        str | None, typer.Argument(help="The model that the probe is fitted on.")
    ] = None,
    subjects: Annotated[
        list[str] | None, typer.Argument(help="Models that it is read on besides.")
    ] = None,
    config: Config = None,
    triples: Annotated[
        str | None, typer.Option(help="Contrast triples: a file, hub:ID@REVISION, or demo")
    ] = None,
    limit: Limit = None,
    set_: Set = None,
    to: Out = None,
) -> None:
    """Does the base's safety probe still tell safe from unsafe inside a subject? AUROC, gap and
    calibration, with baselines."""
    quiet()
    import pandas as pd

    from auditgap.audits.probe.config import read_config
    from auditgap.audits.probe.run import run
    from auditgap.sweep import Progress

    flags = given(
        set_, base=base, subjects=tuple(subjects or ()), triples=triples, limit=limit, out=to
    )
    store, outcome = run(*read_config(config, flags), progress=lambda: Progress(console=err))
    table = pd.read_parquet(store.path / "probe.parquet")
    print_table(_shown(table))
    _finish(store, outcome, "probe.csv")


EVALUATE_EXAMPLES = (
    "Examples: auditgap evaluate smollm2 --limit 50 · auditgap evaluate ./base ./twin --suite paper"
    " --judge ensemble --engine vllm · auditgap evaluate gpt-4.1-mini --endpoint"
    " https://api.openai.com/v1 --suite xstest,mine.jsonl:benign --judge refusal=gpt-4.1"
)


def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Hub ids, folders, adapters, or names at an endpoint."),
    ] = None,
    config: Config = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help=(
                "`paper`, names (see `data ls`), FILE or FILE:KIND, a built folder"
                " [harmbench,everyday]"
            )
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="See `ls judges`: builtin, refusal=MODEL, ensemble, … [builtin]"),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="What the subjects speak through: hf, vllm or openai [hf]")
    ] = None,
    judge_engine: Annotated[
        str | None,
        typer.Option(
            "--judge-engine",
            help="The same for the judge [as --engine; openai beside --judge-endpoint]",
        ),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="Base URL of an OpenAI-compatible endpoint; the key: OPENAI_API_KEY"),
    ] = None,
    judge_endpoint: Annotated[
        str | None, typer.Option("--judge-endpoint", help="The same for the judge [--endpoint]")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Greedy tokens an answer [128]")
    ] = None,
    max_unscored: Annotated[
        float | None,
        typer.Option(
            "--max-unscored",
            help=(
                "Fail above this share of prompts unanswered, or of answers without a verdict [0.2]"
            ),
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use N prompts of each source, chosen by hash [all]")
    ] = None,
    set_: Set = None,
    to: Out = None,
) -> None:
    """What models say: refusal and compliance on harmful prompts and jailbreaks, over-refusal and
    answers on harmless ones."""
    quiet()
    from auditgap.audits import behaviour
    from auditgap.sweep import Progress

    flags = given(
        set_,
        models=tuple(models or ()),
        suite=suite,
        judge=judge,
        engine=engine,
        judge_engine=judge_engine,
        endpoint=endpoint,
        judge_endpoint=judge_endpoint,
        max_new_tokens=max_new_tokens,
        max_unscored=max_unscored,
        limit=limit,
        out=to,
    )
    asked, options = behaviour.read_config(config, flags)
    store, outcome = behaviour.run(asked, options, progress=lambda: Progress(console=err))
    show(store)
    _finish(store, outcome, "behaviour.csv")
    enough(store, options.max_unscored)


def enough(store: Any, max_unscored: float) -> None:
    """Raises PartlyFailed when too little of a behavioural audit could be told for its rates to
    stand for it."""
    from auditgap.audits import behaviour

    lost, reason = behaviour.lost(store)
    if lost > max_unscored:
        raise PartlyFailed(
            f"{lost:.0%} of the prompts got no answer (mostly {reason}), more than --max-unscored"
            f" {max_unscored:g}; the rates speak of the rest alone. The reasons are in the report;"
            " mend their cause and use a new --out, or raise --max-unscored."
        )
    share = behaviour.unscored_share(store)
    if share is not None and share > max_unscored:
        raise PartlyFailed(
            f"The judge gave no verdict on {share:.0%} of the answers, more than --max-unscored"
            f" {max_unscored:g}; the rates speak of the rest alone. The reasons are in the report;"
            " try another --judge, or more of --max-unscored."
        )


def show(store: Any) -> None:
    """The tables of a behavioural audit, a subject at a time, each under its summary."""
    import pandas as pd

    from auditgap.report.behaviour import CORRECTED, leads

    table = pd.read_parquet(store.path / "behaviour.parquet")
    for lead in leads(table):
        out.print(Text(inert(lead.plain())))
        mine = table[table["subject"] == lead.subject]
        print_table(_asked(mine, ("refusal", "compliance", "answered"), ("n_broken", "n_unscored")))
        if mine[list(CORRECTED)].notna().to_numpy().any():
            out.print(Text("Corrected for the judge's errors:"))
            print_table(_asked(mine, CORRECTED))
        out.print()


def _asked(table: Any, shares: Sequence[str], counts: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of a behaviour table, narrow enough for a terminal: cells have no word longer than
    `[100,100]`."""
    from auditgap.report.behaviour import tight_share
    from auditgap.store.tables import rows_of

    titles = {"refusal": "refuses", "compliance": "complies", "answered": "answers"}
    return [
        {
            "kind, source": f"{row['kind'].replace('_', '-')}: {row['source']}",
            "n": row["n"],
            **{titles[name.removesuffix("_corrected")]: tight_share(row, name) for name in shares},
            **{name.removeprefix("n_"): row[name] for name in counts},
        }
        for row in rows_of(table)
    ]


def _shown(table: Any) -> list[dict[str, Any]]:
    """A table's rows with every estimate joined with its interval (`x`, `x_lo`, `x_hi`)."""
    import pandas as pd

    from auditgap.store.tables import rows_of

    rows = []
    for values in rows_of(table):
        row = {}
        for name, value in values.items():
            if name.endswith(("_lo", "_hi")):
                continue
            if f"{name}_lo" in values:
                row[name] = interval(value, values[f"{name}_lo"], values[f"{name}_hi"])
            else:
                row[name] = (
                    "" if pd.isna(value) else f"{value:.3g}" if isinstance(value, float) else value
                )
        rows.append(row)
    return rows


def _finish(store: Any, outcome: Any, table: str) -> None:
    for line in store.warnings:
        err.print(Text(f"Note: {line}"))
    if outcome.failed:
        lines = "\n".join(f"  {key}: {cause}" for key, cause in sorted(outcome.failed.items())[:10])
        raise PartlyFailed(
            f"{len(outcome.failed)} cells failed, the others are in {store.place}:\n{lines}"
        )
    out.print(Text(f"Report: {store.at('report.html')}\nTable: {store.at(table)}"))
