"""Which files of a folder are its weights, and in which precision they are kept.

weights_files(folder)          # model.safetensors, or the shards that its index names
packing = packing_of(folder)   # None: plain numbers
check_opens(folder)            # UsageError for what transformers would open as another model
opening(folder)                # what `from_pretrained` is told besides
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from auditgap.errors import UsageError
from auditgap.models.reading import read_object
from auditgap.types import Document

SINGLE, INDEX, ADAPTER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
)
#: Where older releases of ModelOpt say how they packed; vLLM reads it, transformers does not.
BESIDE = "hf_quant_config.json"
#: Ways of packing that transformers unpacks by itself, while it reads, into 16 bits.
_UNPACKED = ("fp8", "mxfp4")


@dataclass(frozen=True, slots=True)
class Packing:
    """How a checkpoint is quantised, by what its config says."""

    method: str  #: fp8, mxfp4, bitsandbytes, gptq, awq, compressed-tensors, …
    bits: int | None = None

    def __str__(self) -> str:
        return self.method if self.bits is None else f"{self.method}, {self.bits} bits"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter, not a whole model."""
    return (folder / "adapter_config.json").is_file()


def weights_files(folder: Path) -> list[Path]:
    """The safetensors files that are opened: an adapter's, `model.safetensors`, or what the index
    names; not a second copy in another layout (`consolidated.safetensors`).

    Raises UsageError where there are none of these names, where the index names files that are
    absent, and where there are two whole sets, of which only one can be the model.
    """
    single, index = folder / SINGLE, folder / INDEX
    if is_adapter(folder):
        return [folder / ADAPTER]
    if not index.is_file():
        if not single.is_file():
            raise UsageError(
                f"{folder} holds neither {SINGLE} nor {INDEX}, so it is not known which of its"
                " safetensors are the model. Download the model again."
            )
        return [single]
    named = read_object(index).get("weight_map")
    shards = sorted({str(shard) for shard in named.values()}) if isinstance(named, dict) else []
    if single.is_file() and shards != [SINGLE]:
        raise UsageError(
            f"{folder} holds two sets of weights, {SINGLE} and the {len(shards)} files that {INDEX}"
            " names, and only one can be the model. Move the other out of the folder."
        )
    if absent := [shard for shard in shards if not (folder / shard).is_file()]:
        raise UsageError(
            f"{folder.name}/{INDEX} names {len(absent)} files that are not there, such as"
            f" {absent[0][:80]}; download the model again."
        )
    return [folder / shard for shard in shards]


def packing_of(folder: Path) -> Packing | None:
    """How the weights of a model's folder are quantised; None: they are plain numbers."""
    told = _told(folder)
    if told is None:
        return None
    bits = told.get("bits") or told.get("num_bits")
    bits = 4 if told.get("load_in_4bit") else 8 if told.get("load_in_8bit") else bits
    method = (
        told.get("quant_method")
        or told.get("quant_algo")
        or ("bitsandbytes" if bits in (4, 8) else "an unknown method")
    )
    return Packing(str(method)[:40], bits if isinstance(bits, int) else None)


def check_opens(folder: Path) -> None:
    """Raises UsageError where a model's weights are quantised in a way that transformers would open
    as another model than is served, or not at all."""
    packing = packing_of(folder)
    if packing is not None and packing.method not in _UNPACKED:
        raise UsageError(
            f"{folder.name} is a quantised checkpoint ({packing}), and an edit or a gradient would"
            " be of another model than is served. Audit the checkpoint in 16 bits that it was made"
            " from, or unpack it into a folder of its own and audit that."
        )


def opening(folder: Path) -> Document:
    """What `from_pretrained` is told besides: to unpack, where that can be done without a kernel of
    somebody else's."""
    packing = packing_of(folder)
    if packing is None:
        return {}
    from transformers.quantizers.auto import AutoQuantizationConfig

    told = AutoQuantizationConfig.from_dict({**(_told(folder) or {}), "dequantize": True})
    return {"quantization_config": told}


def _told(folder: Path) -> Document | None:
    """What config.json says of quantisation, for all of the model or for its text; else what a file
    beside it says, as older releases of ModelOpt wrote it."""
    path, beside = folder / "config.json", folder / BESIDE
    config = read_object(path) if path.is_file() else {}
    places = [config, *config.values()]  # of a wrapper, its text model's own
    for place in places:
        for key in ("quantization_config", "compression_config"):
            if isinstance(place, dict) and isinstance(place.get(key), dict):
                return place[key]
    told = read_object(beside).get("quantization") if beside.is_file() else None
    return told if isinstance(told, dict) else None
