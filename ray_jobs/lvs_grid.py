"""A grid of latent audits as a Ray job: `auditgap grid` with its groups spread over the cluster
that it was submitted to.

    ray job submit --working-dir . -- python ray_jobs/lvs_grid.py --config grid.yaml --out /shared/runs/grid

The run folders must be on storage that every node sees. Exit codes are auditgap's: 0 done, 2 bad
usage, 3 partly failed.
"""

from __future__ import annotations

import sys
from pathlib import Path

# the job's working directory brings the package with it
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from auditgap.cli import main

if __name__ == "__main__":
    main(["grid", "--executor", "ray", *sys.argv[1:]])
