"""`auditgap submit` from a checkout: starts a grid as a Ray job that brings this checkout along,
follows it, fetches the tables.

    python ray_jobs/submit.py --config grid.yaml --out /shared/runs/grid --address http://127.0.0.1:8265 --fetch tables
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from auditgap.cli import main

if __name__ == "__main__":
    main(["submit", "--working-dir", sys.path[0], *sys.argv[1:]])
