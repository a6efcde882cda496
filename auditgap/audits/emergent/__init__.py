"""Emergent misalignment by domain: fine-tune on narrow bad habits, and see how far they spread
(arXiv 2602.00298).

    store = build.run(*EMERGENT.read(None, {"model": "smollm2", "domains": "demo", "out": "runs/em"}))
    for stage in (train, generate, judge, analyse):
        store, outcome = stage.run("runs/em", options)

Six stages over one run folder, each restartable: `build` makes the panel of domains, `train` an
adapter a (domain, arm, seed), `generate` asks every adapter and the base, `judge` rates the
answers, `analyse` reads memberships, diversity and directions and steers with them, `report` makes
the tables and the page.
"""
