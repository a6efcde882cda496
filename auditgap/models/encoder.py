"""Sentence encoders: a vector a text, the mean of an encoder's last hidden states over its tokens.

    encoder = SentenceEncoder("sentence-transformers/all-MiniLM-L6-v2", device="cpu")
    encoder.embed(["Add 2 and 3.\nIt is 5.", "…"])     # [2, 384] fp32

What the library sentence-transformers saves is read as it saves it: a transformer, mean pooling and
perhaps a normalisation, which no cosine sees. Safetensors only; no foreign code.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from auditgap.errors import UsageError
from auditgap.models.choices import pick_device
from auditgap.models.door import as_usage_error, open_tokenizer
from auditgap.models.folder import OPENING, resolve
from auditgap.models.identity import fingerprint
from auditgap.models.reading import read_object
from auditgap.models.vetting import preflight
from auditgap.models.weights import check_opens, is_adapter, opening

KIND = "a sentence encoder"
#: Parts of a saved sentence encoder that change no cosine of a mean-pooled vector.
_PARTS = ("Transformer", "Pooling", "Normalize")
_MEAN = "pooling_mode_mean_tokens"
_MOST_TOKENS = 512  # where nothing names a smaller limit
_BATCH = 32
_MOST_LETTERS = 100_000


class SentenceEncoder:
    """See the module. Weights are loaded with the first text.

    Raises UsageError: no such model, an adapter, another pooling than the mean; Refused: pickled
    weights, foreign code.
    """

    def __init__(self, name: str, *, device: str = "cpu") -> None:
        self.name, self.device = name, pick_device(device)
        self.folder = resolve(name)
        preflight(self.folder)
        if is_adapter(self.folder):
            raise UsageError(f"{name} is an adapter; {KIND} with weights of its own is wanted.")
        check_opens(self.folder)
        self._check_parts()
        self.n_cut = 0  #: texts whose end was not read, so far

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.folder, tokenizer=self._tokenizer)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[n, D] fp32. Texts of equal length share a batch, so that no padding can change one."""
        whole = [self._tokenizer(text)["input_ids"] for text in texts]
        limit = self._limit
        self.n_cut += sum(len(ids) > limit for ids in whole)
        cut = self._tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
        by_length: dict[int, list[int]] = defaultdict(list)
        for i, ids in enumerate(cut):
            by_length[len(ids)].append(i)
        found: dict[int, np.ndarray] = {}
        for _, same in sorted(by_length.items()):
            for start in range(0, len(same), _BATCH):
                some = same[start : start + _BATCH]
                found |= dict(zip(some, self._means([cut[i] for i in some]), strict=True))
        return np.stack([found[i] for i in range(len(texts))])

    @torch.inference_mode()
    def _means(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """[b, D] of rows of one length."""
        ids = torch.tensor(rows, device=self.device)
        hidden = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        return hidden.float().mean(1).cpu().numpy()

    def close(self) -> None:
        """Give the model's memory back; the next text opens it again."""
        self.__dict__.pop("_model", None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @cached_property
    def _tokenizer(self) -> Any:
        return open_tokenizer(self.folder, self.folder.name)

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModel

        with as_usage_error(self.folder.name, KIND), OPENING:
            model, loading = AutoModel.from_pretrained(
                self.folder,
                dtype=torch.float32,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **opening(self.folder),
            )
        # the head that some families put on the first token is not read
        if missing := [key for key in loading["missing_keys"] if not key.startswith("pooler.")]:
            raise UsageError(
                f"{self.folder.name} is not {KIND}: its weights lack {', '.join(sorted(missing)[:3])}."
            )
        return model.to(self.device).eval().requires_grad_(False)

    @cached_property
    def _limit(self) -> int:
        """Tokens that are read of a text."""
        told = self.folder / "sentence_bert_config.json"
        config = read_object(self.folder / "config.json")
        known = [
            read_object(told).get("max_seq_length") if told.is_file() else None,
            config.get("max_position_embeddings"),
            self._tokenizer.model_max_length,
        ]
        return int(min([n for n in known if n], default=_MOST_TOKENS))

    def _check_parts(self) -> None:
        parts, pooling = self.folder / "modules.json", self.folder / "1_Pooling" / "config.json"
        other = [kind for kind in _kinds(parts) if kind not in _PARTS] if parts.is_file() else []
        told = read_object(pooling) if pooling.is_file() else {}
        modes = [key for key, on in told.items() if key.startswith("pooling_mode_") and on is True]
        if other:
            why = f"it has a part {other[0][:40]!r}"
        elif told and modes != [_MEAN] and told.get("pooling_mode") != "mean":
            why = "it pools otherwise"
        else:
            return
        raise UsageError(
            f"{self.name}: {KIND} whose vectors are means over tokens is wanted, and {why}. For"
            " example: sentence-transformers/all-MiniLM-L6-v2"
        )


def check_encoder(name: str) -> None:
    """Raises UsageError where no sentence encoder of that name can be opened; Refused as it does."""
    try:
        SentenceEncoder(name)
    except UsageError as error:
        raise UsageError(
            f"embedder: {error} Or leave it out: the base's states are read anyway."
        ) from None


def _kinds(path: Path) -> list[str]:
    """What the parts of a saved encoder are, by its list of them. Raises UsageError."""
    try:
        parts = json.loads(path.read_text("utf-8")[:_MOST_LETTERS])
        return [str(part["type"]).rpartition(".")[2] for part in parts]
    except (ValueError, TypeError, KeyError, RecursionError, OSError):
        raise UsageError(f"{path} is no list of an encoder's parts; download it again.") from None
