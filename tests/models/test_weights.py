"""Which files are a model's weights, in which precision they are, and that no code comes with
them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations import hub_kernels

from auditgap import models
from auditgap.audits.stage import Stage
from auditgap.engines import Serving
from auditgap.errors import Refused, UsageError
from auditgap.models.kernels import no_hub_kernels
from auditgap.models.provenance import provenance
from auditgap.models.weights import check_opens


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("weights") / "one")


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "one"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def sharded(folder: Path, saved: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(folder, max_shard_size="20KB")
    tiny.tokenizer().save_pretrained(folder)
    return folder


# -- two copies
# --------------------------------------------------------------------------------------------------------


def test_a_copy_in_another_layout_is_no_part_of_the_model(folder, saved):
    weights = load_file(folder / "model.safetensors")
    other = {name.removeprefix("model."): weight for name, weight in weights.items()}
    save_file(other, folder / "consolidated.safetensors")
    one, two = models.outline(str(saved)), models.outline(str(folder))
    assert one.n_params == two.n_params == sum(w.numel() for w in weights.values())
    assert one.subject.fingerprint == two.subject.fingerprint


def test_a_stale_set_beside_an_index_is_a_sentence(tmp_path, saved):
    folder = sharded(tmp_path / "two", saved)
    whole = models.outline(str(folder))
    assert whole.n_params == models.outline(str(saved)).n_params
    weights = load_file(saved / "model.safetensors")
    save_file({k: torch.zeros_like(v) for k, v in weights.items()}, folder / "model.safetensors")
    with pytest.raises(UsageError, match=r"two sets of weights, model\.safetensors and the \d+"):
        models.outline(str(folder))


def test_an_index_of_files_that_are_not_there_is_a_sentence(tmp_path, saved):
    folder = sharded(tmp_path / "two", saved)
    sorted(folder.glob("model-*.safetensors"))[0].unlink()
    with pytest.raises(UsageError, match=r"names 1 files that are not there, such as model-00001"):
        models.outline(str(folder))


def test_an_index_may_name_the_one_file(folder, saved):
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert models.outline(str(folder)).n_params == models.outline(str(saved)).n_params


# -- quantised
# --------------------------------------------------------------------------------------------------------

REFUSED = {
    "bitsandbytes, 4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes, 8 bits": {"load_in_8bit": True},
    "gptq, 4 bits": {"quant_method": "gptq", "bits": 4},
    "awq, 4 bits": {"quant_method": "awq", "bits": 4},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "fbgemm_fp8": {"quant_method": "fbgemm_fp8"},
    "newest, 3 bits": {"quant_method": "newest", "bits": 3},
    "an unknown method": {},
}


@pytest.mark.parametrize("said", REFUSED)
def test_a_quantised_checkpoint_is_a_sentence(folder, said):
    change(folder / "config.json", quantization_config=REFUSED[said])
    for opened in (
        lambda: models.load(models.outline(str(folder)), device="cpu"),
        lambda: Serving(engine="hf", device="cpu").describe(str(folder)),
    ):
        with pytest.raises(UsageError) as caught:
            opened()
        assert f"quantised checkpoint ({said})" in str(caught.value)
        assert "in 16 bits" in str(caught.value)


def test_what_a_file_beside_the_config_says_is_looked_at_too(folder):
    """vLLM serves it packed; transformers would read its numbers without their scales."""
    told = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(told))
    with pytest.raises(UsageError, match=r"quantised checkpoint \(FP8\)"):
        models.load(models.outline(str(folder)), device="cpu")
    assert Serving(engine="vllm", device="cpu").describe(str(folder))["served"] == "FP8"


def test_the_text_model_of_a_wrapper_is_looked_at_too(tmp_path):
    told = {"text_config": {"quantization_config": {"quant_method": "gptq", "bits": 4}}}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(UsageError, match=r"quantised checkpoint \(gptq, 4 bits\)"):
        check_opens(tmp_path)


def test_vllm_may_serve_what_transformers_may_not_open(folder):
    change(folder / "config.json", quantization_config=REFUSED["awq, 4 bits"])
    told = Serving(engine="vllm", device="cpu").describe(str(folder))
    assert told["served"] == "awq, 4 bits"  # another model than its weights unpacked would be
    with pytest.raises(UsageError, match=r"awq, 4 bits.*vLLM would speak with them packed"):
        Stage(
            models.outline(str(folder)),
            dtype="float32",
            device="cpu",
            vllm=Serving(engine="vllm", device="cpu"),
        )


def fp8(folder: Path) -> dict[str, torch.Tensor]:
    """Pack the linear layers of the blocks as fp8 in blocks of 16 by 16; what they stand for."""
    weights, meant = load_file(folder / "model.safetensors"), {}
    for name in [n for n in weights if "proj" in n]:
        w = weights[name]
        tiles = w.view(w.shape[0] // 16, 16, w.shape[1] // 16, 16)
        scale = tiles.abs().amax(dim=(1, 3)) / 448
        packed = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        meant[name] = (packed.float() * scale[:, None, :, None]).view_as(w)
        weights[name] = packed.view_as(w)
        weights[name + "_scale_inv"] = scale
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    told = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    change(folder / "config.json", quantization_config=told)
    return meant


def test_fp8_is_unpacked_and_said_to_be(folder, saved, tmp_path):
    meant = fp8(folder)
    outline = models.outline(str(folder))
    loaded = models.load(outline, device="cpu", dtype="float32")
    state = loaded.model.state_dict()
    for name, weight in meant.items():
        assert state[name].dtype == torch.float32
        assert torch.allclose(state[name], weight, rtol=2**-7, atol=1e-6)
    told = provenance([outline], dtype="float32")["subjects"][0]
    assert (told["unpacked_from"], told["stored"]) == ("fp8", "F8_E4M3, F32")
    assert outline.subject.fingerprint != models.outline(str(saved)).subject.fingerprint
    loaded.model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


#: What four bits stand for: a sign, two of exponent and one of mantissa.
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def test_mxfp4_is_unpacked_and_said_to_be(tmp_path, monkeypatch):
    """Experts' weights, 32 numbers of four bits and one exponent together."""
    monkeypatch.setitem(tiny.FAMILIES, "gpt_oss", {"num_local_experts": 2, "head_dim": 8})
    folder = tiny.save("gpt_oss", tmp_path / "m", intermediate_size=32)
    weights, meant = load_file(folder / "model.safetensors"), {}
    torch.manual_seed(3)
    for name in [n for n in weights if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, into, out = weights.pop(name).shape
        codes = torch.randint(0, 16, (experts, out, into // 32, 32))
        powers = torch.randint(120, 130, (experts, out, into // 32))
        numbers = FP4[codes % 8] * (1 - 2.0 * (codes // 8)) * 2.0 ** (powers[..., None] - 127)
        meant[name] = numbers.flatten(2).transpose(1, 2)
        weights[name + "_blocks"] = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        weights[name + "_scales"] = powers.to(torch.uint8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    change(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    outline = models.outline(str(folder))
    state = models.load(outline, device="cpu", dtype="float32").model.state_dict()
    assert meant and all(torch.equal(state[name], weight) for name, weight in meant.items())
    told = provenance([outline], dtype="float32")["subjects"][0]
    assert (told["unpacked_from"], told["stored"]) == ("mxfp4", "F32, U8")


# -- code that is not run
# ----------------------------------------------------------------------------------------------

CODE = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}


def test_auto_map_is_ignored_and_noted_where_transformers_ships_the_class(folder, saved, tmp_path):
    change(folder / "config.json", auto_map=CODE)
    for name in ("configuration_x.py", "modeling_x.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    outline = models.outline(str(folder))
    loaded, plain = models.load(outline, device="cpu"), models.load(str(saved), device="cpu")
    assert type(loaded.model) is type(plain.model) and not (tmp_path / "ran").exists()
    told = provenance([outline], dtype="float32")["subjects"][0]
    assert told["note"] == "auto_map of config.json ignored: transformers' own class is used"
    assert "note" not in provenance([models.outline(str(saved))], dtype="float32")["subjects"][0]


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("config.json", {"auto_map": CODE, "model_type": "newest"}),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["x.X", None]}, "tokenizer_class": "X"},
        ),
        ("generation_config.json", {"auto_map": {"x": "x.X"}}),
    ],
    ids=["model", "tokenizer", "generation"],
)
def test_auto_map_is_refused_where_it_does_not(folder, file, values):
    change(folder / file, **values)
    with pytest.raises(Refused, match=file):
        models.outline(str(folder))


def test_no_kernel_of_the_hub_is_fetched(monkeypatch):
    """As if the package `kernels` were installed."""
    fetched = []
    monkeypatch.setattr(
        hub_kernels, "get_kernel_hub", lambda *a, **k: fetched.append(a), raising=False
    )
    for module in [m for n, m in sys.modules.items() if n.startswith("transformers")]:
        if "is_kernels_available" in vars(module):
            monkeypatch.setitem(vars(module), "is_kernels_available", lambda *a, **k: True)
    hub_kernels.get_kernel("someone/kernel", version=1)
    assert fetched  # else the rest would show nothing
    no_hub_kernels()
    with pytest.raises(ImportError):
        hub_kernels.get_kernel("someone/kernel", version=1)
    name = next(iter(hub_kernels._HUB_KERNEL_MAPPING))
    assert hub_kernels.lazy_load_kernel(name, {}) is None
    assert len(fetched) == 1
