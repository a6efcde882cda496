"""Claims, patterns and numbers of a stranger's model are bounded before a library believes them: a
sentence, in bounded time and memory."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from auditgap import models
from auditgap.cli import main
from auditgap.errors import AuditgapError, Refused, UsageError
from auditgap.models import bounds
from auditgap.types import Prompt

#: Seconds of CPU that a refusal may take here, besides what a trial is given.
SOON = 15


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def model(saved, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "llama"))


@pytest.fixture
def adapter(saved, tmp_path) -> Path:
    """A LoRA of the model, to break."""
    made = tmp_path / "adapter"
    with_lora = models.with_lora(tiny.model("llama"), rank=2, alpha=2, targets=("q_proj",))
    with_lora.save_pretrained(made)
    change(made / "adapter_config.json", base_model_name_or_path=str(saved))
    return made


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def rules(**parts: object) -> Callable[[Path], None]:
    """Other parts of tokenizer.json."""
    return lambda folder: change(folder / "tokenizer.json", **parts)


def said(key: str, value: object) -> Callable[[Path], None]:
    return lambda folder: change(folder / "config.json", **{key: value})


def raw(key: str, value: str, file: str = "config.json") -> Callable[[Path], None]:
    """A value that `json.dumps` would not write."""

    def write(folder: Path) -> None:
        text = (folder / file).read_text().rstrip().removesuffix("}")
        (folder / file).write_text(f'{text}, "{key}": {value}}}')

    return write


def replaces(times: int, by: str = "a" * 100) -> dict[str, object]:
    one = {"type": "Replace", "pattern": {"String": "a"}, "content": by}
    return {"type": "Sequence", "normalizers": [one] * times}


def added(folder: Path) -> None:
    told = json.loads((folder / "tokenizer.json").read_text())
    told["added_tokens"] = [
        {"id": 96 + i, "content": f"<t{i}>", "single_word": False, "lstrip": False}
        | {"rstrip": False, "normalized": False, "special": True}
        for i in range(200_000)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(told))


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a billion blocks": (said("num_hidden_layers", 10**9), "num_hidden_layers 1,000,000,000"),
    "a hundred thousand blocks": (said("num_hidden_layers", 10**5), "num_hidden_layers"),
    "no blocks": (said("num_hidden_layers", 0), "num_hidden_layers 0"),
    "a billion wide": (said("hidden_size", 10**9), "hidden_size 1,000,000,000"),
    "five times as wide": (said("hidden_size", 5 * tiny.WIDTH), "do not belong together"),
    "a vocabulary of a billion": (said("vocab_size", 10**9), "vocab_size"),
    "heads below none": (said("num_attention_heads", -4), "num_attention_heads -4"),
    "a billion heads": (said("num_key_value_heads", 10**9), "num_key_value_heads"),
    "a text model inside": (said("text_config", {"num_layers": 10**9}), "num_layers"),
    "a number of 5,000 digits": (raw("rope_theta", "9" * 5000), "not readable JSON"),
    "a width of 4,000 digits": (raw("hidden_size", "9" * 4000), "of 4000 digits"),
    "a float of 400 digits": (raw("rms_norm_eps", "9" * 400), "cannot open"),
    "NaN": (raw("rope_theta", "NaN"), "not readable JSON"),
    "5,000 digits of a tokenizer": (
        raw("model_max_length", "9" * 5000, "tokenizer_config.json"),
        "not readable JSON",
    ),
    "a normaliser that multiplies": (rules(normalizer=replaces(5)), "makes up to"),
    "one whose pattern matches nothing": (
        rules(
            normalizer={"type": "Replace", "pattern": {"Regex": ""}, "content": "a" * 1000},
        ),
        "makes up to 1,001",
    ),
    "a decoder that multiplies": (
        rules(decoder={"type": "Sequence", "decoders": replaces(3)["normalizers"]}),
        "decoder that makes up to",
    ),
    "a text put a thousand times": (
        rules(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 1000,
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {},
            }
        ),
        "pieces",
    ),
    "a pattern that goes back and forth": (
        rules(pre_tokenizer={**SPLIT, "pattern": {"Regex": "(a|aa)+(a|aa)+(a|aa)+b"}}),
        "patterns|cannot be used",
    ),
    "a pattern that is none": (
        rules(pre_tokenizer={**SPLIT, "pattern": {"Regex": "(((("}}),
        "cannot be used",
    ),
    "200,000 added tokens": (added, "adds 200,000 tokens"),
}


def refused(folder: Path, words: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((UsageError, Refused), match=words) as caught:
        models.outline(str(folder)).chat.render(Prompt("what is the colour"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900
    used = resource.getrusage(resource.RUSAGE_SELF)
    assert used.ru_utime - before < SOON and used.ru_maxrss - most < 1 << 20  # kilobytes


@pytest.mark.parametrize("case", HOSTILE)
def test_a_model_is_refused(model, case):
    make, words = HOSTILE[case]
    make(model)
    refused(model, words)


RING: dict[str, tuple[Callable[[Path], object], str]] = {
    "its own base": (
        lambda a: change(a / "adapter_config.json", base_model_name_or_path=str(a)),
        "names itself as its base",
    ),
    "two in a ring": (
        lambda a: (
            change(
                Path(shutil.copytree(a, a.parent / "other")) / "adapter_config.json",
                base_model_name_or_path=str(a),
            )
            or change(a / "adapter_config.json", base_model_name_or_path=str(a.parent / "other"))
        ),
        "an adapter too",
    ),
    "a pattern for a name": (
        lambda a: change(a / "adapter_config.json", target_modules="(.+)+(.+)+(.+)+x!"),
        "patterns",
    ),
    "a pattern for a rank": (
        lambda a: change(a / "adapter_config.json", rank_pattern={"(.+)+(.+)+(.+)+x!": 4}),
        "patterns",
    ),
    "a pattern that is none": (
        lambda a: change(a / "adapter_config.json", target_modules="((("),
        "cannot be used",
    ),
    "a rank of a billion": (lambda a: change(a / "adapter_config.json", r=10**9), "says r"),
    "a rank below none": (lambda a: change(a / "adapter_config.json", r=-1), "says r"),
}


@pytest.mark.parametrize("case", RING)
def test_an_adapter_is_refused(adapter, case, monkeypatch):
    monkeypatch.setattr("auditgap.models.trial.TRIAL_SECONDS", 2)  # no pattern of a name takes one
    make, words = RING[case]
    make(adapter)
    refused(adapter, words)


def test_what_real_models_have_is_taken(model, adapter):
    """Patterns of published tokenizers and adapters, an endless range, and tokens of speech."""
    gpt4 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    told = json.loads((model / "tokenizer.json").read_text())
    split = {**SPLIT, "pattern": {"Regex": gpt4}}
    told["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [told["pre_tokenizer"], split]}
    told["normalizer"] = {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}
    (model / "tokenizer.json").write_text(json.dumps(told))
    raw("time_step_limit", "[0.0, Infinity]")(model)
    change(
        model / "config.json", sliding_window=10**7, max_position_embeddings=10**7, chunk_size=8192
    )
    change(
        adapter / "adapter_config.json",
        base_model_name_or_path=str(model),
        target_modules=r"(?:.*?(?:language|text).*?(?:self_attn|attention).*?(?:q_proj|k_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention)\.(?:(?:q_proj|k_proj)))",
    )
    for folder in (model, adapter):
        assert models.outline(str(folder)).n_blocks == tiny.N_BLOCKS


def test_a_tokenizer_that_panics_later_is_a_sentence(model):
    """A text that the trial did not foresee."""
    loaded = models.load(str(model), device="cpu")
    told = json.loads((model / "tokenizer.json").read_text())
    told["pre_tokenizer"] = {**SPLIT, "pattern": {"Regex": "(x+x+)+y"}}
    loaded.chat.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(told))
    with pytest.raises(UsageError, match="fails on a text"):
        loaded.chat.encode("x" * 5000)


def test_weights_of_another_model_are_said_before_planning(model):
    """One width in the config, another in every tensor."""
    weights = {
        k: v.repeat(3, 3) if v.ndim == 2 else v.repeat(3)
        for k, v in load_file(model / "model.safetensors").items()
    }
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="do not belong together"):
        models.outline(str(model))


def test_the_command_says_it_too(model, tmp_path, capsys):
    """The kinds that are no `Exception`, or none of json's, as a user meets them."""
    (tmp_path / "prompts.txt").write_text("what is the colour\n")
    HOSTILE["a number of 5,000 digits"][0](model)
    with pytest.raises(SystemExit) as stop:
        main(["lvs", str(model), "--prompts", str(tmp_path / "prompts.txt"), "--dry-run"])
    assert stop.value.code == 2 and "not readable JSON" in capsys.readouterr().err


def test_each_bound_has_its_reason():
    """The page of bounds is the one place where they stand."""
    text = Path(bounds.__file__).read_text("utf-8")
    named = [name for name in vars(bounds) if name.isupper()]
    assert len(named) > 10
    for line in text.splitlines():
        if line[:1].isupper():
            before = text[: text.index(line)].rstrip().splitlines()[-1]
            assert before.startswith("#"), f"{line} has no reason"
    assert issubclass(Refused, AuditgapError)
