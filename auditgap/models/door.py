"""The one door to what transformers opens of a model's folder: its config and its tokenizer.

    config = open_config(folder, "smollm2")
    tokenizer = open_tokenizer(folder, "smollm2")

Local files alone, no code of the folder's, and one kind of refusal whatever is raised behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from auditgap.errors import AuditgapError, UsageError


def open_config(folder: Path, name: str) -> Any:
    """The config of a model's folder; of a wrapper the whole one. Raises UsageError."""
    from transformers import AutoConfig

    with as_usage_error(name):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def open_tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer of a folder that has one. Raises UsageError."""
    from transformers import AutoTokenizer

    with as_usage_error(name, "a model with a tokenizer"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


@contextmanager
def as_usage_error(name: str, what: str = "a causal LM with a tokenizer") -> Iterator[None]:
    """Whatever a library raises while it opens `name` as `what`, as a UsageError."""
    try:
        yield
    except AuditgapError:
        raise
    except (Exception, *panics()) as error:  # of many kinds, all of them about this folder
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"transformers cannot open {name} as {what}: {first[:300]}") from None


def panics() -> tuple[type[BaseException], ...]:
    """What tokenizers raises where its Rust code panics, which is no Exception; empty before it
    has."""
    return tuple(t for t in BaseException.__subclasses__() if t.__name__ == "PanicException")
