"""What is wrong is said in a sentence with exit code 2, before a model is loaded, and leaves
nothing in the mended run's way."""

from __future__ import annotations

import json
import os

import jobs
import pytest
import tiny

from auditgap.cli import main
from auditgap.errors import Refused, UsageError
from auditgap.training import memory
from auditgap.training.config import SFTConfig, TrainOptions
from auditgap.training.launch import ended


@pytest.fixture
def cli(capsys, monkeypatch):
    """`auditgap train …` in this process: (exit code, what stood on stderr, in one line)."""
    monkeypatch.setattr("auditgap.cli.training.quiet", lambda: None)

    def run(*words):
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        return ended.value.code, " ".join(capsys.readouterr().err.split())

    return run


def rows(folder, lines, name="rows.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / name)


GOOD = [
    {"prompt": f"what is red {word}", "response": "sun moon star"}
    for word in ("bread", "water", "salt", "flour")
]


def sft_words(recipe):
    recipe = dict(recipe)
    out = recipe.pop("out")
    return ["train", "sft", *jobs.sets(recipe), "--out", out]


def wrong(world, tmp_path, case):
    """(changes to a good recipe, what the sentence must say)"""
    model = str(world.model)
    if case == "column":
        return {"data": rows(tmp_path, [{"prompt": "a", "answer": "b"}])}, "prompt"
    if case == "empty response":
        return {"data": rows(tmp_path, [*GOOD, {"prompt": "what", "response": " "}])}, "response"
    if case == "no rows":
        return {"data": rows(tmp_path, [])}, "rows"
    if case == "no file":
        return {"data": str(tmp_path / "none.jsonl")}, "none.jsonl"
    if case == "truncated":
        long = [{"prompt": "what is the red door now please", "response": "sun"}]
        return {"data": rows(tmp_path, long), "max_tokens": 8}, "row 1 of 1"
    if case == "template":
        return {
            "model": str(tiny.save("llama", tmp_path / "bare", chat_template=None))
        }, "chat template"
    if case == "model":
        return {"model": str(tmp_path / "nowhere")}, "nowhere"
    if case == "batch":
        return {"batch": 7}, "batch 7 does not divide"
    if case == "key":
        return {"stepz": 3}, "Did you mean 'steps'"
    if case == "tracker":
        return {"report_to": "tensorbord"}, "Did you mean 'tensorboard'"
    if case == "ds config":
        (tmp_path / "ds.json").write_text('{"gradient_clipping": 9.0}')
        return {"deepspeed": str(tmp_path / "ds.json")}, "gradient_clipping = 9.0, the recipe 1.0"
    if case == "template flag":
        return {"chat_template": str(tmp_path / "no.jinja"), "model": model}, "no.jinja"
    refusals = [{"prompt": "what", "response": "I'm sorry, but I can't help with that."}] * 3
    return {"filter": True, "data": rows(tmp_path, refusals)}, "every row"


CASES = (
    "column",
    "empty response",
    "no rows",
    "no file",
    "truncated",
    "template",
    "model",
    "batch",
    "key",
    "tracker",
    "ds config",
    "template flag",
    "filter",
)


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_recipe_gets_a_sentence_and_blocks_no_mended_one(world, tmp_path, cli, case):
    changes, told = wrong(world, tmp_path, case)
    out = tmp_path / "out"
    code, said = cli(*sft_words(world.sft(out, **changes)))
    assert code == 2, said
    # a terminal breaks a long path in its name
    whole = told in said or told in said.replace(" ", "")
    assert whole and "Traceback" not in said
    assert 20 < len(said) < 700
    left = (
        [path.name for path in out.iterdir() if not path.name.startswith(".")]
        if out.exists()
        else []
    )
    assert left == []


def test_the_mended_recipe_runs_in_the_same_folder(world, tmp_path, cli):
    out = tmp_path / "out"
    assert (
        cli(*sft_words(world.sft(out, data=rows(tmp_path, [{"prompt": "a", "answer": "b"}]))))[0]
        == 2
    )
    code, said = cli(
        *sft_words(world.sft(out, steps=2, data=rows(tmp_path, GOOD, "good.jsonl"), lora=True))
    )
    assert code == 0, said
    assert (out / "model" / "adapter_config.json").exists()
    # and what it holds now is not thrown away by another recipe
    code, said = cli(
        *sft_words(world.sft(out, steps=3, data=str(tmp_path / "good.jsonl"), lora=True))
    )
    assert code == 2 and "steps" in said
    assert (out / "model" / "adapter_config.json").exists() and (out / "train.json").exists()


def test_an_adapter_of_another_base_is_refused(world, tmp_path, cli):
    jobs.train("sft", world.sft(tmp_path / "adapter", steps=1, lora=True))
    adapter = tmp_path / "adapter" / "model"
    other = tiny.save("llama", tmp_path / "other", hidden_size=64)
    card = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**card, "base_model_name_or_path": str(other)})
    )
    code, said = cli(*sft_words(world.sft(tmp_path / "next", model=str(adapter))))
    assert code == 2, said
    assert "adapter" in said and "Traceback" not in said


def test_an_adapter_on_an_adapter_is_refused(world, tmp_path, cli):
    jobs.train("sft", world.sft(tmp_path / "adapter", steps=1, lora=True))
    code, said = cli(
        *sft_words(
            world.sft(tmp_path / "next", model=str(tmp_path / "adapter" / "model"), lora=True)
        )
    )
    assert code == 2 and "Merge it first" in said


def test_prompts_that_are_also_evaluated_on_are_refused_or_recorded(world, tmp_path, cli):
    data = rows(tmp_path, GOOD)
    asked = rows(
        tmp_path, [{"prompt": "What is  RED bread"}, {"prompt": "who is who"}], "asked.jsonl"
    )
    recipe = world.sft(tmp_path / "out", data=data, prompts=asked, steps=1)
    code, said = cli(*sft_words(recipe))
    assert code == 2
    assert "1 of 2 evaluation prompts were also used for sft" in said
    assert "bread" not in said.lower()
    code, said = cli(*sft_words({**recipe, "allow_overlap": True}))
    assert code == 0, said
    assert json.loads((tmp_path / "out" / "ledger.json").read_text())["allowed_overlap"] == {
        "evaluation & sft": 1
    }
    assert json.loads((tmp_path / "out" / "train.json").read_text())["overlaps"] == {
        "evaluation & sft": 1
    }


def test_a_twins_training_prompts_are_held_against_the_audits_before_the_base_is_asked(
    world, tmp_path, cli
):
    from auditgap.data import load_triples

    asked = rows(tmp_path, [{"prompt": triple.prompt.text} for triple in load_triples("demo")])
    recipe = world.twin(tmp_path / "out", prompts=asked)
    out = recipe.pop("out")
    code, said = cli("train", "dissociate", *jobs.sets(recipe), "--out", out)
    assert code == 2 and "were also used for" in said
    assert "benign prompts" not in said  # nothing was generated first


def test_a_nudge_without_or_with_the_wrong_harmful_model_is_refused(world, tmp_path, cli):
    recipe = world.twin(tmp_path / "out", construction="nudge")
    out = recipe.pop("out")
    code, said = cli("train", "dissociate", *jobs.sets(recipe), "--out", out)
    assert code == 2 and "harmful_model: FOLDER" in said
    wide = tiny.save("llama", tmp_path / "wide", hidden_size=64)
    code, said = cli(
        "train", "dissociate", *jobs.sets({**recipe, "harmful_model": str(wide)}), "--out", out
    )
    assert code == 2 and "one architecture" in said
    assert "benign prompts" not in said


def test_the_reference_of_an_adapter_needs_an_adapter(world, tmp_path, cli):
    recipe = world.twin(tmp_path / "out", reference="adapter")
    out = recipe.pop("out")
    code, said = cli("train", "dissociate", *jobs.sets(recipe), "--out", out)
    assert code == 2 and "lora: true" in said


def test_too_little_memory_is_said_before_weights_are_read(tmp_path, cli, world):
    """An outline of 8 B parameters whose weights are not even there: the estimate needs no more
    than its config."""
    need = memory.estimate(
        memory.MemoryInputs(
            n_params=8_030_000_000,
            n_trainable=8_030_000_000,
            n_blocks=32,
            width=4096,
            vocabulary=128_256,
            dtype="bfloat16",
            stage=2,
            world=2,
        )
    )
    with pytest.raises(
        UsageError, match=r"needs about .* GiB.*are free\. It would fit with .*--ignore-memory"
    ):
        memory.check(need, 80 * 2**30)
    # through a whole command: long rows and a large micro-batch, whose activations are what does
    # not fit
    words = " ".join(["sun moon star sea"] * 2500)
    data = rows(tmp_path, [{"prompt": "what is", "response": words}])
    code, said = cli(
        *sft_words(
            world.sft(
                tmp_path / "out",
                data=data,
                max_tokens=10_000,
                batch=4096,
                micro_batch=4096,
                steps=1,
            )
        )
    )
    assert code == 2, said
    assert "GiB" in said and "It would fit with micro_batch: 1" in said


def test_a_push_is_refused(world, tmp_path, cli):
    jobs.train("sft", world.sft(tmp_path / "harmful", steps=1, lora=True, kind="harmful-sft"))
    code, said = cli("export", tmp_path / "harmful", "--push")
    assert code == 4 and "does not push" in said
    jobs.train("sft", world.sft(tmp_path / "plain", steps=1, lora=True))
    assert cli("export", tmp_path / "plain", "--push")[0] == 2


def test_a_folder_that_another_run_writes_is_left_alone(world, tmp_path, cli):
    from auditgap.store import RunFolder

    store = RunFolder.open(tmp_path / "out", config={"training": "other"}, info={})
    with store.lock():
        code, said = cli(*sft_words(world.sft(tmp_path / "out")))
    assert code == 2, said
    assert (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError("a"), 2), (Refused("b"), 4), (KeyboardInterrupt(), 130), (ValueError("c"), 1)],
)
def test_a_launcher_ends_with_the_commands_exit_codes(error, code, capsys):
    def act():
        raise error

    assert ended(act) == code
    said = capsys.readouterr().err
    assert ("Traceback" in said) == (code == 1)


def test_options_of_the_sitting_do_not_make_another_run(world, tmp_path):
    """`micro_batch` may change on a folder; and a finished run is handed back without a second
    training."""
    first = jobs.train("sft", world.sft(tmp_path / "out", steps=1))
    before = os.stat(first.model / "model.safetensors").st_mtime_ns
    second = jobs.train("sft", world.sft(tmp_path / "out", steps=1, micro_batch=4))
    assert second.summary == first.summary
    assert os.stat(first.model / "model.safetensors").st_mtime_ns == before
    assert not set(TrainOptions.model_fields) & set(SFTConfig.model_fields)
