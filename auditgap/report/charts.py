"""A figure as a value: drawings grouped by subject, their legend, and the very numbers they show."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd
from markupsafe import Markup

Groups = tuple[tuple[str, tuple[Markup, ...]], ...]


@dataclass(frozen=True)
class Figure:
    """Drawings grouped by subject, their legend, and the data they show (`figures/<name>.csv`);
    `missing` says why there is nothing to draw."""

    name: str
    title: str
    caption: str = ""
    groups: Groups = ()
    legend: str = ""
    data: pd.DataFrame = field(default_factory=pd.DataFrame)
    missing: str = ""

    @property
    def is_flat(self) -> bool:
        """Whether each subject has one drawing, so that they stand side by side."""
        return len(self.groups) > 1 and all(len(panels) == 1 for _, panels in self.groups)
