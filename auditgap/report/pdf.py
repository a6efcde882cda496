"""A page on paper, by the browser that is on the machine.

written = write(Path("runs/tuned/report.html"))      # runs/tuned/report.pdf
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from auditgap.errors import UsageError
from auditgap.store import files

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
#: A long page takes seconds.
_SECONDS = 180
_FLAGS = (
    "headless disable-gpu no-first-run disable-background-networking disable-component-update"
    " disable-sync disable-dev-shm-usage no-pdf-header-footer"
).split()


def browser() -> str:
    """A browser that prints without a screen. Raises UsageError where there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise UsageError(
            "A PDF is printed by Chromium or Chrome, and neither is on this machine. Install one"
            " (on Debian and Ubuntu the package is called chromium) and give the same command"
            " again, or print report.html from a browser of your own."
        )
    return found


def write(page: Path) -> Path:
    """Print a page beside itself as a PDF; returns its path. Fetches nothing: a report needs no
    network. Raises UsageError where there is no browser, or it fails."""
    to = page.with_suffix(".pdf")
    with tempfile.TemporaryDirectory() as place:
        made = page.with_name(f".{to.name}")  # beside it, so that it takes its name in one step
        # as root, as in a container, Chromium starts without its sandbox or not at all
        as_root = ["no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        where = [f"user-data-dir={place}/profile", f"print-to-pdf={made.absolute()}"]
        command = [browser(), *(f"--{flag}" for flag in (*_FLAGS, *as_root, *where))]
        try:
            done = subprocess.run(
                [*command, page.absolute().as_uri()],
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UsageError(
                f"{command[0]} did not print {page} within {_SECONDS} s. Print it from a browser of"
                " your own."
            ) from None
        if not made.is_file():
            said = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
            raise UsageError(
                f"{command[0]} did not print {page}: {said[0]}. Print it from a browser of your own."
            )
        with files.disk_errors(to):
            made.chmod(page.stat().st_mode & 0o777)
            made.replace(to)
    return to
