"""What was asked, and through what: a suite's sources as its manifest has them, and the engines
that the subjects spoke through.

    # [{"source": "xstest", "kept": 249, "dropped": 0, "revision": "f1d7…", …}, …]
    sources(folders)
    # [{"subject": "smollm2", "engine": "vllm", "dtype": "float32", "parity": {"n": 8, "equal": 8,
    # …}}]
    engines(folders)
    parity_warnings(engines(folders))

A manifest is `info["prompts"]` of a run (`data.suite`); an engine and its parity with transformers
stand in cells' records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from auditgap.report.columns import Column, whole, word
from auditgap.report.section import Bullets, Section, Table
from auditgap.report.text import is_null, percent, plain
from auditgap.store import RunFolder

if TYPE_CHECKING:
    from auditgap.report.gather import ReportData

#: Entries of a manifest that have a place of their own on the page.
SHOWN = ("sources", "missing", "notes", "schema", "rules")
_KINDS = {"over_refusal": "over-refusal"}
_ENGINES = {"hf": "transformers", "vllm": "vLLM", "openai": "an OpenAI-compatible endpoint"}


def manifests(folders: Sequence[RunFolder]) -> list[Mapping[str, Any]]:
    """The manifests of the suites that these runs asked, equal ones once."""
    found: list[Mapping[str, Any]] = []
    for folder in folders:
        told = folder.run.get("info", {}).get("prompts")
        if (
            isinstance(told, Mapping)
            and isinstance(told.get("sources"), Mapping)
            and told not in found
        ):
            found.append(told)
    return found


def sources(folders: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """A mapping a source: what was read, and what became of every row; a source that several runs
    read alike once."""
    found: list[dict[str, Any]] = []
    for manifest in manifests(folders):
        for name, told in manifest["sources"].items():
            entry = (
                {"source": str(name), **told}
                if isinstance(told, Mapping)
                else {"source": str(name)}
            )
            if entry not in found:
                found.append(entry)
    return found


def source_table(found: Sequence[Mapping[str, Any]], asked: Mapping[str, int]) -> pd.DataFrame:
    """A row a source; `asked`: prompts that were put to a subject, by source."""
    rows = []
    for entry in found:
        dropped = {
            "of another kind": entry.get("n_not_asked"),
            **_counts(entry.get("n_dropped")),
            "twice": entry.get("n_doubles"),
            "benign anchors": (entry.get("n_anchors") or 0) + (entry.get("n_in_anchors") or 0),
        }
        origin = (str(entry[k]) for k in ("origin", "place") if not is_null(entry.get(k)))
        kinds = [_KINDS.get(str(k), str(k)) for k in entry.get("kinds") or ()]
        rows.append(
            {
                "source": entry["source"],
                "kinds": ", ".join(dict.fromkeys(kinds)),
                "n_read": entry.get("n_read"),
                "dropped": _reasons(dropped),
                "given_to": _reasons(_counts(entry.get("n_given_to"))),
                "n_held_out": entry.get("n_held_out"),
                "n": entry.get("n"),
                "n_asked": asked.get(entry["source"], 0),
                "origin": " ".join(origin),
                "revision": plain(entry.get("revision")),
                "licence": plain(entry.get("licence")),
            }
        )
    return pd.DataFrame(rows, columns=[column.name for column in SOURCES])


#: `source_table` as it is read.
SOURCES: tuple[Column, ...] = (
    word("source", "Source"),
    word("kinds", "Kinds"),
    Column("n_read", "Read", whole),
    word("dropped", "Dropped"),
    word("given_to", "Left to another source"),
    Column("n_held_out", "Held out", whole),
    Column("n", "Kept", whole),
    Column("n_asked", "Asked", whole),
    word("origin", "From"),
    word("revision", "Revision"),
    word("licence", "Licence"),
)


def _counts(value: Any) -> dict[str, Any]:
    return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else {}


def _reasons(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{n} {why.replace('_', ' ')}" for why, n in counts.items() if n) or "none"


def notes(folders: Sequence[RunFolder]) -> list[str]:
    """What a reader must know of the suites: what is missing, what was cut to a sample, and their
    own notes."""
    said = []
    for manifest in manifests(folders):
        missing = _counts(manifest.get("missing"))
        said += [f"Missing: {name}. {why}" for name, why in missing.items()]
        if not is_null(limit := manifest.get("limit_per_source")):
            seed = plain(manifest.get("seed"))
            said.append(
                f"At most {plain(limit)} prompts of each source were asked, chosen by hash (seed"
                f" {seed})."
            )
        if only := manifest.get("only"):
            said.append(f"Of the suite only {plain(only)} was asked.")
        said += [str(note) for note in manifest.get("notes") or ()]
    return list(dict.fromkeys(said))


# -- engines
# -------------------------------------------------------------------------------------------------------------


def names_of(folder: RunFolder) -> dict[Any, Any]:
    """A run's subjects by the fingerprint that its records know them by."""
    listed = folder.info.get("subjects") or ()
    return {s.get("fingerprint"): s.get("name") for s in listed if isinstance(s, Mapping)}


def engines(folders: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """A mapping a (subject, engine, dtype, parity) that cells' records tell of; parity {} where
    nothing was compared."""
    found: list[dict[str, Any]] = []
    for folder in folders:
        names = names_of(folder)
        for record in folder.records():
            info, told = record.get("info") or {}, record.get("description") or {}
            if not info.get("engine"):
                continue
            entry = {
                "subject": str(names.get(told.get("subject"), told.get("subject"))),
                "engine": str(info["engine"]),
                "dtype": (told.get("settings") or {}).get("dtype"),
                "parity": _counts(info.get("parity")),
            }
            if entry not in found:
                found.append(entry)
    named = [
        s.get("name")
        for f in folders
        for s in f.info.get("subjects") or ()
        if isinstance(s, Mapping)
    ]
    found.sort(key=lambda e: named.index(e["subject"]) if e["subject"] in named else len(named))
    compared = [(e["subject"], e["engine"]) for e in found if e["parity"]]
    return [e for e in found if e["parity"] or (e["subject"], e["engine"]) not in compared]


def engine_sentences(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Through what each subject spoke, and how far that says what transformers says."""
    said = []
    for entry in found:
        dtype = "" if is_null(entry["dtype"]) else f", in {entry['dtype']}"
        what = (
            f"{entry['subject']} spoke through"
            f" {_ENGINES.get(entry['engine'], entry['engine'])}{dtype}."
        )
        if parity := entry["parity"]:
            what += f" {_compared(parity)}"
        elif entry["engine"] == "vllm":
            what += " Its answers were not compared with those of transformers."
        said.append(what)
    return said


def _compared(parity: Mapping[str, Any]) -> str:
    n, lost = parity.get("n") or 0, parity.get("n_unanswered") or 0
    unanswered = (
        f" {plain(lost)} more could not be compared, as one of the two gave no answer."
        if lost
        else ""
    )
    if not n:
        return f"No greedy answer could be compared with that of transformers.{unanswered}"
    common, equal, until = parity.get("mean_common"), parity.get("equal"), ""
    if not is_null(common) and equal != n:
        until = (
            f"; {percent(common)} of an answer’s tokens, on average, come before the first"
            " difference"
        )
    return (
        f"Of {plain(n)} greedy answers compared with those of transformers, {plain(equal)} are"
        f" equal{until}.{unanswered}"
    )


def parity_warnings(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence a subject whose float32 answers differ from those of transformers, where they
    should all be equal."""
    return [
        f"{e['subject']}: in float32 every greedy answer of"
        f" {_ENGINES.get(e['engine'], e['engine'])} should equal that of transformers, and"
        f" {plain(e['parity'].get('equal'))} of {plain(e['parity']['n'])} do. What was measured"
        " here may not be this model as transformers runs it."
        for e in found
        if e["dtype"] == "float32"
        and e["parity"].get("n")
        and e["parity"].get("equal") != e["parity"]["n"]
    ]


# -- section
# ---------------------------------------------------------------------------------------------------

_SOURCES_NOTE = (
    "A prompt that several sources hold stays with the one of highest priority. Held out: of the"
    " tenth that is no benign anchor. Asked: prompts that were put to a subject."
)


def sections(report: ReportData) -> list[Section]:
    """What became of every row of the suite; [] where no suite was asked."""
    if not report.sources:
        return []
    told = source_table(report.sources, report.n_asked)
    table = Table("sources", "Sources of the suite", told, SOURCES, _SOURCES_NOTE)
    return [
        Section(
            id="suite",
            title="What was asked",
            contents="What was asked",
            blocks=(table, *((Bullets(report.notes),) if report.notes else ())),
            covers=[f"prompts.{name}" for name in SHOWN],
        )
    ]
