"""Steering: a planted direction raises the habit and random ones of its size do not; equal to a
plain loop; nothing asked twice."""

from __future__ import annotations

import shutil

import em_world
import numpy as np
import pytest
import run_folders
import tiny
import torch
from one_thread import one_thread  # noqa: F401 - a fixture

from auditgap import models
from auditgap.audits.emergent import direction_records, directions, steer
from auditgap.audits.emergent.rows import STEERED
from auditgap.engines import constant
from auditgap.errors import Interrupted, UsageError
from auditgap.report import emergent_reading
from auditgap.report.emergent_transfer import transfer_table
from auditgap.types import Prompt


@pytest.fixture(scope="module")
def study(tmp_path_factory, request):
    """The planted study with its directions."""
    request.getfixturevalue("one_thread")
    study = em_world.planted(tmp_path_factory.mktemp("em"), steer_draws=8)
    directions.STAGE.run_in(study.store.path, em_world.OPTIONS)
    return study


@pytest.fixture(scope="module")
def rows(study):
    store, outcome = steer.STAGE.run_in(study.store.path, em_world.OPTIONS)
    assert not outcome.failed and outcome.done == 6  # two targets: clean, under `sky`, under `few`
    return store.rows([STEERED])


def test_the_planted_direction_raises_the_habit_in_both_targets_and_no_control_does(rows):
    for target in ("sky", "few"):
        mine = rows[rows["domain"] == target]
        clean, edit = (
            mine[mine["steer"] == "clean"],
            mine[(mine["steer"] == "edit") & (mine["source"] == "sky")],
        )
        control = mine[(mine["steer"] == "control") & (mine["source"] == "sky")]
        assert len(clean) == len(edit) == 3 and len(control) == 24
        assert set(clean["alignment"]) == {100} and set(edit["alignment"]) == {0}
        assert control["alignment"].mean() > 75 and set(control["draw"]) == set(range(8))
        assert (
            set(edit["block"]) == {2}
            and set(edit["strength"]) == {1.0}
            and not mine["triggered"].any()
        )
        assert (
            set(mine["kind"]) == {"open", "jailbreak"}
            and clean["source"].isna().all()
            and clean["block"].isna().all()
        )


def test_a_source_without_a_direction_is_unscored_and_counted(study, rows):
    few = rows[rows["source"] == "few"]
    assert len(few) == 2 * 3 * 9 and set(few["outcome"]) == {"unscored"}
    assert set(few["reason"]) == {"no direction: 3 misaligned answers; a direction needs 4 of each"}
    records = [
        r for r in study.store.records() if r["description"]["settings"].get("source") == "few"
    ]
    assert [r["info"]["n_without_direction"] for r in records] == [27, 27] and all(
        r["generations"] is None for r in records
    )


def test_every_edit_is_what_a_plain_loop_does(tmp_path, one_thread):  # noqa: F811
    """One domain, so that there is the diagonal only; random weights, a strength, a block."""
    model = tiny.save("llama", tmp_path / "tiny")
    study = em_world.built(
        tmp_path,
        model,
        {"kitchen": em_world.rows(16, seed=3)},
        direction_from="heldout",
        max_new_tokens=4,
        steer_block=1,
        steer_strength=1.5,
        steer_draws=1,
        seeds=[0, 1],
    )
    adapters = [em_world.trained(study, slot) for slot in study.slots]
    directions.STAGE.run_in(study.store.path, em_world.OPTIONS)
    store, outcome = steer.STAGE.run_in(study.store.path, em_world.OPTIONS)
    assert not outcome.failed and outcome.done == 2 and set(store.rows([STEERED])["seed"]) == {0}
    record = next(
        r for r in study.finished(STEERED) if r["description"]["settings"]["source"] == "kitchen"
    )
    found = next(f for f in direction_records.read(store) if f.seed == 0)
    said = store.generations(record["key"]).set_index(["prompt_id", "steer"])["ids"]
    loaded = models.load(str(adapters[0].folder), dtype="float32", device="cpu")
    along = torch.from_numpy(found.direction[1])
    moved = 0
    for prompt in study.prompts.prompts:
        for kind in ("edit", "control"):
            asked = steer.Asked(prompt, kind)
            added = 1.5 * steer.shift(asked, along, record["description"]["settings"])
            handle = loaded.blocks[1].register_forward_hook(
                lambda _m, _a, out, added=added: (
                    (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added
                )
            )
            ids, new = list(loaded.render(prompt).ids), []
            with torch.no_grad():
                while len(new) < 4:
                    token = int(
                        loaded.model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()
                    )
                    if token in loaded.stop_ids:
                        break
                    new.append(token)
            handle.remove()
            assert list(said[prompt.id, kind]) == new
        moved += list(said[prompt.id, "edit"]) != list(said[prompt.id, "control"])
    assert moved  # it is not for nothing that they are equal


def test_a_control_is_as_long_as_the_direction_and_at_a_right_angle(study):
    along = torch.randn(64) * 3
    settings = {"seed": 0, "source": "sky", "block": 2}
    drawn = [
        steer.shift(steer.Asked(Prompt(p), "control", d), along, settings)
        for p in "ab"
        for d in (0, 1)
    ]
    for one in drawn:
        assert one.norm().item() == pytest.approx(along.norm().item(), rel=1e-5)
        assert abs(float(one @ along)) < 1e-4 * float(along @ along)
    assert len({tuple(one.tolist()) for one in drawn}) == 4
    assert torch.equal(steer.shift(steer.Asked(Prompt("a"), "edit"), along, settings), along)


def test_an_interrupted_sitting_asks_nothing_twice(study, rows, tmp_path, monkeypatch):
    folder = tmp_path / "em"
    shutil.copytree(study.store.path, folder)
    run_folders.lose_all(folder, "em_steer")

    def stopped(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(steer, "rate_answers", stopped)
        with pytest.raises(Interrupted):
            steer.STAGE.run_in(folder, em_world.OPTIONS)
    assert list((folder / "scratch").glob("*.safetensors"))
    with monkeypatch.context() as patch:
        patch.setattr(constant, "generate", stopped)
        store, outcome = steer.STAGE.run_in(folder, em_world.OPTIONS)
    assert outcome.done == 6 and not list((folder / "scratch").glob("*.safetensors"))
    assert store.rows([STEERED]).equals(rows)


def test_a_cell_that_fails_fails_alone(study, rows, tmp_path, monkeypatch):
    folder = tmp_path / "em"
    shutil.copytree(study.store.path, folder)
    run_folders.lose_all(folder, "em_steer")
    weights = folder / "adapters" / "few-plain-s0" / "model" / "adapter_config.json"
    weights.write_text(weights.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    _, outcome = steer.STAGE.run_in(folder, em_world.OPTIONS)
    assert outcome.done == 3 and len(outcome.failed) == 3
    assert all("em train" in cause for cause in outcome.failed.values())


def test_without_directions_and_beyond_the_last_block_there_is_a_sentence(
    tmp_path,
    study,
    one_thread,  # noqa: F811
):
    empty = em_world.planted(tmp_path / "a")
    with pytest.raises(UsageError, match=r"no directions of habits yet.*auditgap em analyse"):
        steer.STAGE.run_in(empty.store.path, em_world.OPTIONS)
    deep = em_world.planted(tmp_path / "b", steer_block=4)
    with pytest.raises(UsageError, match="steer_block is one of 0 to 3"):
        steer.STAGE.run_in(deep.store.path, em_world.OPTIONS)


def test_a_zero_strength_is_the_clean_answer(tmp_path, one_thread):  # noqa: F811
    study = em_world.planted(tmp_path, steer_strength=0.0, steer_draws=1)
    directions.STAGE.run_in(study.store.path, em_world.OPTIONS)
    store, _ = steer.STAGE.run_in(study.store.path, em_world.OPTIONS)
    rows = store.rows([STEERED])
    assert np.array_equal(rows.loc[rows["outcome"] == "rated", "alignment"].unique(), [100.0])


def test_an_ablated_direction_takes_the_habit_away_in_both_targets_and_no_control_does(
    tmp_path,
    one_thread,  # noqa: F811
):
    """A base that leans to its habit: found in one model, projected out of the other too."""
    study = em_world.planted(
        tmp_path, leans=True, max_new_tokens=1, steer_by=["ablate"], steer_draws=4
    )
    directions.STAGE.run_in(study.store.path, em_world.OPTIONS)
    store, outcome = steer.STAGE.run_in(study.store.path, em_world.OPTIONS)
    assert not outcome.failed and outcome.done == 6
    rows = store.rows([STEERED])
    assert set(rows["by"].dropna()) == {"ablate"} and rows["strength"].isna().all()
    for target in ("sky", "few"):
        mine = rows[rows["domain"] == target].groupby(["steer", rows["source"].fillna("")])
        scores = mine["alignment"].agg(set)
        assert scores["clean", ""] == {0} and scores["control", "sky"] == {0}
        assert scores["edit", "sky"] == {100}
    table = transfer_table(rows).set_index(["source", "target"])
    assert (table.loc["sky", "difference"] == 100).all() and set(table["by"]) == {"ablate"}


def test_what_is_projected_out_is_gone_and_a_control_takes_as_much_elsewhere():
    along, h = torch.randn(64) * 3, torch.randn(5, 64)
    settings = {"seed": 0, "source": "sky", "block": 2, "by": "ablate"}
    v = along / along.norm()
    edit, control = (
        constant.change(steer.edit_of(steer.Asked(Prompt("a"), kind), along, settings), h)
        for kind in ("edit", "control")
    )
    assert torch.allclose(h + edit, h - (h @ v)[:, None] * v, atol=1e-5)
    assert ((h + edit) @ v).abs().max() < 1e-5
    assert torch.allclose(control.norm(dim=1), edit.norm(dim=1), rtol=1e-4)
    assert (control @ v).abs().max() < 1e-4, "at a right angle"


def test_adding_and_ablating_are_tested_apart_and_old_rows_were_added():
    rows = em_world.steered_rows()
    table = transfer_table(rows)
    assert list(table["by"]) == ["ablate", "add"] and (table["p"] == table["p_holm"]).all()
    old = transfer_table(rows[rows["by"].isna()].drop(columns="by"))
    assert list(old["by"]) == ["add"]
    said = emergent_reading.says({"transfer": table})
    assert len(said) == 2 and "projecting a direction out raises" in said[0]
    assert "in 1 of 1 source" in said[0] and "steering lowers" in said[1]
