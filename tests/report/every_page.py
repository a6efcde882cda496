"""A page of every kind that auditgap writes, of made-up runs.

pages = write(tmp_path)      # {"latent": …/report.html, "compare": …/compare.html, …}
"""

from __future__ import annotations

from pathlib import Path

import test_compare
from emergent_runs import write_study
from test_behaviour_page import COMPLY, rows_of, store_of
from test_curve import PAIR
from test_curve import rows as curve_rows
from test_curve import store_of as curve_of
from test_sections import intervened, probed
from toy_runs import write_toy_run

from auditgap.audits import bundle, pages
from auditgap.audits.comparing import compare
from auditgap.report import compare_page
from auditgap.report.verdict_lines import Criteria

#: Two models, as folders are typed.
BASE, TUNED = "./models/base", "./models/tuned"


def write(home: Path) -> dict[str, Path]:
    """Write each page into a folder of its own below `home`; their paths by name."""
    pair = write_toy_run(
        home / "latent",
        subjects={BASE: 30, TUNED: 30},
        sites=(-1, 5, 15, 29),
        texts=False,
        config={"audit": "latent"},
    )
    asked = store_of(home / "behaviour", rows_of())
    alone = store_of(home / "alone", rows_of({TUNED: COMPLY["base"]}))
    attacked = write_toy_run(
        home / "attacked", subjects={TUNED: 30}, sites=(-1, 15), texts=False, n=16
    )
    whole = home / "whole"
    bundle.write(
        [alone, attacked],
        out=whole,
        criteria=Criteria(),
        missing={"probe": "no triples were named", "sft-curve": "no rows were named"},
        title="Safety audit of tuned",
    )
    others = {
        "curve": curve_of(home / "curve", curve_rows(PAIR)),
        "emergent": write_study(home / "emergent", n_prompts=6),
        "probe": probed(home / "probe"),
        "intervene": intervened(home / "intervene"),
    }
    runs = [
        test_compare.run(home / name, {name: lvs}) for name, lvs in (("base", 0.0), ("twin", 3.0))
    ]
    return {
        "latent": pages.write([pair]),
        "behaviour": pages.write([asked]),
        "whole": whole / "report.html",
        **{name: pages.write([store]) for name, store in others.items()},
        "compare": compare_page.write(compare(runs), home / "compare"),
    }
