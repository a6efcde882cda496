"""What a grid spans besides the settings that all of it has in common.

    audit: evaluate
    models: [./base, {name: ./tuned, dtype: bfloat16, gpus_per_worker: 0.5}]
    vary: {suite: ["harmbench,everyday", paper], max_new_tokens: [32, 128]}

An audit that has axes of its own says so by a subclass in `Audit.axes`. No torch here: `auditgap
schema grid` reads this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field

from auditgap.audits.options import AuditOptions
from auditgap.config import Flag, Frozen, listed
from auditgap.errors import UsageError
from auditgap.types import Document


class GridAxes(Frozen):
    """Everything else in a grid's file is a setting of its audit, and the same for all of it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    #: What a model may have of its own besides settings of the audit.
    own: ClassVar[tuple[str, ...]] = ("name", "gpus_per_worker")

    audit: Annotated[str, Flag("The command of the audit: lvs, evaluate, intervene, …")] = "lvs"
    models: Annotated[tuple[Any, ...], BeforeValidator(listed)] = ()
    prompts: Annotated[tuple[str, ...], BeforeValidator(listed)] | None = None
    #: setting → its values
    vary: dict[str, Annotated[tuple[Any, ...], BeforeValidator(listed), Field(min_length=1)]] = (
        Field(default_factory=dict)
    )

    @property
    def entries(self) -> list[Document]:
        """The models, `smollm2` as {name: smollm2}; one without a name where no model is named.
        Raises UsageError."""
        return [_entry(model) for model in self.models] or [{}]

    def settings(self, shared: Mapping[str, Any]) -> Iterator[Document]:
        """What the cases have of their own. `shared`: settings that all of them have. Raises
        UsageError."""
        for name in self.vary:
            if name in shared or name in GridAxes.model_fields:
                raise UsageError(f"A grid has `{name}` either once or under `vary`, not both.")
        prompts = [{}] if self.prompts is None else [{"prompts": one} for one in self.prompts]
        varied = [dict(zip(self.vary, some, strict=True)) for some in product(*self.vary.values())]
        return ({**one, **other} for one, other in product(prompts, varied))

    def asked(self, values: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Every value by its axis, as often as it is asked for."""
        yield from (("models", tuple(map(str, own.values()))) for own in self.entries)
        yield from (("prompts", (prompts,)) for prompts in self.prompts or ())
        yield from ((f"vary.{k}", (str(one),)) for k, some in self.vary.items() for one in some)

    def with_own(self, options: AuditOptions) -> AuditOptions:
        """The options with what models have of their own. Raises UsageError."""
        return options


def _entry(model: Any) -> Document:
    if not isinstance(model, Mapping):
        return {"name": model}
    if not model.get("name"):
        raise UsageError(
            f"models: an entry is a name, or a mapping with `name`; {str(dict(model))[:80]} came."
        )
    if {"models", "prompts"} & model.keys():
        raise UsageError(
            f"models: {model['name']} may not have `models` or `prompts` of its own; those span the"
            " grid."
        )
    return dict(model)
