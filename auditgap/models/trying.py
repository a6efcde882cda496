"""Whether a folder's model opens, found out before one of its weights is read.

    tried(folder, "smollm2")["missing_keys"]     # what transformers would have made up
    check_fits(folder, "smollm2")                # UsageError: the weights do not fit the config

What is opened last (a judge once all is said, the third subject of four) would otherwise fail after
hours. transformers lays the model out without memory, from its config and the names and shapes in
its weights' headers; opening it later asks the same of the weights themselves.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from auditgap.errors import UsageError
from auditgap.models.claims import held_by
from auditgap.models.door import as_usage_error, open_config
from auditgap.models.folder import OPENING
from auditgap.models.weights import check_opens, packing_of
from auditgap.types import Document

#: A weight of a decoder block; a vision tower's blocks, which a causal LM does not read, are named
#: otherwise.
_BLOCK_KEY = re.compile(r"(model\.|transformer\.|gpt_neox\.|language_model\.)*(layers|h)\.\d+\.")


def opener(folder: Path) -> Any:
    """The class that opens a folder's model: a causal LM's, or that of a wrapper which transformers
    opens as an image-text-to-text model alone, and which reads text without images."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    config = open_config(folder, folder.name)
    as_text = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    with_images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    is_wrapper = config.model_type not in as_text and config.model_type in with_images
    return AutoModelForImageTextToText if is_wrapper else AutoModelForCausalLM


def check_fits(folder: Path, name: str) -> None:
    """Raises UsageError where a causal LM's weights are quantised in a way that transformers opens
    as another model, or not at all; and where they are not those of its config."""
    check_opens(folder)
    check_all_loaded(name, tried(folder, name, opener(folder)), folder)


def tried(
    folder: Path, name: str, auto: Any, what: str = "a causal LM with a tokenizer"
) -> Document:
    """What transformers says of loading the folder as `auto` does (`missing_keys` and the like);
    nothing of packed weights, whose names are other ones until they are unpacked, and of a family
    that cannot be laid out without numbers. Raises UsageError where it does not open it at all."""
    if packing_of(folder) is not None:
        return {}
    with OPENING, as_usage_error(name, what):
        try:
            return _tried(auto, open_config(folder, name), tuple(held_by(folder).shapes.items()))
        except NotImplementedError as error:
            if "meta tensor" not in str(error):
                raise
            return {}  # whoever loads it finds out


def _tried(auto: Any, config: Any, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> Document:
    with torch.device("meta"):
        kind = type(auto.from_config(config, trust_remote_code=False))
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes}
    _, found = kind.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        device_map="meta",
        output_loading_info=True,
        trust_remote_code=False,
    )
    return found


def check_all_loaded(name: str, found: Document, folder: Path) -> None:
    """Raises UsageError when weights were missing (they would be random) or left over (they belong
    to another model)."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in found.get(what) or ())
        # a stray file's weights, or a buffer of an older release, change nothing
        if what == "unexpected_keys":
            keys = [
                key
                for key in keys
                if _BLOCK_KEY.match(key) and not key.endswith(("inv_freq", ".bias", ".masked_bias"))
            ]
        if keys:
            raise UsageError(
                f"{name}: the weights in {folder.name} do not fit its config.json ({len(keys)}"
                f" {what.replace('_', ' ')}, such as {keys[0][:80]}). Download the model again;"
                " what transformers would make of it is another model."
            )
