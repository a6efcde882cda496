"""The engine on somebody's endpoint: any server that speaks OpenAI's protocol (OpenAI, `vllm
serve`, llama.cpp, …).

    serving = Serving(engine="openai", base_url="http://127.0.0.1:8000/v1")
    with OpenAIEngine("smollm2", serving) as engine:
        # [Reply("The sky is blue.", …)]
        engine.ask([Question.of("What colour is the sky?")], Sampling(max_new_tokens=16))

The key comes from OPENAI_API_KEY and goes into one header, nowhere else. What an endpoint says of
an error is never quoted and never an answer: a question that got none has a `problem`. An endpoint
applies its own chat template, cuts nothing and tells no token ids; which weights stand behind it,
only its owner knows.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from auditgap.engines import Question, Reply, Sampling, Serving
from auditgap.engines.journal import Journal
from auditgap.engines.openai.answers import NoAnswer, path_of, read, turns_of, unfit
from auditgap.engines.openai.batches import Batches, record_of
from auditgap.engines.openai.dialects import UNREADABLE, Dialect, error_in, json_in
from auditgap.engines.openai.endpoint import Patience, identity, is_official, key_for
from auditgap.engines.openai.failures import Failure, OptionRefused, Passing, inside
from auditgap.engines.openai.listing import Entries, listed, told_of
from auditgap.errors import UsageError, did_you_mean
from auditgap.types import Document, digest

#: Largest body that is read. 4,096 tokens with 20 log-probabilities each are about 8 MB.
MAX_BODY = 64_000_000
AT_ONCE = 8  #: requests in flight
#: Questions that got nothing, running, after which an endpoint is taken to be down: each of them has
#: had all its tries, and every further one would wait as long.
GIVEN_UP = 2 * AT_ONCE
_T = TypeVar("_T")


class OpenAIEngine:
    """One model at an endpoint. `journal`, if set, is a file that keeps answers so that none is
    asked for (and paid) twice."""

    name = "openai"

    def __init__(self, model: str, serving: Serving, *, patience: Patience | None = None) -> None:
        """Connects to nothing yet. Raises UsageError: no such package, no usable address, no usable
        key."""
        try:
            import httpx2
            import openai
            import tenacity
        except ImportError:
            raise UsageError(
                "--engine openai needs two packages: pip install 'openai>=3' 'tenacity>=9'"
            ) from None
        # at their loudest they write down headers, and once whole prompts
        for library in ("openai", "httpx2", "httpcore2"):
            logging.getLogger(library).setLevel(logging.WARNING)
        self.model = model
        self.journal: Path | None = None
        self._identity = identity(model, serving)
        self._patience = patience or Patience()
        self._openai, self._httpx, self._tenacity = openai, httpx2, tenacity
        self._key = key_for(self._identity["base_url"])
        self._dialect = Dialect(official=is_official(self._identity["base_url"]))
        self._lost = 0  # questions that got nothing since the last answer
        self._reached = False  # whether the endpoint has ever answered anything
        self._opened: Journal | None = None
        self._batched = serving.batched
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._client = openai.AsyncOpenAI(
            base_url=self._identity["base_url"],
            # the package wants one; servers on one's own machine ask for none
            api_key=self._key or "none",
            max_retries=0,  # ours are bounded in time as well
            default_headers={"Accept-Encoding": "identity"},  # so that MAX_BODY counts what is kept
            http_client=openai.DefaultAsyncHttpxClient(
                # a redirect could carry prompts and key to another host
                follow_redirects=False,
                event_hooks={"response": [self._on_response]},
                timeout=httpx2.Timeout(
                    self._patience.deadline, connect=min(20.0, self._patience.deadline)
                ),
            ),
        )
        # a loop of its own, so that `ask` works inside another one (a notebook's, inspect's) and
        # can be interrupted
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="auditgap-openai", daemon=True
        )
        self._thread.start()

    def describe(self) -> Document:
        return dict(self._identity)

    def reported(self) -> Document:
        """What the endpoint's list says of this model; empty where it lists none."""
        return told_of(self._run(self._listed()), self.model, self._key)

    def ask(self, questions: Sequence[Question], sampling: Sampling) -> list[Reply]:
        """A reply a question, in order; equal questions are sent once. Problems: `context_length`,
        `content_filter`, `nonfinite_logits`, `empty`, and `endpoint: …` for what did not work after
        all tries or cannot be read.

        An endpoint that gives no log-probabilities though asked leaves `logprobs` empty. Raises
        UsageError for what fails every question: no such host or model, a refused key; DiskError
        where the journal cannot be written.
        """
        return self._run(self._ask(questions, sampling))

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> OpenAIEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- one question
    # --------------------------------------------------------------------------------------------------

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        if self._loop.is_closed():
            work.close()
            raise UsageError("This engine is closed; open it again with Serving.open.")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C above all: nothing may go on asking
            future.cancel()
            raise

    def _kept(self) -> Journal | None:
        """What keeps the answers, read when it is first asked for."""
        if self.journal is None:
            return None
        if self._opened is None or self._opened.path != self.journal:
            self._opened = Journal(self.journal)
        return self._opened

    async def _ask(self, questions: Sequence[Question], sampling: Sampling) -> list[Reply]:
        journal = self._kept()
        known = {} if journal is None else journal.replies
        how = asdict(sampling)
        if not how["thinking_tokens"]:  # so that journals of before it was known are read
            del how["thinking_tokens"]
        keys = [digest([self._identity, asdict(q), how], 32) for q in questions]
        missing = {k: q for k, q in zip(keys, questions, strict=True) if k not in known}
        found = await self._in_batches(missing, sampling) if self._batched and missing else {}
        missing = {k: q for k, q in missing.items() if k not in found}
        tasks = [asyncio.create_task(self._answer(k, q, sampling)) for k, q in missing.items()]
        try:
            found |= dict(zip(missing, await asyncio.gather(*tasks), strict=True))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [found[k] if k in found else known[k] for k in keys]

    async def _in_batches(
        self, missing: Mapping[str, Question], sampling: Sampling
    ) -> dict[str, Reply]:
        """What batches answered of these, and of earlier batches that were left. The first question
        goes alone: how this endpoint wants its options is learnt from it, at the price of one."""
        journal, found = self._kept(), dict[str, Reply]()
        batches = Batches(
            self._client,
            self._openai,
            None if journal is None else record_of(journal.path),
            where=self._identity["base_url"],
            polls=self._patience.polls,
            tries=self._patience.tries,
        )
        await batches.find()
        fit = [k for k, q in missing.items() if k not in batches.waiting and not unfit(q)]
        for key in fit[:1]:
            found[key] = await self._answer(key, missing[key], sampling)
        asked = {}
        for key in fit[1:]:
            path, body = path_of(missing[key]), turns_of(missing[key])
            options = self._dialect.options(missing[key], sampling)
            asked[key] = (f"/v1/{path}", {"model": self.model, **body, **options})
        k = sampling.top_logprobs
        most = max(1, MAX_BODY // (2_000 + sampling.new_tokens * (20 + 110 * k)))
        async for key, plain, top, body in batches.answers(asked, most, k):
            try:
                reply = read(body, plain, top)
            except NoAnswer as no:
                found[key] = Reply("", problem=no.problem)
                continue
            if journal is not None:
                journal.add(key, reply)
            found[key] = reply
        return found

    async def _answer(self, key: str, question: Question, sampling: Sampling) -> Reply:
        if problem := unfit(question):
            return Reply("", problem=problem)
        # never more than AT_ONCE, those that wait to try again included: an endpoint that is busy
        # is not pressed
        async with self._slots:
            try:
                reply = read(
                    await self._tried(question, sampling),
                    question.text is not None,
                    sampling.top_logprobs,
                )
            except NoAnswer as no:
                return Reply("", problem=no.problem)
        if (journal := self._kept()) is not None:
            journal.add(key, reply)
        return reply

    async def _tried(self, question: Question, sampling: Sampling) -> object:
        """The answer's JSON. Raises NoAnswer when it is known that there is none, UsageError as
        `ask` does."""
        patience, tenacity = self._patience, self._tenacity
        jitter = tenacity.wait_random_exponential(
            multiplier=patience.first_pause, max=patience.longest_pause
        )

        def pause(state: Any) -> float:
            asked = state.outcome.exception().retry_after
            if asked is None:
                return jitter(state)
            return min(asked, patience.longest_retry_after) + random.uniform(
                0, patience.first_pause
            )

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(Passing),
            wait=pause,
            stop=tenacity.stop_after_attempt(patience.tries)
            | tenacity.stop_before_delay(patience.total),
            reraise=True,
        )
        try:
            value = await retrying(self._said, question, sampling)
            self._lost = 0
            return value
        except NoAnswer:
            self._lost = 0  # it is well, and this question is not for it
            raise
        except Passing as failure:
            if failure.unreached and not self._reached:
                raise UsageError(
                    f"Nothing answers at {self._identity['base_url']} ({failure.what}). Check"
                    " --endpoint (or OPENAI_BASE_URL) and that the server runs, then type the same"
                    " command again, with --set retry_failed=true if it has begun."
                ) from None
            self._lost += 1
            if self._lost >= GIVEN_UP:
                raise UsageError(
                    f"{self._identity['base_url']} gave no answer to {self._lost} questions running"
                    f" ({failure.what}), each tried up to {patience.tries} times. What was answered"
                    " is kept. See that it is well, then type the same command again, with --set"
                    " retry_failed=true."
                ) from None
            tries = retrying.statistics["attempt_number"]
            raise NoAnswer(
                f"endpoint: {failure.what} after {tries} {'try' if tries == 1 else 'tries'}"
            ) from None

    async def _said(self, question: Question, sampling: Sampling) -> object:
        """One try, and once more at once where the endpoint wants an option otherwise."""
        while True:
            sent = self._dialect.options(question, sampling)
            try:
                return await self._post(question, sent)
            except OptionRefused as refused:
                self._dialect.learn(refused.option)
                if self._dialect.options(question, sampling) == sent:  # there is no other way
                    raise self._not_taken(refused.option, sent) from None

    async def _post(self, question: Question, sent: Document) -> object:
        """One request with the options `sent`. Raises Passing for what may be otherwise the next
        time, OptionRefused, else as `_tried` does."""
        httpx, openai = self._httpx, self._openai
        path = path_of(question)
        try:
            async with asyncio.timeout(self._patience.deadline):
                raw = await self._request(question, sent)
                body = raw.http_response.content
        except (TimeoutError, openai.APITimeoutError) as error:
            raise Passing(
                "timed out", unreached=isinstance(error.__cause__, httpx.ConnectTimeout)
            ) from None
        except openai.APIConnectionError as error:
            unreached = isinstance(error.__cause__, (httpx.ConnectError, httpx.ProxyError))
            raise Passing(
                "no connection" if unreached else "connection lost", unreached=unreached
            ) from None
        except openai.APIStatusError as error:
            # its text may hold the key or the prompt, so that it is not chained to what is raised
            status, headers = error.status_code, error.response.headers
            body, retry_after = error.response.content, headers.get("retry-after")
            told = error_in(json_in(body)) or {}
        except openai.OpenAIError as error:
            raise NoAnswer(f"endpoint: {type(error).__name__}") from None
        else:
            value = json_in(body)
            if value is UNREADABLE:
                raise NoAnswer("endpoint: not JSON")
            if (found := inside(value)) is None:
                return value
            (status, told), retry_after = found, None
        where = self._identity["base_url"]
        failure = Failure(status, told, sent, where, self.model, self._key, retry_after)
        raise failure.meaning() or await self._nothing_there(status, path)

    async def _request(self, question: Question, sent: Document) -> Any:
        is_plain = question.text is not None
        where: Any = self._client.completions if is_plain else self._client.chat.completions
        send = where.with_raw_response.create
        return await send(model=self.model, **turns_of(question), **sent)

    def _not_taken(self, option: str, sent: Document) -> UsageError:
        where = self._identity["base_url"]
        return UsageError(
            f"{where} does not take {option}: {sent[option]!r} for {self.model}, and left out it"
            " would change the answers. Choose another value where the command has an option for it,"
            " or a model or an endpoint that takes it."
        )

    async def _nothing_there(self, status: int, path: str) -> UsageError:
        """The sentence for a model or a path that the endpoint does not have, with the models that
        it lists."""
        where = self._identity["base_url"]
        found = await self._listed()
        if found is None:
            return UsageError(
                f"{where} has no {path} (HTTP {status}). Does the address end as it should, for"
                " example in /v1?"
            )
        names = [str(entry["id"]) for entry in found]
        if self.model in names:
            return UsageError(
                f"{where} serves {self.model}, but has no {path} (HTTP {status}); use another"
                " endpoint for this."
            )
        some = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        return UsageError(
            f"{where} has no model {self.model!r}.{did_you_mean(self.model, names)} It lists"
            f" {some or 'none'}."
        )

    async def _listed(self) -> Entries | None:
        return await listed(self._client, self._key, min(30.0, self._patience.deadline))

    async def _on_response(self, response: Any) -> None:
        """Before a body is read: note that somebody is there, and see that it cannot fill the
        memory."""
        self._reached = True
        if response.headers.get("content-encoding", "identity").strip().lower() not in (
            "identity",
            "",
        ):
            raise NoAnswer("endpoint: compressed though asked not to")
        inner = response.stream

        class Bounded(self._httpx.AsyncByteStream):
            async def __aiter__(self):
                seen = 0
                async for chunk in inner:
                    seen += len(chunk)
                    if seen > MAX_BODY:
                        raise NoAnswer(f"endpoint: more than {MAX_BODY:,} bytes")
                    yield chunk

            async def aclose(self) -> None:
                await inner.aclose()

        response.stream = Bounded()
