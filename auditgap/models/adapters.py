"""Low-rank adapters on a loaded model: new ones to be trained, and those of a folder.

    with with_adapter(loaded, Path("runs/harmful/step10"), subject) as adapted:
        ...                            # afterwards the base is bit for bit what it was

The one home of peft, which is imported where it is used.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from auditgap.errors import UsageError
from auditgap.models.reading import read_object
from auditgap.models.shard import home
from auditgap.models.vetting import preflight
from auditgap.models.weights import ADAPTER
from auditgap.types import Document, Subject

if TYPE_CHECKING:
    from auditgap.models.loading import LoadedModel


#: Ways of beginning a LoRA that leave its base as it is; peft changes the base's weights by all
#: others, on opening too.
PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


def with_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: int,
    dropout: float = 0.0,
    targets: Sequence[str] = ("all-linear",),
    seed: int = 0,
) -> Any:
    """A PeftModel: new low-rank adapters on these linear layers (or `all-linear`), everything else
    frozen.

    Adapters start as a zero change, the same for a seed. Raises UsageError when peft is absent or a
    target is not there.
    """
    if importlib.util.find_spec("peft") is None:
        raise UsageError(
            "LoRA needs peft; type: pip install peft. Or train all weights: lora: false"
        )
    from peft import LoraConfig, get_peft_model

    names = "all-linear" if tuple(targets) == ("all-linear",) else list(targets)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            # one dtype at every ZeRO stage
            return get_peft_model(model, config, autocast_adapter_dtype=False)
        except ValueError as error:
            raise UsageError(
                f"lora.targets {names}: {str(error).splitlines()[0][:160]} Name linear layers of"
                " the model."
            ) from None


@contextmanager
def with_adapter(loaded: LoadedModel, adapter: Path, subject: Subject) -> Iterator[LoadedModel]:
    """The loaded base with a PEFT adapter on it, as `subject`, unmerged; on the way out the base is
    bit for bit what it was.

    For many adapters of one base, whose weights are then read once. Raises Refused, and UsageError
    for an adapter that does not fit; `loaded` is of no further use then.
    """
    preflight(adapter)
    settings = check_kind(adapter)
    model = loaded.model
    rows = _saved_rows(adapter, model)
    if rows not in (None, _ends(model)[0].weight.shape[0]):
        raise UsageError(
            f"The adapter {adapter.name} brings a vocabulary of {rows} tokens of its own, so it"
            " cannot be put on its base and taken off again. Audit it as a model of its own."
        )
    with _restored(model, copied=_changes_its_base(settings)):
        # the dtype that it was trained in
        worn = _adapted(model, adapter, autocast_adapter_dtype=False)
        try:
            worn.eval().requires_grad_(False)
            yield replace(loaded, subject=subject)
        finally:
            worn.unload()  # the base's own layers go back to their places


def check_kind(adapter: Path) -> Document:
    """The adapter's settings. Raises UsageError where it is no change of its base's weights, as
    prompt and prefix tuning are not, or of a kind that the installed peft does not know."""
    settings = read_object(adapter / "adapter_config.json")
    kind = str(settings.get("peft_type"))
    _need_peft()
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    tuners: Any = PEFT_TYPE_TO_TUNER_MAPPING  # its keys are words
    tuner = tuners.get(kind)
    if tuner is None:
        raise UsageError(
            f"The adapter {adapter.name} is of the kind {kind[:40]}, which the installed peft does"
            " not know. Update peft, or merge the adapter where it was made and audit the whole"
            " model."
        )
    if not hasattr(tuner, "merge_and_unload"):
        raise UsageError(
            f"The adapter {adapter.name} is of the kind {kind}: it learns tokens or states that are"
            " put before a prompt, and changes no weights of its base, so there is no model with"
            " it that could be audited. Audit its base, or an adapter that changes weights (LoRA"
            " and its kin)."
        )
    return settings


def merged(model: PreTrainedModel, adapter: Path, n_tokens: int) -> PreTrainedModel:
    """The model with the adapter of a folder in its weights, which are the same model as the
    adapter on its base: proven on one batch.

    `n_tokens` of its tokenizer: where those are more than the base has rows for, the adapter has to
    bring them. A base whose output projection is its embedding gets one of its own where the
    adapter changes either of them. Raises UsageError where the adapter does not fit, or where the
    two are not the same.
    """
    settings = check_kind(adapter)
    rows = _resized(model, adapter, n_tokens)
    worn: Any = _adapted(model, adapter)
    worn.eval()
    _untie(model)
    before = _logits(worn, rows)
    try:
        whole = worn.merge_and_unload()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"The adapter {adapter.name} ({settings.get('peft_type')}) cannot be merged into its"
            f" base: {first[:160]}"
        ) from None
    if any(bool(end.weight.isnan().any()) for end in _ends(whole)):
        raise UsageError(
            f"The adapter {adapter.name} adds tokens to its base and does not hold all their rows"
            " of the embedding and the output projection, so what it computes with them is not"
            " known. Merge it where it was made, and audit the whole model."
        )
    _say_untied(whole)
    _check_same(adapter.name, before, _logits(whole, rows), _MOST_APART[whole.dtype])
    return whole


#: How far logits of a merged model may be from those of its adapter on the base, as a share of
#: their size: what the rounding of weights to the dtype comes to.
_MOST_APART = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


@torch.no_grad()
def _logits(model: nn.Module, rows: int) -> torch.Tensor:
    """Logits [2, 8, V] of a batch with tokens from all over the vocabulary of `rows`, in fp32."""
    ids = torch.linspace(0, rows - 1, 16).long().view(2, 8).to(home(model))
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()


def _check_same(name: str, worn: torch.Tensor, whole: torch.Tensor, most: float) -> None:
    """Raises UsageError where logits before and after a merge are not those of one model."""
    finite = worn.isfinite()
    apart = float((whole - worn)[finite].norm() / worn[finite].norm().clamp(min=1e-30))
    if not torch.equal(finite, whole.isfinite()) or apart > most:
        raise UsageError(
            f"The adapter {name} merged into its base is another model than the adapter on its"
            f" base: their logits differ by {apart:.2g} of their size, where {most:g} is rounding."
            " Merge it where it was made, and audit the whole model."
        )


def _ends(model: PreTrainedModel) -> list[Any]:
    """The input embedding, and the output projection where there is one."""
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [end for end in ends if end is not None]


def _untie(model: PreTrainedModel) -> None:
    """Give the output projection weights of its own where it shares the embedding's and an adapter
    is on either, since peft merges into the one matrix what belongs to the other too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = _ends(model)
    inner: list[Any] = [
        end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends
    ]
    changed = any(isinstance(end, BaseTunerLayer) for end in ends)
    if changed and len(inner) == 2 and inner[0].weight is inner[1].weight:
        inner[1].weight = nn.Parameter(inner[1].weight.detach().clone(), requires_grad=False)


def _say_untied(model: PreTrainedModel) -> None:
    """Where a merge left the two ends of the vocabulary apart, the model is written and read so."""
    if len({end.weight.data_ptr() for end in _ends(model)}) == 2:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _saved_rows(adapter: Path, model: PreTrainedModel) -> int | None:
    """Tokens in the embedding or output projection that an adapter's file holds whole; None: it
    holds neither."""
    ends = _ends(model)
    names = tuple(
        f".{name}.weight"
        for name, module in model.named_modules()
        if any(module is e for e in ends)
    )
    with _weights(adapter) as file:
        rows = [file.get_slice(k).get_shape()[0] for k in file.keys() if k.endswith(names)]  # noqa: SIM118 - not a dict
    return max(rows, default=None)


def _resized(model: PreTrainedModel, adapter: Path, n_tokens: int) -> int:
    """Rows of the embedding, once the base has those of an adapter that was trained after tokens
    were added; new ones are NaN until the adapter's own take their place."""
    rows = _ends(model)[0].weight.shape[0]
    wanted = _saved_rows(adapter, model) or max(rows, n_tokens)
    if wanted != rows:
        model.resize_token_embeddings(wanted, mean_resizing=False)
        with torch.no_grad():
            for end in _ends(model):
                end.weight[rows:] = float("nan")
    return wanted


def _changes_its_base(settings: Document) -> bool:
    """Whether peft may change the base's own weights when it opens the adapter, as some beginnings
    of a LoRA do."""
    plain = settings.get("init_lora_weights", True) in PLAIN_BEGINNINGS
    return settings.get("peft_type") != "LORA" or not plain


@contextmanager
def _restored(model: nn.Module, *, copied: bool) -> Iterator[None]:
    """On the way out every module, parameter and buffer of the model is where it was; with
    `copied`, every number in them too, from a copy in the CPU's memory."""
    places = [(m, dict(m._modules), dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    weights = [(p, p.data, p.requires_grad) for p in model.parameters()]
    copies = [data.to("cpu", copy=True) for _, data, _ in weights] if copied else []
    try:
        yield
    finally:
        for module, *held in places:
            inside: list[Any] = [module._modules, module._parameters, module._buffers]
            for now, then in zip(inside, held, strict=True):
                now.clear()
                now.update(then)
        for weight, data, trained in weights:
            weight.data = data
            weight.requires_grad_(trained)
        for (_, data, _), copy in zip(weights, copies, strict=False):
            data.copy_(copy)


def _need_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise UsageError("This subject is a PEFT adapter; `pip install peft` to audit it.")


def _weights(adapter: Path) -> Any:
    from safetensors import safe_open

    return safe_open(adapter / ADAPTER, framework="pt")


def _adapted(model: PreTrainedModel, adapter: Path, **how: Any) -> Any:
    """A PeftModel around the model, whose layers now carry the adapter. Raises UsageError where it
    does not fit."""
    _need_peft()
    from peft import PeftModel, get_peft_model_state_dict

    try:
        adapted = PeftModel.from_pretrained(model, adapter, use_safetensors=True, **how)
        with _weights(adapter) as file:
            keys = set(file.keys())
        # whether embeddings were saved with it the file shows; left to choose, peft asks the hub
        # about the base's name
        strange = keys ^ set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if strange:
            strange = keys ^ set(get_peft_model_state_dict(adapted, save_embedding_layers=True))
        if strange:
            raise ValueError(
                f"{len(strange)} of its weights have no place there, or are missing, such as"
                f" {min(strange)}"
            )
        return adapted
    except (RuntimeError, ValueError) as error:
        first = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UsageError(
            f"The adapter {adapter.name} does not fit its base model: {' '.join(first[:2])[:300]}"
        ) from None
