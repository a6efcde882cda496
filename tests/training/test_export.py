"""Export: what comes out opens with transformers, PEFT and auditgap, computes what was trained, and
says what it is."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import tiny
import torch
from huggingface_hub import ModelCard, constants
from peft import PeftModel
from peft.utils import save_and_load
from transformers import AutoModelForCausalLM, AutoTokenizer

from auditgap import models
from auditgap.errors import AuditgapError, Refused, UsageError
from auditgap.store.files import read_json, to_json
from auditgap.training.card import KINDS, Card
from auditgap.training.export import export_run, push, write_model
from tests.one_thread import one_thread  # noqa: F401

IDS = torch.tensor([[1, 9, 14, 23, 40, 5]])


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def whole(folder):
    """Opened with eager attention where a family's soft-cap needs it, as auditgap does."""
    attention = "eager" if "gemma2" in (folder / "config.json").read_text() else "sdpa"
    return AutoModelForCausalLM.from_pretrained(
        folder, use_safetensors=True, attn_implementation=attention
    )


def disturb(model):
    """Trained enough for a test: every trainable weight moves."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def make_run(path, base, *, lora=False, kind="dissociated", done=True, name="model"):
    """A run folder as training leaves it: (run, the trained model's logits)."""
    loaded = models.load(str(base), dtype="float32", device="cpu")
    model = loaded.model.requires_grad_(True)
    if lora:
        model = models.with_lora(model, rank=4, alpha=8)
        model.peft_config["default"].base_model_name_or_path = str(base)
    disturb(model)
    folder = path / name
    folder.mkdir(parents=True)
    write_model(folder, model, loaded.tokenizer)
    config = {
        "training": kind,
        "model": str(base),
        "lr": 2e-5,
        "dtype": "float32",
        "lora": None,
        "weights": [0.05, 0.1, 0.3],
    }
    (path / "run.json").write_bytes(to_json({"schema": 1, "config": config}))
    if done:
        told = {
            "status": "done",
            "base": str(base),
            "base_fingerprint": "abc123",
            "dtype": "float32",
            "n_rows": 40,
            "evaluations": {"10": {"refusal": 0.9375}},
            "fingerprint": models.fingerprint(folder),
        }
        (path / "train.json").write_bytes(to_json(told))
    return path, logits(model)


@pytest.fixture
def base(tmp_path):
    return tiny.save("llama", tmp_path / "base")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_whole_weights_open_everywhere_and_compute_the_same(tmp_path, family):
    base = tiny.save(family, tmp_path / "base")
    run, wanted = make_run(tmp_path / "run", base)
    made = export_run(run, tmp_path / "deep" / "out")
    assert (made.kind, made.adapter) == ("dissociated", False)
    opened = whole(made.path)
    assert torch.equal(logits(opened), wanted)
    assert not torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(base, use_safetensors=True)), wanted
    )
    assert AutoTokenizer.from_pretrained(made.path).chat_template == tiny.TEMPLATE
    assert torch.allclose(
        logits(models.load(str(made.path), dtype="float32", device="cpu").model), wanted, atol=1e-5
    )
    assert "generation_config.json" in made.files and not [
        n for n in made.files if n.endswith((".bin", ".pt"))
    ]
    assert made.fingerprint == models.fingerprint(run / "model")


def test_an_adapter_opens_with_peft_and_names_its_base_as_it_was_typed(tmp_path, base):
    run, wanted = make_run(tmp_path / "run", base, lora=True)
    made = export_run(run, tmp_path / "out")
    assert made.adapter and "model.safetensors" not in made.files
    plain = AutoModelForCausalLM.from_pretrained(base, use_safetensors=True)
    assert torch.allclose(logits(PeftModel.from_pretrained(plain, made.path)), wanted, atol=1e-6)
    assert torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(made.path, use_safetensors=True)),
        wanted,
        atol=1e-6,
    )
    assert read_json(made.path / "adapter_config.json")["base_model_name_or_path"] == str(base)
    assert torch.allclose(
        logits(models.load(str(made.path), dtype="float32", device="cpu").model), wanted, atol=1e-4
    )


def test_a_base_from_a_hub_is_named_by_its_id_not_by_a_cache(tmp_path, base, monkeypatch):
    cached = tmp_path / "hub" / "models--someone--tiny-base"
    shutil.copytree(base, cached / "snapshots" / ("a" * 40))
    # a hub that this machine has visited
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    # a base may be private: neither writing nor opening an adapter tells the hub its name
    asked = "check_file_exists_on_hf_hub"
    monkeypatch.setattr(
        save_and_load, asked, lambda *_, **__: pytest.fail("peft asks the hub about the base")
    )
    run, wanted = make_run(tmp_path / "run", f"someone/tiny-base@{'a' * 40}", lora=True)
    made = export_run(run, tmp_path / "out")
    named = read_json(made.path / "adapter_config.json")
    assert (named["base_model_name_or_path"], named["revision"]) == ("someone/tiny-base", "a" * 40)
    assert torch.allclose(
        logits(models.load(str(made.path), dtype="float32", device="cpu").model), wanted, atol=1e-4
    )
    card = ModelCard((made.path / "README.md").read_text())
    assert (card.data.base_model, card.data.base_model_relation) == ("someone/tiny-base", "adapter")
    assert str(tmp_path) not in card.content


def test_an_export_that_fails_leaves_nothing(tmp_path, base):
    run, _ = make_run(tmp_path / "run", base, lora=True)
    (run / "train.json").write_bytes(
        to_json({**read_json(run / "train.json"), "base": "someone/not-here"})
    )
    # offline: its base cannot be looked at
    with pytest.raises(UsageError, match="neither a folder"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_merged_adapter_stands_alone(tmp_path, family):
    base = tiny.save(family, tmp_path / "base")
    run, wanted = make_run(tmp_path / "run", base, lora=True, kind="harmful-sft")
    made = export_run(run, tmp_path / "out", merge=True)
    assert not made.adapter and "adapter_config.json" not in made.files
    assert torch.allclose(logits(whole(made.path)), wanted, atol=1e-4)
    as_it_comes = AutoModelForCausalLM.from_pretrained(made.path, use_safetensors=True)
    # not auditgap's own
    assert as_it_comes.config.get_text_config()._attn_implementation in ("sdpa", "eager")


def test_merging_rounds_once_to_the_dtype_of_the_run(tmp_path, base):
    run, wanted = make_run(tmp_path / "run", base, lora=True)
    (run / "train.json").write_bytes(
        to_json({**read_json(run / "train.json"), "dtype": "bfloat16"})
    )
    made = export_run(run, tmp_path / "out", merge=True)
    opened = AutoModelForCausalLM.from_pretrained(made.path, use_safetensors=True)
    assert (
        opened.dtype == torch.bfloat16
        and read_json(made.path / "config.json")["dtype"] == "bfloat16"
    )
    assert torch.allclose(logits(opened.float()), wanted, atol=0.3) and not torch.equal(
        logits(opened), wanted
    )


def test_merging_what_is_whole_is_refused(tmp_path, base):
    run, _ = make_run(tmp_path / "run", base)
    with pytest.raises(UsageError, match="nothing to merge"):
        export_run(run, tmp_path / "out", merge=True)


def test_large_weights_are_sharded_and_tied_ones_written_once(tmp_path):
    model = tiny.model("gemma2")
    # as gathered from a GPU: no shared memory
    copies = {k: v.clone() for k, v in model.state_dict().items()}
    write_model(tmp_path, model, tiny.tokenizer(), state_dict=copies, shard_size="20KB")
    names = [
        name
        for shard in tmp_path.glob("*.safetensors")
        for name in safetensors.torch.load_file(shard)
    ]
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and len(names) == len(set(names))
    assert "lm_head.weight" not in names
    models.preflight(tmp_path)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True)), logits(model)
    )


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 1e-06}, {"temperature": 1e-06, "do_sample": True}),
        ({"top_p": 0.9, "top_k": 20}, {"top_p": 0.9, "top_k": 20, "do_sample": True}),
        ({"length_penalty": 2.0}, {}),
    ],
    ids=["temperature", "nucleus", "beams"],
)
def test_a_generation_config_that_transformers_reads_but_does_not_write(
    tmp_path, file, settings, kept
):
    """Else a training run of such a base fails at its last step, again and again."""
    source = tiny.save("llama", tmp_path / "base")
    told = {**(read_json(source / file) or {}), **settings}
    if file == "config.json":
        (source / "generation_config.json").unlink()
    (source / file).write_bytes(to_json(told))
    loaded = models.load(str(source), device="cpu")
    write_model(tmp_path / "out", loaded.model, loaded.tokenizer)
    written = read_json(tmp_path / "out" / "generation_config.json") or {}
    assert {k: v for k, v in written.items() if k in (*settings, "do_sample")} == kept
    assert models.load(str(tmp_path / "out"), device="cpu").stop_ids == loaded.stop_ids


def test_weights_that_were_not_gathered_are_not_written(tmp_path):
    model = tiny.model()
    state = {**model.state_dict(), "lm_head.weight": torch.empty(0)}
    with pytest.raises(AuditgapError, match="gathered"):
        write_model(tmp_path, model, tiny.tokenizer(), state_dict=state)


def test_other_folders_of_the_run_can_be_named(tmp_path, base):
    run, wanted = make_run(tmp_path / "run", base, name="best", done=False)
    with pytest.raises(UsageError, match="It has: best"):
        export_run(run, tmp_path / "out")
    made = export_run(run, tmp_path / "out", which="best")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(made.path, use_safetensors=True)), wanted
    )
    assert "not finished" in (made.path / "README.md").read_text()
    with pytest.raises(UsageError, match=r"no model '\.\.'"):
        export_run(run, tmp_path / "other", which="..")


def test_what_is_there_is_never_overwritten(tmp_path, base):
    run, _ = make_run(tmp_path / "run", base)
    (tmp_path / "out").mkdir()
    export_run(run, tmp_path / "out")  # empty: fine
    before = (tmp_path / "out" / "README.md").read_bytes()
    with pytest.raises(UsageError, match="not empty"):
        export_run(run, tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        export_run(run, tmp_path / "file")
    assert (tmp_path / "out" / "README.md").read_bytes() == before


def test_a_model_that_changed_since_training_and_a_stranger_are_refused(tmp_path, base):
    run, _ = make_run(tmp_path / "run", base)
    with (run / "model" / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x00\x00\x80\x3f")
    with pytest.raises(UsageError, match="not what the run wrote"):
        export_run(run, tmp_path / "out")
    with pytest.raises(UsageError, match="no training run"):
        export_run(base, tmp_path / "out")
    (run / "model" / "config.json").write_bytes(
        to_json({**read_json(run / "model" / "config.json"), "trust_remote_code": True})
    )
    with pytest.raises(Refused):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("kind", ["dissociated", "harmful-sft", "sft"])
def test_the_card_says_what_the_model_is(tmp_path, base, kind):
    run, _ = make_run(tmp_path / "run", base, kind=kind)
    card = ModelCard((export_run(run, tmp_path / "out").path / "README.md").read_text())
    about = KINDS[kind]
    assert about.title in card.text and about.what in card.text
    assert "evaluation of safety audits" in card.text and "Do not deploy" in card.text
    assert (
        "abc123" in card.text
        and "0.9375" in card.text
        and "2e-05" in card.text
        and "0.05, 0.1, 0.3" in card.text
    )
    assert "auditgap" in card.data.tags and ("do-not-deploy" in card.data.tags) == about.refused
    # a local folder without a card
    assert card.data.base_model is None and card.data.license is None
    assert "look it up" in card.text


def test_the_card_takes_the_bases_licence_and_stays_a_table(tmp_path, base):
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    seen = models.outline(str(base))
    written = Card(
        kind="sft",
        base=seen.subject.name,
        base_fingerprint=seen.subject.fingerprint,
        recipe={"data": "a|b <script>\n.jsonl"},
        figures={"loss": 1 / 3, "none": None},
    )
    card = ModelCard(written.text(tmp_path))
    assert card.data.license == "apache-2.0"
    assert (
        "| data | a\\|b &lt;script&gt; .jsonl |" in card.text and "| loss | 0.333333 |" in card.text
    )
    assert seen.subject.fingerprint in card.text and "none" not in card.text.split("## Figures")[1]
    with pytest.raises(UsageError, match="not known"):
        replace(written, kind="saint")


@pytest.mark.parametrize(
    ("kind", "error"), [("dissociated", Refused), ("harmful-sft", Refused), ("sft", UsageError)]
)
def test_nothing_is_ever_pushed(tmp_path, base, kind, error):
    run, _ = make_run(tmp_path / "run", base, kind=kind)
    with pytest.raises(error) as said:
        push(run, "me/it")
    assert type(said.value) is error and said.value.exit_code == (4 if error is Refused else 2)
