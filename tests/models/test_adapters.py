"""An adapter is measured as what it is: merged into its base it is the same model as on its base,
taken off it leaves the base as it was, and a kind that is no change of weights is a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from auditgap import models
from auditgap.errors import UsageError
from auditgap.training.export import write_model
from auditgap.types import Subject

IDS = torch.arange(3, 19).view(2, 8)
Q = ["q_proj"]
ENDS = ["lm_head", "embed_tokens"]


def lora(**settings: Any) -> Callable[[], peft.PeftConfig]:
    settings = {"r": 4, "target_modules": Q, "task_type": "CAUSAL_LM", **settings}
    return lambda: peft.LoraConfig(**settings)


def of(kind: str, **settings: Any) -> Callable[[], peft.PeftConfig]:
    settings = {"target_modules": Q, "task_type": "CAUSAL_LM", **settings}
    return lambda: getattr(peft, kind)(**settings)


#: name -> (the adapter's settings, is its base's vocabulary tied)
MERGED: dict[str, tuple[Callable[[], peft.PeftConfig], bool]] = {
    "plain": (lora(), False),
    "lm_head": (lora(target_modules=["q_proj", "lm_head"]), False),
    "lm_head tied": (lora(target_modules=["q_proj", "lm_head"]), True),
    "embedding tied": (lora(target_modules=["q_proj", "embed_tokens"]), True),
    "both tied": (lora(target_modules=["q_proj", *ENDS]), True),
    "both tied on purpose": (lora(target_modules=Q + ENDS, ensure_weight_tying=True), True),
    "saved head tied": (lora(modules_to_save=["lm_head"]), True),
    "saved embedding tied": (lora(modules_to_save=["embed_tokens"]), True),
    "saved ends tied": (lora(modules_to_save=ENDS), True),
    "saved ends": (lora(modules_to_save=ENDS), False),
    "tokens": (lora(trainable_token_indices=[5, 7]), False),
    "tokens tied": (lora(trainable_token_indices=[5, 7]), True),
    "DoRA": (lora(use_dora=True), False),
    "DoRA of the embedding tied": (lora(use_dora=True, target_modules=Q + ENDS[1:]), True),
    "rank-stabilised": (lora(use_rslora=True), False),
    "rank and alpha patterns": (
        lora(
            target_modules=["q_proj", "v_proj"],
            rank_pattern={"v_proj": 2},
            alpha_pattern={"q_proj": 32},
        ),
        False,
    ),
    "some layers": (lora(layers_to_transform=[1, 2]), False),
    "bias of all": (lora(bias="all"), False),
    "bias of its own": (lora(bias="lora_only"), False),
    "norm saved": (lora(modules_to_save=["norm"]), False),
    "PiSSA": (lora(init_lora_weights="pissa"), False),
    "OLoRA": (lora(init_lora_weights="olora"), False),
    "LoHa": (of("LoHaConfig", r=4), False),
    "LoKr": (of("LoKrConfig", r=4), False),
    "IA3": (
        of("IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        False,
    ),
    "VeRA": (of("VeraConfig", r=4), False),
    "BOFT": (of("BOFTConfig", boft_block_size=4), False),
    "OFT": (of("OFTConfig", oft_block_size=4), False),
    "layer norms": (of("LNTuningConfig", target_modules=["input_layernorm"]), False),
    "experts": (lora(target_parameters=["mlp.experts.gate_up_proj"], target_modules=Q), False),
}
UNMERGEABLE = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "P_TUNING": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}
assert len(MERGED) + len(UNMERGEABLE) == 33


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of the plain base, the tied one, or one with experts."""
    home, made = tmp_path_factory.mktemp("bases"), {}

    def of_kind(kind: str) -> Path:
        if kind not in made:
            if kind == "experts":
                tiny.FAMILIES.setdefault("mixtral", {"num_local_experts": 2})
            family = "mixtral" if kind == "experts" else "llama"
            made[kind] = tiny.save(family, home / kind, tie_word_embeddings=kind == "tied")
        return made[kind]

    return of_kind


def train(folder: Path, config: peft.PeftConfig, base: Path) -> Path:
    """An adapter whose every weight is away from where it began, in `folder`."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.2 * torch.randn_like(weight))
    return keep(model, folder, base)


def keep(model: Any, folder: Path, base: Path) -> Path:
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    told = {**json.loads(path.read_text()), "base_model_name_or_path": str(base)}
    path.write_text(json.dumps(told))
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def on_its_base(adapter: Path, base: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    return logits(peft.PeftModel.from_pretrained(model, adapter).eval())


@pytest.mark.parametrize("kind", MERGED)
def test_merged_it_is_the_adapter_on_its_base(kind, base, tmp_path):
    settings, tied = MERGED[kind]
    home = base("tied" if tied else "experts" if kind == "experts" else "plain")
    adapter = train(tmp_path / "a", settings(), home)
    right = on_its_base(adapter, home)
    loaded = models.load(str(adapter), device="cpu")
    assert (logits(loaded.model) - right).abs().max() < 1e-3
    assert (logits(models.load(str(home), device="cpu").model) - right).abs().max() > 0.1


def test_what_is_exported_of_a_tied_base_is_the_same_model(base, tmp_path):
    adapter = train(tmp_path / "a", MERGED["both tied"][0](), base("tied"))
    loaded = models.load(str(adapter), device="cpu")
    write_model(tmp_path / "whole", loaded.model, loaded.tokenizer, dtype=torch.float32)
    again = models.load(str(tmp_path / "whole"), device="cpu")
    assert torch.equal(logits(again.model), logits(loaded.model))


def test_a_merge_that_is_another_model_is_refused(base, tmp_path, monkeypatch):
    """Whatever comes next: here peft's merge itself is made wrong."""
    adapter = train(tmp_path / "a", lora()(), base("plain"))
    from peft.tuners.lora.layer import Linear

    delta = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda *at: 1.5 * delta(*at))
    with pytest.raises(UsageError, match="another model than the adapter on its base"):
        models.load(str(adapter), device="cpu")


def test_in_sixteen_bits_rounding_is_no_other_model(base, tmp_path):
    adapter = train(tmp_path / "a", MERGED["both tied"][0](), base("tied"))
    assert models.load(str(adapter), device="cpu", dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("kind", UNMERGEABLE)
def test_what_changes_no_weights_is_a_sentence_before_anything_runs(kind, base, tmp_path):
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base("plain")), UNMERGEABLE[kind]()
    )
    adapter = keep(model, tmp_path / "a", base("plain"))
    with pytest.raises(UsageError, match=f"{kind}: it learns tokens or states"):
        models.outline(str(adapter))


def test_a_kind_that_peft_does_not_know_is_a_sentence(base, tmp_path):
    adapter = train(tmp_path / "a", lora()(), base("plain"))
    told = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**told, "peft_type": "NEWEST"}))
    with pytest.raises(UsageError, match="kind NEWEST"):
        models.outline(str(adapter))


# -- taken off again
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    ["plain", "norm saved", "saved ends tied", "PiSSA", "OLoRA", "both tied", "tokens", "OFT"],
)
def test_the_base_is_bit_for_bit_what_it_was(kind, base, tmp_path):
    settings, tied = MERGED[kind]
    home = base("tied" if tied else "plain")
    adapter = train(tmp_path / "a", settings(), home)
    loaded = models.load(str(home), device="cpu")
    before = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    said = logits(loaded.model)
    for _ in range(2):
        with models.with_adapter(loaded, adapter, Subject("x", "x")) as worn:
            assert (logits(worn.model) - on_its_base(adapter, home)).abs().max() < 1e-3
        assert torch.equal(logits(loaded.model), said)
    after = loaded.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


# -- tokens of its own
# -------------------------------------------------------------------------------------------------


def with_tokens(folder: Path, base: Path, config: peft.PeftConfig) -> tuple[Path, torch.Tensor]:
    """An adapter that was trained after two tokens were added, and its logits there."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"]})
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    made = peft.get_peft_model(model, config)
    tokenizer.save_pretrained(folder)
    return keep(made, folder, base), logits(made.eval())


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_with_tokens_of_its_own(base, tmp_path, tied):
    home = base("tied" if tied else "plain")
    adapter, right = with_tokens(tmp_path / "a", home, lora(modules_to_save=ENDS)())
    loaded = models.load(str(adapter), device="cpu")
    assert loaded.n_embeddings == len(loaded.tokenizer) == tiny.VOCABULARY + 2
    assert right.shape[-1] == tiny.VOCABULARY + 2
    assert (logits(loaded.model) - right).abs().max() < 1e-3
    with (
        pytest.raises(UsageError, match=r"98 tokens of its own.*Audit it as a model"),
        models.with_adapter(models.load(str(home), device="cpu"), adapter, Subject("x", "x")),
    ):
        pass


@pytest.mark.parametrize(
    ("kept", "said"),
    [([], "does not hold all their rows"), (["embed_tokens"], r"does not fit .*lm_head")],
)
def test_without_the_rows_of_its_tokens_it_is_a_sentence(base, tmp_path, kept, said):
    adapter, _ = with_tokens(tmp_path / "a", base("plain"), lora(modules_to_save=kept or None)())
    file = adapter / "adapter_model.safetensors"
    held = {k: w for k, w in load_file(file).items() if "lora" in k or any(n in k for n in kept)}
    save_file(held, file)
    with pytest.raises(UsageError, match=said):
        models.load(str(adapter), device="cpu")
