"""The pictures of the documentation, from a demonstration: make pictures

python docs/pictures.py build/demo      # report.png, report_dark.png and two figures into docs/pictures
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from auditgap.report.pdf import browser

PICTURES = Path(__file__).parent / "pictures"
FIGURES = ("asr_by_depth", "gap_by_budget")
#: Name -> what Chromium calls the reader's colour scheme.
SCHEMES = {"report": 1, "report_dark": 0}


def main(home: Path) -> None:
    for name in FIGURES:
        shutil.copyfile(home / "figures" / f"{name}.svg", PICTURES / f"{name}.svg")
    for name, scheme in SCHEMES.items():
        with tempfile.TemporaryDirectory() as profile:
            flags = [
                *("headless", "no-sandbox", "disable-gpu", "hide-scrollbars"),
                f"user-data-dir={profile}",
                "window-size=1200,820",
                f"blink-settings=preferredColorScheme={scheme}",
                f"screenshot={(PICTURES / name).absolute()}.png",
            ]
            page = (home / "report.html").absolute().as_uri()
            command = [browser(), *(f"--{flag}" for flag in flags), page]
            subprocess.run(command, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
