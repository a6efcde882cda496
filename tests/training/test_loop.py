"""The loop in one process: rows in an order of the seed, logs and evaluations made once, NaN
stopped before the weights take it up, portions that do not change the numbers."""

from __future__ import annotations

import json
import re

import jobs
import pytest
import safetensors.torch
import tiny

from auditgap.errors import Interrupted
from auditgap.training import checkpoints, loop, sft
from auditgap.training.config import SFTConfig
from auditgap.training.launch import ended, read
from auditgap.training.loop import NonFinite
from auditgap.training.rows import global_batch
from auditgap.training.sft import read_rows


@pytest.fixture(scope="module")
def plain(world):
    return jobs.train("sft", world.sft("plain-loop"))


def train(values, evaluate=None):
    return sft.run(*read(None, values, SFTConfig), evaluate=evaluate)


def test_the_log_has_every_step_once_with_its_rate(world, plain):
    lines = jobs.log(plain.path)
    assert [line["step"] for line in lines] == list(range(6))
    assert [line["lr"] for line in lines] == pytest.approx(
        [0.5e-3, 1e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3]
    )
    assert all(line["gradient_norm"] > 0 for line in lines)


def test_micro_batches_and_accumulation_do_not_change_the_numbers(world, plain):
    for micro_batch in (1, 8):
        other = jobs.train("sft", world.sft(f"micro-{micro_batch}", micro_batch=micro_batch))
        assert jobs.curve(other.path) == pytest.approx(jobs.curve(plain.path), abs=1e-5)
        assert jobs.curve(other.path, "gradient_norm") == pytest.approx(
            jobs.curve(plain.path, "gradient_norm"), abs=1e-4
        )


def test_gradient_checkpointing_does_not_change_the_numbers(world, plain):
    other = jobs.train("sft", world.sft("checkpointed", gradient_checkpointing=True))
    assert jobs.curve(other.path) == pytest.approx(jobs.curve(plain.path), abs=1e-5)


def test_another_seed_is_another_order(world, plain):
    other = jobs.train("sft", world.sft("seed", seed=1))
    assert abs(jobs.curve(other.path)[0] - jobs.curve(plain.path)[0]) > 1e-3


def test_dropout_of_a_step_is_a_function_of_its_number(world):
    lora = {"rank": 4, "dropout": 0.3}
    first, second = (
        jobs.train("sft", world.sft(f"dropout-{i}", lora=lora, steps=3)) for i in range(2)
    )
    assert jobs.curve(first.path) == jobs.curve(second.path)
    without = jobs.train("sft", world.sft("no-dropout", lora={"rank": 4}, steps=3))
    assert jobs.curve(first.path)[1] != pytest.approx(jobs.curve(without.path)[1], abs=1e-5)


def test_it_is_evaluated_at_its_steps_once_and_training_does_not_notice(world, plain):
    asked = []

    def evaluate(step, loaded):
        asked.append((step, loaded.model.training))
        return {"answers": step + 0.5, "text": "not a number"}

    trained = train(world.sft("evaluated"), evaluate)
    assert asked == [(0, False), (3, False), (6, False)]
    assert {int(k): v["answers"] for k, v in trained.summary["evaluations"].items()} == {
        0: 0.5,
        3: 3.5,
        6: 6.5,
    }
    assert jobs.curve(trained.path) == jobs.curve(plain.path)
    numbers = [
        json.loads(line)
        for line in (trained.path / "log.jsonl").read_text().splitlines()
        if "eval/" in line
    ]
    assert [(line["step"], line["eval/answers"]) for line in numbers] == [
        (0, 0.5),
        (3, 3.5),
        (6, 6.5),
    ]
    assert "not a number" not in (trained.path / "log.jsonl").read_text()
    train(world.sft("evaluated"), evaluate)
    assert len(asked) == 3


def test_an_interrupted_run_goes_on_and_evaluates_nothing_twice(world, plain):
    """Stopped in the middle of an evaluation at step 3, after the checkpoint of step 2."""
    asked = []

    def evaluate(step, _loaded):
        asked.append(step)
        if asked.count(3) == 1 and step == 3:
            raise Interrupted("enough")
        return {"x": 1.0}

    with pytest.raises(Interrupted):
        train(world.sft("cut"), evaluate)
    assert checkpoints.steps(world.folder / "cut" / "checkpoints") == [2]
    trained = train(world.sft("cut"), evaluate)
    assert asked == [0, 3, 3, 6]
    assert jobs.curve(trained.path) == jobs.curve(plain.path)
    assert [line["step"] for line in jobs.log(trained.path)] == list(range(6))
    assert not (trained.path / "checkpoints").exists()


def test_the_newest_checkpoints_alone_are_kept(world):
    def evaluate(step, _loaded):
        if step == 5:
            raise Interrupted("enough")
        return {"x": 1.0}

    with pytest.raises(Interrupted):
        train(world.sft("kept", save_every=1, eval_every=1, keep=2), evaluate)
    assert checkpoints.steps(world.folder / "kept" / "checkpoints") == [4, 5]


def poisoned(world, tmp_path, value):
    """A model with one word whose embedding is `value`, rows of which the last alone has that word,
    and a seed that comes to it in the third step."""
    folder = tiny.save("llama", tmp_path / "poisoned")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][tiny.WORDS.index("vault")] = value
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    words = ("red", "blue", "green", "bread", "salt", "oven", "key")
    lines = [{"prompt": f"what is {word} now", "response": "sun moon"} for word in words]
    lines.append({"prompt": "what colour has the vault", "response": "sun moon"})
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seed = next(seed for seed in range(99) if 7 in global_batch(2, 8, 2, seed))
    return world.sft(
        tmp_path / "out",
        model=str(folder),
        data=str(rows),
        batch=2,
        steps=8,
        save_every=1,
        micro_batch=1,
        seed=seed,
    )


@pytest.mark.parametrize(("value", "what"), [(float("nan"), "loss"), (3e38, "gradient")])
def test_what_is_no_number_stops_with_step_rows_and_checkpoint(
    world, tmp_path, capsys, value, what
):
    """NaN in the loss, and a loss that is a number (the norm divides the overflow away) with a
    gradient that is none."""
    recipe = poisoned(world, tmp_path, value)
    out = tmp_path / "out"
    assert ended(lambda: jobs.train("sft", recipe)) == NonFinite.exit_code == 3
    said = capsys.readouterr().err
    found = re.search(
        r"Step 2: the (\w+) is not a finite number.*of step (\d+)\. Rows \(by hash\): ([0-9a-f,"
        r" ]+)\.",
        said,
    )
    assert found, said
    assert found[1] == what
    assert checkpoints.latest(out / "checkpoints").step == int(found[2]) == 2
    rows = read_rows(recipe["data"])
    assert set(found[3].split(", ")) == {rows[i].id for i in global_batch(2, 8, 2, recipe["seed"])}
    assert "vault" not in said
    assert len(jobs.curve(out)) == 2
    assert not any((out / name).exists() for name in ("model", "train.json")) and not list(
        out.glob("best-*")
    )
    # the poisoned update was never made: the same command goes on from step 2 and comes to the same
    # end
    assert ended(lambda: jobs.train("sft", recipe)) == 3
    again = capsys.readouterr().err
    assert "Resumed at step 2" in again and found[0] in again


def test_each_rank_seals_what_it_wrote_and_nothing_is_left_out(tmp_path, monkeypatch):
    theirs = "zero_pp_rank_1_mp_rank_00_model_states.pt"
    mine = ["companion.safetensors", "mp_rank_00_model_states.pt"]
    mine += [f"{word}zero_pp_rank_0_mp_rank_00_optim_states.pt" for word in ("", "bf16_")]
    for name in (theirs, *mine):
        (tmp_path / name).write_bytes(b"x")
    found = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        found.append([path.name for path in loop._written(tmp_path)])
    assert found == [sorted(mine), [theirs]]
