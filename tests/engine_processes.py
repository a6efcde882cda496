"""The engines' processes that this one has started and that live; libraries have helpers of their
own, which do not count.

    assert not engine_processes.running()
"""

from __future__ import annotations

from contextlib import suppress

import psutil


def running() -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            words = " ".join(process.cmdline())
            if "auditgap.engines.vllm.process" in words or "VLLM::" in words:
                found.append(process.pid)
    return found
