"""A latent audit's record says what speaks for its attack."""

from __future__ import annotations

import planted
import pytest
from planted import Plant


def test_targeted_cells_carry_a_certificate(tmp_path):
    model = planted.save(Plant(door=1), tmp_path / "model")
    prompts = planted.write_prompts(tmp_path / "prompts.txt", planted.PROMPTS[:4])
    with pytest.MonkeyPatch.context() as patch:
        planted.register(patch)
        asked = {"layers": "1,2", "eps": [0.02, 0.1]}
        store = planted.audit(tmp_path / "run", [model], prompts, **asked)
    found = {}
    for record in store.records():
        cell = record["description"]
        assert ("strength" in record["info"]) == (cell["attack"] == "targeted")
        if cell["attack"] == "targeted":
            found[cell["site"], cell["eps"]] = record["info"]["strength"]
    assert set(found) == {(site, eps) for site in (1, 2) for eps in (0.02, 0.1)}
    at_door = found[1, 0.1]
    assert at_door["n"] == 4 and at_door["flags"] == []
    assert at_door["gradient_error"] < 0.15 and at_door["drop"] > 2 * at_door["random_drop"]
    repeats = [r["info"]["repeat"] for r in store.records() if "repeat" in r["info"]]
    assert {"n": 4, "equal": 4} in repeats, "of the pass without an edit"
    both = [r for r in repeats if "edited" in r]
    assert len(both) == 4 and all(r["clean"] == {"n": 4, "equal": 4} for r in both)
    assert all(r["edited"]["equal"] == r["edited"]["n"] >= 16 for r in both)
    assert len(at_door["curve"]) == 11 and min(at_door["curve"]) < at_door["curve"][0]
    page = (store.path / "report.html").read_text("utf-8")
    assert "nothing is known of how much more steps would find" in page
    assert '<section id="strength">' in page and (store.path / "tables" / "strength.csv").is_file()
