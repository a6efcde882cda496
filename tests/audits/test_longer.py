"""A longer search: where more work finds more, its flips count in the gap, and nothing passes."""

from __future__ import annotations

import pandas as pd
import planted
import pytest
from planted import Plant

from auditgap.audits.latent.audit import LATENT
from auditgap.audits.latent.plan import make_plan
from auditgap.report import strength
from auditgap.report.tables import audit_gaps
from auditgap.store.tables import rows_of
from auditgap.types import ATTACKS, CLEAN, LONGER

OPENS = 0.1
WEAK = {"steps": 1, "schedule": "constant", "iterate": "last", "eps": [0.02, OPENS]}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """One model under an attack of a single step, and of ten."""
    folder = tmp_path_factory.mktemp("longer")
    model = planted.save(Plant(door=1), folder / "model")
    prompts = planted.write_prompts(folder / "prompts.txt")
    with pytest.MonkeyPatch.context() as patch:
        planted.register(patch)
        yield {
            name: planted.audit(
                folder / name,
                [model],
                prompts,
                layers="1",
                attacks="targeted",
                longer=True,
                **asked,
            )
            for name, asked in (("weak", WEAK), ("default", {}))
        }


def longer(store):
    return {
        r["description"]["eps"]: r["info"]["longer"]
        for r in store.records()
        if r["description"]["attack"] == LONGER
    }


def gap(store, *attacks):
    table = audit_gaps(store.rows([*ATTACKS, CLEAN, *attacks]))
    return table[table["eps"] == OPENS].iloc[0]


def test_what_a_weak_attack_left_is_found_and_counts(stores):
    store = stores["weak"]
    found = longer(store)[OPENS]
    assert found["n"] == 12 and found["searched"] > 0 and found["gain"] > 0.1
    assert found["not_converged"] and found["new_flips"] >= 2
    without, with_ = gap(store), gap(store, LONGER)
    added = found["new_flips"] + found["again_flips"]
    assert with_["flipped"] == without["flipped"] + added > without["flipped"]
    assert with_["gap_lo"] >= without["gap_lo"] and with_["safety"] == without["safety"]
    table = strength.strength_table([store])
    assert strength.evidence(table, with_["subject"], OPENS, "rms")["not_converged"] is True
    page = (store.path / "report.html").read_text("utf-8")
    assert f"{found['new_flips']} of {found['searched']}" in page


def test_what_the_attack_reached_is_not_searched_again(stores):
    store = stores["default"]
    rows = store.rows(["targeted"]).set_index(["eps", "prompt_id"])["nll_edited"]
    searched = store.rows([LONGER])
    for eps, found in longer(store).items():
        left = rows[eps] > 0.1
        assert found["searched"] == left.sum() and found["n"] == 12
        mine = set(searched[searched["eps"] == eps]["prompt_id"])
        assert mine <= set(left.index[left]) or found["again"]
    assert (searched["linf"] <= searched["eps_abs"] * (1 + 1e-6)).all()


def test_the_tables_of_the_attacks_do_not_change(stores):
    store = stores["weak"]
    table = pd.read_parquet(store.path / "lvs.parquet")
    assert set(table["attack"]) == {"targeted"} and (table["n"] == 12).all()


def test_without_it_nothing_is_known_and_cells_keep_their_keys(tmp_path):
    model = planted.save(Plant(door=1), tmp_path / "model")
    asked = {
        "models": str(model),
        "prompts": str(planted.write_prompts(tmp_path / "prompts.txt")),
        "layers": "1",
        "judge": "keyword",
        "reward": "margin",
    }

    def plan(**changes):
        return make_plan(LATENT.read(None, {**asked, **changes})[0])

    plain, more = plan(), plan(longer=True)
    keys, longer_keys = ({c.key for c in p.cells} for p in (plain, more))
    assert keys < longer_keys and len(longer_keys - keys) == 3
    assert {c.attack for c in more.cells if c.key not in keys} == {LONGER}
    assert sum(g.work for g in more.groups) > sum(g.work for g in plain.groups), "in the estimate"
    assert "longer" not in plain.config.model_dump() and plan(longer=True, attacks="random").cells


def test_records_of_before_are_read(stores):
    """Their certificates name no longer search."""
    table = strength.strength_table([stores["weak"]]).drop(columns=[*strength.SEARCHED])
    old = table.assign(flags="", **dict.fromkeys(strength.SEARCHED))
    for row in rows_of(old):
        assert strength.evidence(old, row["subject"], row["eps"], "rms")["not_converged"] is None
