"""Emergent misalignment by domain: fine-tune on narrow bad habits, and see how far they spread
(arXiv 2602.00298).

    config, options = EMERGENT.read(None, {"model": "smollm2", "domains": "demo", "out": "runs/em"})
    store, outcome = run(EMERGENT, config, options)
    store, outcome = stages.run("judge", "runs/em", options)    # a stage alone: another judge's

Six stages over one run folder, each restartable: `build` makes the panel of domains, `train` an
adapter a (domain, arm, seed), `generate` asks every adapter and the base, `judge` rates the
answers, `analyse` reads memberships, diversity and directions and steers with them, `report` makes
the tables and the page.
"""
