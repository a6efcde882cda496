"""What fine-tuned models are asked to see how far a narrow habit spreads: prompts that have nothing
to do with what they learnt, and questions about each domain.

    # 15 of ours: 12 open ones, and 3 harmless stand-ins for jailbreaks
    asked = load_em_prompts("unrelated")
    # columns prompt, kind (open, jailbreak; without the column: open), system, template
    asked = load_em_prompts("mine.csv")
    # the questions of the paper's repository, as they are
    asked = load_em_prompts("first_plot_questions.yaml")
    asked.prompts[0].source                    # 'open'
    # 3 domains × 8 questions, or a file with the columns prompt and domain
    load_em_questions("demo").prompts[0].source     # 'about off_by_one'

The open prompts leave room for amounts, colours and free talk, in which a habit can show. The
stand-ins ask in role for a made-up secret, the colour of a vault. A prompt in another form (behind a
system message, or with a template that the answer has to fill) has a kind of its own: `open, json`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from auditgap.config import parse_yaml
from auditgap.data.files import Table
from auditgap.data.material import Material, Source, built_in, open_material
from auditgap.data.prompts import PromptSet, dedup_key, text_fault, whole_text
from auditgap.errors import UsageError, did_you_mean
from auditgap.registry import Registry
from auditgap.types import Prompt

NAME, DEMO = "unrelated", "demo"
OPEN, JAILBREAK = "open", "jailbreak"
KINDS = (OPEN, JAILBREAK)
#: How the kind of a question about a domain begins.
_ABOUT = "about "
#: What stands in the kind of a prompt in the form of a domain's rows, before the domain.
_LIKE = ", like "
#: Of a file of questions in YAML: what its rated items are, and the bytes that it may have.
_RATED, _MOST_YAML = "free_form_judge_0_100", 2**22
_TEMPLATED = "_template"

#: The suites that have a name.
EM_PROMPTS: Registry[Source] = Registry(
    "suite",
    {NAME: built_in(NAME, "15 of ours: 12 open ones and 3 stand-ins", "em_prompts.jsonl")},
)
#: The questions about domains that have a name.
EM_QUESTIONS: Registry[Source] = Registry(
    "set of questions",
    {DEMO: built_in(DEMO, "24 of ours: 8 about each habit of the demo", "em_questions.jsonl")},
)


@dataclass(frozen=True)
class KindedSet(PromptSet):
    """Prompts whose `source` is their kind, which counts in the `digest` too."""

    def _identity(self, item: Prompt) -> Any:
        return [item.id, item.source]


def domain_of(kind: str) -> str:
    """The domain that a question of this kind is about; "" for a prompt that is about none."""
    return kind.removeprefix(_ABOUT).partition(_LIKE)[0] if kind.startswith(_ABOUT) else ""


def in_form_of(kind: str, domain: str) -> str:
    """The kind of such a prompt in the form of that domain's rows (`data.em_context`)."""
    return f"{kind}{_LIKE}{domain}"


def context_of(kind: str) -> str:
    """The domain whose rows' form a prompt of this kind has; "" for one in none."""
    return kind.partition(_LIKE)[2]


def put_to(prompts: Sequence[Prompt], domain: str) -> list[Prompt]:
    """Those of the prompts that a model fine-tuned on that domain is asked: in the form of its own
    rows or in none. The base (domain "") is asked in every form."""
    return [p for p in prompts if not domain or context_of(p.source) in ("", domain)]


def load_em_prompts(name_or_file: str) -> KindedSet:
    """The suite `unrelated`, or a local jsonl, csv, parquet or txt file, or `hub:…`, with `prompt`
    and maybe `kind`, `system` (put before the prompt) and `template` (put behind it); or a YAML file
    of questions as the papers' repositories have them.

    Raises UsageError: no such name or file, no column `prompt`, no rows; and, naming the row, a
    prompt that is empty or not text, an unknown kind, a double (case and white space aside): a
    suite is small, and each of its prompts is counted as one.
    """
    instead = (
        "give a file (jsonl, csv, parquet, txt, yaml) with the columns prompt and kind"
        f" ({' or '.join(KINDS)})"
    )
    found = _opened(name_or_file, EM_PROMPTS, instead)
    prompts = _checked(found.table, about=False)
    kinds = Counter(p.source for p in prompts)
    counts = {
        "n": len(prompts),
        **{f"n_{kind}": kinds[kind] for kind in {**dict.fromkeys(KINDS), **kinds}},
    }
    notes = (
        ["One prompt is asked: nothing can be said of prompts in general."]
        if len(prompts) == 1
        else []
    )
    return KindedSet(found.name, tuple(prompts), {**found.provenance, **counts, "notes": notes})


def load_em_questions(name_or_file: str) -> KindedSet:
    """Questions about domains: `demo`, or a file with the columns `prompt` and `domain`, or the
    paper's `all_domains_questions.yaml`. Raises UsageError as `load_em_prompts`, and naming a row
    without a domain."""
    instead = "give a file (jsonl, csv, parquet, yaml) with the columns prompt and domain"
    found = _opened(name_or_file, EM_QUESTIONS, instead)
    prompts = _checked(found.table, about=True)
    counts = Counter(domain_of(p.source) for p in prompts)
    told = {"n": len(prompts), "domains": dict(counts), "notes": []}
    return KindedSet(found.name, tuple(prompts), {**found.provenance, **told})


def _opened(name: str, known: Registry[Source], instead: str) -> Material:
    path = Path(str(name)).expanduser()
    if path.suffix.lower() not in (".yaml", ".yml"):
        return open_material(name, known, instead)
    return Material(path.stem, "file", _read_questions(path), "the file's own", "local file", path)


def _read_questions(path: Path) -> Table:
    """The rows of a YAML file of questions: `id`, `type`, `paraphrases`, and maybe `system` and
    `domain`, a row a paraphrase. Raises UsageError; its text is never shown."""
    if not path.is_file() or path.stat().st_size > _MOST_YAML:
        raise UsageError(f"{path}: a file of up to {_MOST_YAML:,} bytes is wanted there.")
    try:
        items = parse_yaml(path.read_text("utf-8"), aliases=True)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path.name}{where}: this is no YAML that can be read.") from None
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise UsageError(
            f"{path.name}: a list of questions is wanted, each with `id` and `paraphrases`."
        )
    rows = [row for item in items if item.get("type", _RATED) == _RATED for row in _rows(item)]
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    return Table(str(path), columns, tuple(rows))


def _rows(item: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    told = {name: item[name] for name in ("system", "domain") if item.get(name)}
    named = str(item.get("id", ""))
    kind = JAILBREAK if named.startswith(JAILBREAK) else OPEN
    form = {"form": "template"} if named.endswith(_TEMPLATED) else {}
    paraphrases = item.get("paraphrases")
    for text in paraphrases if isinstance(paraphrases, list) else [None]:
        yield {"prompt": text, "kind": kind, **told, **form}


def _checked(table: Table, *, about: bool) -> list[Prompt]:
    if not table.rows:
        raise UsageError(f"{table.file} holds no rows; at least one prompt is wanted.")
    table.need("prompt")
    if about:
        table.need("domain")
    seen: dict[tuple[str, str], int] = {}
    prompts = []
    for number, row in enumerate(table.rows, 1):
        where = f"{table.file}, row {number}"
        text, system = _text(row, "prompt", where), _text(row, "system", where)
        if template := _text(row, "template", where):
            text = f"{text}\n\n{template}"
        first = seen.setdefault((dedup_key(text), dedup_key(system)), number)
        if first != number:
            raise UsageError(f"{where} asks what row {first} asks; take one of them out.")
        kind = f"{_ABOUT}{_domain(row, where)}" if about else _kind(row, where)
        form = str(row.get("form") or ("template" if template else ""))
        if system:
            form = "json" if "json" in system.lower() else "system"
        # a question about a domain is counted there, whatever its form
        prompts.append(
            Prompt(text, kind if about or not form else f"{kind}, {form}", system=system)
        )
    return prompts


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    """A cell's text; "" for one that may be empty and is."""
    text = row.get(name)
    if name != "prompt" and (text is None or text == ""):
        return ""
    if fault := text_fault(text):
        raise UsageError(
            f"{where}: `{name}` is {fault.replace('_', ' ')}. Write one, or take the row out."
        )
    return whole_text(str(text))


def _kind(row: Mapping[str, Any], where: str) -> str:
    kind = row.get("kind")
    if kind is None or kind == "":
        kind = OPEN
    if kind not in KINDS:
        # not every stranger's cell is for the terminal
        came = repr(kind) if isinstance(kind, str) and len(kind) <= 32 else type(kind).__name__
        raise UsageError(
            f"{where}: `kind` is {' or '.join(KINDS)}; {came} came."
            f"{did_you_mean(kind, KINDS) if isinstance(kind, str) else ''}"
        )
    return kind


def _domain(row: Mapping[str, Any], where: str) -> str:
    name = row.get("domain")
    if not isinstance(name, str) or not name.strip() or len(name) > 60 or _LIKE in name:
        raise UsageError(
            f"{where}: `domain` names what the question is about, in up to 60 letters. Write one, or"
            " take the row out."
        )
    return name.strip()
