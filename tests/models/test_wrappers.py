"""A wrapper's folder (a text decoder beside a vision tower) as its maker saves it, opened by the
loader that audits use: text alone, the decoder's blocks and not the tower's, nothing left random."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from auditgap import models
from auditgap.engines.families import building
from auditgap.engines.hf import HFEngine
from auditgap.errors import UsageError
from auditgap.types import Site

#: model type -> the class of a block that text runs through; the tower has as many blocks.
WRAPPERS = {"llava": "LlamaDecoderLayer", "qwen2_5_vl": "Qwen2_5_VLDecoderLayer"}


@pytest.fixture(scope="module", params=WRAPPERS)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    made = building.build(request.param, wrapper=True)
    made.save_pretrained(folder)
    building.tokenizer().save_pretrained(folder)
    return request.param, folder, made


def test_a_saved_wrapper_is_opened_whole_by_its_own_class(saved):
    model_type, folder, made = saved
    loaded = models.load(str(folder), dtype="float32", device="cpu")
    assert type(loaded.model) is type(made)
    assert {type(block).__name__ for block in loaded.blocks} == {WRAPPERS[model_type]}
    assert models.outline(str(folder)).n_blocks == loaded.n_blocks == 4
    ids = torch.arange(4, 12)[None]
    with torch.inference_mode():
        wanted, found = (
            model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            for model in (made, loaded.model)
        )
    assert torch.equal(wanted, found)
    HFEngine(loaded).self_test(Site(1))


def test_a_wrapper_whose_decoder_lacks_a_weight_is_a_sentence(saved, tmp_path):
    _, folder, _ = saved
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "layers.1.mlp" in name and "vision" not in name)
    kept = {name: w for name, w in weights.items() if name != gone}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"1 missing keys.*layers\.1\.mlp"):
        models.load(str(tmp_path), dtype="float32", device="cpu")
