"""What can be known of a subject before its weights are loaded.

    seen = outline("smollm2")
    seen.n_blocks, seen.subject.fingerprint

It reads the config, the tokenizer and the headers of the safetensors files.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from auditgap.errors import UsageError
from auditgap.models.adapters import check_kind
from auditgap.models.blocks import count_blocks, width_of
from auditgap.models.chat import Chat
from auditgap.models.claims import check_width
from auditgap.models.door import as_usage_error, open_config, open_tokenizer
from auditgap.models.folder import adapter_base, resolve
from auditgap.models.identity import fingerprint, speaks
from auditgap.models.trying import check_fits
from auditgap.models.turns import read_template
from auditgap.models.vetting import ignored_code, preflight
from auditgap.models.weights import Packing, is_adapter, packing_of, weights_files
from auditgap.types import Subject, ThinkingMode


@dataclass(frozen=True, eq=False)
class Outline:
    """What can be known of a subject before its weights are loaded: enough to plan, and to
    estimate, an audit."""

    subject: Subject
    folder: Path
    chat: Chat
    n_blocks: int
    width: int
    n_block_params: int  #: all parameters of the blocks
    n_head_params: int  #: of the output projection
    n_params: int
    #: token ids that end a completion, as `LoadedModel.stop_ids`
    stop_ids: frozenset[int] = frozenset()
    max_positions: int | None = None  #: tokens that it can attend to; None: not said
    packing: Packing | None = None  #: how its weights are quantised; None: they are plain numbers
    #: dtypes of its files, as safetensors calls them, that of most numbers first
    stored: tuple[str, ...] = ()
    note: str = ""  #: what was ignored of its folder
    thinking: ThinkingMode = "auto"  #: how an audit has it think

    def asked_to_think(self, mode: ThinkingMode) -> Outline:
        """The same, spoken to in this way. Raises UsageError where its template has no such way."""
        if mode == "auto":
            return self
        return replace(self, chat=self.chat.thinking(mode != "off"), thinking=mode)

    def check_opens(self) -> None:
        """Raises UsageError where transformers would open its weights as another model, or not at
        all: they are quantised, or not those of its config."""
        base = adapter_base(self.folder) if is_adapter(self.folder) else self.folder
        check_fits(base, self.subject.name)


def outline(
    name: str, *, chat_template: str | None = None, thinking: ThinkingMode = "auto"
) -> Outline:
    """Resolve, look at and fingerprint a subject, without loading its weights.

    Raises Refused or UsageError as `preflight`, `resolve` and transformers' own reading of the
    config find cause to, and where its template cannot have it think so.
    """
    folder = resolve(name)
    preflight(folder)
    base = folder
    if is_adapter(folder):
        check_kind(folder)
        base = adapter_base(folder)
    config = open_config(base, name).get_text_config()
    tokenizer = open_tokenizer(folder if speaks(folder) else base, name)
    with as_usage_error(name):
        stop_ids = stop_ids_of(_generation_config(base), tokenizer)
    check_width(name, width_of(config), base)
    numbers, n_embedding = _count_parameters(base)
    n_params = numbers.total()
    tied = bool(getattr(config, "tie_word_embeddings", False))
    return Outline(
        Subject(name, fingerprint(folder, tokenizer=tokenizer)),
        folder,
        Chat(name, tokenizer, read_template(chat_template)),
        count_blocks(config),
        width_of(config),
        n_block_params=max(n_params - n_embedding * (1 if tied else 2), 0),
        n_head_params=n_embedding,
        n_params=n_params,
        stop_ids=stop_ids,
        max_positions=getattr(config, "max_position_embeddings", None),
        packing=packing_of(base),
        stored=tuple(dtype for dtype, _ in numbers.most_common()),
        note=ignored_code(base),
    ).asked_to_think(thinking)


def stop_ids_of(
    generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Token ids that end a completion: the generation config's and the tokenizer's."""
    ids = None if generation is None else generation.eos_token_id
    ids = [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return frozenset(ids)


def _generation_config(base: Path) -> GenerationConfig:
    """What transformers would give the loaded model: generation_config.json, else what config.json
    says of generation."""
    try:
        return GenerationConfig.from_pretrained(
            base, trust_remote_code=False, local_files_only=True
        )
    except OSError:
        return GenerationConfig.from_pretrained(
            base,
            "config.json",
            _from_model_config=True,
            trust_remote_code=False,
            local_files_only=True,
        )


def _count_parameters(folder: Path) -> tuple[Counter[str], int]:
    """Stored numbers by dtype, and how many are of the input embedding, from the headers of the
    safetensors files."""
    from safetensors import SafetensorError, safe_open

    total: Counter[str] = Counter()
    embedding = 0
    for path in weights_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    tensor = file.get_slice(key)
                    size = math.prod(tensor.get_shape())
                    total[tensor.get_dtype()] += size
                    if "embed" in key.rpartition(".")[0].rpartition(".")[2] and size > embedding:
                        embedding = size
        except (SafetensorError, OSError) as error:
            raise UsageError(
                f"{path} is not a readable safetensors file ({error}); download the model again."
            ) from None
    return total, embedding
