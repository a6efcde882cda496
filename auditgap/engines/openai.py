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
import json
import logging
import math
import os
import random
import re
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from auditgap.engines import Question, Reply, Sampling, Serving
from auditgap.engines.choosing import likeliest
from auditgap.engines.journal import Journal
from auditgap.errors import UsageError, did_you_mean
from auditgap.types import digest

OPENAI = "https://api.openai.com/v1"
KEY = "OPENAI_API_KEY"  #: the environment variable with the key
#: Largest body that is read. 4,096 tokens with 20 log-probabilities each are about 8 MB.
MAX_BODY = 64_000_000
AT_ONCE = 8  #: requests in flight
_T = TypeVar("_T")
_ENDED = ("stop", "eos_token", "stop_sequence")
_CUT = ("length", "max_tokens")
_TOO_LONG = re.compile(
    r"context[ _-]?(length|window|size)|(prompt|input) (is )?too long|too many tokens|token count",
    re.I,
)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long an endpoint is waited for. Seconds; what `Retry-After` asks for is granted up to
    `longest_retry_after`."""

    tries: int = 5
    #: for one request from its first byte to its last, however steadily it drips
    deadline: float = 300.0
    total: float = 1200.0  #: no try begins later than this after the question's first
    #: doubles with each try; the pause is drawn from 0 to it (full jitter)
    first_pause: float = 0.5
    longest_pause: float = 30.0
    longest_retry_after: float = 120.0


def identity(model: str, serving: Serving) -> dict[str, Any]:
    """What an endpoint's answers depend on as far as can be told: its address and the model's name
    there. No secrets.

    Raises UsageError for an address that is none or that holds credentials, and for a chat
    template, which an endpoint has.
    """
    if serving.chat_template is not None:
        raise UsageError(
            "An endpoint applies its own chat template; leave --chat-template out, or use --engine"
            " hf or vllm."
        )
    given, source = serving.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI, "--endpoint"
    if not serving.base_url and os.environ.get("OPENAI_BASE_URL"):
        source = "OPENAI_BASE_URL"
    try:
        url = urlsplit(given.strip())
        host, port = url.hostname, url.port
    except ValueError:
        url = host = port = None
    if url is None or not host or url.scheme not in ("http", "https") or not given.isprintable():
        raise UsageError(
            f"{source} takes the address of an endpoint, for example http://127.0.0.1:8000/v1."
        )
    if url.username is not None or url.password is not None or url.query or url.fragment:
        # a config is stored with its run, so an address must be fit to be read by anybody
        raise UsageError(
            f"{source} may hold no user, password or query; put the key into {KEY} and leave only"
            " the address."
        )
    host = f"[{host}]" if ":" in host else host
    return {
        "base_url": (
            f"{url.scheme}://{host}{'' if port is None else f':{port}'}{url.path.rstrip('/')}"
        ),
        "model": model,
    }


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
        self._key = _key(self._identity["base_url"])
        self._reached = False  # whether the endpoint has ever answered anything
        self._opened: Journal | None = None
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

    def describe(self) -> dict[str, Any]:
        return dict(self._identity)

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
        keys = [digest([self._identity, asdict(q), asdict(sampling)], 32) for q in questions]
        missing = {k: q for k, q in zip(keys, questions, strict=True) if k not in known}
        tasks = [asyncio.create_task(self._answer(k, q, sampling)) for k, q in missing.items()]
        try:
            found = dict(zip(missing, await asyncio.gather(*tasks), strict=True))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [found[k] if k in found else known[k] for k in keys]

    async def _answer(self, key: str, question: Question, sampling: Sampling) -> Reply:
        words = (
            [question.text or ""]
            if question.text is not None
            else [m.content for m in question.messages]
        )
        if not any(words):
            return Reply("", problem="empty")
        if any(not _sendable(w) for w in words):
            return Reply("", problem="endpoint: the question is not valid Unicode")
        # never more than AT_ONCE, those that wait to try again included: an endpoint that is busy
        # is not pressed
        async with self._slots:
            try:
                reply = _read(
                    await self._tried(question, sampling),
                    question.text is not None,
                    sampling.top_logprobs,
                )
            except _NoAnswer as no:
                return Reply("", problem=no.problem)
        if (journal := self._kept()) is not None:
            journal.add(key, reply)
        return reply

    async def _tried(self, question: Question, sampling: Sampling) -> bytes:
        """The body of the answer. Raises _NoAnswer when it is known that there is none, UsageError
        as `ask` does."""
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
            retry=tenacity.retry_if_exception_type(_Passing),
            wait=pause,
            stop=tenacity.stop_after_attempt(patience.tries)
            | tenacity.stop_before_delay(patience.total),
            reraise=True,
        )
        try:
            return await retrying(self._post, question, sampling)
        except _Passing as failure:
            if failure.unreached and not self._reached:
                raise UsageError(
                    f"Nothing answers at {self._identity['base_url']} ({failure.what}). Check"
                    " --endpoint (or OPENAI_BASE_URL) and that the server runs, then type the same"
                    " command again, with --set retry_failed=true if it has begun."
                ) from None
            tries = retrying.statistics["attempt_number"]
            raise _NoAnswer(
                f"endpoint: {failure.what} after {tries} {'try' if tries == 1 else 'tries'}"
            ) from None

    async def _post(self, question: Question, sampling: Sampling) -> bytes:
        """One try. Raises _Passing for what may be otherwise the next time, else as `_tried`
        does."""
        httpx, openai = self._httpx, self._openai
        try:
            async with asyncio.timeout(self._patience.deadline):
                send: Any
                if question.text is not None:
                    send = self._client.completions.with_raw_response.create
                    raw = await send(
                        model=self.model,
                        prompt=question.text,
                        **_options(question, sampling, self._official),
                    )
                else:
                    send = self._client.chat.completions.with_raw_response.create
                    turns = [{"role": m.role, "content": m.content} for m in question.messages]
                    raw = await send(
                        model=self.model,
                        messages=turns,
                        **_options(question, sampling, self._official),
                    )
                return raw.http_response.content
        except (TimeoutError, openai.APITimeoutError) as error:
            raise _Passing(
                "timed out", unreached=isinstance(error.__cause__, httpx.ConnectTimeout)
            ) from None
        except openai.APIConnectionError as error:
            unreached = isinstance(error.__cause__, (httpx.ConnectError, httpx.ProxyError))
            raise _Passing(
                "no connection" if unreached else "connection lost", unreached=unreached
            ) from None
        except openai.APIStatusError as error:
            # its text may hold the key or the prompt, so that it is not chained to what is raised
            failure = error
        except openai.OpenAIError as error:
            raise _NoAnswer(f"endpoint: {type(error).__name__}") from None
        raise await self._meaning(failure, question)

    async def _meaning(self, error: Any, question: Question) -> Exception:
        """What an HTTP status says: for all questions (UsageError), for now (_Passing) or for this
        question (_NoAnswer)."""
        status, where = error.status_code, self._identity["base_url"]
        body = error.body if isinstance(error.body, dict) else {}
        code, parameter = (_plain(body.get(name), self._key) for name in ("code", "param"))
        if status in (401, 403):
            state = (
                f"the key in {KEY}" if self._key else f"a request without a key ({KEY} is not set)"
            )
            return UsageError(
                f"{where} refused {state}: HTTP {status}. Set {KEY} to one that may use"
                f" {self.model}."
            )
        if status == 402 or code == "insufficient_quota":
            return UsageError(
                f"{where} has no credit left for this key: HTTP {status}. Add some, then type the"
                " same command with --set retry_failed=true."
            )
        if 300 <= status < 400:
            return UsageError(
                f"{where} sends us elsewhere (HTTP {status}), and prompts and key go nowhere"
                " unasked. Give --endpoint the final address."
            )
        if status in (404, 405):
            return await self._nothing_there(
                status, "completions" if question.text is not None else "chat/completions"
            )
        if status in (408, 409, 429) or status >= 500:
            return _Passing(
                str(status), retry_after=_retry_after(error.response.headers.get("retry-after"))
            )
        if code == "content_filter":
            return _NoAnswer("content_filter")
        if (
            code == "context_length_exceeded"
            or status == 413
            or _TOO_LONG.search(str(body.get("message")))
        ):
            return _NoAnswer("context_length")
        detail = ", ".join(word for word in (code, parameter) if word and word != str(status))
        return _NoAnswer(f"endpoint: {status}{f' ({detail})' if detail else ''}")

    async def _nothing_there(self, status: int, path: str) -> UsageError:
        """The sentence for a model or a path that the endpoint does not have, with the models that
        it lists."""
        where = self._identity["base_url"]
        try:
            async with asyncio.timeout(min(30.0, self._patience.deadline)):
                listed = json.loads(
                    (await self._client.models.with_raw_response.list()).http_response.content
                )
            names = [_plain(m["id"], self._key, 200) for m in listed["data"]]
        except (
            self._openai.OpenAIError,
            TimeoutError,
            _NoAnswer,
            ValueError,
            TypeError,
            KeyError,
            RecursionError,
        ):
            return UsageError(
                f"{where} has no {path} (HTTP {status}). Does the address end as it should, for"
                " example in /v1?"
            )
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

    @property
    def _official(self) -> bool:
        """Whether this is OpenAI itself, where newer models know `max_tokens` by another name
        only."""
        host = urlsplit(self._identity["base_url"]).hostname or ""
        return host.endswith((".openai.com", ".openai.azure.com"))

    async def _on_response(self, response: Any) -> None:
        """Before a body is read: note that somebody is there, and see that it cannot fill the
        memory."""
        self._reached = True
        if response.headers.get("content-encoding", "identity").strip().lower() not in (
            "identity",
            "",
        ):
            raise _NoAnswer("endpoint: compressed though asked not to")
        inner = response.stream

        class Bounded(self._httpx.AsyncByteStream):
            async def __aiter__(self):
                seen = 0
                async for chunk in inner:
                    seen += len(chunk)
                    if seen > MAX_BODY:
                        raise _NoAnswer(f"endpoint: more than {MAX_BODY:,} bytes")
                    yield chunk

            async def aclose(self) -> None:
                await inner.aclose()

        response.stream = Bounded()


class _NoAnswer(Exception):
    """It is known that this question gets no answer; `problem` is what its reply says."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


class _Passing(Exception):
    """A failure that may pass. `unreached`: not even a connection came about; `retry_after`:
    seconds that were asked for."""

    def __init__(
        self, what: str, *, unreached: bool = False, retry_after: float | None = None
    ) -> None:
        super().__init__(what)
        self.what, self.unreached, self.retry_after = what, unreached, retry_after


# -- what is sent and what comes back
# -----------------------------------------------------------------------------------


def _options(question: Question, sampling: Sampling, official: bool) -> dict[str, Any]:
    """The request's fields, no more than needed: endpoints refuse what they do not know."""
    chat = question.text is None
    options: dict[str, Any] = {"temperature": sampling.temperature}
    options["max_completion_tokens" if chat and official else "max_tokens"] = (
        sampling.max_new_tokens
    )
    if sampling.temperature > 0:
        options["seed"] = question.seed(sampling.seed)
        if sampling.top_p < 1:
            options["top_p"] = sampling.top_p
    if sampling.top_logprobs:
        options |= (
            {"logprobs": True, "top_logprobs": sampling.top_logprobs}
            if chat
            else {"logprobs": sampling.top_logprobs}
        )
    return options


def _read(body: bytes, plain: bool, top_logprobs: int) -> Reply:
    """The reply in a body; `plain` as the completions endpoint writes it. Raises _NoAnswer for
    everything else."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise _NoAnswer("endpoint: not JSON") from None
    choices = value.get("choices") if isinstance(value, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        came = f"{len(choices)} answers" if isinstance(choices, list) else "no answer"
        raise _NoAnswer(f"endpoint: {came} where one was wanted")
    choice = choices[0]
    reason = choice.get("finish_reason")
    if reason == "content_filter":
        raise _NoAnswer("content_filter")
    if reason not in (*_ENDED, *_CUT):
        raise _NoAnswer("endpoint: the answer did not end in a known way")
    message = choice if plain else choice.get("message")
    text = message.get("text" if plain else "content") if isinstance(message, dict) else None
    if text is None and isinstance(message, dict):
        text = message.get("refusal")  # where OpenAI puts a model's own refusal
    if not isinstance(text, str):
        raise _NoAnswer("endpoint: an answer without text")
    tops = _tops(choice.get("logprobs"), plain, top_logprobs) if top_logprobs else ()
    return Reply(text, None, reason in _ENDED, tops)


def _tops(given: Any, plain: bool, k: int) -> tuple[Mapping[str, float], ...]:
    """For each new token its k likeliest, from either endpoint's form. Raises _NoAnswer for what is
    no log-probability."""
    if given is None:
        return ()
    try:
        if plain:
            steps = [list((top or {}).items()) for top in given["top_logprobs"]]
        else:
            steps = [
                [(top["token"], top["logprob"]) for top in step["top_logprobs"]]
                for step in given["content"] or ()
            ]
        found = []
        for step in steps:
            if not all(isinstance(t, str) and isinstance(v, (int, float)) for t, v in step):
                raise TypeError
            if any(math.isnan(v) or v == math.inf for _, v in step):
                raise _NoAnswer("nonfinite_logits")
            # an endpoint may add the token it chose; −∞ is a token that was forbidden
            best = sorted(
                ((t, float(v)) for t, v in step if v > -math.inf), key=lambda pair: -pair[1]
            )[:k]
            found.append(likeliest(([t for t, _ in best], [v for _, v in best]), "".join))
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError):
        raise _NoAnswer("endpoint: log-probabilities in no known form") from None
    return tuple(found)


def _retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks to wait, from a number or an HTTP date; None when it
    says nothing usable."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            at = parsedate_to_datetime(value)
        except (TypeError, ValueError, OverflowError):
            return None
        at = at if at.tzinfo else at.replace(tzinfo=UTC)
        seconds = max(0.0, (at - datetime.now(UTC)).total_seconds())
    return seconds if seconds >= 0 else None  # NaN compares as False


def _key(base_url: str) -> str:
    """The key from the environment, or nothing. Raises UsageError, without showing it."""
    key = os.environ.get(KEY, "").strip()
    if not key and base_url == OPENAI:
        raise UsageError(
            f"OpenAI's endpoint wants a key: set {KEY}, or give --endpoint the address of another"
            " endpoint."
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        # a header cannot hold it, and the exception that says so would quote it
        raise UsageError(
            f"{KEY} holds white space, a line break or a letter beyond ASCII; set it to the key"
            " alone."
        )
    return key


def _plain(value: Any, key: str, length: int = 60) -> str:
    """A word of the endpoint's that may be shown: printable, short, and not the key, which some
    endpoints echo."""
    text = value if isinstance(value, str) else ""
    text = text.replace(key, "…") if key else text
    return "".join(c for c in text if c.isprintable())[:length]


def _sendable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which no JSON on the wire can carry
        return False
    return True
