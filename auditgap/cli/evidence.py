"""`auditgap plan`, `attest`, `verify` and `disclose`: evidence for somebody who does not trust the
auditor.

    auditgap plan lvs --config audit.yaml --sign auditor.pem --new-key
    auditgap verify runs/tuned --key auditor.pem.pub
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from auditgap.cli.options import AsJson, File, Set, examples
from auditgap.cli.screen import answer, note, print_json, print_table, quiet, say
from auditgap.config import build, overrides
from auditgap.errors import Differs, UsageError

if TYPE_CHECKING:
    from auditgap.report.verdict_lines import Criteria

PANEL = "Runs and reports"
Criterion = Annotated[
    list[str] | None,
    typer.Option(
        "--criterion",
        metavar="KEY=VALUE",
        help="A criterion of the verdict table, such as gap=0.05; may be repeated.",
    ),
]


def add(app: typer.Typer) -> None:
    for act, lines in (
        (plan, ("auditgap plan lvs --config audit.yaml --sign auditor.pem --new-key",)),
        (attest, ("auditgap attest runs/tuned --plan plan.dsse.json --key auditor.pem",)),
        (
            verify,
            (
                "auditgap verify runs/tuned --key auditor.pem.pub --model ./tuned",
                "auditgap verify cell.json --key auditor.pem.pub",
            ),
        ),
        (disclose, ('auditgap disclose runs/tuned "./tuned · clean" --out cell.json',)),
    ):
        app.command(act.__name__, epilog=examples(lines), rich_help_panel=PANEL)(act)


def plan(
    audit: Annotated[str, typer.Argument(help="The audit that will run: lvs, evaluate, …")],
    sign: Annotated[
        Path, typer.Option("--sign", help="The auditor's private key: Ed25519 as PEM, mode 0600.")
    ],
    file_: File = None,
    set_: Set = None,
    criterion: Criterion = None,
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Make that key first, and FILE.pub beside it.")
    ] = False,
    to: Annotated[Path, typer.Option("--out", help="File of the signed plan.")] = Path(
        "plan.dsse.json"
    ),
    as_json: AsJson = False,
) -> None:
    """Sign what will be measured and by which criteria, before the run. Hashes every file of the
    models; loads no weights."""
    quiet()
    from auditgap.audits.table import named
    from auditgap.evidence import dsse, keys
    from auditgap.evidence.attest import planned

    chosen = named(audit)
    config, options = chosen.read(file_, overrides(set_ or ()))
    prepared = chosen.prepare(config, options)
    if to.exists():
        raise UsageError(f"{to} is there already; a signed plan is never replaced. Choose --out.")
    if new_key:
        note(f"Public key, for whoever verifies: {keys.make(sign)}")
    signed = dsse.sign(planned(chosen, prepared, options, _criteria(criterion)), keys.private(sign))
    dsse.write(to, signed)
    answer(
        as_json,
        f"Signed plan of {len(prepared.cells)} cells: {to}. SHA-256 {signed.sha256}",
        plan=str(to),
        sha256=signed.sha256,
        cells=len(prepared.cells),
    )


def attest(
    folder: Annotated[str, typer.Argument(help="A finished run folder.")],
    key: Annotated[Path, typer.Option("--key", help="The auditor's private key.")],
    plan: Annotated[
        Path | None, typer.Option("--plan", help="The plan that was signed before the run.")
    ] = None,
    criterion: Criterion = None,
    as_json: AsJson = False,
) -> None:
    """Sign what a run has found: every cell, table and verdict. Goes to DIR/evidence/."""
    quiet()
    from auditgap.evidence import attest as statements
    from auditgap.evidence import cells, dsse, keys
    from auditgap.store import RunFolder
    from auditgap.store.remote import needs_disk

    if plan is not None and criterion:
        raise UsageError("The criteria are those of the plan; leave --criterion or --plan out.")
    needs_disk(folder, "`auditgap attest`")
    private, store = keys.private(key), RunFolder.load(folder)
    signed = None if plan is None else dsse.read(plan)
    if signed is not None and not signed.signed_by(private.public_key()):
        raise UsageError(f"{plan} was not signed with {key}. Give the key that signed the plan.")
    with store.lock():
        leaves = cells.of(store)
        found = statements.found(store, leaves, signed, _criteria(criterion))
        result = dsse.sign(found, private)
        cells.write(store, leaves)
        if signed is not None:
            dsse.write(store.path / statements.PLAN_FILE, signed)
        path = dsse.write(store.path / statements.RESULT_FILE, result)
    n = result.statement["predicate"]["cells"]["n"]
    answer(
        as_json,
        f"Signed {n} cells, tables and verdicts: {path}. SHA-256 {result.sha256}",
        result=str(path),
        sha256=result.sha256,
        cells=n,
    )


def verify(
    what: Annotated[Path, typer.Argument(help="A run folder, or the file of a disclosure.")],
    key: Annotated[Path, typer.Option("--key", help="The auditor's public key.")],
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="[NAME=]DIR",
            help="Also compare a model's files with the plan's; may be repeated.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check what was signed of a run: signature, plan, cells; tables and verdicts are computed again
    from the cells. Needs no model. Exits with 1 if anything differs."""
    quiet()
    from auditgap import evidence
    from auditgap.evidence import disclosure, keys

    public = keys.read(key)
    if not what.exists():
        raise UsageError(f"There is no {what}. Give a run folder, or the file of a disclosure.")
    if what.is_file():
        found, checked, missing = disclosure.verify(disclosure.read(what), public), ["the cell"], []
    else:
        seen = evidence.verify(what, public, models=_models(model or ()))
        found, checked, missing = seen.findings, seen.checked, seen.not_checked
    if as_json:
        print_json(
            {
                "holds": not found,
                "findings": [asdict(one) for one in found],
                "checked": checked,
                "not_checked": missing,
            }
        )
    else:
        if found:
            print_table([asdict(one) for one in found])
        say(f"Checked: {'; '.join(checked)}.")
        for line in missing:
            say(f"Not checked: {line}.")
        if not found:
            say("What was signed is what is there.")
    if found:
        kinds = ", ".join(sorted({one.what for one in found}))
        raise Differs(f"{len(found)} findings in {what}, of these kinds: {kinds}.")


def disclose(
    folder: Annotated[str, typer.Argument(help="A run folder with DIR/evidence/.")],
    cell: Annotated[str, typer.Argument(help="The cell: what reports call it, or its key.")],
    to: Annotated[Path, typer.Option("--out", help="File of the disclosure.")] = Path("cell.json"),
    completions: Annotated[
        bool, typer.Option("--completions", help="With prompts and what the model said.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show one cell with the proof that it is of the signed run; all others stay withheld."""
    quiet()
    from auditgap.evidence import disclosure
    from auditgap.store import RunFolder, files

    shown = disclosure.disclose(RunFolder.load(folder), cell, completions=completions)
    files.write_document(to, shown, files.PRIVATE if completions else 0o666)
    answer(as_json, f"Disclosed: {to}", disclosure=str(to), cell=cell)


def _criteria(pairs: Sequence[str] | None) -> Criteria:
    from auditgap.report.verdict_lines import Criteria  # which opens tables; help has no need

    (criteria,) = build(overrides(pairs or ()), Criteria)
    return criteria


def _models(words: Sequence[str]) -> dict[str, Path]:
    """NAME=DIR, or DIR for a model that the plan names as it is typed here."""
    found = {}
    for word in words:
        name, equals, place = word.rpartition("=")
        found[name if equals else word] = Path(place)
    return found
