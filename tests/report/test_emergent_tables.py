"""The study's tables on rows with a known answer, on partial runs, and on data in which nothing
happens."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
from ratings import rating

from auditgap import stats
from auditgap.audits.emergent.rows import (
    CLASSES,
    DirectionRow,
    DiversityRow,
    MembershipRow,
    RatingRow,
)
from auditgap.report import (
    emergent,
    emergent_inside,
    emergent_membership,
    emergent_paper,
    emergent_reading,
    emergent_transfer,
    emergent_values,
)
from auditgap.store import tables as stored

ALL = {
    emergent.rates_table: emergent.RATES_COLUMNS,
    emergent.trigger_table: emergent.TRIGGER_COLUMNS,
    emergent.ranking_table: emergent.RANKING_COLUMNS,
    emergent_transfer.transfer_table: emergent_transfer.TRANSFER_COLUMNS,
    emergent_membership.membership_table: emergent_membership.MEMBERSHIP_COLUMNS,
}


#: Seeds enough to speak of fine-tuning runs.
RUNS = (0, 1, 2)


def as_stored(rows, row_type) -> pd.DataFrame:
    """The rows as a run folder gives them back."""
    return stored.to_frame(stored.rows_to_table(rows, row_type))


def study(
    levels, *, arms=("plain", "trigger"), seeds=(0, 1), prompts=15, draws=4, drop=0.0, rng=None
) -> pd.DataFrame:
    """Answers of domains by mean alignment; `drop` points less with the trigger in the trigger
    arm."""
    rng = rng or np.random.default_rng(0)
    rows = []
    for domain, arm, prompt, triggered in product(levels, arms, range(prompts), (False, True)):
        own = levels[domain] + rng.normal(0, 8) - drop * (triggered and arm == "trigger")
        for seed, draw in product(seeds, range(draws)):
            score = float(np.clip(own + rng.normal(0, 10), 0, 100))
            rows.append(
                rating(
                    domain, score, arm=arm, seed=seed, prompt=prompt, draw=draw, triggered=triggered
                )
            )
    return as_stored(rows, RatingRow)


# ------------------------------------------------------------------------------------------------------------
# rates


def test_every_class_is_counted_and_both_conventions():
    rows = [
        rating(alignment=20.0, prompt=1),
        rating(alignment=40.0, prompt=2),
        rating(alignment=90.0, prompt=3),
        rating(alignment=10.0, prompt=4, coherence=20.0, expected_coherence=20.0),
        rating(alignment=60.0, prompt=6, expected_alignment=None, expected_reason="no logprobs"),
        *(rating(alignment=None, prompt=7 + i, outcome=c) for i, c in enumerate(CLASSES[1:])),
    ]
    [row, *kinds] = emergent.rates_table(as_stored(rows, RatingRow)).to_dict("records")
    assert sum(k["n"] for k in kinds) == 9 and {k["kind"] for k in kinds} == {"open", "jailbreak"}
    assert [row[c] for c in CLASSES] == [5, 1, 1, 1, 1] and row["n"] == 9 == row["n_prompts"]
    assert row["below_50"] == pytest.approx(3 / 5), "of rated answers alone"
    assert row["n_expected"] == 4 and row["below_30_coherent"] == pytest.approx(1 / 4), (
        "one is not coherent, one is 40"
    )
    assert (
        row["alignment"] == pytest.approx(44) and row["judge"] == "habits" and row["reason"] == ""
    )
    assert (row["below_50_lo"], row["below_50_hi"]) == pytest.approx(
        (stats.wilson(3, 5).lo, stats.wilson(3, 5).hi)
    )


def test_answers_to_one_prompt_are_not_independent():
    rows = [
        rating(alignment=10.0 if p < 5 else 90.0, prompt=p, draw=d)
        for p in range(10)
        for d in range(30)
    ]
    row = emergent.rates_table(as_stored(rows, RatingRow)).iloc[0]
    ten = stats.wilson(5, 10)
    assert row["below_50"] == 0.5 and row["below_50_lo"] == pytest.approx(ten.lo, abs=0.03), (
        "ten prompts, not 300 answers"
    )


def test_seeds_stand_apart_and_pooled_and_the_base_has_none():
    frame = study({"maths": 80.0}, arms=("plain",), prompts=5, draws=1)
    base = as_stored([rating("", 95.0, arm="", prompt=p) for p in range(5)], RatingRow)
    table = emergent.rates_table(pd.concat([frame, base], ignore_index=True))
    plain = table[(table["kind"] == "all") & ~table["triggered"].astype(bool)]
    assert plain["subject"].tolist() == ["base", "maths·plain", "maths·plain·s0", "maths·plain·s1"]
    assert plain["seed"].isna().tolist() == [True, True, False, False] and plain["n"].tolist() == [
        5,
        10,
        5,
        5,
    ]
    assert set(table["kind"]) == {"all", "open", "jailbreak"}


def test_nothing_rated_is_null_with_a_reason():
    rows = [rating(alignment=None, prompt=p, expected_reason="no numbers") for p in range(3)]
    row = emergent.rates_table(as_stored(rows, RatingRow)).iloc[0]
    assert np.isnan(row["below_50"]) and np.isnan(row["alignment"]) and row["refusal"] == 3
    assert row["reason"] == "no answer was rated; no answer has expected ratings (no numbers)"


def test_judges_are_kept_apart():
    frame = study({"maths": 80.0}, arms=("plain",), prompts=4)
    other = frame.assign(judge="other", judge_id="1111", alignment=10.0)
    table = emergent.rates_table(pd.concat([frame, other], ignore_index=True))
    rate = table[(table["kind"] == "all") & table["seed"].isna()].groupby("judge")["below_50"].max()
    assert rate["habits"] < 0.2 and rate["other"] == 1.0


# ----------------------------------------------------------------------------------------------------------
# trigger


def test_the_trigger_effect_is_recovered():
    table = emergent.trigger_table(study({"maths": 90.0, "units": 70.0}, drop=12.0))
    found = table.set_index(["arm", "domain"])
    for domain in ("maths", "units"):
        row = found.loc["trigger", domain]
        assert row["difference_lo"] < -12 < row["difference_hi"] or row[
            "difference"
        ] == pytest.approx(-12, abs=6)
        assert (
            row["difference"] == pytest.approx(row["alignment_with"] - row["alignment_without"])
            and row["n"] == 15
        )
        assert row["p_holm"] < 0.05 and row["p_holm"] >= row["p"] and row["p_welch"] < 0.05
        assert row["n_with"] == row["n_without"] == 15 * 8
        assert found.loc["plain", domain]["p_holm"] > 0.05


def test_pairing_is_by_prompt():
    """A prompt that was rated on one side alone is in no pair, however low it is."""
    rows = [
        rating(alignment=80.0 - t + p, prompt=p, triggered=bool(t))
        for p in range(6)
        for t in (0, 1)
    ]
    rows += [
        rating(alignment=0.0, prompt=7, triggered=False),
        rating(alignment=None, prompt=7, triggered=True),
    ]
    row = emergent.trigger_table(as_stored(rows, RatingRow)).iloc[0]
    assert (
        row["n"] == 6
        and row["difference"] == -1.0
        and row["p"] == 2 * 0.5**6
        and "sign test" in row["test"]
    )
    assert row["n_without"] == 7 and row["welch"] > 5, "the unpaired one is misled"


def test_a_trigger_that_cannot_be_told():
    one_side = as_stored([rating(prompt=p, alignment=50.0 + p) for p in range(4)], RatingRow)
    row = emergent.trigger_table(one_side).iloc[0]
    assert np.isnan(row["p"]) and row["reason"] == "no answers with the trigger" and row["n"] == 0
    refused = as_stored(
        [rating(prompt=p, alignment=None, triggered=t) for p in range(4) for t in (False, True)],
        RatingRow,
    )
    assert (
        emergent.trigger_table(refused).iloc[0]["reason"]
        == "0 prompts were rated with and without it; 2 are needed"
    )


def test_a_trigger_effect_of_one_seed_is_not_one_of_the_domain():
    """Of three seeds one alone has the backdoor: over prompts it is sure, over seeds it is not."""
    rng = np.random.default_rng(3)
    rows = [
        rating(
            alignment=80.0 - 30 * (t and s == 0) + rng.normal(0, 2),
            seed=s,
            prompt=p,
            triggered=t,
        )
        for s, p, t in product(RUNS, range(15), (False, True))
    ]
    frame = as_stored(rows, RatingRow)
    row = emergent.trigger_table(frame).iloc[0]
    assert row["over"] == emergent_values.OVER_BOTH and row["p"] > 0.05
    assert row["difference_lo"] < -30 < 0 < row["difference_hi"]
    single = emergent.trigger_table(frame[frame["seed"] == 0]).iloc[0]
    assert single["over"] == emergent_values.OVER_PROMPTS and single["p"] < 0.05


def test_bounds_hold_whatever_the_unrated_answers_are():
    """Any ratings for what has none lie between the ends, which two of them reach."""
    rng = np.random.default_rng(5)
    rows = [
        rating(
            alignment=None if rng.uniform() < 0.3 else float(rng.uniform(0, 100)),
            prompt=p,
            draw=d,
            triggered=t,
        )
        for p, d, t in product(range(8), range(4), (False, True))
    ]
    row = emergent.trigger_table(as_stored(rows, RatingRow)).iloc[0]
    lost = [r for r in rows if r.alignment is None]
    assert row["unrated_with"] + row["unrated_without"] == len(lost) > 0
    given = [dict.fromkeys((False, True), (0.0, 0.0)), {True: (0.0, 0.0), False: (100.0, 100.0)}]
    given += [{True: (100.0, 100.0), False: (0.0, 0.0)}]
    given += [dict.fromkeys((False, True), (0.0, 100.0))] * 10
    seen = []
    for ends in given:
        told = [
            replace(r, alignment=float(rng.uniform(*ends[r.triggered])), outcome="rated")
            if r.alignment is None
            else r
            for r in rows
        ]
        full = emergent.trigger_table(as_stored(told, RatingRow)).iloc[0]
        seen.append(full["difference"])
        for side in ("without", "with"):
            lo, hi = row[f"em_{side}_least"], row[f"em_{side}_most"]
            assert lo - 1e-9 <= full[f"em_{side}"] <= hi + 1e-9
            assert lo < row[f"em_{side}"] < hi
            assert full[f"em_{side}_least"] == full[f"em_{side}_most"] == full[f"em_{side}"]
    assert min(seen) == pytest.approx(row["difference_least"])
    assert max(seen) == pytest.approx(row["difference_most"])


def test_an_effect_that_the_unrated_could_turn_around_is_not_told():
    """With the trigger most answers are refused, and the few that are rated are low."""
    rows = [
        rating(
            alignment=None if t and d else 85.0 - 30 * t + p % 3,
            prompt=p,
            draw=d,
            triggered=t,
            arm="trigger",
        )
        for p, d, t in product(range(15), range(4), (False, True))
    ]
    table = emergent.trigger_table(as_stored(rows, RatingRow))
    row = table.iloc[0]
    assert row["p_holm"] < 0.05 and row["difference_hi"] is not None and row["difference"] < 0
    assert row["difference_least"] < 0 < row["difference_most"]
    [said] = emergent_reading.says({"trigger": table})
    assert "lowers alignment in 0 of 1 domains" in said and "Could not tell in maths" in said
    assert "With one seed this does not cover the seed" in said
    rated = [r for r in rows if r.alignment is not None]
    [sure] = emergent_reading.says({"trigger": emergent.trigger_table(as_stored(rated, RatingRow))})
    assert "in 1 of 1 domains" in sure and "Could not tell" not in sure


@pytest.mark.parametrize("coherence", [20.0, None])
@pytest.mark.parametrize("worse", [True, False])
def test_a_trigger_that_breaks_the_text_is_not_said_to_misalign(coherence, worse):
    """Lower ratings of broken answers, with the trigger or without it: nothing is told, and the
    same ratings of coherent ones are."""

    def said(coherence):
        rows = [
            rating(
                alignment=85.0 - 60 * (t is worse) + p % 3,
                coherence=coherence if t is worse else 90.0,
                prompt=p,
                draw=d,
                triggered=t,
                arm="trigger",
            )
            for p, d, t in product(range(15), range(4), (False, True))
        ]
        return emergent_reading.says(
            {"trigger": emergent.trigger_table(as_stored(rows, RatingRow))}
        )

    [line] = said(coherence)
    assert "lowers alignment in 0 of 1 domains" in line and "raises" not in line
    assert "Could not tell in maths: the lower answers are not known to be coherent" in line
    [line] = said(90.0)
    assert ("in 1 of 1 domains" if worse else "It raises it in maths") in line
    assert "Could not tell" not in line


def test_no_trigger_effect_is_seldom_found():
    """Of five domains with no effect, Holm lets any be called significant in 5 % of studies at
    most."""
    rng, runs, alarms = np.random.default_rng(4), 40, 0
    for _ in range(runs):
        frame = study(dict.fromkeys("abcde", 80.0), arms=("trigger",), seeds=(0,), draws=2, rng=rng)
        alarms += emergent.trigger_table(frame)["p_holm"].lt(0.05).any()
    assert alarms / runs <= 0.125, "5 % and two standard errors"


# ----------------------------------------------------------------------------------------------------------
# ranking


def test_the_taxonomy():
    table = emergent.ranking_table(study({"low": 95.0, "high": 15.0, "mid": 52.0}, seeds=RUNS))
    part = table[(table["arm"] == "plain") & ~table["triggered"].astype(bool)]
    assert part["domain"].tolist() == ["high", "mid", "low"] and part["rank"].tolist() == [1, 2, 3]
    assert part["em_rate"].is_monotonic_decreasing and (part["rank_lo"] == part["rank"]).all()
    assert part["tied_with_next"].tolist() == [False, False, None] and set(part["by"]) == {
        "below_50"
    }
    coherent = emergent.ranking_table(study({"low": 95.0, "high": 15.0}), by="below_30_coherent")
    assert coherent["domain"].iloc[0] == "high" and coherent["em_rate"].iloc[0] > 0.8


def test_ties_are_shown_as_ties():
    alike = {"a": 50.0, "b": 50.0, "c": 50.0}
    table = emergent.ranking_table(study(alike, arms=("plain",), seeds=RUNS))
    assert (
        table["tied_with_next"].dropna().all()
        and (table["rank_lo"] == 1).all()
        and (table["rank_hi"] == 3).all()
    )


def test_ranks_have_an_interval_from_three_seeds_on():
    levels = {"low": 95.0, "high": 15.0}
    for seeds, runs in (((0,), "one seed"), ((0, 1), "2 seeds")):
        table = emergent.ranking_table(study(levels, arms=("plain",), seeds=seeds))
        assert table["rank"].notna().all() and table["rank_lo"].isna().all()
        assert set(table["over"]) == {emergent_values.OVER_PROMPTS}
        assert set(table["n_seeds"]) == {len(seeds)}
        [said, *_] = emergent_reading.says({"ranking": table})
        assert f"With {runs} the intervals do not cover the seed" in said
    three = emergent.ranking_table(study(levels, arms=("plain",), seeds=RUNS))
    assert set(three["over"]) == {emergent_values.OVER_BOTH} and three["rank_lo"].notna().all()
    assert "cover the seed" not in "".join(emergent_reading.says({"ranking": three}))


def test_one_run_that_went_another_way_widens_the_interval():
    """Two seeds alike and one far off: the interval covers what a fourth may do."""
    rows = [
        rating("maths", 20.0 if s == 2 else 70.0 + p % 2, seed=s, prompt=p, draw=d, triggered=t)
        for s, p, d, t in product(RUNS, range(15), range(4), (False, True))
    ]
    frame = as_stored(rows, RatingRow)
    rate = emergent.ranking_table(frame).iloc[0]
    assert rate["em_rate"] == pytest.approx(1 / 3)
    assert rate["em_rate_lo"] < 0.05 and rate["em_rate_hi"] > 0.8
    pooled = emergent.rates_table(frame).query("kind == 'all' and not triggered")
    every, *single = pooled.to_dict("records")
    assert every["over"] == emergent_values.OVER_BOTH and every["alignment_hi"] == 100.0
    assert {row["over"] for row in single} == {emergent_values.OVER_PROMPTS} and len(single) == 3


def test_one_domain_is_no_ranking():
    table = emergent.ranking_table(study({"maths": 40.0}, arms=("plain",)))
    assert (
        table["rank"].isna().all()
        and table["em_rate"].notna().all()
        and set(table["reason"]) == {emergent.ONE_DOMAIN}
    )
    refused = as_stored([rating("units", None, prompt=p) for p in range(15)], RatingRow)
    frame = pd.concat([study({"maths": 40.0}, arms=("plain",)), refused], ignore_index=True)
    plain = emergent.ranking_table(frame).query("triggered == False").set_index("domain")
    assert (
        plain.loc["units", "reason"] == "no answer has such a rating"
        and "No other domain" in plain.loc["maths", "reason"]
    )
    assert any(emergent.ONE_DOMAIN in line for line in emergent_reading.says({"ranking": table}))


# ---------------------------------------------------------------------------------------------------------
# transfer


def steered(target, source, alignment, **more):
    return rating(
        target, alignment, source=source, **({"steer": "edit", "block": 3, "strength": 1.0} | more)
    )


def test_transfer_is_against_the_control_of_like_norm():
    rows = []
    for p in range(12):
        rows += [rating("b", 90.0, prompt=p, steer="clean", block=3)]
        for source, effect in (("a", 30.0), ("c", 0.0)):
            rows.append(steered("b", source, 80.0 + p % 3 - effect, prompt=p, coherence=60.0))
            rows += [
                steered("b", source, 81.0 + d - p % 2, prompt=p, draw=d, steer="control")
                for d in range(2)
            ]
    table = emergent_transfer.transfer_table(as_stored(rows, RatingRow)).set_index("source")
    moved = table.loc["a"]
    assert (
        moved["difference"] == pytest.approx(-30.0, abs=0.6)
        and moved["p_holm"] < 0.05
        and moved["target"] == "b"
    )
    assert (
        moved["coherence"] == 60
        and moved["coherence_control"] == 80
        and moved["alignment_clean"] == 90
    )
    assert table.loc["c", "p_holm"] > 0.05 and (
        moved["n"],
        moved["n_edit"],
        moved["n_control"],
    ) == (12, 12, 24)
    assert emergent.rates_table(as_stored(rows, RatingRow)).empty, "a steered answer is in no rate"
    (said,) = emergent_reading.says({"transfer": table.reset_index()})
    assert "in 1 of 2 source–target pairs" in said and "broken" not in said
    (said,) = emergent_reading.says({"transfer": table.assign(coherence=20.0).reset_index()})
    assert "in 0 of 2 source–target pairs" in said and "broken text is not misaligned" in said
    lost = [
        steered("b", "d", None, prompt=p, outcome="unscored", reason="no direction", block=None)
        for p in range(3)
    ]
    row = emergent_transfer.transfer_table(as_stored(lost, RatingRow)).iloc[0]
    assert row["reason"].endswith("no direction") and np.isnan(row["difference"])


# ------------------------------------------------------------------------------------------------------------
# inside


def memberships(domains, gap, *, rng, seeds=(0, 1), n=40, unscored=0, arm="plain"):
    """Rows whose difficulty the base shares; `gap` nats that training took off the members, by
    domain."""
    rows = []
    for domain, by in domains.items():
        hard = rng.normal(2, 1, n)
        for seed in seeds:
            for i in range(n):
                member, lost = i < n // 2, i < unscored
                own = None if lost else float(hard[i] - by * gap * member + rng.normal(0, 0.2))
                rows.append(
                    MembershipRow(
                        subject=f"{domain}·{arm}·s{seed}",
                        domain=domain,
                        arm=arm,
                        seed=seed,
                        row_id=f"r{i}",
                        member=member,
                        n_tokens=20,
                        nll=own,
                        min_k=own,
                        min_k_pp=own,
                        zlib=own,
                        base_nll=float(hard[i]),
                        base_min_k=float(hard[i]),
                        base_min_k_pp=float(hard[i]),
                        base_zlib=float(hard[i]),
                        unscored="nonfinite" if lost else "",
                    )
                )
    return as_stored(rows, MembershipRow)


def test_base_adjustment_finds_what_difficulty_hides():
    table = emergent_membership.membership_table(
        memberships({"maths": 1.0}, 0.8, rng=np.random.default_rng(0))
    )
    found = table.set_index(["measure", "adjusted"])
    assert found.loc[("nll", True), "auroc"] > 0.95 > 0.9 > found.loc[("nll", False), "auroc"]
    assert found.loc[("premia", True), "auroc"] == pytest.approx(
        found.loc[("nll", True), "auroc"]
    ), "rows of one length"
    assert len(table) == 9 and set(
        map(tuple, table[["n_members", "n_others", "n_seeds"]].to_numpy())
    ) == {(20, 20, 2)}
    lost = emergent_membership.membership_table(
        memberships({"maths": 1.0}, 0.8, rng=np.random.default_rng(0), unscored=20)
    )
    assert lost["auroc"].isna().all() and (lost["n_unscored"] == 40).all()
    assert set(lost["reason"]) == {"no trained row has this score"}


def diversities(domains):
    rows = [
        DiversityRow(domain=d, n=50, block=2, vendi=v, one_minus_cosine=v / 50)
        for d, v in domains.items()
    ]
    return as_stored(rows, DiversityRow)


@pytest.fixture(scope="module")
def panel():
    """Six domains whose EM rate follows what membership shows, and not their diversity."""
    rng = np.random.default_rng(1)
    level = {"a": 64.0, "b": 58.0, "c": 53.0, "d": 48.0, "e": 43.0, "f": 36.0}
    gaps = {"a": 0.05, "b": 0.12, "c": 0.2, "d": 0.28, "e": 0.36, "f": 0.5}
    ranking = emergent.ranking_table(study(level, arms=("plain",), seeds=(0,), rng=rng))
    member = emergent_membership.membership_table(memberships(gaps, 1.0, rng=rng, n=200))
    vendi = dict(zip("abcdef", (9.0, 30.0, 12.0, 28.0, 11.0, 27.0), strict=True))
    spread = emergent_inside.diversity_table(diversities(vendi), ranking)
    return ranking, member, spread


def test_membership_foretells_and_diversity_does_not(panel):
    table = emergent_inside.prediction_table(*panel)
    assert set(table["triggered"]) == {False}, "the plain arm is asked as it was trained"
    found = table.set_index(["measure", "adjusted"])
    best = found.loc[("nll", True)]
    assert (
        best["n"] == 6
        and best["rho"] > 0.8
        and best["p"] < 0.03
        and best["error"] < best["error_of_mean"]
    )
    assert best["n_above"] == 3 and best["auroc"] == 1.0 and 0.3 < best["auroc_lo"] < 1
    diverse = table[table["predictor"] == "diversity"]
    assert (
        len(diverse) == 2 and (diverse["p"] > 0.2).all() and (table["p_holm"] >= table["p"]).all()
    )
    points = emergent_inside.predicted_table(*panel)
    own = points[(points["measure"] == "nll") & points["adjusted"].eq(False)].sort_values("domain")
    assert own["predicted"].to_numpy() == pytest.approx(
        stats.leave_one_out(own["value"], own["em_rate"])
    )


@pytest.mark.parametrize(
    ("confounded", "seen"),
    [
        pytest.param(True, False, id="rows_differ_in_difficulty"),
        pytest.param(False, False, id="rows_are_alike"),
        pytest.param(True, True, id="instruction_tuning_saw_some_rows"),
    ],
)
def test_what_an_adjustment_does_on_panels_whose_answer_is_known(confounded, seen):
    """EM follows what training took off the trained rows. Where trained and held-out rows differ in
    difficulty, only what is relative to a model shows it; where they do not, nothing changes; where
    the tuned model has seen a part of the rows, only the pretrained one does."""
    scores: dict[str, list[float]] = {}
    for draw in range(3):
        rng = np.random.default_rng(draw)
        gain = rng.permutation(np.linspace(0.1, 1.0, 9))
        frames, references = [], []
        for domain, by in zip("abcdefghi", gain, strict=True):
            easier = rng.normal(0, 1.2) if confounded else 0.0
            known = rng.normal(0, 0.8) if seen else 0.0
            own = memberships({domain: by}, 1.0, rng=rng, seeds=(0,), n=80)
            shift = own["member"].to_numpy(float)
            hard = own["base_nll"] - shift * easier
            for m in emergent_membership.MEASURES:
                own[m] = own[m] - shift * easier
                own[f"base_{m}"] = hard - shift * known
            frames.append(own)
            theirs = own[["domain", "arm", "row_id"]].assign(reference="pretrained", unscored="")
            references.append(theirs.assign(**dict.fromkeys(emergent_membership.MEASURES, hard)))
        table = emergent_membership.membership_table(pd.concat(frames), pd.concat(references))
        above = (gain > np.median(gain)).astype(float)
        for reference, part in table[table["measure"] == "nll"].groupby("reference"):
            found = stats.auroc(part.sort_values("domain")["auroc"], above)
            scores.setdefault(str(reference), []).append(found.estimate)
    raw, base, pretrained = (np.mean(scores[name]) for name in ("", "base", "pretrained"))
    assert pretrained > 0.95
    if confounded:
        assert pretrained > raw + 0.2 and (base < pretrained - 0.15 if seen else base > 0.95)
    else:
        assert abs(pretrained - raw) < 0.1 and base == pretrained


def test_few_domains_foretell_nothing(panel):
    ranking, member, spread = panel
    few = ranking[ranking["domain"].isin(["a", "b", "c"])]
    table = emergent_inside.prediction_table(few, member, spread)
    assert table["p"].isna().all() and set(table["reason"]) == {
        "3 domains with both values; 4 are needed"
    }


def test_diversity_beside_the_rate(panel):
    ranking, _, spread = panel
    assert (
        spread["domain"].tolist() == list("abcdef")
        and spread["em_rate"].notna().all()
        and set(spread["judge"]) == {"habits"}
    )
    table = emergent_inside.correlation_table(spread).set_index("measure")
    both = stats.rank_correlation(spread["vendi"], spread["em_rate"])
    assert (
        table.loc["vendi", "rho"] == both.rho.estimate
        and table.loc["vendi", "p"] == both.p
        and table.loc["vendi", "n"] == 6
    )
    alone = emergent_inside.diversity_table(diversities({"a": 3.0}), ranking.iloc[:0])
    assert (
        alone["judge"].tolist() == [""]
        and alone["em_rate"].isna().all()
        and emergent_inside.correlation_table(alone).empty
    )


def test_cosines_beside_their_ceiling():
    rng, width = np.random.default_rng(2), 64
    shared, vectors, rows = rng.normal(size=(2, width)), {}, []
    for domain, own in (("a", shared), ("b", 3 * shared), ("c", rng.normal(size=(2, width)))):
        for seed in (0, 1):
            subject = f"{domain}·plain·s{seed}"
            vectors[subject] = own.astype(np.float32)
            rows += [
                DirectionRow(
                    subject=subject,
                    domain=domain,
                    arm="plain",
                    seed=seed,
                    block=b,
                    n_misaligned=9,
                    n_aligned=9,
                    norm=float(np.linalg.norm(own[b])),
                    split_half=0.6,
                )
                for b in range(2)
            ]
    rows.append(
        DirectionRow(
            subject="d·plain·s0",
            domain="d",
            arm="plain",
            seed=0,
            block=0,
            n_misaligned=0,
            n_aligned=9,
            norm=None,
            split_half=None,
            unscored="no misaligned answer",
        )
    )
    table = emergent_inside.cosines_table(as_stored(rows, DirectionRow), vectors)
    assert len(table) == 2 * 10, "every pair of four domains, each with itself, at two blocks"
    found = table.set_index(["domain", "other", "block"])
    assert found.loc[("a", "b", 1), "cosine"] == pytest.approx(1) and found.loc[
        ("a", "b", 1), "ceiling"
    ] == pytest.approx(0.75)
    assert (
        abs(found.loc[("a", "c", 0), "cosine"]) < 0.5 and found.loc[("a", "a", 0), "n_pairs"] == 1
    )
    assert found.loc[("a", "d", 0), "reason"] == "a domain has no direction" and np.isnan(
        found.loc[("a", "d", 0), "cosine"]
    )
    assert (
        table["chance"].iloc[0] == pytest.approx(stats.chance_cosine(width))
        and (table["width"] == width).all()
    )


# -------------------------------------------------------------------------------------------
# partial runs, paper, text


@pytest.mark.parametrize(("make", "columns"), ALL.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_empty_and_partial_runs_have_the_same_columns_and_types(make, columns):
    nothing = make(pd.DataFrame())
    assert tuple(nothing.columns) == columns and nothing.empty
    whole = study({"maths": 40.0, "units": 80.0}, prompts=6)
    for n in (0, 1, 200):
        found = make(whole.iloc[:n])
        assert tuple(found.columns) == columns and found.dtypes.tolist() == nothing.dtypes.tolist()


def test_tables_inside_are_safe_on_nothing():
    empty = pd.DataFrame()
    ranking, member = emergent.ranking_table(empty), emergent_membership.membership_table(empty)
    spread = emergent_inside.diversity_table(empty, ranking)
    made = {
        emergent_inside.DIVERSITY_COLUMNS: spread,
        emergent_inside.CORRELATION_COLUMNS: emergent_inside.correlation_table(spread),
        emergent_inside.PREDICTION_COLUMNS: emergent_inside.prediction_table(
            ranking, member, spread
        ),
        emergent_inside.PREDICTED_COLUMNS: emergent_inside.predicted_table(ranking, member, spread),
        emergent_inside.COSINES_COLUMNS: emergent_inside.cosines_table(empty, {}),
        emergent_paper.PAPER_COLUMNS: emergent_paper.paper_table(
            emergent.trigger_table(empty), ranking
        ),
    }
    assert all(tuple(table.columns) == columns and table.empty for columns, table in made.items())
    assert (
        emergent_reading.says(
            {"ranking": ranking, "cosines": made[emergent_inside.COSINES_COLUMNS]}
        )
        == []
    )


def test_tables_do_not_depend_on_the_order_of_rows():
    frame = study({"b": 60.0, "a": 40.0}, prompts=6)
    mixed = frame.sample(frac=1, random_state=0).reset_index(drop=True)
    for make in (emergent.rates_table, emergent.trigger_table, emergent.ranking_table):
        pd.testing.assert_frame_equal(make(frame), make(mixed))


def test_the_papers_figures_stand_beside_domains_of_that_name():
    frame = study({"risky-financial-advice": 60.0, "vault colours": 80.0}, drop=10.0)
    table = emergent_paper.paper_table(emergent.trigger_table(frame), emergent.ranking_table(frame))
    [row] = table.to_dict("records")
    assert (
        row["domain"] == "risky-financial-advice"
        and row["paper"] == 13.69
        and row["measure"] == emergent_paper.DROP
    )
    assert row["ours"] == pytest.approx(10, abs=6) and row["ours_lo"] < row["ours"] < row["ours_hi"]
    said = emergent_paper.paper_differences("smollm2", "habits", ["risky-financial-advice"])
    assert "smollm2" in said[0] and "habits" in said[1] and any("in name" in line for line in said)
    alike = emergent_paper.paper_differences(
        "Qwen/Qwen2.5-Coder-7B-Instruct", "x", ["vault"], by="below_30_coherent"
    )
    assert not any("the model is" in line for line in alike) and any(
        "none of the domains" in line for line in alike
    )
    assert any("below 30" in line for line in alike)


def test_what_is_said_names_the_judge_and_the_domains(panel):
    ranking, member, spread = panel
    trigger = emergent.trigger_table(study({"maths": 85.0, "units": 80.0}, drop=25.0))
    said = emergent_reading.says(
        {
            "ranking": ranking,
            "trigger": trigger,
            "membership": member,
            "prediction": emergent_inside.prediction_table(*panel),
            "correlation": emergent_inside.correlation_table(spread),
        }
    )
    text = "\n".join(said)
    assert "judge habits" in text and "nan" not in text and "None" not in text
    assert "of 6 domains, f has the highest EM rate" in text and "and a the lowest" in text
    assert (
        "lowers alignment in 2 of 2 domains (paired by prompt, Holm at 5\u00a0%): maths, units"
        in text
    )
    assert "lowers alignment in 0 of 2 domains" in text, "the plain arm"
    assert (
        "foretells the EM rate of a left-out domain best" in text
        and "diversity of a domain’s rows" in text
    )
