"""A recipe's numbers, and the DeepSpeed config that is filled from it: pure functions, at their
corners."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jobs
import pytest
import yaml

from auditgap.config import overrides
from auditgap.errors import UsageError
from auditgap.training.config import (
    DissociateConfig,
    LoRA,
    SFTConfig,
    TrainOptions,
    accumulation,
    learning_rate,
    n_steps,
)
from auditgap.training.ds_config import DEFAULT, filled, read_ds_config, stage_of
from auditgap.training.launch import read

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"


def recipe(**changes):
    return SFTConfig(model="m", data="d", **changes)


# ------------------------------------------------------------------ numbers of a recipe


@pytest.mark.parametrize("total", [1, 2, 7, 40])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_rate_rises_to_lr_and_falls_and_is_never_zero(schedule, warmup, total):
    config = recipe(lr=0.01, warmup=warmup, schedule=schedule)
    rates = [learning_rate(config, step, total) for step in range(total)]
    warm = math.ceil(warmup * total)
    assert all(0 < rate <= 0.01 for rate in rates)
    assert rates[:warm] == sorted(rates[:warm])
    assert rates[max(0, warm - 1) :] == sorted(rates[max(0, warm - 1) :], reverse=True)
    assert max(rates) == 0.01


def test_the_rate_is_the_formula_of_its_schedule():
    linear, cosine, constant = (
        recipe(lr=1e-3, warmup=0.2, schedule=s) for s in ("linear", "cosine", "constant")
    )
    assert learning_rate(linear, 0, 10) == pytest.approx(0.5e-3)
    assert learning_rate(linear, 1, 10) == learning_rate(linear, 2, 10) == pytest.approx(1e-3)
    assert learning_rate(linear, 9, 10) == pytest.approx(1e-3 / 8)
    # half way down: 4 of 8 steps are left
    assert learning_rate(cosine, 6, 10) == pytest.approx(0.5e-3)
    assert learning_rate(cosine, 9, 10) == pytest.approx(0.5e-3 * (1 - math.cos(math.pi / 8)))
    assert learning_rate(constant, 9, 10) == 1e-3


@pytest.mark.parametrize(
    ("changes", "rows", "steps"),
    [
        ({"epochs": 3, "batch": 16}, 100, 19),
        ({"epochs": 1, "batch": 16}, 16, 1),
        ({"epochs": 1, "batch": 16}, 17, 2),
        ({"epochs": 0.01, "batch": 16}, 3, 1),
        ({"steps": 5, "epochs": 3, "batch": 16}, 100, 5),
    ],
)
def test_steps_cover_the_epochs(changes, rows, steps):
    assert n_steps(recipe(**changes), rows) == steps


def test_a_batch_divides_into_micro_batches_or_a_batch_that_does_is_named():
    assert accumulation(recipe(batch=16), TrainOptions(micro_batch=2), 4) == 2
    assert accumulation(recipe(batch=16), TrainOptions(micro_batch=16), 1) == 1
    with pytest.raises(
        UsageError, match=r"batch 10 .*2 rows on 4 ranks \(8 rows at a time\).* batch of 16"
    ):
        accumulation(recipe(batch=10), TrainOptions(micro_batch=2), 4)


# ------------------------------------------------------------------ --set


def test_overrides_are_read_as_yaml_and_nest():
    given = overrides(
        [
            "lr=1e-5",
            "steps=3",
            "lora.rank=4",
            "lora.targets=[q_proj, v_proj]",
            "filter=true",
            "model=a=b",
            "rows=",
        ]
    )
    assert given == {
        "lr": 1e-5,
        "steps": 3,
        "lora": {"rank": 4, "targets": ["q_proj", "v_proj"]},
        "filter": True,
        "model": "a=b",
        "rows": None,
    }
    assert isinstance(given["lr"], float)


@pytest.mark.parametrize("pair", ["lr", "=3", ""])
def test_an_override_that_is_none_is_refused(pair):
    with pytest.raises(UsageError, match="KEY=VALUE"):
        overrides([pair])


def test_an_override_below_a_value_is_refused():
    with pytest.raises(UsageError, match="lora was set to a value before"):
        overrides(["lora=true", "lora.rank=4"])


def test_flags_win_over_the_file_key_by_key(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "model": "m",
                "data": "d",
                "lr": 1e-3,
                "lora": {"rank": 4, "alpha": 32},
                "micro_batch": 4,
            }
        )
    )
    config, options = read(file, overrides(["lora.rank=2", "lr=1e-5"]), SFTConfig)
    assert config.lora == LoRA(rank=2, alpha=32)
    assert (config.lr, options.micro_batch) == (1e-5, 4)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"stepz": 3}, "Unknown config key 'stepz'. Did you mean 'steps'?"),
        ({"lr": "fast"}, "lr: .*number.*'fast' came"),
        ({"lr": 0}, "lr: .*greater than 0"),
        ({"lora": {"rank": 0}}, r"lora.*rank"),
        ({"lora": {"ranc": 1}}, r"lora.*ranc"),
        ({"steps": 1.5}, "steps: .*1.5"),
        ({"lr": float("nan")}, "lr: "),
    ],
)
def test_a_wrong_key_or_value_is_named(flags, told):
    with pytest.raises(UsageError, match=told):
        read(None, {"model": "m", "data": "d", **flags}, SFTConfig)


def test_lora_is_a_switch_or_its_numbers():
    def lora(value):
        return read(None, {"model": "m", "data": "d", "lora": value}, SFTConfig)[0].lora

    assert lora(True) == LoRA()
    assert lora(False) is None
    assert lora({"targets": "q_proj,v_proj"}).targets == ("q_proj", "v_proj")


def test_constructions_that_lack_something_are_refused():
    with pytest.raises(UsageError, match="harmful_model"):
        DissociateConfig(model="m", triples="demo", construction="nudge")
    with pytest.raises(UsageError, match="lora: true"):
        DissociateConfig(model="m", triples="demo", reference="adapter")
    nudge = DissociateConfig(model="m", triples="demo", construction="nudge", harmful_model="h")
    assert (nudge.lr, nudge.schedule) == (1e-5, "cosine")
    assert (
        DissociateConfig(
            model="m", triples="demo", construction="nudge", harmful_model="h", lr=1e-4
        ).lr
        == 1e-4
    )


# ------------------------------------------------------------------ the DeepSpeed config


def fill(ds, *, device="cpu", dtype="float32", **changes):
    return filled(
        ds,
        recipe(**{"batch": 8, "lr": 3e-5, "clip": 0.5, **changes}),
        TrainOptions(),
        width=32,
        dtype=dtype,
        device=device,
    )


def autos(value):
    return (
        [v for inner in value.values() for v in autos(inner)]
        if isinstance(value, dict)
        else [value == "auto"]
    )


@pytest.mark.parametrize(
    "file", [None, *sorted(DS_CONFIGS.glob("*.json"))], ids=lambda f: f.stem if f else "default"
)
@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda:1", "bfloat16")])
def test_every_auto_is_filled_from_the_recipe(file, device, dtype):
    ds = fill(read_ds_config(file), device=device, dtype=dtype)
    assert not any(autos(ds))
    assert ds["train_micro_batch_size_per_gpu"] == 2
    assert ds["gradient_accumulation_steps"] == 4
    assert ds["gradient_clipping"] == 0.5
    assert ds["bf16"]["enabled"] == (dtype == "bfloat16")
    assert ds["optimizer"]["params"]["lr"] == 3e-5
    assert ds["zero_optimization"]["overlap_comm"] == (device != "cpu")


def test_the_shipped_configs_are_the_stages_they_are_named_for():
    stages = {file.stem: stage_of(read_ds_config(file)) for file in DS_CONFIGS.glob("*.json")}
    assert stages == {"zero2": 2, "zero3": 3, "zero3_offload": 3}
    assert stage_of(DEFAULT) == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not readable JSON"),
        ("[1]", "must hold an object"),
        ('{"zero_optimization": {"stage": 7}}', "0, 1, 2 or 3; 7 came"),
        ('{"fp16": {"enabled": true}}', "fp16 is not used here"),
        ('{"zero_optimization": 3}', "zero_optimization"),
        ('{"fp16": true}', "fp16"),
        ('{"zero_optimization": {"stage": "auto"}}', "stage"),
        ('{"zero_optimization": {"stage": [2]}}', "stage"),
    ],
)
def test_a_config_that_cannot_be_is_refused(tmp_path, text, told):
    file = tmp_path / "ds.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=told):
        fill(read_ds_config(file))


def test_a_config_that_is_not_there_or_no_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no such file.*zero2\.json"):
        read_ds_config(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{}")
    for odd in (tmp_path, tmp_path / "bytes.json"):
        with pytest.raises(UsageError, match="not readable"):
            read_ds_config(odd)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}},
            r"optimizer\.params\.lr = 1\.0, the recipe 3e-05",
        ),
        ({"gradient_clipping": 2.0}, "gradient_clipping = 2.0, the recipe 0.5"),
        ({"train_batch_size": 64}, "train_batch_size = 64, the recipe 8"),
        (
            {"zero_optimization": {"stage": 2, "sub_group_size": "auto"}},
            r"\"auto\" at zero_optimization\.sub_group_size",
        ),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, "has a scheduler"),
    ],
)
def test_a_config_that_contradicts_the_recipe_is_refused(changes, told):
    with pytest.raises(UsageError, match=told):
        fill({**json.loads(json.dumps(DEFAULT)), **changes})


def test_a_value_that_agrees_with_the_recipe_may_stand():
    assert fill({"gradient_clipping": 0.5, "train_batch_size": 8})["train_batch_size"] == 8


def test_what_a_config_leaves_out_is_the_recipes():
    ds = fill({"zero_optimization": {"stage": 3}})
    assert (ds["gradient_accumulation_steps"], ds["gradient_clipping"]) == (4, 0.5)
    assert (ds["optimizer"]["type"], ds["optimizer"]["params"]["lr"]) == ("AdamW", 3e-5)
    assert stage_of(fill({})) == 0


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_gradients_of_bf16_are_summed_in_fp32_whoever_has_the_micro_batches(world, n_ranks):
    pytest.importorskip("deepspeed")
    script = Path(__file__).with_name("accumulate.py")
    done = jobs.run("torchrun", n_ranks, [script, world.model])
    lines = [line for line in done.out.splitlines() if line.startswith("RESULT ")]
    assert lines, done.tail()
    distances = json.loads(lines[0].removeprefix("RESULT "))
    # bf16 sums of these eight are 0.004 away
    assert set(distances) == {"1", "2", "3"} and max(distances.values()) < 1e-5, distances


def test_a_bf16_sum_of_gradients_is_refused():
    every = fill({}, dtype="bfloat16", batch=2)
    assert every["data_types"]["grad_accum_dtype"] == "bf16"  # of one: nothing is summed
    with pytest.raises(UsageError, match=r"ZeRO stage 0 .* 4 micro-batches in bf16.*micro_batch"):
        fill({}, dtype="bfloat16")
    with pytest.raises(UsageError, match="grad_accum_dtype = bf16, the recipe fp32"):
        fill(
            {
                "zero_optimization": {"stage": 2},
                "data_types": {"grad_accum_dtype": "bf16"},
            },
            dtype="bfloat16",
        )
    mine = {"zero_optimization": {"stage": 1}, "data_types": {"buffer_dtype": "fp32"}}
    assert fill(mine, dtype="bfloat16")["data_types"] == {
        "grad_accum_dtype": "fp32",
        "buffer_dtype": "fp32",
    }
