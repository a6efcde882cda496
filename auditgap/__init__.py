"""auditgap measures the audit gap of a language model: behavioural safety minus robustness under bounded edits."""

__version__ = "0.1.0"
