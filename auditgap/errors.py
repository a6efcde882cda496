"""Every way auditgap says no, each with the exit code that the command line gives back.

An error is one sentence or two: what was wanted, what came, what to type next. For example

    UsageError("--eps must be a number above 0; 'abc' is not. For example: --eps 0.03")

ends the command with that text alone and exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AuditgapError(Exception):
    """Base of every error that a user can cause or mend; shown without a traceback."""

    exit_code = 2


class UsageError(AuditgapError):
    """Bad input: an option, a config, a prompt set, a model name."""

    exit_code = 2


class Differs(AuditgapError):
    """What was signed of a run is not what is there: `verify`."""

    exit_code = 1


class CriterionFailed(AuditgapError):
    """A verdict is FAIL, where the command was told to say so: `gate`, and `--fail-on`."""

    exit_code = 1


class PartlyFailed(AuditgapError):
    """The run ended, some cells did not: their causes are in the store."""

    exit_code = 3


class Refused(AuditgapError):
    """Refused for safety: pickles, foreign code, text that may not be shown."""

    exit_code = 4


class CouldNotTell(AuditgapError):
    """No verdict is FAIL and not all can be told, where the command was told to say so."""

    exit_code = 5


class Interrupted(AuditgapError):
    """Stopped by the user or the scheduler; the same command resumes."""

    exit_code = 130


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'eps'?" when `word` is close to one of `known`, else the empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
