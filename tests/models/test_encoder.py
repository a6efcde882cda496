"""A sentence encoder: vectors as transformers alone gives them, whoever else is read, and sentences
for what is none."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModel, AutoTokenizer, BertModel

from auditgap.errors import Refused, UsageError
from auditgap.models.encoder import SentenceEncoder, check_encoder

TEXTS = ["say the sky is blue", "how bread bake ?", "say", "what is the colour of the vault ?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.encoder(tmp_path_factory.mktemp("encoder") / "tiny-bert")


def test_vectors_are_means_over_tokens_whoever_is_read_besides(folder):
    encoder = SentenceEncoder(str(folder))
    found = encoder.embed(TEXTS)
    model, tokenizer = (
        AutoModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    for text, own in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        np.testing.assert_allclose(own, hidden[0].mean(0).numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(encoder.embed(TEXTS[::-1])[::-1], found)
    assert found.dtype == np.float32 and encoder.n_cut == 0
    long = " ".join(["red"] * 90)
    np.testing.assert_array_equal(*encoder.embed([long, f"{long} blue"]))
    assert encoder.n_cut == 2, "an end that is not read is counted"


def test_a_head_that_is_not_read_may_lack_and_nothing_else(folder, tmp_path):
    """Weights without a pooler open; a folder of other weights is not taken for trained."""
    made = BertModel(AutoModel.from_pretrained(folder).config, add_pooling_layer=False)
    made.save_pretrained(tmp_path / "headless")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "headless")
    assert SentenceEncoder(str(tmp_path / "headless")).embed(["say"]).shape == (1, 32)
    deeper = json.loads((tmp_path / "headless" / "config.json").read_text())
    deeper["num_hidden_layers"] += 1
    (tmp_path / "headless" / "config.json").write_text(json.dumps(deeper))
    with pytest.raises(UsageError, match=r"its weights lack|cannot open"):
        SentenceEncoder(str(tmp_path / "headless")).embed(["say"])


@pytest.mark.parametrize(
    ("file", "said", "match"),
    [
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "pools otherwise"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
            "pools otherwise",
        ),
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}], "a part 'Dense'"),
        ("modules.json", {"a": 1}, "no list of an encoder's parts"),
    ],
)
def test_what_pools_otherwise_is_refused(folder, tmp_path, file, said, match):
    there = tiny.encoder(tmp_path / "other")
    (there / file).parent.mkdir(exist_ok=True)
    (there / file).write_text(json.dumps(said))
    with pytest.raises(UsageError, match=match):
        SentenceEncoder(str(there))


def test_what_sentence_transformers_saves_opens(tmp_path):
    there = tiny.encoder(tmp_path / "saved")
    (there / "1_Pooling").mkdir()
    told = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (there / "1_Pooling" / "config.json").write_text(
        json.dumps({**told, "pooling_mode_cls_token": False})
    )
    kinds = ("Transformer", "Pooling", "Normalize")
    (there / "modules.json").write_text(
        json.dumps([{"type": f"sentence_transformers.models.{kind}"} for kind in kinds])
    )
    (there / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 4}))
    encoder = SentenceEncoder(str(there))
    encoder.embed(TEXTS)
    assert encoder.n_cut == 2, "its own window counts"


def test_sentences(folder, tmp_path):
    with pytest.raises(UsageError, match=r"embedder: .* is not a model folder.*base's states"):
        check_encoder(str(tmp_path / "nowhere"))
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(Refused, match="pickled weights only"):
        check_encoder(str(tmp_path / "pickled"))
