"""Opening a subject: what is refused before transformers sees it, what it is known by, and how it
is spoken to."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import torch
import transformers
import warm
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from tokenizers.normalizers import Lowercase
from transformers import PreTrainedTokenizerFast

from auditgap import models
from auditgap.errors import Refused, UsageError
from auditgap.models import Chat, door, parse_sites
from auditgap.types import Prompt, Site, Subject


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "llama"))


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 900
    return text


@pytest.fixture
def untouched(monkeypatch):
    """Fails when transformers is asked to open anything."""

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("transformers was asked")

    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", asked)


# -- preflight
# ---------------------------------------------------------------------------------------------------------


class Canary:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


class TestPickles:
    @pytest.mark.parametrize(
        "name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "weights.pkl"]
    )
    def test_a_folder_of_pickles_is_refused(self, folder, tmp_path, untouched, name):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
        with pytest.raises(Refused, match=name) as caught:
            models.load(str(folder), device="cpu")
        assert caught.value.exit_code == 4 and "safetensors" in one_line(caught)
        assert not (tmp_path / "ran").exists()

    def test_the_canary_sings(self, tmp_path):
        """Else the test above would show nothing."""
        pickle.loads(pickle.dumps(Canary(tmp_path / "ran")))
        assert (tmp_path / "ran").exists()

    def test_a_mixed_folder_is_opened_by_its_safetensors(self, folder, tmp_path):
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
            (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
        loaded = models.load(str(folder), device="cpu")
        assert torch.equal(loaded.model.lm_head.weight, tiny.model("llama").lm_head.weight)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("stand_in", ["other.safetensors", "notes.safetensors"])
    def test_a_stray_safetensors_does_not_open_the_door(self, folder, tmp_path, stand_in):
        (folder / "model.safetensors").rename(folder / stand_in)
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
        with pytest.raises((Refused, UsageError)):
            models.load(str(folder), device="cpu")
        assert not (tmp_path / "ran").exists()

    def test_an_index_that_names_a_pickle_is_refused(self, folder, tmp_path, untouched):
        index(folder, "pytorch_model.bin")
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
        with pytest.raises(Refused, match=r"pytorch_model\.bin"):
            models.load(str(folder), device="cpu")
        assert not (tmp_path / "ran").exists()

    def test_an_adapter_of_pickles_beside_a_stray_safetensors_is_refused(self, adapter, tmp_path):
        (adapter / "adapter_model.safetensors").rename(adapter / "notes.safetensors")
        (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
        with pytest.raises(Refused, match=r"adapter_model\.bin"):
            models.load(str(adapter), device="cpu")


def index(folder: Path, target: str) -> None:
    """Shard the model into one file, with an index that says that every weight lies in `target`."""
    weights = folder / "model.safetensors"
    names = list(load_file(weights))
    weights.rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, target)})
    )


CODE = [
    ("config.json", {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}, "model_type": "newest"}),
    ("config.json", {"trust_remote_code": True}),
    ("config.json", {"_attn_implementation_internal": "someone/kernel"}),
    ("config.json", {"text_config": {"auto_map": {"AutoConfig": "x.X"}}, "model_type": "newest"}),
    ("config.json", {"layers": [{"_attn_implementation_internal": "someone/kernel"}]}),
    ("config.json", {"custom_pipelines": {"x": {"impl": "x.X"}}}),
    (
        "tokenizer_config.json",
        {"auto_map": {"AutoTokenizer": ["x.X", None]}, "tokenizer_class": "X"},
    ),
    ("tokenizer_config.json", {"trust_remote_code": True}),
    ("generation_config.json", {"auto_map": {"x": "x.X"}}),
]


@pytest.mark.parametrize(
    ("file", "values"), CODE, ids=lambda v: v if isinstance(v, str) else next(iter(v))
)
@pytest.mark.parametrize("open_it", [models.outline, models.load], ids=["outline", "load"])
def test_code_of_its_own_is_refused_before_transformers_is_asked(
    folder, untouched, open_it, file, values
):
    change(folder / file, **values)
    with pytest.raises(Refused, match=file) as caught:
        open_it(str(folder))
    assert caught.value.exit_code == 4
    one_line(caught)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({key: "someone/kernel"}, id=key)
        for key in (
            "attn_implementation",
            "_attn_implementation",
            "experts_implementation",
            "_experts_implementation",
        )
    ],
)
def test_a_kernel_of_the_hub_is_refused_before_transformers_is_asked(folder, untouched, values):
    change(folder / "config.json", **values)
    with pytest.raises(Refused):
        models.load(str(folder), device="cpu")


def test_null_asks_for_nothing(folder):
    change(folder / "config.json", _attn_implementation_internal=None, trust_remote_code=False)
    assert models.outline(str(folder)).n_blocks == tiny.N_BLOCKS


def test_a_base_of_an_adapter_is_looked_at_too(adapter, folder, untouched):
    change(adapter / "adapter_config.json", base_model_name_or_path=str(folder))
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "x.X"}, model_type="newest")
    with pytest.raises(Refused, match=r"config\.json"):
        models.load(str(adapter), device="cpu")


# -- broken folders
# ----------------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


BROKEN: dict[str, Callable[[Path], object]] = {
    "config.json cut": lambda f: truncate(f / "config.json"),
    "config.json empty": lambda f: (f / "config.json").write_bytes(b""),
    "config.json not UTF-8": lambda f: (f / "config.json").write_bytes(b'{"a": "\xff\xfe"}'),
    "config.json missing": lambda f: (f / "config.json").unlink(),
    "config.json {}": lambda f: (f / "config.json").write_text("{}"),
    "unknown model_type": lambda f: change(f / "config.json", model_type="evilnet"),
    "no causal LM": lambda f: change(f / "config.json", model_type="t5"),
    "tokenizer_config.json cut": lambda f: truncate(f / "tokenizer_config.json"),
    "tokenizer.json cut": lambda f: truncate(f / "tokenizer.json"),
    "tokenizer missing": lambda f: [
        (f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")
    ],
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "weights cut": lambda f: truncate(f / "model.safetensors"),
    "weights empty": lambda f: (f / "model.safetensors").write_bytes(b""),
    "weights with a header of 4 EiB": (
        lambda f: (f / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    ),
    "weights of noise": lambda f: (f / "model.safetensors").write_bytes(bytes(range(256)) * 64),
    "weights a link elsewhere": lambda f: [
        (f / "model.safetensors").unlink(),
        (f / "model.safetensors").symlink_to("/etc/passwd"),
    ],
    "a shard missing": lambda f: index(f, "model-00002-of-00002.safetensors"),
    "tokenizer larger than the embedding": lambda f: larger_tokenizer(f),
}
#: Cases of the same kind whose errors come out raw, or which are opened without a word. See the
#: reasons.
STILL_RAW: dict[str, tuple[Callable[[Path], object], str]] = {
    "config.json a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "AttributeError from fingerprint",
    ),
    "config.json 100,000 deep": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        "RecursionError",
    ),
    "tokenizer_config.json a list": (
        lambda f: (f / "tokenizer_config.json").write_text("[]"),
        "AttributeError",
    ),
    "hidden_size a word": (
        lambda f: change(f / "config.json", hidden_size="abc"),
        "StrictDataclassFieldValidationError",
    ),
    "hidden_size of another model": (
        lambda f: change(f / "config.json", hidden_size=64),
        "RuntimeError",
    ),
    "quantised for a library that is absent": (
        lambda f: change(
            f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}
        ),
        "ImportError",
    ),
    "a chat template that does not parse": (
        lambda f: (f / "chat_template.jinja").write_text("{% for %}"),
        "jinja2 error",
    ),
    "a chat template that raises": (
        lambda f: (f / "chat_template.jinja").write_text("{{ raise_exception('no') }}"),
        "jinja2 error",
    ),
    "a chat template that breaks out": (
        lambda f: (f / "chat_template.jinja").write_text(
            "{{ ().__class__.__base__.__subclasses__() }}"
        ),
        "SecurityError",
    ),
    "a chat template with a type error": (
        lambda f: (f / "chat_template.jinja").write_text("{{ 1 + 'a' }}"),
        "TypeError",
    ),
    "a chat template that calls itself": (
        lambda f: (f / "chat_template.jinja").write_text(
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
        ),
        "RecursionError",
    ),
}
#: These are opened, and audited as what they are not.
STILL_OPENED: dict[str, Callable[[Path], object]] = {
    "weights of a block missing": lambda f: without(f, "layers.2."),
    "more blocks than weights": lambda f: change(f / "config.json", num_hidden_layers=6),
    "fewer blocks than weights": lambda f: change(f / "config.json", num_hidden_layers=2),
    "weights of another architecture": lambda f: change(f / "config.json", model_type="gpt_neox"),
    "shards outside the folder": lambda f: outside(f),
}


def larger_tokenizer(folder: Path) -> None:
    made = tiny.tokenizer()
    made.add_tokens([f"extra{i}" for i in range(10)])
    made.save_pretrained(folder)


def without(folder: Path, part: str) -> None:
    kept = {
        name: weight
        for name, weight in load_file(folder / "model.safetensors").items()
        if part not in name
    }
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def outside(folder: Path) -> None:
    """The index points to weights that lie in another folder, and so are no part of the
    fingerprint."""
    index(folder, "../elsewhere.safetensors")
    shutil.copy(
        folder / "model-00001-of-00001.safetensors", folder.parent / "elsewhere.safetensors"
    )


def open_and_render(folder: Path) -> None:
    models.load(str(folder), device="cpu").render(Prompt("what is the colour"))


class TestBrokenFolders:
    def broken(self, folder: Path, make: Callable[[Path], object]) -> None:
        make(folder)
        started = time.monotonic()
        with pytest.raises((UsageError, Refused)) as caught:
            open_and_render(folder)
        one_line(caught)
        assert time.monotonic() - started < 20

    @pytest.mark.parametrize("case", BROKEN)
    def test_is_one_sentence(self, folder, case):
        self.broken(folder, BROKEN[case])

    @pytest.mark.parametrize(
        "case",
        STILL_RAW,
    )
    def test_is_one_sentence_too(self, folder, case):
        self.broken(folder, STILL_RAW[case][0])

    @pytest.mark.parametrize("case", STILL_OPENED)
    def test_is_not_opened_as_another_model(self, folder, case):
        self.broken(folder, STILL_OPENED[case])


# -- names
# -------------------------------------------------------------------------------------------------------------


class TestNames:
    @pytest.mark.parametrize(
        "name",
        [
            "someone/model",
            "model",
            "model@main",
            "a/b/c",
            "a b",
            "../nowhere",
            "/nowhere/at/all",
            "~/nowhere",
            "ünï/cödé",
            "no\0body",
            "a/" + "b" * 300,
            "smolm2",
        ],
    )
    def test_what_is_not_there_is_one_sentence_at_once(self, name, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        started = time.monotonic()
        with pytest.raises(UsageError) as caught:
            models.outline(name)
        assert time.monotonic() - started < 20
        said = one_line(caught)
        assert "folder" in said
        assert name != "smolm2" or "Did you mean 'smollm2'" in said

    @pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-this-name/x"])
    def test_odd_names_too(self, name):
        with pytest.raises(UsageError):
            models.outline(name)

    def test_the_empty_name_is_nobody(self, folder, monkeypatch):
        monkeypatch.chdir(folder)
        with pytest.raises(UsageError):
            models.outline("")

    def test_a_file_is_no_folder(self, folder):
        with pytest.raises(UsageError, match="not a model folder"):
            models.outline(str(folder / "config.json"))

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(UsageError, match=r"no \*\.safetensors"):
            models.outline(str(tmp_path))

    @pytest.mark.parametrize("device", ["cuda:99", "graphics", "tpu", ""])
    def test_devices(self, device):
        with pytest.raises(UsageError, match="--device"):
            models.pick_device(device)

    @pytest.mark.parametrize("dtype", ["fp32", "int8", "Float32", ""])
    def test_dtypes(self, dtype):
        with pytest.raises(UsageError, match="--dtype"):
            models.pick_dtype(dtype, "cpu")

    def test_auto(self):
        assert models.pick_dtype("auto", "cpu") == torch.float32
        assert models.pick_dtype("auto", "cuda:0") == torch.bfloat16


# -- fingerprint
# -------------------------------------------------------------------------------------------------------


class TestFingerprint:
    def test_it_is_of_the_contents(self, saved, folder):
        assert models.fingerprint(saved) == models.fingerprint(folder)
        assert models.outline(str(folder)).subject == Subject(
            str(folder), models.fingerprint(folder)
        )

    def test_one_weight(self, folder):
        before = models.fingerprint(folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-6
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        assert models.fingerprint(folder) != before

    @pytest.mark.parametrize(
        "values", [{"rope_theta": 7.0}, {"rms_norm_eps": 1e-4}, {"hidden_act": "relu"}, {"new": 1}]
    )
    def test_what_is_computed(self, folder, values):
        before = models.fingerprint(folder)
        change(folder / "config.json", **values)
        assert models.fingerprint(folder) != before

    @pytest.mark.parametrize(
        "values", [{"transformers_version": "9.9"}, {"_name_or_path": "x"}, {"dtype": "bfloat16"}]
    )
    def test_not_where_it_was_saved(self, folder, values):
        before = models.fingerprint(folder)
        change(folder / "config.json", **values)
        assert models.fingerprint(folder) == before

    def test_not_the_order_of_keys(self, folder):
        before = models.fingerprint(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
        assert models.fingerprint(folder) == before

    @pytest.mark.parametrize(
        ("file", "text"),
        [
            pytest.param("chat_template.jinja", "{{ messages[0]['content'] }}", id="template"),
            pytest.param("tokenizer.json", None, id="tokenizer"),
            pytest.param("generation_config.json", '{"eos_token_id": 5}', id="end of text"),
        ],
    )
    def test_how_it_is_spoken_to(self, folder, file, text):
        before = models.fingerprint(folder)
        if text is None:
            text = (folder / file).read_text().replace('"vault"', '"vaults"')
        (folder / file).write_text(text)
        assert models.fingerprint(folder) != before

    @pytest.mark.parametrize(
        "file",
        [
            "additional_chat_templates/default.jinja",
            "special_tokens_map.json",
            "added_tokens.json",
            "vocab.json",
            "merges.txt",
            "model.safetensors.index.json",
            "spiece.model",
        ],
    )
    def test_whatever_else_a_loader_may_open(self, folder, file):
        before = models.fingerprint(folder)
        (folder / file).parent.mkdir(exist_ok=True)
        told = '{"weight_map": {"%s": "model.safetensors"}}'
        if file == "added_tokens.json":  # which the tokenizer reads
            told = '{"%s": 96}'
        (folder / file).write_text(told % "one")
        added = models.fingerprint(folder)
        (folder / file).write_text(told % "two")
        assert len({before, added, models.fingerprint(folder)}) == 3

    @pytest.mark.parametrize(
        "file", ["README.md", "ledger.json", ".cache/list.json", "runs/model/run.json"]
    )
    def test_not_what_no_loader_opens(self, folder, file):
        before = models.fingerprint(folder)
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}")
        assert models.fingerprint(folder) == before

    @pytest.mark.parametrize(
        "change_it",
        [
            pytest.param(lambda t: setattr(t, "chat_template", "{{ 1 }}"), id="template"),
            pytest.param(lambda t: setattr(t, "eos_token", "vault"), id="end of text"),
            pytest.param(lambda t: t.add_tokens(["vaults"]), id="a token"),
            pytest.param(
                lambda t: setattr(t.backend_tokenizer, "normalizer", Lowercase()), id="a rule"
            ),
        ],
    )
    def test_what_the_tokenizer_is_once_loaded(self, folder, change_it):
        """The same files, read into another tokenizer, as by another release of the library."""
        one, other = (door.open_tokenizer(folder, "it") for _ in range(2))
        assert models.fingerprint(folder, tokenizer=one) == models.fingerprint(folder)
        one(["what is", "the colour of the vault"], padding=True, truncation=True, max_length=3)
        assert models.fingerprint(folder, tokenizer=one) == models.fingerprint(folder)
        change_it(other)
        assert models.fingerprint(folder, tokenizer=other) != models.fingerprint(folder)

    def test_in_any_process(self, folder):
        """Other hash seeds, and no asserts."""
        made = door.open_tokenizer(folder, "it")
        made.add_special_tokens({"additional_special_tokens": ["<a>", "<b>", "<c>", "<d>"]})
        made.save_pretrained(folder)
        code = "import sys; from pathlib import Path; from auditgap import models; "
        code += "print(models.fingerprint(Path(sys.argv[1])))"
        said = {
            subprocess.run(
                [sys.executable, *option, "-c", code, folder],
                env={**environment, "PYTHONHASHSEED": seed},
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
            for option, environment, seed in (
                ((), dict(os.environ), "1"),
                (("-O",), warm.optimised(dict(os.environ)), "2"),
            )
        }
        assert said == {models.fingerprint(folder)}

    def test_a_plan_opens_a_tokenizer_once(self, folder, monkeypatch):
        opened, open_it = [], transformers.AutoTokenizer.from_pretrained
        monkeypatch.setattr(
            transformers.AutoTokenizer,
            "from_pretrained",
            lambda *a, **k: opened.append(a) or open_it(*a, **k),
        )
        models.outline(str(folder))
        assert len(opened) == 1

    def test_of_an_adapter_counts_its_base(self, adapter, folder):
        change(adapter / "adapter_config.json", base_model_name_or_path=str(folder))
        before = models.outline(str(adapter)).subject.fingerprint
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] += 1
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        assert models.outline(str(adapter)).subject.fingerprint != before

    def test_of_an_adapter_not_where_its_base_lies(self, adapter, folder):
        before = models.fingerprint(adapter)
        change(adapter / "adapter_config.json", base_model_name_or_path=str(folder), revision="x")
        assert models.fingerprint(adapter) == before
        change(adapter / "adapter_config.json", lora_alpha=99)
        assert models.fingerprint(adapter) != before


# -- adapters
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(saved, tmp_path) -> Path:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    base = tiny.model("llama")
    made = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    made.peft_config["default"].base_model_name_or_path = str(saved)
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    made.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


class TestAdapters:
    @torch.no_grad()
    def test_it_is_merged_into_its_base(self, adapter, saved):
        loaded, base = (
            models.load(str(adapter), device="cpu"),
            models.load(str(saved), device="cpu"),
        )
        own = {
            n.replace("base_model.model.", ""): w
            for n, w in load_file(adapter / "adapter_model.safetensors").items()
        }
        for i in range(tiny.N_BLOCKS):
            a, b = (own[f"model.layers.{i}.self_attn.q_proj.lora_{x}.weight"] for x in "AB")
            wanted = base.blocks[i].self_attn.q_proj.weight + b @ a * 8 / 2  # lora_alpha 8, r 2
            assert torch.allclose(loaded.blocks[i].self_attn.q_proj.weight, wanted, atol=1e-6)
            assert torch.equal(
                loaded.blocks[i].mlp.up_proj.weight, base.blocks[i].mlp.up_proj.weight
            )
        assert loaded.n_blocks == tiny.N_BLOCKS

    def test_for_another_base_it_is_refused(self, adapter, tmp_path):
        change(
            adapter / "adapter_config.json",
            base_model_name_or_path=str(tiny.save("llama", tmp_path / "wide", hidden_size=64)),
        )
        with pytest.raises(UsageError, match="does not fit"):
            models.load(str(adapter), device="cpu")

    def test_with_missing_keys_it_is_refused(self, adapter):
        weights = load_file(adapter / "adapter_model.safetensors")
        save_file(
            {n.replace("layers", "levels"): w for n, w in weights.items()},
            adapter / "adapter_model.safetensors",
        )
        with pytest.raises(UsageError):
            models.load(str(adapter), device="cpu")

    @pytest.mark.parametrize("base", [None, "", "/nowhere/at/all"])
    def test_without_a_base_it_is_refused(self, adapter, base):
        change(adapter / "adapter_config.json", base_model_name_or_path=base)
        with pytest.raises(UsageError):
            models.load(str(adapter), device="cpu")


# -- chat
# --------------------------------------------------------------------------------------------------------------


def chat(own: str | None = tiny.TEMPLATE, **options: str) -> Chat:
    """A tokenizer with a template of its own; `template` in the options is the user's."""
    return Chat("tiny", tiny.tokenizer(own), **options)


def own_words(rendered, tokenizer) -> list[str]:
    return [
        t
        for t, own in zip(
            tokenizer.convert_ids_to_tokens(rendered.ids), rendered.content, strict=True
        )
        if own
    ]


class TestRender:
    def test_without_a_template_it_says_what_to_pass(self):
        with pytest.raises(
            UsageError, match=r"no chat template.*--chat-template FILE.*--chat-template none"
        ) as caught:
            chat(None).render(Prompt("what is the colour"))
        one_line(caught)

    def test_none_sends_the_prompt_as_it_is(self):
        made = chat(None, template="none")
        assert own_words(made.render(Prompt("the red door")), made.tokenizer) == [
            "the",
            "red",
            "door",
        ]
        assert len(made.render(Prompt("the red door")).ids) == 3

    def test_a_template_of_the_user(self):
        made = chat(template="user {{ messages[0]['content'] }} assistant")
        assert made.tokenizer.convert_ids_to_tokens(made.render(Prompt("the door")).ids) == [
            "user",
            "the",
            "door",
            "assistant",
        ]

    def test_a_template_file(self, folder, tmp_path):
        (tmp_path / "my.jinja").write_text("sun {{ messages[0]['content'] }} moon")
        loaded = models.load(str(folder), device="cpu", chat_template=str(tmp_path / "my.jinja"))
        assert loaded.tokenizer.convert_ids_to_tokens(loaded.render(Prompt("the door")).ids) == [
            "sun",
            "the",
            "door",
            "moon",
        ]
        with pytest.raises(UsageError, match="--chat-template takes a file"):
            models.outline(str(folder), chat_template=str(tmp_path / "their.jinja"))

    def test_exactly_one_bos(self):
        """The template writes it, and the tokenizer would add another."""
        tokenizer = bos_adding_tokenizer()
        assert tokenizer("the door")["input_ids"][0] == tokenizer.bos_token_id
        for template in (tiny.TEMPLATE, "{{ bos_token }} {{ messages[0]['content'] }}"):
            tokenizer.chat_template = template
            ids = Chat("tiny", tokenizer).render(Prompt("the door")).ids
            assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        ids = Chat("tiny", tokenizer, "none").render(Prompt("the door")).ids
        assert ids.count(tokenizer.bos_token_id) == 1

    def test_thinking_is_off(self):
        off = (
            "{% if enable_thinking is defined and not enable_thinking %}shut{% else %}open{%"
            " endif %}"
        )
        template = "{{ messages[0]['content'] }} " + off
        made = chat(template)
        assert made.tokenizer.convert_ids_to_tokens(made.render(Prompt("the door")).ids) == [
            "the",
            "door",
            "shut",
        ]

    def test_an_empty_rendering(self):
        with pytest.raises(UsageError, match="no tokens"):
            chat(template="{{ messages[0]['content'].strip() }}").render(Prompt(" "))

    def test_the_date_does_not_enter(self):
        made = chat("{{ messages[0]['content'] }} {{ strftime_now('%f') }}")
        texts = []
        for _ in range(3):
            texts.append(made._written("the door"))
            time.sleep(0.001)
        assert set(texts) == {"the door 000000"}

    @pytest.mark.parametrize(
        "text", ["the 🚪 door", "a\u202eb", "e\u0301", "x\0y", "a" * 100_000, "colour\r\nof", "鍵"]
    )
    def test_odd_text(self, text):
        made = chat()
        rendered = made.render(Prompt(text))
        assert (
            len(rendered.content) == len(rendered.ids)
            and any(rendered.content)
            and not all(rendered.content)
        )


def bos_adding_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers.processors import TemplateProcessing

    made = tiny.tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    return made


REPEATS = (
    "{% for m in messages %}<s> user : the colour of the vault is blue . {{ m['content'] }} {%"
    " endfor %}assistant : the colour is"
)
CONTENT = {
    "plain": (tiny.TEMPLATE, "what is the colour", ["what", "is", "the", "colour"]),
    "white space around it": (
        tiny.TEMPLATE,
        "  what is the colour  ",
        ["what", "is", "the", "colour"],
    ),
    "stripped by the template": (
        tiny.TEMPLATE.replace("m['content']", "m['content'].strip()"),
        "  what is the colour ",
        ["what", "is", "the", "colour"],
    ),
    "its own words again": (REPEATS, "who is the moon", ["who", "is", "the", "moon"]),
}
STILL_MISTAKEN = {
    "a word of the generation prompt": (tiny.TEMPLATE, "assistant", ["assistant"]),
    "the end of the generation prompt": (REPEATS, "the colour is", ["the", "colour", "is"]),
    "a letter": (tiny.TEMPLATE, "a", ["a"]),
    "lowered by the template": (
        tiny.TEMPLATE.replace("m['content']", "m['content'].lower()"),
        "WHAT is the colour",
        ["what", "is", "the", "colour"],
    ),
}


class TestContent:
    """`content` marks the user's words: what the rms budget and ‖h‖₂ are taken over."""

    def check(self, template: str, text: str, wanted: list[str]) -> None:
        made = chat(template)
        rendered = made.render(Prompt(text))
        assert own_words(rendered, made.tokenizer) == wanted
        marked = [i for i, own in enumerate(rendered.content) if own]
        written = made.tokenizer.convert_ids_to_tokens(rendered.ids)
        before = (
            len(template.split("{{ m['content']")[0].split("%}")[-1].split()) or 3
        )  # tokens of the template before it
        assert marked[0] == before and written[marked[0]] == wanted[0]

    @pytest.mark.parametrize("case", CONTENT)
    def test_the_users_words(self, case):
        self.check(*CONTENT[case])

    @pytest.mark.parametrize("case", STILL_MISTAKEN)
    def test_the_users_words_and_no_others(self, case):
        self.check(*STILL_MISTAKEN[case])

    def test_with_a_tokenizer_of_bytes(self):
        """Byte-level BPE, as nearly all subjects have it: a token may hold half a character."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        plain = Tokenizer(tokenizer_models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        plain.decoder = decoders.ByteLevel()
        made = PreTrainedTokenizerFast(tokenizer_object=plain)
        made.chat_template = "<user>{{ messages[0]['content'] }}</user>"
        for text in ("colour", "Tür 🚪 é", "鍵"):
            rendered = Chat("bytes", made).render(Prompt(text))
            own = [i for i, mine in zip(rendered.ids, rendered.content, strict=True) if mine]
            assert made.decode(own) == text
            assert rendered.content == (False,) * 6 + (True,) * len(text.encode()) + (False,) * 7


# -- sites and blocks
# --------------------------------------------------------------------------------------------------


class TestSites:
    @pytest.mark.parametrize(
        ("words", "wanted"),
        [
            ("embedding,mid,last", [-1, 15, 29]),
            ("last,embedding", [-1, 29]),
            ("all", list(range(-1, 30))),
            ("stride:10", [-1, 0, 10, 20]),
            ("0,5,12", [0, 5, 12]),
            ("12, 5 ,5,block5", [5, 12]),
            ("0029", [29]),
        ],
    )
    def test_words(self, words, wanted):
        assert [s.layer_index for s in parse_sites(words, 30)] == wanted

    @pytest.mark.parametrize(("n", "mid"), [(1, 0), (2, 1), (3, 2), (4, 2), (26, 13), (32, 16)])
    def test_mid_is_half_way(self, n, mid):
        assert parse_sites("mid", n) == [Site(mid)]
        assert parse_sites("last", n) == [Site(n - 1)]

    @pytest.mark.parametrize(
        "words",
        [
            "30",
            "-1",
            "1.5",
            "block30",
            "",
            ",",
            "1,,2",
            "first",
            "embeding",
            "stride:0",
            "stride:x",
            "stride:-1",
            "1e1",
            "٣0",
            "blockblock1",
            "0x1",
            "all:2",
            "None",
        ],
    )
    def test_what_is_none_names_the_range(self, words):
        with pytest.raises(UsageError, match=r"0 to 29.*30 blocks") as caught:
            parse_sites(words, 30)
        assert ("Did you mean 'embedding'" in str(caught.value)) == (words == "embeding")
        one_line(caught)

    @pytest.mark.parametrize("words", ["²", "stride:²"])
    def test_digits_that_are_no_numbers(self, words):
        with pytest.raises(UsageError):
            parse_sites(words, 30)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_wrap_finds_the_blocks_and_freezes_the_rest(family):
    loaded = tiny.load(family)
    assert (
        loaded.n_blocks == tiny.N_BLOCKS
        and loaded.width == tiny.WIDTH
        and loaded.max_positions == 256
    )
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.site("mid") == Site(2) and loaded.stop_ids == {2}
    capped = getattr(loaded.model.config, "attn_logit_softcapping", None)
    assert loaded.model.config._attn_implementation == ("eager" if capped else "sdpa")


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_our_attention_is_eager_attention(family, padded):
    own = {"gemma3_text": {"query_pre_attn_scalar": 3}, "gemma2": {"query_pre_attn_scalar": 3}}.get(
        family, {}
    )
    plain = tiny.model(family, **own)
    plain.set_attn_implementation("eager")
    ids = torch.randint(4, 96, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    with torch.no_grad():
        ours, theirs = (
            tiny.load(family, **own).model(ids, attention_mask=mask).logits,
            plain(ids, attention_mask=mask).logits,
        )
    assert torch.allclose(ours[mask.bool()], theirs[mask.bool()], atol=1e-4)


def test_a_family_without_sdpa_is_spoken_to_in_eager():
    config = transformers.GptOssConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert models.wrap(model, tiny.tokenizer(), Subject("gpt-oss", "gpt-oss")).n_blocks == 4


def test_an_outline_knows_the_sizes_without_the_weights(saved):
    outline, model = models.outline(str(saved)), tiny.model("llama")
    assert (outline.n_blocks, outline.width) == (tiny.N_BLOCKS, tiny.WIDTH)
    assert outline.n_params == sum(p.numel() for p in model.parameters())
    assert outline.n_head_params == model.lm_head.weight.numel()
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    # the final norm is counted in
    assert math.isclose(outline.n_block_params, blocks, rel_tol=0.01)


def test_weights_that_nobody_reads_do_no_harm(folder):
    save_file({"x": torch.zeros(2)}, folder / "more.safetensors")
    assert models.load(str(folder), device="cpu").n_blocks == tiny.N_BLOCKS


def test_weights_may_be_tied_and_sharded(tmp_path):
    """Neither is a missing weight."""
    tied = tiny.model("llama", tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied", max_shard_size="20KB")
    tiny.tokenizer().save_pretrained(tmp_path / "tied")
    assert len(list((tmp_path / "tied").glob("*.safetensors"))) > 1
    loaded = models.load(str(tmp_path / "tied"), device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(loaded.model(ids).logits, tied(ids).logits, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_load_gives_the_dtype_asked_for(saved, dtype):
    loaded = models.load(str(saved), dtype=dtype, device="cpu")
    assert {p.dtype for p in loaded.model.parameters()} == {models.DTYPES[dtype]} == {loaded.dtype}
    assert loaded.device == torch.device("cpu")


def test_models_opened_by_threads_at_once_keep_their_ties(tmp_path):
    """transformers switches weight tying off while it opens a model, for all of them: a race would
    leave it off for good."""
    tiny.model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    tie = transformers.PreTrainedModel.tie_weights
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: models.load(str(tmp_path), device="cpu").model, range(16)))
    assert transformers.PreTrainedModel.tie_weights is tie
    assert all(m.lm_head.weight is m.model.embed_tokens.weight for m in opened)
