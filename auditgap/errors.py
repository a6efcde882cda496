"""Every way auditgap says no, each with the exit code that the command line gives back.

An error is one sentence or two: what was wanted, what came, what to type next. For example

    UsageError("--eps must be a number above 0; 'abc' is not. For example: --eps 0.03")

ends the command with that text alone and exit code 2.
"""

from __future__ import annotations

import difflib
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

#: What ends a process from outside, besides Ctrl-C: a scheduler's goodbye, and a terminal that
#: closes (Windows has none).
GOODBYES = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


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

    def __init__(
        self,
        said: str = "Stopped. What was finished is kept; run the same command again to resume.",
    ) -> None:
        super().__init__(said)


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C and GOODBYES leave the block as `Interrupted`; a signal that the process was told to
    ignore (`nohup`) stays ignored."""

    def stop(*_: Any) -> None:
        # no Exception: a worker's own `except Exception` must not swallow it
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in GOODBYES:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'eps'?" when `word` is close to one of `known`, else the empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
