"""What the engine on vLLM refuses before it starts a process, and what its workers are told; no
vLLM is needed."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from auditgap.engines.vllm import adapters, process, start
from auditgap.engines.vllm.edits import span_of
from auditgap.engines.vllm.worker import WorkerExtension
from auditgap.errors import UsageError
from auditgap.types import ConstantEdit, Edit, Site

BLOCK = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    save_file(
        {f"{BLOCK}.weight": torch.zeros(8, 8), "model.norm.weight": torch.zeros(8)},
        tmp_path / "base/model.safetensors",
    )
    return tmp_path / "base"


def adapter(tmp_path, **settings):
    (tmp_path / "adapter").mkdir(exist_ok=True)
    weights = {f"base_model.model.{BLOCK}.lora_{x}.weight": torch.zeros(2, 8) for x in "AB"}
    save_file(weights, tmp_path / "adapter/adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "bias": "none",
        **settings,
    }
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "settings",
    [{}, {"init_lora_weights": True}, {"init_lora_weights": "gaussian"}, {"use_rslora": True}],
)
def test_plain_adapters_have_a_rank(tmp_path, base, settings):
    assert adapters.check(adapter(tmp_path, **settings), base=base) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        # peft changes the base's own weights when it opens these
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"use_dora": True}, "use_dora"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        ({"r": 0}, "rank 0"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_other_adapters_are_refused(tmp_path, base, settings, said):
    with pytest.raises(UsageError, match=f"{said}.*--engine hf"):
        adapters.check(adapter(tmp_path, **settings), base=base)


def test_gpus_are_counted_before_a_process_is_started(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    start.check_gpus("cpu", 2)
    start.check_gpus("cuda:1", 1)
    start.check_gpus("cuda", 2)
    with pytest.raises(UsageError, match=r"cuda:1 is one GPU.*--device cuda"):
        start.check_gpus("cuda:1", 2)
    with pytest.raises(UsageError, match="wants 4 GPUs, and 2"):
        start.check_gpus("cuda", 4)


def test_a_request_says_on_which_positions_its_edit_is():
    delta = torch.zeros(5, 8)
    assert span_of(Edit(Site(1), delta), 5) == (0, 5)
    assert span_of(ConstantEdit((Site(1),), shift=delta[0]), 5) == (0, None)
    assert span_of(Edit(Site(1), delta, goes_on=True), 5) == (0, None)


def test_vllm_is_shown_no_weights_but_the_models_own(base, tmp_path, monkeypatch):
    """It reads every safetensors file of a folder that has no index, and where one of them is called
    `consolidated` another config too."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        shutil.copy(base / "model.safetensors", base / name)
    found = start.strays(base)
    assert found == ["adapter_model.safetensors", "consolidated.safetensors"]
    shown = process._without(found, base)
    assert [(p.name, p.resolve()) for p in shown.iterdir()] == [
        ("model.safetensors", (base / "model.safetensors").resolve())
    ]
    assert process._without([], base) == base
    index = {"weight_map": {"a": "model.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert start.strays(base) == found


@pytest.mark.parametrize("said", ["1", "true"])
def test_the_second_model_runner_is_refused(monkeypatch, said):
    for fine in ("", "0"):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", fine)
        assert start.environment("cpu")["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", said)
    with pytest.raises(UsageError, match=r"first model runner alone.*Unset it"):
        start.environment("cpu")


def test_a_worker_of_its_own_process_is_made_to_clean_its_cache():
    """On a GPU alone: a runner there zeroes nothing that it was not prepared for, and says
    nothing."""

    def worker(device: str, **has):
        said = []
        runner = SimpleNamespace(
            device=torch.device(device), _init_kv_zero_meta=lambda: said.append(device), **has
        )
        extension = WorkerExtension()
        extension.model_runner = runner
        extension.cache_clean()
        return said

    assert worker("cuda") == ["cuda"]
    assert worker("cuda", _kv_block_zeroer=object()) == []  # done already
    assert worker("cpu") == []  # zeroes as it is
