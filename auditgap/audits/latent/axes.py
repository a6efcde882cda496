"""What a grid of latent audits spans: budgets in several units, and a model's own shard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from auditgap.audits.axes import GridAxes
from auditgap.audits.latent.config import RunOptions
from auditgap.audits.options import AuditOptions
from auditgap.config import listed
from auditgap.errors import UsageError
from auditgap.types import UNITS, Document


class LatentAxes(GridAxes):
    own: ClassVar[tuple[str, ...]] = (*GridAxes.own, "shard")

    prompts: Annotated[tuple[str, ...], BeforeValidator(listed)] | None = ("harmbench",)
    budgets: dict[str, Any] = Field(default_factory=dict)  #: unit → sizes; else `unit` and `eps`

    def settings(self, shared: Mapping[str, Any]) -> Iterator[Document]:
        if self.budgets and {"unit", "eps"} & {*shared, *self.vary}:
            raise UsageError(
                "A grid has either `budgets` (unit: sizes) or `unit` and `eps`, not both."
            )
        for unit in self.budgets:
            if unit not in UNITS:
                raise UsageError(
                    f"budgets: a unit is one of {', '.join(UNITS)}; {str(unit)[:40]!r} came."
                )
        units = [{"unit": unit, "eps": sizes} for unit, sizes in self.budgets.items()] or [{}]
        return ({**one, **unit} for one in super().settings(shared) for unit in units)

    def asked(self, values: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
        yield from super().asked(values)
        yield from (("attacks", (attack,)) for attack in listed(values.get("attacks", ())))
        sizes = dict(self.budgets)
        if "eps" in values:
            sizes[values.get("unit", "rms")] = values["eps"]
        for unit, some in sizes.items():
            yield from ((f"budgets.{unit}", (f"{float(size):g}",)) for size in listed(some))

    def with_own(self, options: AuditOptions) -> AuditOptions:
        shards = {str(own.get("name")): own.get("shard") for own in self.entries}
        return options.with_shards(shards) if isinstance(options, RunOptions) else options
