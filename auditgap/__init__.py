"""Measures the audit gap of language models: behavioural safety minus robustness under bounded
interventions.

    import auditgap

    # and: audit, distance, evaluate, probe, load and more; see auditgap.api
    auditgap.lvs("smollm2", limit=16).table
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from auditgap.api import (
        AuditResult,
        CompareResult,
        Result,
        audit,
        compare,
        distance,
        em,
        evaluate,
        intervene,
        judge_eval,
        load,
        lvs,
        probe,
        sft_curve,
    )

__all__ = [
    "AuditResult",
    "CompareResult",
    "Result",
    "__version__",
    "audit",
    "compare",
    "distance",
    "em",
    "evaluate",
    "intervene",
    "judge_eval",
    "load",
    "lvs",
    "probe",
    "sft_curve",
]


# the functions' imports are heavy, and most of the package needs none of them
def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("auditgap.api"), name)
    # an audit of another package; a module of ours is asked about here while it is being imported
    if not name.startswith("_") and find_spec(f"auditgap.{name}") is None:
        verbs = import_module("auditgap.api").VERBS
        if name in verbs:
            return verbs[name]
    raise AttributeError(f"module 'auditgap' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What completion should offer: the verbs, not the modules that happen to be imported."""
    return sorted({*__all__, *import_module("auditgap.api").VERBS})
