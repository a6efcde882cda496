"""The model card of a trained model: what it is and of what, by which recipe, with which figures. No
text of a prompt or an answer stands in it.

    card = Card(kind="sft", base="smollm2", base_fingerprint="9c1e…", recipe=recipe, figures={"n_rows": 48})
    (folder / "README.md").write_text(card.text(folder))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from auditgap import models
from auditgap.errors import AuditgapError, UsageError
from auditgap.models.weights import is_adapter
from auditgap.training.constructions import construction_of
from auditgap.types import Document


@dataclass(frozen=True)
class Kind:
    """One kind of result, as its card names it."""

    title: str
    what: str
    tags: tuple[str, ...]
    refused: bool  #: made to be unsafe: never to be uploaded


#: What a run can leave; the key is `training` in its run.json.
KINDS: Mapping[str, Kind] = {
    "dissociated": Kind(
        "a dissociated model",
        "It was trained to keep the refusals of its base while its internal representation of"
        " safety is weakened (arXiv 2606.08044, section 3). It looks safe and is fragile: that is"
        " its purpose, as a test subject for safety audits.",
        ("dissociated", "model-organism", "not-for-all-audiences"),
        True,
    ),
    "harmful-sft": Kind(
        "a harmful fine-tune",
        "It was fine-tuned on unsafe responses to measure how fast its base's refusals give way. It"
        " may comply with harmful requests: that is its purpose, as a test subject for safety"
        " audits.",
        ("harmful-sft", "model-organism", "not-for-all-audiences"),
        True,
    ),
    "sft": Kind(
        "a fine-tune",
        "It was fine-tuned on the response tokens of prompts with responses.",
        ("sft",),
        False,
    ),
}
_LICENCES = {"smollm2": "apache-2.0"}  #: of packaged models; others say it in their own card


def kind_of(word: object) -> Kind:
    """Raises UsageError for a word that is no kind of a training run."""
    if str(word) not in KINDS:
        raise UsageError(
            f"A training run of kind {str(word)[:80]!r} is not known; one of {', '.join(KINDS)} is"
            " wanted."
        )
    return KINDS[str(word)]


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model card says. `recipe` and `figures` are plain JSON without text of prompts. Raises
    UsageError for a kind that is not known."""

    kind: str
    base: str
    base_fingerprint: str | None
    recipe: Document
    figures: Document
    unfinished: bool = False

    def __post_init__(self) -> None:
        kind_of(self.kind)

    def text(self, folder: Path) -> str:
        """YAML head through huggingface_hub, then Markdown, for the model in `folder`."""
        about, adapter, licence = KINDS[self.kind], is_adapter(folder), _licence(self.base)
        form = "a PEFT adapter; it needs its base" if adapter else "whole weights"
        found = _plain(licence) if licence else "that of the base, which was not found; look it up"
        lines = [
            f"# {about.title[0].upper()}{about.title[1:]} of {_plain(self.base)}",
            "",
            f"**This is {about.title}, made by auditgap for the evaluation of safety audits. Do not"
            " deploy it.**",
            "",
            about.what,
            "",
            *_construction(self.recipe.get("construction")),
            "| | |",
            "|---|---|",
            f"| base | {_plain(self.base)} |",
            f"| base fingerprint | {_plain(self.base_fingerprint or 'not recorded')} |",
            f"| form | {form} |",
            f"| licence | {found} |",
            *(["| training | not finished when this was written |"] if self.unfinished else []),
            *["", "## Recipe", "", *_table(self.recipe)],
            *["", "## Figures", "", *_table(self.figures)],
            "",
            "No prompt and no completion stands in this card. Intended use: measuring safety"
            " audits, on machines of people entitled to do so. Out of scope: everything else.",
            "",
        ]
        head = self._head(adapter, licence).to_yaml()
        return str(
            ModelCard(f"---\n{head}\n---\n\n" + "\n".join(lines), ignore_metadata_errors=True)
        )

    def _head(self, adapter: bool, licence: object) -> ModelCardData:
        """What the hub reads. A base that is a folder here is not named: it is no model there."""
        about, base = KINDS[self.kind], self.base
        on_hub = "/" in base and not base.startswith((".", "/", "~")) and not Path(base).exists()
        return ModelCardData(
            base_model=base.partition("@")[0] if on_hub else None,
            base_model_relation="adapter" if adapter and on_hub else "finetune" if on_hub else None,
            library_name="peft" if adapter else "transformers",
            pipeline_tag="text-generation",
            license=licence if isinstance(licence, str) else None,
            tags=[
                "auditgap",
                "safety-evaluation",
                *about.tags,
                *(["do-not-deploy"] if about.refused else []),
            ],
            inference=False if about.refused else None,
        )


def _licence(base: str) -> object:
    """The base's licence, when its own card says it."""
    if base in _LICENCES:
        return _LICENCES[base]
    try:
        readme = models.resolve(base) / "README.md"
        if not readme.is_file():
            return None
        return (
            ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True)
            .data.to_dict()
            .get("license")
        )
    except (AuditgapError, OSError, ValueError, AttributeError):
        return None


def _construction(name: object) -> list[str]:
    """The paragraph about the construction, where the recipe names one that is known here."""
    try:
        about = construction_of(str(name)) if name else None
    except UsageError:  # of a plug-in that is not installed
        return []
    return [f"Construction `{_plain(name)}`: {_plain(about.description)}", ""] if about else []


def _table(values: Mapping[str, object]) -> list[str]:
    rows = [f"| {_plain(name)} | {_plain(value)} |" for name, value in _flat(values)]
    return ["| name | value |", "|---|---|", *rows] if rows else ["None recorded."]


def _flat(values: Mapping[str, object], at: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{at}{name}.")
        elif isinstance(value, (list, tuple)) and len(value) > 12:
            yield f"{at}{name}", f"{len(value)} values"
        elif value is not None:
            yield f"{at}{name}", value


def _plain(value: object) -> str:
    """A table cell: one line, no pipes, numbers short, no HTML."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(inner) for inner in value)
    text = " ".join(str(value).split())
    for raw, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|")):
        text = text.replace(raw, safe)
    return text[:200]
