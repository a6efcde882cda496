"""A data set of the Hugging Face hub as a table, at a pinned revision:
`hub:ID@REVISION[:CONFIG][:SPLIT]`.

    read_hub("hub:PKU-Alignment/PKU-SafeRLHF@0123456789abcdef0123456789abcdef01234567:train").columns
    # the same repository as a local folder
    read_clone(Path("PKU-SafeRLHF"), split="train").columns

One part after the revision is the split, two are the configuration and the split; without any the
split is `train`. The revision is a commit, since a branch or tag may hold other rows tomorrow. Data
sets that bring code are never run: the `datasets` library has no way to since version 4, and an
older one is refused.
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auditgap.data.files import Table
from auditgap.errors import UsageError

PREFIX = "hub:"
#: Seconds that the hub has to answer before a read starts: without a network nobody should wait for
#: a library's retries.
PATIENCE = 4.0
_NAME = re.compile(
    r"hub:(?P<id>\w[\w.-]*(?:/\w[\w.-]*)?)@(?P<revision>[0-9a-f]{40})(?::(?P<first>[\w.-]+))?(?::(?P<second>[\w.\-\[\]%:]+))?"
)
#: Errors whose text speaks of names and connections, not of rows.
_TELLING = (
    "ValueError",
    "FileNotFoundError",
    "ConnectionError",
    "OfflineModeIsEnabled",
    "DatasetNotFoundError",
    "GatedRepoError",
)
_INSTEAD = "or give a local copy (jsonl, csv, parquet)"


class HubUnreachable(UsageError):
    """No connection to the hub, so the next data set need not be tried."""


@dataclass(frozen=True, slots=True)
class HubName:
    """What `hub:…` says. `config` is None for a data set's only (or default) configuration."""

    id: str
    revision: str
    config: str | None
    split: str

    @classmethod
    def parse(cls, name: str) -> HubName:
        """Raises UsageError when the revision is missing or not a commit, or the form is
        another."""
        match = _NAME.fullmatch(name)
        if match is None:
            pinned = re.search("@[0-9a-f]{40}", name)
            why = (
                "cannot be read"
                if pinned
                else (
                    "has no pinned revision (a commit's 40 hex digits after @; a branch may change)"
                )
            )
            raise UsageError(
                f"{name!r} {why}. The form is hub:ID@REVISION[:CONFIG][:SPLIT], or give a local"
                " file."
            )
        first, second = match["first"], match["second"]
        return cls(
            match["id"], match["revision"], first if second else None, second or first or "train"
        )


def read_hub(name: str) -> Table:
    """The rows of one split. Raises UsageError: form, no (or too old a) `datasets`, no such set or
    split, no connection."""
    return read_split(HubName.parse(name))


def read_split(
    hub: HubName, *, columns: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> Table:
    """The rows of one split, of these `columns` alone where some are named. `options` go to the
    reader of its files, such as `{"delimiter": "\\t"}`. Raises UsageError as `read_hub` does; for a
    gated set it names the page with the licence.
    """
    if Path(hub.id).exists():  # the library would open that instead, at no revision at all
        raise UsageError(
            f"hub:{hub.id} names a hub data set, but {hub.id} is also a path here. Go to another"
            " folder, or give a file."
        )
    _library(f"{PREFIX}{hub.id}")
    find_revision(hub.id, hub.revision)
    told = f"{hub.id}@{hub.revision[:8]}"
    return _load(
        told,
        hub.id,
        hub.config,
        hub.split,
        columns,
        {**(options or {}), "revision": hub.revision},
        hub.revision,
    )


def read_clone(
    folder: Path,
    *,
    config: str | None = None,
    split: str = "train",
    columns: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Table:
    """The rows of one split of a data set's repository that lies in a local folder. Raises
    UsageError as `read_hub` does."""
    _library(str(folder))
    # Its own cache would keep a second copy of the text for good.
    with tempfile.TemporaryDirectory(prefix="auditgap-") as cache:
        return _load(
            folder.name,
            str(folder),
            config,
            split,
            columns,
            {**(options or {}), "cache_dir": cache},
        )


def find_revision(hub_id: str, revision: str | None = None) -> str:
    """The commit that a data set stands at, or `revision` once it was seen there. Offline,
    `revision` is believed.

    Raises UsageError: no connection, no such data set or revision, and offline without a revision.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        if revision is None:
            raise UsageError(
                f"The revision of {hub_id} is not known, and HF_HUB_OFFLINE is set. Unset it to"
                f" look the revision up, {_INSTEAD}."
            )
        return revision
    try:
        found = HfApi().dataset_info(hub_id, revision=revision, timeout=PATIENCE).sha
    except Exception as error:  # httpx's and the library's own errors have no common base
        raise _refusal(hub_id, revision, error) from None
    if found is None:
        raise UsageError(
            f"The hub does not say which revision of {hub_id} it has. Name one after an @,"
            f" {_INSTEAD}."
        )
    return found


def is_downloaded(hub_id: str, revision: str | None) -> bool:
    """Whether a data set was read from the hub before, at this revision (None: at any)."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(
        try_to_load_from_cache(
            hub_id, "README.md", revision=revision or "main", repo_type="dataset"
        ),
        str,
    )


def _library(wanted: str) -> None:
    if importlib.util.find_spec("datasets") is None:
        raise UsageError(
            f"{wanted} needs the package datasets, which is not installed. Type: pip install"
            " 'datasets>=4'; or save the split as a jsonl, csv or parquet file and give that."
        )
    import datasets

    version = getattr(datasets, "__version__", "0")
    if int(version.split(".")[0]) < 4:
        raise UsageError(
            f"datasets {version} can run a data set's own code; 4 or later is wanted. Type: pip"
            " install 'datasets>=4'"
        )
    datasets.disable_progress_bars()
    # offline it tells of "the latest cached version", which `_load` checks
    datasets.logging.set_verbosity_error()


def _load(
    told: str,
    path: str,
    config: str | None,
    split: str,
    columns: Sequence[str],
    options: Mapping[str, Any],
    revision: str = "",
) -> Table:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        rows = datasets.load_dataset(path, config, split=split, **options)
        # Offline the library takes whichever revision it has; the folder of its cache bears the
        # commit.
        if not all(revision in file["filename"] for file in rows.cache_files):
            raise DatasetNotFoundError("another revision of it was downloaded")
        names = tuple(rows.column_names)
        if columns:  # answers and labels of hundreds of thousands of rows are not carried along
            rows = rows.select_columns([c for c in columns if c in names])
        return Table(told, names, tuple(rows.to_list()))
    except (
        Exception
    ) as error:  # the library's errors have no common base, and reach from httpx to pyarrow
        raise _refusal(told, split, error) from None


def _refusal(told: str, part: str | None, error: Exception) -> UsageError:
    """What went wrong and what to type next; an error's own text only where it cannot quote
    rows."""
    from huggingface_hub import constants

    kind, text = type(error).__name__, " ".join(str(error).split())
    page = f"https://huggingface.co/datasets/{told.split('@')[0]}"
    if kind == "GatedRepoError" or "is a gated dataset" in text:
        return UsageError(
            f"{told} is gated: accept its licence at {page}, then type: hf auth login ({_INSTEAD})."
        )
    if kind in ("RepositoryNotFoundError", "RevisionNotFoundError"):
        return UsageError(
            f"The hub has no data set {told}{f' at revision {part}' if part else ''}, or it is"
            f" private: see {page}."
        )
    if constants.HF_HUB_OFFLINE and ("Connect" in kind or kind == "DatasetNotFoundError"):
        return UsageError(
            f"{told} was not downloaded before, and HF_HUB_OFFLINE is set. Unset it, {_INSTEAD}."
        )
    if "Connect" in kind or "Timeout" in kind or kind == "HfHubHTTPError":
        return HubUnreachable(
            f"{told}: the hub cannot be reached ({kind}). Try again with a connection, set"
            f" HF_HUB_OFFLINE=1 to use what was downloaded before, {_INSTEAD}."
        )
    detail = f": {text[:200]}" if kind in _TELLING else ""
    return UsageError(
        f"The data set {told} (split {part}) cannot be read ({kind}{detail}). Without a connection,"
        " give a local jsonl, csv or parquet file."
    )
