"""Questions as batches: a file of them is handed in, and a file of answers comes back within a day,
for half the price (OpenAI's `/v1/files` and `/v1/batches`, and servers that speak them).

    batches = Batches(client, openai, record, polls=(5.0, 60.0))
    async for key, plain, top, body in batches.answers({"9c1e…": (path, body)}, 1000, 0): …

What was handed in is written down before it is, and again once it has a number, so that a process
that ends in between finds its batch and neither drops an answer nor asks for one twice.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

from auditgap.engines.openai.answers import plain_word
from auditgap.engines.openai.dialects import error_in, value_of
from auditgap.errors import UsageError
from auditgap.store import files
from auditgap.types import Document, digest

#: A request: the path behind the server's host, and its body.
Asked = tuple[str, Document]
#: Requests and bytes of one batch at most; half of what OpenAI takes.
MOST, MOST_BYTES = 25_000, 100_000_000
_OVER = ("completed", "failed", "expired", "cancelled")
#: What a batch's metadata has, by which it is found again.
_MARK = "auditgap"
#: Batches that are looked through for one that was made and not written down.
_LOOKED = 100


class _NotTaken(UsageError):
    """A request was refused, so that nothing came of it."""


class Batches:
    """See the module. `record`: the file that says what was handed in (None: nothing is written
    down); `polls`: seconds between two looks, at first and at most."""

    def __init__(
        self,
        client: Any,
        openai: Any,
        record: Path | None,
        *,
        where: str,
        polls: tuple[float, float],
        tries: int = 5,
    ) -> None:
        self._client, self._openai, self._record = client, openai, record
        self._where, self._polls, self._tries = where, polls, tries
        self._known: dict[str, Document] = {} if record is None else _handed_in(record)

    @property
    def waiting(self) -> set[str]:
        """The keys of what was handed in and has not come back."""
        return _waiting(self._known)

    async def answers(
        self, asked: Mapping[str, Asked], most: int, top: int
    ) -> AsyncIterator[tuple[str, bool, int, object]]:
        """(key, whether it was a plain completion, how many log-probabilities were asked for, body)
        of every request that was answered, as batches end: those of this call, and of earlier ones
        that were left. A batch has `most` requests at most.

        What is not among them got no answer, or an error. Raises UsageError: no batches there, a batch that was
        refused or that ran out of time (what it had answered comes first).
        """
        waiting = self.waiting
        new = {key: request for key, request in asked.items() if key not in waiting}
        for part in _parts(new, most):
            await self._hand_in(part, top)
        pause, longest = self._polls
        while open_ := [mark for mark, batch in self._known.items() if not batch["over"]]:
            for mark in open_:
                batch = await self._call(
                    lambda mark=mark: self._client.batches.retrieve(self._known[mark]["id"])
                )
                if batch.status in _OVER:
                    plain, top = self._known[mark]["plain"], self._known[mark]["top"]
                    async for key, body in self._read(batch):
                        yield key, plain, top, body
                    self._note(mark, over=True)
                    self._check(batch)
            if any(not batch["over"] for batch in self._known.values()):
                await asyncio.sleep(pause)
                pause = min(longest, 1.5 * pause)

    async def _hand_in(self, part: Mapping[str, Asked], top: int) -> None:
        [path] = {path for path, _ in part.values()}
        mark = digest(sorted(part), 32)
        plain = not path.endswith("/chat/completions")
        lines = (
            {"custom_id": key, "method": "POST", "url": path, "body": body}
            for key, (_, body) in part.items()
        )
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        file = await self._call(
            lambda: self._client.files.create(file=(f"{mark}.jsonl", data), purpose="batch")
        )
        self._note(mark, id=None, keys=sorted(part), over=False, plain=plain, top=top)
        try:
            made = await self._call(
                lambda: self._client.batches.create(
                    input_file_id=file.id,
                    endpoint=path,
                    completion_window="24h",
                    metadata={_MARK: mark},
                ),
                once=True,  # a second one would be paid for as well
            )
        except _NotTaken:
            self._note(mark, over=True)  # there is none to wait for
            raise
        self._note(mark, id=made.id)

    async def find(self) -> None:
        """See that batches of before have their numbers: one may have been made and not written
        down. What never was is forgotten."""
        lost = [m for m, batch in self._known.items() if batch["id"] is None and not batch["over"]]
        if not lost:
            return
        listed = await self._call(lambda: self._client.batches.list(limit=_LOOKED))
        there = {(batch.metadata or {}).get(_MARK): batch.id for batch in reversed(listed.data)}
        for mark in lost:
            if mark in there:
                self._note(mark, id=there[mark])
            else:
                del self._known[mark]

    async def _read(self, batch: Any) -> AsyncIterator[tuple[str, object]]:
        """The lines of a batch's answers. What of them is no answer is left out."""
        if not batch.output_file_id:
            return
        came = await self._call(lambda: self._client.files.content(batch.output_file_id))
        for line in came.content.splitlines():
            try:
                told = value_of(line)
                key, response = told["custom_id"], told["response"]
                status, body = response["status_code"], response["body"]
            except (ValueError, RecursionError, TypeError, KeyError):
                continue
            if isinstance(key, str) and status == 200 and error_in(body) is None:
                yield key, body

    def _check(self, batch: Any) -> None:
        if batch.status == "completed":
            return
        data = getattr(batch.errors, "data", None) or ()
        why = "; ".join(dict.fromkeys(plain_word(getattr(e, "code", "")) for e in data))
        raise UsageError(
            f"A batch of {self._where} {batch.status}{f' ({why})' if why else ''}. What it had"
            " answered is kept. Type the same command again, with --set retry_failed=true, to hand in"
            " what is missing, or without --judge-batch to ask it one by one."
        )

    async def _call(self, call: Any, *, once: bool = False) -> Any:
        """What a call gives; tried again where nothing answers or is busy. Raises UsageError."""
        openai = self._openai
        for attempt in range(self._tries):
            try:
                return await call()
            except openai.APIStatusError as error:
                status = error.status_code
                if status in (404, 405):
                    raise _NotTaken(
                        f"{self._where} has no batches (HTTP {status}). Leave --judge-batch out."
                    ) from None
                what, passes = f"HTTP {status}", status in (408, 409, 429) or status >= 500
            except openai.APIConnectionError as error:
                what, passes = type(error).__name__, True
            if once or not passes or attempt + 1 == self._tries:
                # what was refused was not made; what nothing was heard of may have been
                refusal = UsageError if passes else _NotTaken
                raise refusal(
                    f"{self._where} did not take a batch ({what}). What it has is found again: type"
                    " the same command, with --set retry_failed=true."
                ) from None
            await asyncio.sleep(self._polls[0])
        raise AssertionError("unreachable")

    def _note(self, mark: str, **facts: Any) -> None:
        self._known[mark] = {**self._known.get(mark, {}), **facts}
        if self._record is not None:
            files.write_document(self._record, {"batches": self._known}, files.PRIVATE)


def _parts(asked: Mapping[str, Asked], most: int) -> Iterator[dict[str, Asked]]:
    """Requests of one path, as many as a batch takes."""
    for path in dict.fromkeys(path for path, _ in asked.values()):
        part: dict[str, Asked] = {}
        size = 0
        for key, request in asked.items():
            if request[0] != path:
                continue
            long = len(json.dumps(request[1])) + 200
            if part and (len(part) >= min(most, MOST) or size + long > MOST_BYTES):
                yield part
                part, size = {}, 0
            part[key], size = request, size + long
        if part:
            yield part


def record_of(journal: Path) -> Path:
    """Where it is written down which batches of a journal's answers were handed in."""
    return journal.with_suffix(".batches.json")


def check_none_waits(journal: Path) -> None:
    """Raises UsageError where questions of this journal were handed in as a batch that has not come
    back: asked one by one they would be paid for twice."""
    record = record_of(journal)
    if waiting := _waiting(_handed_in(record)):
        raise UsageError(
            f"{len(waiting)} questions to this judge were handed in as a batch that has not come"
            " back, and are paid for. Add --judge-batch, which waits for it; or, to ask them one by"
            f" one and pay for them again, delete {record}."
        )


def _handed_in(record: Path) -> dict[str, Document]:
    """The batches of a record, by their marks. Raises Damaged."""
    return (files.read_document(record) or {}).get("batches", {})


def _waiting(known: Mapping[str, Document]) -> set[str]:
    open_ = (batch["keys"] for batch in known.values() if not batch["over"])
    return {key for keys in open_ for key in keys}
