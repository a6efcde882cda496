"""Objects below one prefix of object storage: read, written, listed, and asked for with patience.

    bucket = Objects("s3://bucket/runs/llama")
    bucket.write("run.json", data);  bucket.read("run.json");  bucket.names("cells")
    bucket.create("lock.json", note)        # False: somebody else's is there

Credentials are those that the storage's own library finds (for S3 the environment, ~/.aws or the
machine's role); none is taken, kept or shown here.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any, TypeVar

import fsspec

from auditgap.errors import UsageError
from auditgap.store.files import DiskError
from auditgap.types import Document

#: Storage whose objects appear whole or not at all, and the package that reaches it.
PROTOCOLS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "memory": "fsspec",
}
THREADS = 16  #: downloads at a time
FIRST_SECONDS = 6.0  #: of trying before storage that has never answered is given up,
PATIENCE = 30.0  #: and storage that has answered this process before

_EXISTS = ("PreconditionFailed", "412")
_NO_CONDITIONS = ("NotImplemented", "501")
_PART = re.compile(r"[A-Za-z0-9_=+@,:~-][A-Za-z0-9_.=+@,:~-]{0,254}")

_Answer = TypeVar("_Answer")


class Objects:
    """The objects of one prefix. Every call raises DiskError when storage does not answer."""

    def __init__(self, url: str) -> None:
        self.url = checked(url)
        self._answered = False

    def read(self, name: str) -> bytes | None:
        """The object's bytes; None when there is none."""
        try:
            found = self._ask(lambda: self._system.cat_file(self._object(name)))
            return found.encode() if isinstance(found, str) else found
        except FileNotFoundError:
            return None

    def read_json(self, name: str) -> Any | None:
        """The object's JSON; None when it is absent or none."""
        try:
            return json.loads(self.read(name) or b"")
        except (ValueError, RecursionError):
            return None

    def write(self, name: str, data: bytes) -> None:
        """Put the object, whole or not at all."""
        try:
            self._ask(lambda: self._system.pipe_file(self._object(name), data))
        except FileNotFoundError as error:
            raise self._refusal(error) from None

    def create(self, name: str, data: bytes) -> bool:
        """Put the object unless there is one; False when somebody else's is there."""
        path = self._object(name)

        def put() -> None:
            try:
                self._system.pipe_file(path, data, mode="create")
            except OSError as error:
                if _code(error) in _EXISTS:
                    raise FileExistsError(name) from None
                if _code(error) not in _NO_CONDITIONS:
                    raise
                if self._system.exists(path):  # storage without conditional writes: nearly as good
                    raise FileExistsError(name) from None
                self._system.pipe_file(path, data)

        try:
            self._ask(put)
        except FileNotFoundError as error:
            raise self._refusal(error) from None
        except FileExistsError:
            return self.read(name) == data  # ours, when only the answer to it was lost
        return True

    def delete(self, name: str) -> None:
        """Delete the object, if it is there."""
        with suppress(FileNotFoundError):
            self._ask(lambda: self._system.rm_file(self._object(name)))

    def names(self, under: str) -> list[str]:
        """All objects below the folder `under` ("": everything), as names such as
        cells/9c1e….parquet; one listing."""
        return self._below(lambda: self._system.find(self._object(under) if under else self._root))

    def entries(self) -> list[str]:
        """What stands at the top: names of objects and of folders."""
        return self._below(lambda: self._system.ls(self._root, detail=False))

    def folders_with(self, file: str) -> list[str]:
        """The folders at the top that have such a file."""
        return [
            name
            for name in sorted(self.entries())
            if _PART.fullmatch(name) and self.read(f"{name}/{file}") is not None
        ]

    def _below(self, call: Callable[[], Iterable[str]]) -> list[str]:
        try:
            found = self._ask(call)
        except FileNotFoundError:
            return []
        start = f"{self._root}/"
        return [
            path[len(start) :].rstrip("/")
            for path in found
            if path.startswith(start) and path != start
        ]

    def _object(self, name: str) -> str:
        return f"{self._root}/{name}"

    @cached_property
    def _root(self) -> str:
        return str(self._system._strip_protocol(self.url)).rstrip("/")

    @cached_property
    def _system(self) -> fsspec.AbstractFileSystem:
        protocol = self.url.split("://")[0]
        # others write there too
        options: Document = {"skip_instance_cache": True, "use_listings_cache": False}
        s3 = PROTOCOLS[protocol] == "s3fs"
        # it would try for minutes where nobody answers; how often and how long is decided in `_ask`
        if s3:
            # of one object's parts: it would ask for its size before every download
            options["max_concurrency"] = 1
            options["config_kwargs"] = {
                "connect_timeout": 4,
                "read_timeout": 8,
                "retries": {"total_max_attempts": 1},
                "max_pool_connections": THREADS,
            }
        try:
            # of abfs:// the account's name stands in the URL
            system, _ = fsspec.url_to_fs(self.url, **options)
        except ImportError:
            extra = "'auditgap[s3]'" if s3 else PROTOCOLS[protocol]
            raise UsageError(
                f"{protocol}:// needs {PROTOCOLS[protocol]}, which is not installed. Type: pip"
                f" install {extra}"
            ) from None
        except Exception as error:
            raise self._refusal(error) from None
        if s3:
            system.retries = 1
        return system

    def _ask(self, call: Callable[[], _Answer]) -> _Answer:
        """What `call` gives, tried again while storage does not answer; then a sentence
        (DiskError), never its own words, which can hold keys. FileNotFoundError and FileExistsError
        of an object go through."""
        until = time.monotonic() + (PATIENCE if self._answered else FIRST_SECONDS)
        pause = 0.2
        while True:
            try:
                answer = call()
                self._answered = True
                return answer
            except (FileNotFoundError, FileExistsError) as error:
                if _code(error) == "NoSuchBucket":
                    raise self._refusal(error) from None
                self._answered = True
                raise
            except (UsageError, DiskError):
                raise
            except Exception as error:
                if _hopeless(error) or time.monotonic() + pause > until:
                    self._answered = False  # what is asked on the way out waits less
                    raise self._refusal(error) from None
            time.sleep(pause)
            pause = min(2 * pause, 4.0)

    def _refusal(self, error: Exception) -> DiskError:
        if isinstance(error, FileNotFoundError):
            return DiskError(
                f"There is no bucket for {self.url}. Make it, or check the name, then run the same"
                " command again."
            )
        if _hopeless(error):
            return DiskError(
                f"Storage refused {self.url} ({_reason(error)}): no credentials, or none that may"
                " do this. Set them as its own tools want them (S3: AWS_ACCESS_KEY_ID with"
                " AWS_SECRET_ACCESS_KEY, or AWS_PROFILE) and run the same command again."
            )
        return DiskError(
            f"Storage does not answer for {self.url} ({_reason(error)}). What was finished before"
            " is intact; check the network and the endpoint (S3: AWS_ENDPOINT_URL), then run the"
            " same command again."
        )


def checked(url: str) -> str:
    """The URL without a slash at its end. Raises UsageError: no storage that we know, credentials
    in it, odd names."""
    protocol, _, rest = url.rstrip("/").partition("://")
    bucket, *parts = rest.split("/")
    # abfs://container@account/… is a name
    if ":" in bucket or ("@" in bucket and PROTOCOLS.get(protocol) != "adlfs"):
        raise UsageError(
            "The URL has a user, a password or a port in it, and would end up in logs with it."
            " Write s3://bucket/runs/llama, and set the rest in the storage's own variables (S3:"
            " AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)."
        )
    if protocol not in PROTOCOLS:
        raise UsageError(
            f"{shown(url)}: a run's folder is a path, or a URL of {', '.join(sorted(PROTOCOLS))}."
            " For example: --out s3://bucket/runs/llama"
        )
    if not parts or not all(_PART.fullmatch(part) for part in (bucket, *parts)):
        raise UsageError(
            f"{shown(url)} names no place for a run: a bucket and at least one folder, in plain"
            " letters. For example: --out s3://bucket/runs/llama"
        )
    return f"{protocol}://{rest}"


def shown(url: str) -> str:
    """A URL as it may be shown: without what stands before an @ or behind a question mark."""
    protocol, _, rest = url.partition("://")
    return f"{protocol.rsplit('@')[-1][:20]}://{rest.rsplit('@', 1)[-1].split('?')[0][:200]}"


def _code(error: BaseException) -> str:
    """The storage's own word for an error, such as NoSuchBucket; "" where it has none."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, Mapping):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _reason(error: BaseException) -> str:
    return re.sub(r"[^A-Za-z0-9_]", "", _code(error))[:60] or type(error).__name__


def _hopeless(error: BaseException) -> bool:
    """Whether asking again cannot help: storage does not know us."""
    return (
        isinstance(error, PermissionError)
        or "Credential" in type(error).__name__
        or "ProfileNotFound" in type(error).__name__
    )
