"""Measures the audit gap of language models: behavioural safety minus robustness under bounded
interventions.

    import auditgap

    # and: audit, distance, evaluate, load; see auditgap.api
    auditgap.lvs("smollm2", limit=16).table
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from auditgap.api import AuditResult, Result, audit, distance, evaluate, load, lvs

__all__ = ["AuditResult", "Result", "__version__", "audit", "distance", "evaluate", "load", "lvs"]


# the functions' imports are heavy, and most of the package needs none of them
def __getattr__(name: str) -> Any:
    if name in __all__:
        from auditgap import api

        return getattr(api, name)
    raise AttributeError(f"module 'auditgap' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What completion should offer: the verbs, not the modules that happen to be imported."""
    return sorted(__all__)
