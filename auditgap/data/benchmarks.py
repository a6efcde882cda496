"""The published benchmarks that an evaluation suite is made of. To add one: an entry in BENCHMARKS,
at its priority.

    BENCHMARKS["xstest"].hub_id            # 'walledai/XSTest'
    # safe prompts: over-refusal; their unsafe twins: harmful
    BENCHMARKS["xstest"].parts

Nine sources (arXiv 2606.08044, Table 2). The order is the priority: a prompt that two of them hold
stays in the upper one. Where an installed package carries a benchmark (`SOURCES` has its name),
that copy is read; else the hub's, at a pinned commit. Only where rows are read from is written
here, never what they say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from auditgap.data.files import Table, read_table
from auditgap.data.hub import PREFIX, HubName, find_revision, is_downloaded, read_clone, read_split
from auditgap.data.material import Source, package_version
from auditgap.data.sources import SOURCES, package_file
from auditgap.errors import UsageError, did_you_mean

PAPER = "paper"
Kind = Literal["harmful", "jailbreak", "over_refusal", "benign"]
#: What prompts are there for: to be refused (the first two) or to be answered (over_refusal: they
#: only look harmful).
KINDS: tuple[Kind, ...] = ("harmful", "jailbreak", "over_refusal", "benign")


@dataclass(frozen=True, slots=True)
class SourcePart:
    """The rows of a benchmark that are prompts of one kind: those whose label columns hold the
    values of `where`.

    `anchors`: safe prompts, nine tenths of which are training's benign anchors (`data.anchors`);
    only the held-out tenth is evaluated on.
    """

    kind: Kind
    where: Mapping[str, str] = field(default_factory=dict)
    anchors: bool = False


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Where a benchmark's rows are, and what they are. Labels are compared as lower-case text.

    `labels` has every value that a label column may hold: another one means that the set was
    changed, and is refused. A prompt that rows of two parts hold belongs to the part named first.
    `revision` None: no commit is known to us; the one that is found when a suite is first built
    goes into its manifest. `options` go to the hub library's reader.
    """

    description: str
    licence: str
    hub_id: str
    revision: str | None
    parts: tuple[SourcePart, ...] = (SourcePart("harmful"),)
    column: str = "prompt"
    config: str | None = None
    split: str = "train"
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    gated: bool = False


#: Highest priority first (ours).
BENCHMARKS: dict[str, Benchmark] = {
    "xstest": Benchmark(
        "over-refusal: 250 safe prompts that sound harmful; 200 harmful twins",
        "CC BY 4.0",
        "walledai/XSTest",
        "f1d713187c61b6ae64e602d74f0b3d812cc2e8e8",
        split="test",
        gated=True,
        parts=(
            SourcePart("harmful", {"label": "unsafe"}),
            SourcePart("over_refusal", {"label": "safe"}, anchors=True),
        ),
        labels={"label": ("safe", "unsafe")},
    ),
    "harmbench": Benchmark(
        "harmful: 200 standard behaviours",
        "MIT",
        "walledai/HarmBench",
        None,
        config="standard",
        gated=True,
    ),
    "jailbreakbench": Benchmark(
        "jailbreak: 100 harmful behaviours",
        "MIT",
        "JailbreakBench/JBB-Behaviors",
        "886acc352a31533ffbcf4ef22c744658688086fc",
        config="behaviors",
        split="harmful",
        column="Goal",
        parts=(SourcePart("jailbreak"),),
    ),
    "advbench": Benchmark(
        "harmful: 520 behaviours",
        "MIT",
        "walledai/AdvBench",
        "9d4730540082fa4017450b65ca1c0e1d8d30446e",
        gated=True,
    ),
    "maliciousinstruct": Benchmark(
        "harmful: 100 of ten malicious intents",
        "CC BY-SA 4.0",
        "walledai/MaliciousInstruct",
        "4669349f48fea45dbacec02aaa9aca4fd7ac1c15",
    ),
    "do-not-answer": Benchmark(
        "harmful: 939 that a model should not follow",
        "CC BY-NC-SA 4.0",
        "LibrAI/do-not-answer",
        "74e74f2e4507ef256fe536f78a776f4a1ff67955",
        column="question",
    ),
    "wildjailbreak": Benchmark(
        "jailbreak: 2,000 of the evaluation set",
        "ODC-BY 1.0",
        "allenai/wildjailbreak",
        "5ddc12a7894f842b0619b8e1c7ee496b198af009",
        config="eval",
        column="adversarial",
        gated=True,
        parts=(SourcePart("jailbreak", {"data_type": "adversarial_harmful"}),),
        labels={"data_type": ("adversarial_harmful", "adversarial_benign")},
        # Without these a prompt "None" or one with a comma would be read as something else.
        options={"delimiter": "\t", "keep_default_na": False},
    ),
    "aegis": Benchmark(
        "harmful: 2.0, those that people labelled unsafe",
        "CC BY 4.0",
        # Its redacted prompts say nothing but "REDACTED", and drop out as too short.
        "nvidia/Aegis-AI-Content-Safety-Dataset-2.0",
        "d86bb8bedff51d25ac834ab7838f1cc61acb7a2c",
        parts=(SourcePart("harmful", {"prompt_label": "unsafe"}),),
        labels={"prompt_label": ("safe", "unsafe")},
    ),
    # The labels are of answers, many to a prompt. Ours: harmful when any answer was unsafe, safe
    # when none was.
    "beavertails": Benchmark(
        "harmful: those with an unsafe answer; benign: those without",
        "CC BY-NC 4.0",
        "PKU-Alignment/BeaverTails",
        "8401fe609d288129cc684a9b3be6a93e41cfe678",
        split="330k_train",
        parts=(
            SourcePart("harmful", {"is_safe": "false"}),
            SourcePart("benign", {"is_safe": "true"}, anchors=True),
        ),
        labels={"is_safe": ("true", "false")},
    ),
}

#: Named sets whose prompts are to be answered; a file's or another set's are harmful unless `:KIND`
#: says otherwise.
_BENIGN = ("demo-benign", "everyday")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where rows come from: `package`, `built in`, `file`, `folder` (a clone of the hub's
    repository) or `hub`. `revision` is a version, a SHA-256 or a commit; None: it is not known yet,
    or there is none."""

    kind: str
    place: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """A source that a suite asks for: what its rows are, where they come from, and how to read them
    at a revision."""

    name: str
    licence: str
    benchmark: Benchmark
    origin: Origin
    read: Callable[[str | None], Table]

    def resolve(self, known: str | None = None) -> Origin:
        """The origin with a revision: its own, else the `known` one (a manifest's), else the hub's
        newest commit."""
        if self.origin.kind != "hub" or self.origin.revision:
            return self.origin
        return replace(self.origin, revision=known or find_revision(self.origin.place))


def wanted(spec: str, places: Mapping[str, str] | None = None) -> list[Wanted]:
    """The sources that a spec names, highest priority first; files and other named sets after the
    benchmarks, as given.

    `places` says where a benchmark's rows are instead: a file with its real columns, a folder with
    a clone of the hub's repository, or `hub:ID@REVISION[:CONFIG][:SPLIT]`. Nothing is read yet.
    Raises UsageError for an unknown name or kind.
    """
    places = places or {}
    names = (
        list(BENCHMARKS)
        if spec.strip() == PAPER
        else [item.strip() for item in spec.split(",") if item.strip()]
    )
    if not names:
        raise UsageError(
            f"A suite needs sources: {PAPER}, some of {', '.join(BENCHMARKS)}, or files; for"
            " example harmbench,xstest"
        )
    for name in places:
        if name not in names or name not in BENCHMARKS:
            raise UsageError(
                f"--from {name}=… names no benchmark of this suite.{did_you_mean(name, names)} It"
                f" has: {', '.join(names)}."
            )
    sources = [_benchmark(name, places.get(name)) for name in BENCHMARKS if name in names]
    for name in dict.fromkeys(names):
        if name not in BENCHMARKS:
            sources.append(_other(name, {s.name for s in sources}))
    return sources


def package_copy(name: str) -> Source | None:
    """The copy of a benchmark that a package carries, where that package is installed."""
    source = SOURCES.get(name)
    if source is None or source.package is None:
        return None
    try:
        package_file(source.package)
    except UsageError:
        return None
    return source


def where_from(name: str) -> str:
    """Where a benchmark would be read from here, and what to do before that."""
    entry = BENCHMARKS[name]
    if (copy := package_copy(name)) is not None:
        return copy.origin
    place = f"hub {entry.hub_id}@{(entry.revision or 'newest')[:8]}"
    if is_downloaded(entry.hub_id, entry.revision):
        return f"{place}, downloaded"
    page = f"https://huggingface.co/datasets/{entry.hub_id}"
    return (
        f"{place}: accept its licence at {page}, then type: hf auth login"
        if entry.gated
        else f"{place}: needs a connection"
    )


def _benchmark(name: str, place: str | None) -> Wanted:
    entry = BENCHMARKS[name]
    columns = (entry.column, *entry.labels)
    if place is None and (copy := package_copy(name)) is not None:
        entry = replace(entry, column="prompt", config=None)
        return Wanted(name, copy.licence, entry, _of_package(copy), lambda _: copy.read())
    if place is None or place.startswith(PREFIX):
        hub = (
            HubName.parse(place)
            if place
            else HubName(entry.hub_id, entry.revision or "", entry.config, entry.split)
        )
        return Wanted(
            name,
            entry.licence,
            entry,
            Origin("hub", hub.id, hub.revision or None),
            lambda at: read_split(
                replace(hub, revision=str(at)), columns=columns, options=entry.options
            ),
        )
    path = Path(place).expanduser()
    if path.is_dir():
        return Wanted(
            name,
            entry.licence,
            entry,
            Origin("folder", path.name, _folder_hash(path)),
            lambda _: read_clone(
                path, config=entry.config, split=entry.split, columns=columns, options=entry.options
            ),
        )
    return Wanted(name, entry.licence, entry, _of_file(path), lambda _: read_table(path))


def _other(item: str, taken: Collection[str]) -> Wanted:
    """A file, `hub:…` or named set as a source: FILE or FILE:KIND."""
    head, _, tail = item.rpartition(":")
    kind = tail if tail in KINDS else None
    where = head if kind else item
    if kind is None and Path(head).is_file():
        raise UsageError(
            f"{item}: {tail!r} is no kind of prompt.{did_you_mean(tail, KINDS)} Kinds:"
            f" {', '.join(KINDS)}."
        )
    entry = Benchmark(
        "", "", "", None, parts=(SourcePart(kind or ("benign" if where in _BENIGN else "harmful")),)
    )
    if (source := SOURCES.get(where)) is not None:
        found = Wanted(where, source.licence, entry, _of_package(source), lambda _: source.read())
    elif where.startswith(PREFIX):
        hub = HubName.parse(where)
        entry = replace(entry, config=hub.config, split=hub.split)
        found = Wanted(
            hub.id,
            "the data set's own",
            entry,
            Origin("hub", hub.id, hub.revision),
            lambda _: read_split(hub, columns=("prompt",)),
        )
    else:
        path = Path(where).expanduser()
        if not path.suffix and len(path.parts) == 1 and not path.exists():
            known = dict.fromkeys((PAPER, *BENCHMARKS, *SOURCES))
            raise UsageError(
                f"Unknown source {where!r}.{did_you_mean(where, known)} Sources:"
                f" {', '.join(known)}; or give a file."
            )
        # no file's rows pass for a benchmark's
        name = path.name if path.stem in (*BENCHMARKS, *SOURCES) else path.stem
        found = Wanted(name, "the file's own", entry, _of_file(path), lambda _: read_table(path))
    if found.name in taken:
        raise UsageError(f"Two sources of this suite are called {found.name!r}; rename the file.")
    return found


def _of_package(source: Source) -> Origin:
    return (
        Origin("package", source.package, package_version(source.package))
        if source.package
        else Origin("built in", "auditgap")
    )


def _of_file(path: Path) -> Origin:
    return Origin("file", path.name, _hash(path) if path.is_file() else None)


def _folder_hash(folder: Path) -> str:
    """Of the names and contents of its files, hidden ones (.git, .cache) aside."""
    of = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            of.update(f"{name}\0{_hash(path)}\n".encode("utf-8", "surrogatepass"))
    return of.hexdigest()


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
