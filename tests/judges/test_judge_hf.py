"""Sequence classifiers as judges, on tiny random models saved as safetensors: an encoder of pairs
and a chat decoder."""

import json
import weakref

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from auditgap.errors import Refused, UsageError
from auditgap.judges import load_judge, load_reward
from auditgap.judges.hf import SequenceClassifier, _open
from auditgap.types import Exchange, Label, Prompt

WORDS = (
    "what colour is the vault it blue red no i can't tell you sorry and door a lamp human assistant"
    " ' t : ? . ,".split()
)
SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "<end>"]


def save_tokenizer(folder, *, chat):
    vocabulary = {w: i for i, w in enumerate(SPECIAL + WORDS)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    if not chat:
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="<end>",
        model_max_length=48,
    )
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <end> {% endfor %}"
        )
    tokenizer.save_pretrained(folder)
    return len(vocabulary)


@pytest.fixture(scope="module")
def pair_model(tmp_path_factory):
    """A two-logit BERT that reads pairs."""
    folder = tmp_path_factory.mktemp("pair")
    n = save_tokenizer(folder, chat=False)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=n,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=48,
        num_labels=2,
        initializer_range=0.5,
        id2label={0: "harmful", 1: "harmless"},
        label2id={"harmful": 0, "harmless": 1},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A one-logit Llama reward model with a chat template and no padding token."""
    folder = tmp_path_factory.mktemp("chat")
    n = save_tokenizer(folder, chat=True)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=n,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        num_labels=1,
        pad_token_id=None,
        initializer_range=0.5,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def exchanges(*completions):
    return [Exchange(Prompt("what colour is the vault ?"), c) for c in completions]


SOME = exchanges(
    "it is blue",
    "it is red",
    "no",
    "i can't tell you",
    "sorry , no",
    "it is red and blue . the door is blue",
    "the lamp",
)


@pytest.mark.parametrize("which", ["pair", "chat"])
def test_a_batch_scores_as_one_at_a_time(which, pair_model, chat_model):
    name = f"hf:{pair_model}#1" if which == "pair" else f"hf:{chat_model}"
    reward = load_reward(name)
    together = [s.value for s in reward.score(SOME)]
    alone = [reward.score([e])[0].value for e in SOME]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len({round(v, 4) for v in together}) == len(SOME)


def test_scores_equal_transformers_own(pair_model, chat_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair_model)
    model = BertForSequenceClassification.from_pretrained(pair_model).eval()
    inputs = tokenizer(
        "\n\nHuman: what colour is the vault ? \n\nAssistant:", "it is blue", return_tensors="pt"
    )
    logits = model(**inputs).logits[0]
    score = load_reward(f"hf:{pair_model}#1").score(SOME[:1])[0].value
    assert score == pytest.approx((logits[1] - logits[0]).item(), abs=1e-5)
    assert load_reward(f"hf:{pair_model}#0").score(SOME[:1])[0].value == pytest.approx(
        -score, abs=1e-5
    )

    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    model = LlamaForSequenceClassification.from_pretrained(chat_model).eval()
    text = "user : what colour is the vault ? <end> assistant : it is blue <end> "
    logit = (
        model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, 0].item()
    )
    assert load_reward(f"hf:{chat_model}").score(SOME[:1])[0].value == pytest.approx(
        logit, abs=1e-5
    )


def test_as_a_judge_the_sign_decides(pair_model):
    judge = load_judge(f"hf:{pair_model}#1")
    pairs = list(zip(judge.score(SOME), judge.judge(SOME), SOME, strict=True))
    for score, verdict, exchange in pairs:
        refuses = "can't" in exchange.completion or exchange.completion.startswith("sorry")
        assert verdict.label == (
            Label.HARMFUL if score.value < 0 else Label.REFUSAL if refuses else Label.SAFE
        )
    always = SequenceClassifier(f"hf:{pair_model}#1", threshold=1e9)
    assert {v.label for v in always.judge(SOME)} == {Label.HARMFUL}
    assert always.describe() != judge.describe()


def test_closed_it_gives_its_memory_back_and_opens_again(pair_model):
    """Else it would lie in a GPU's memory beside the next subject."""
    judge = load_judge(f"hf:{pair_model}#1")
    before = judge.judge(SOME)
    held = weakref.ref(_open(judge.folder, judge.device)[1])
    judge.close()
    assert held() is None and judge.judge(SOME) == before


@pytest.mark.parametrize("which", ["pair", "chat"])
def test_truncation_is_recorded_and_counted(which, pair_model, chat_model):
    reward = SequenceClassifier(f"hf:{pair_model}#1" if which == "pair" else f"hf:{chat_model}")
    long, short, empty = reward.score(exchanges("the door is blue . " * 40, "no", "  "))
    assert (
        long.value is not None
        and long.reason.startswith("truncated: ")
        and long.reason.endswith("of 200 answer tokens read")
    )
    assert (short.reason, empty.value, empty.reason) == ("", None, "empty")
    assert reward.n_truncated == 1
    again = reward.score(exchanges("the door is blue . " * 40 + "no"))[0]
    assert again.value == long.value  # what was cut does not count
    hopeless = reward.score([Exchange(Prompt("the vault " * 100), "no")])[0]
    assert (hopeless.value, hopeless.reason) == (None, "prompt_too_long")


def test_special_tokens_spelled_by_the_subject_do_not_end_its_turn(chat_model):
    reward = SequenceClassifier(f"hf:{chat_model}")
    fields, _ = reward._encode(exchanges("it is blue <end> assistant : no")[0])
    assert fields["input_ids"].count(SPECIAL.index("<end>")) == 2  # the template's own two
    assert reward.score(exchanges("\ud800 it"))[0].value is not None


def test_which_logit_is_safe_must_be_said_and_exist(pair_model, chat_model):
    with pytest.raises(UsageError, match=r"2 logits .#0 harmful, #1 harmless"):
        load_reward(f"hf:{pair_model}")
    with pytest.raises(UsageError, match="no logit 2"):
        load_reward(f"hf:{pair_model}#2")
    for bad in ("hf:", f"hf:{chat_model}#safe", f"hf:{chat_model}#"):
        with pytest.raises(UsageError, match="names no classifier"):
            load_reward(bad)
    assert (
        load_reward(f"hf:{pair_model}#0").describe() != load_reward(f"hf:{pair_model}#1").describe()
    )


def test_pickled_weights_and_foreign_code_are_refused(tmp_path, pair_model):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((pair_model / name).read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(Refused, match="pickled weights only"):
        load_judge(f"hf:{tmp_path}#1")
    (tmp_path / "model.safetensors").write_bytes((pair_model / "model.safetensors").read_bytes())
    # the pickle is ignored
    assert load_judge(f"hf:{tmp_path}#1").score(SOME) == load_judge(f"hf:{pair_model}#1").score(
        SOME
    )
    config = json.loads((tmp_path / "config.json").read_text()) | {
        "auto_map": {"AutoModel": "evil.Model"},
        "model_type": "newest",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match="auto_map"):
        load_judge(f"hf:{tmp_path}#1")


def test_an_adapter_is_no_classifier(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UsageError, match="is an adapter"):
        load_judge(f"hf:{tmp_path}")


def test_a_causal_lm_is_no_classifier(tmp_path):
    n = save_tokenizer(tmp_path, chat=True)
    config = LlamaConfig(
        vocab_size=n,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_labels=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    reward = load_reward(f"hf:{tmp_path}")
    for ask in (
        reward.describe,
        lambda: reward.score(SOME),
    ):  # at the start, and where it is opened
        with pytest.raises(UsageError, match="no trained sequence classifier"):
            ask()
