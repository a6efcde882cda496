"""The engine on an endpoint against a real server on loopback that counts what it is asked and
misbehaves on demand."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import logging
import os
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import warm

from auditgap.engines import Question, Reply, Sampling, Serving
from auditgap.engines import openai as engines_openai
from auditgap.engines.openai import OpenAIEngine, Patience, identity
from auditgap.engines.openai.dialects import ENDINGS, Ending
from auditgap.errors import AuditgapError, UsageError
from auditgap.store.files import DiskError
from auditgap.types import Message

CANARY = "sk-canary-3f9a1c77d2"
QUICK = Patience(
    tries=3, deadline=5.0, first_pause=0.01, longest_pause=0.05, longest_retry_after=0.5
)
SKY, SEA = Question.of("What colour is the sky?"), Question.of("What colour is the sea?")


NO_REASON = "endpoint: no finish reason, so nobody knows whether the answer is whole"


def answer(text: str | None = "Blue.", reason: str = "stop", **message: Any) -> dict[str, Any]:
    """A chat completion with one choice."""
    return {
        "choices": [
            {
                "index": 0,
                "finish_reason": reason,
                "message": {"role": "assistant", "content": text, **message},
            }
        ]
    }


class Endpoint(ThreadingHTTPServer):
    """Does what `script` says for the n-th request, and what `default` says afterwards; keeps every
    request."""

    daemon_threads = True

    def __init__(self) -> None:
        self.script: list[Callable[[Handler], None]] = []
        self.default: Callable[[Handler], None] = says(answer())
        self.seen: list[tuple[str, Any, dict]] = []  #: path, headers, body
        self.times: list[float] = []
        self.lock = threading.Lock()
        self.in_flight = self.most_in_flight = 0
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is part of the play."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        with server.lock:
            server.seen.append((self.path, self.headers, body))
            server.times.append(time.monotonic())
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            act = server.script.pop(0) if server.script else server.default
        self.body = body
        try:
            act(self)
        finally:
            with server.lock:
                server.in_flight -= 1

    def do_GET(self) -> None:
        self.send(
            200,
            json.dumps(
                {"object": "list", "data": [{"id": "smollm2"}, {"id": "smol-large"}]}
            ).encode(),
        )

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def says(body: Any, status: int = 200, **headers: str) -> Callable[[Handler], None]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda handler: handler.send(status, raw, **headers)


def fails(
    status: int, message: str = "no", code: Any = None, param: str | None = None, **headers: str
) -> Callable[[Handler], None]:
    return says(
        {"error": {"message": message, "type": "bad", "code": code, "param": param}},
        status,
        **headers,
    )


def resets(handler: Handler) -> None:
    """A RST instead of an answer."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def drips(handler: Handler) -> None:
    """A byte at a time, each well within any read timeout, for far longer than anybody should
    wait."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def cut(handler: Handler) -> None:
    """Half of the body that was promised."""
    handler.send_response(200)
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def echo(handler: Handler) -> None:
    says(answer(handler.body["messages"][-1]["content"]))(handler)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "OPENAI_BASE_URL",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
        "OPENAI_CUSTOM_HEADERS",
        "OPENAI_LOG",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def opened(endpoint: Endpoint) -> Iterator[Callable[..., OpenAIEngine]]:
    engines: list[OpenAIEngine] = []

    def build(patience: Patience = QUICK, model: str = "smollm2") -> OpenAIEngine:
        engines.append(
            OpenAIEngine(model, Serving(engine="openai", base_url=endpoint.url), patience=patience)
        )
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


def one(engine: OpenAIEngine, question: Question = SKY, **sampling: Any) -> Reply:
    (reply,) = engine.ask([question], Sampling(**sampling))
    return reply


# -- what is sent, what is read
# -------------------------------------------------------------------------------------------


def test_a_chat_request_and_its_reply(endpoint, opened):
    question = Question.of("What colour is the sky?", system="Be brief.", draw=2)
    reply = one(opened(), question, max_new_tokens=7, temperature=0.5, top_p=0.9, seed=3)
    assert reply == Reply("Blue.", None, True)
    path, headers, body = endpoint.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {CANARY}"
    assert body == {
        "model": "smollm2",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What colour is the sky?"},
        ],
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": question.seed(3),
    }


def test_a_greedy_request_says_no_more_than_it_must(endpoint, opened):
    endpoint.default = says(answer("Bl", "length"))
    assert one(opened(), max_new_tokens=2) == Reply("Bl", None, False)
    sent = endpoint.seen[0][2]
    assert (
        set(sent) == {"model", "messages", "max_tokens", "temperature"} and sent["temperature"] == 0
    )


def test_text_goes_to_the_completions_endpoint_as_it_stands(endpoint, opened):
    tops = {"tokens": [" blue"], "top_logprobs": [{" blue": -0.1, " red": -2.5, " green": -3.0}]}
    endpoint.default = says(
        {"choices": [{"text": " blue", "finish_reason": "length", "logprobs": tops}]}
    )
    reply = one(opened(), Question(text="<s>The sky is"), max_new_tokens=1, top_logprobs=2)
    assert reply == Reply(" blue", None, False, ({" blue": -0.1, " red": -2.5},))
    path, _, body = endpoint.seen[0]
    assert (path, body["prompt"], body["logprobs"]) == (
        "/v1/completions",
        "<s>The sky is",
        2,
    ) and "messages" not in body


def chat_tops(*steps: list[tuple[str, Any]]) -> dict[str, Any]:
    body = answer()
    content = [
        {"token": s[0][0], "top_logprobs": [{"token": t, "logprob": v} for t, v in s]}
        for s in steps
    ]
    body["choices"][0]["logprobs"] = {"content": content}
    return body


def test_log_probabilities_of_a_chat(endpoint, opened):
    endpoint.default = says(
        chat_tops([("Blue", -0.2), ("\ufffd", -3.0), ("\ufffd", -3.0)], [(".", -0.01), ("!", -4.6)])
    )
    reply = one(opened(), top_logprobs=3)
    assert endpoint.seen[0][2]["logprobs"] is True and endpoint.seen[0][2]["top_logprobs"] == 3
    assert reply.logprobs[0]["Blue"] == -0.2 and reply.logprobs[1] == {".": -0.01, "!": -4.6}
    # two tokens of one text add up
    assert reply.logprobs[0]["\ufffd"] == pytest.approx(-3.0 + 0.6931, abs=1e-3)


def test_an_endpoint_without_log_probabilities_leaves_them_empty(opened):
    assert one(opened(), top_logprobs=3) == Reply("Blue.", None, True)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (chat_tops([("a", float("nan"))]), "nonfinite_logits"),
        (chat_tops([("a", float("inf"))]), "nonfinite_logits"),
        (chat_tops([("a", "likely")]), "endpoint: log-probabilities in no known form"),
        (chat_tops([("a", 10**400)]), "endpoint: log-probabilities in no known form"),
        (b"<html>502 Bad Gateway</html>", "endpoint: not JSON"),
        (b"", "endpoint: not JSON"),
        (b"[" * 100_000, "endpoint: not JSON"),
        (b"\xff\xfe{", "endpoint: not JSON"),
        (b"null", "endpoint: no answer where one was wanted"),
        ({"choices": None}, "endpoint: no answer where one was wanted"),
        ({"choices": []}, "endpoint: 0 answers where one was wanted"),
        ({"choices": answer()["choices"] * 2}, "endpoint: 2 answers where one was wanted"),
        ({"choices": [None]}, "endpoint: 1 answers where one was wanted"),
        (answer(None), "endpoint: an answer without text"),
        (answer([{"type": "image", "url": "x"}]), "endpoint: an answer without text"),
        (answer("x", "tool_calls"), "endpoint: finish reason 'tool_calls' is not known"),
        (answer("x", None), f"{NO_REASON}"),
        (answer("x", ""), f"{NO_REASON}"),
        (answer("half of it", "content_filter"), "content_filter"),
    ],
)
def test_what_cannot_be_read_is_a_problem_and_no_answer(endpoint, opened, body, problem):
    endpoint.default = says(body)
    assert one(opened(), top_logprobs=1) == Reply("", problem=problem)
    assert len(endpoint.seen) == 1, "a body that came whole is not asked for again"


def test_an_empty_answer_is_an_answer_and_a_refusal_is_what_the_model_said(endpoint, opened):
    endpoint.script = [says(answer("")), says(answer(None, refusal="I'm sorry, I can't tell you."))]
    engine = opened()
    assert one(engine) == Reply("", None, True)
    assert one(engine) == Reply("I'm sorry, I can't tell you.", None, True)


def test_order_company_and_duplicates(endpoint, opened):
    endpoint.default = lambda handler: (time.sleep(0.1), echo(handler))
    questions = [Question.of(f"Say {i}.") for i in range(30)]
    replies = opened().ask([*questions, questions[3]], Sampling())
    assert [r.text for r in replies] == [f"Say {i}." for i in range(30)] + ["Say 3."]
    assert len(endpoint.seen) == 30, "equal questions are sent once"
    assert 2 <= endpoint.most_in_flight <= engines_openai.AT_ONCE


def test_unicode_goes_through_and_what_cannot_is_a_problem(endpoint, opened):
    endpoint.default = echo
    strange = ["\u202eolleh", "👩‍👩‍👧‍👦", "e\u0301 é", "天空", "a\x00b", "x\r\ny", "w" * 300_000]
    replies = opened().ask(
        [*map(Question.of, strange), Question.of("\ud800"), Question.of(""), Question()], Sampling()
    )
    assert [r.text for r in replies[:-3]] == strange
    assert [r.problem for r in replies[-3:]] == [
        "endpoint: the question is not valid Unicode",
        "empty",
        "empty",
    ]
    assert len(endpoint.seen) == len(strange)


def test_it_works_inside_a_running_event_loop_and_closes_twice(opened):
    engine = opened()

    async def inside() -> Reply:
        return one(engine)

    assert asyncio.run(inside()).text == "Blue."
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        one(engine)
    assert engine.ask is not None and not engine._thread.is_alive()


# -- faults that may pass
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [fails(500), fails(408), fails(409), fails(503), fails(429), resets, cut],
    ids=["500", "408", "409", "503", "429", "resets", "cut"],
)
def test_a_passing_fault_is_tried_again(endpoint, opened, fault):
    endpoint.script = [fault, fault]
    assert one(opened()) == Reply("Blue.", None, True)
    assert len(endpoint.seen) == 3


def within(code: object, message: str = "upstream") -> Callable[[Handler], None]:
    """An error in the body of HTTP 200."""
    return says({"error": {"message": message, "code": code}, "user_id": "u"})


def in_the_choice(handler: Handler) -> None:
    body = answer("", "error")
    body["choices"][0]["error"] = {"code": 502, "message": "upstream"}
    says(body)(handler)


@pytest.mark.parametrize(
    "fault",
    [
        *(within(code) for code in (429, 502, None, "server_error")),
        in_the_choice,
        says(answer("", "error")),
    ],
    ids=["429", "502", "no code", "a word", "in the choice", "a reason alone"],
)
def test_a_passing_error_inside_200_is_tried_again(endpoint, opened, fault):
    endpoint.script = [fault, fault]
    assert one(opened()) == Reply("Blue.", None, True)
    assert len(endpoint.seen) == 3


def test_what_an_error_inside_200_says_is_heeded_as_a_status_is(endpoint, opened):
    endpoint.script = [within(400, "This prompt was flagged"), within(402, "Insufficient credits")]
    assert one(opened()) == Reply("", problem="content_filter")
    with pytest.raises(UsageError, match="no credit"):
        one(opened())
    endpoint.script = []
    endpoint.default = within(None)
    assert one(opened()) == Reply("", problem="endpoint: 502 after 3 tries")


def test_an_endpoint_that_is_down_is_given_up_and_what_was_answered_is_kept(
    endpoint, opened, tmp_path
):
    engine = opened(Patience(tries=2, deadline=5.0, first_pause=0.01, longest_pause=0.02))
    engine.journal = tmp_path / "journal.jsonl"
    assert one(engine).text == "Blue."
    endpoint.default = fails(503)
    with pytest.raises(UsageError, match=r"gave no answer to \d+ questions running .*is kept"):
        engine.ask([Question.of(f"Say {i}.") for i in range(400)], Sampling())
    assert len(endpoint.seen) < 2 * (engines_openai.GIVEN_UP + 2 * engines_openai.AT_ONCE)
    endpoint.default = echo
    asked = len(endpoint.seen)
    assert one(engine).text == "Blue." and len(endpoint.seen) == asked


def test_one_answer_among_failures_keeps_it_going(endpoint, opened):
    seen = itertools.count()
    endpoint.default = lambda handler: (echo if next(seen) % 5 == 0 else fails(503))(handler)
    replies = opened(Patience(tries=1)).ask(
        [Question.of(f"Say {i}.") for i in range(60)], Sampling()
    )
    assert 5 <= sum(not reply.problem for reply in replies) <= 20


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (fails(429), "endpoint: 429 after 3 tries"),
        (fails(500), "endpoint: 500 after 3 tries"),
        (resets, "endpoint: connection lost after 3 tries"),
        (says(b"<html>bad gateway</html>", 502), "endpoint: 502 after 3 tries"),
    ],
)
def test_tries_are_bounded_and_others_are_not_touched(endpoint, opened, fault, problem):
    endpoint.default = lambda handler: (
        fault if handler.body["messages"][-1]["content"].endswith("sky?") else echo
    )(handler)
    replies = opened().ask([SKY, SEA], Sampling())
    assert replies == [Reply("", problem=problem), Reply("What colour is the sea?", None, True)]
    assert len(endpoint.seen) == 3 + 1


def test_a_dripping_answer_is_cut_off_by_the_total_deadline(endpoint, opened):
    endpoint.default = drips
    begun = time.monotonic()
    reply = one(opened(Patience(tries=2, deadline=0.4, first_pause=0.01)))
    assert reply == Reply("", problem="endpoint: timed out after 2 tries")
    assert time.monotonic() - begun < 10 and len(endpoint.seen) == 2


def test_an_interrupt_is_heeded_at_once_and_nothing_is_asked_any_more(endpoint, opened):
    endpoint.default = lambda handler: (time.sleep(0.5), echo(handler))
    engine = opened()
    timer = threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        engine.ask([Question.of(f"Say {i}.") for i in range(100)], Sampling())
    sent = -1
    while sent != len(endpoint.seen):  # what was under way may arrive late
        sent = len(endpoint.seen)
        time.sleep(1.5)
    assert sent < 100
    assert one(engine).text == "What colour is the sky?", "and the engine is as good as before"


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for(endpoint, opened, form):
    # a date has whole seconds, so that it must lie two ahead to be one ahead for certain
    asked = (
        "0.4"
        if form == "seconds"
        else format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    )
    endpoint.script = [fails(429, Retry_After=asked)]
    assert one(opened(Patience(tries=2, first_pause=0.01))).text == "Blue."
    waited = endpoint.times[1] - endpoint.times[0]
    assert (0.39 if form == "seconds" else 0.9) <= waited < 4


def test_retry_after_is_capped_and_nonsense_in_it_ignored(endpoint, opened):
    endpoint.script = [
        fails(429, Retry_After=v)
        for v in ("86400", "soon", "-5", "nan", "Wed, 21 Oct 2015 07:28:00 GMT")
    ]
    assert (
        one(
            opened(Patience(tries=6, first_pause=0.01, longest_pause=0.02, longest_retry_after=0.3))
        ).text
        == "Blue."
    )
    assert (
        0.3 <= endpoint.times[1] - endpoint.times[0] < 2.5
        and endpoint.times[5] - endpoint.times[1] < 2.5
    )


def test_no_try_begins_after_the_total_time(endpoint, opened):
    endpoint.default = fails(429, Retry_After="0.2")
    reply = one(opened(Patience(tries=1000, total=0.5, first_pause=0.01)))
    assert reply.problem.startswith("endpoint: 429 after ") and 2 <= len(endpoint.seen) <= 6


def test_pauses_are_drawn_at_random(endpoint, opened):
    """Full jitter: clients that were turned away together do not come back together."""
    came: dict[str, list[float]] = {}

    def act(handler: Handler) -> None:
        times = came.setdefault(handler.body["messages"][-1]["content"], [])
        times.append(time.monotonic())
        (fails(503) if len(times) == 1 else echo)(handler)

    endpoint.default = act
    replies = opened(Patience(tries=2, first_pause=1.0)).ask(
        [Question.of(f"Say {i}.") for i in range(8)], Sampling()
    )
    assert all(not r.problem for r in replies)
    pauses = sorted(second - first for first, second in came.values())
    assert pauses[-1] - pauses[0] > 0.15 and pauses[0] < 0.8  # eight draws from 0 to 1


# -- faults that will not pass
# ---------------------------------------------------------------------------------------------


# -- dialects
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reason", [word for word, how in ENDINGS.items() if how is not Ending.FAILED]
)
def test_each_finish_reason_means_what_the_table_says(endpoint, opened, reason):
    endpoint.script = [says(answer("Blue.", reason)), says(answer("Blue.", reason.upper()))]
    wanted = {
        Ending.ENDED: Reply("Blue.", None, True),
        Ending.CUT: Reply("Blue.", None, False),
        Ending.FILTERED: Reply("", problem="content_filter"),
    }[ENDINGS[reason]]
    engine = opened()
    assert [one(engine), one(engine)] == [wanted, wanted]


def streamed(*deltas: dict[str, Any], reason: str | None = "stop") -> Callable[[Handler], None]:
    """Server-sent events though nobody asked for a stream."""
    pieces = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    pieces.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    lines = [": a comment", *(f"data: {json.dumps(piece)}" for piece in pieces), "data: [DONE]"]
    return says("\n\n".join(lines).encode(), Content_Type="text/event-stream")


@pytest.mark.parametrize(
    ("body", "reply"),
    [
        (says(answer([{"type": "text", "text": "Bl"}, "ue."])), Reply("Blue.", None, True)),
        (says(b"\xef\xbb\xbf" + json.dumps(answer()).encode()), Reply("Blue.", None, True)),
        (
            streamed({"role": "assistant", "content": "Bl"}, {"content": "ue."}),
            Reply("Blue.", None, True),
        ),
        (streamed({"content": "Bl"}, reason="length"), Reply("Bl", None, False)),
        (streamed({"content": "Bl"}, reason=None), Reply("", problem=NO_REASON)),
        (
            streamed(
                {"reasoning_content": "I "}, {"reasoning_content": "think"}, {"content": "No."}
            ),
            Reply("No.", None, True, chain="I think"),
        ),
        (says(b"data: {half"), Reply("", problem="endpoint: not JSON")),
        (says(b"data: [1]"), Reply("", problem="endpoint: not JSON")),
    ],
    ids=["parts", "mark", "stream", "cut", "torn", "chain", "half", "odd"],
)
def test_other_forms_of_a_body_are_understood_or_named(endpoint, opened, body, reply):
    endpoint.default = body
    assert one(opened()) == reply


def refuses(option: str, how: Callable[[Handler], None]) -> Callable[[Handler], None]:
    """An endpoint that takes everything but one option."""
    return lambda handler: (how if option in handler.body else says(answer()))(handler)


@pytest.mark.parametrize(
    "how",
    [
        fails(400, "Use 'max_completion_tokens' instead.", "unsupported_parameter", "max_tokens"),
        fails(400, "Unsupported parameter: 'max_tokens' is not supported with this model."),
        says(
            {"detail": [{"loc": ["body", "max_tokens"], "msg": "Extra inputs are not permitted"}]},
            422,
        ),
    ],
    ids=["param", "words", "fastapi"],
)
def test_the_limit_is_asked_for_by_its_other_name(endpoint, opened, how):
    endpoint.default = refuses("max_tokens", how)
    engine = opened()
    questions = [Question.of(f"Say {i}.") for i in range(20)]
    assert all(reply.text == "Blue." for reply in engine.ask(questions, Sampling(max_new_tokens=7)))
    assert len(endpoint.seen) <= 20 + engines_openai.AT_ONCE, "it is learnt once"
    assert endpoint.seen[-1][2]["max_completion_tokens"] == 7


def test_log_probabilities_that_are_refused_are_done_without(endpoint, opened):
    endpoint.default = refuses(
        "logprobs", fails(403, "You are not allowed to request logprobs from this model")
    )
    assert one(opened(), top_logprobs=5) == Reply("Blue.", None, True)


@pytest.mark.parametrize(
    ("option", "message", "sampling"),
    [
        ("temperature", "'temperature' does not support 0 with this model. Only the default", {}),
        ("seed", "Unrecognized request argument supplied: seed", {"temperature": 0.7}),
        ("top_p", "Unsupported value: top_p", {"temperature": 0.7, "top_p": 0.9}),
        ("max_tokens", "max_tokens and max_completion_tokens are not supported", {}),
    ],
)
def test_an_option_that_changes_answers_is_one_sentence_at_the_first(
    endpoint, opened, option, message, sampling
):
    endpoint.default = lambda handler: fails(400, message)(handler)
    with pytest.raises(UsageError, match=r"does not take \w+: .* for smollm2, and left out"):
        opened().ask([Question.of(f"Say {i}.") for i in range(100)], Sampling(**sampling))
    assert len(endpoint.seen) <= 3 * engines_openai.AT_ONCE


def test_a_model_that_no_allowed_provider_has_is_said_to_be_that(endpoint, opened):
    endpoint.default = fails(404, "No endpoints found matching your data policy", code=404)
    with pytest.raises(UsageError, match="no provider of it that this account's settings allow"):
        one(opened())


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_it_at_once(endpoint, opened, status):
    endpoint.default = fails(status, f"Incorrect API key provided: {CANARY}")
    with pytest.raises(UsageError, match="OPENAI_API_KEY") as caught:
        opened().ask([Question.of(f"Say {i}.") for i in range(50)], Sampling())
    assert str(status) in str(caught.value) and len(endpoint.seen) < 2 * engines_openai.AT_ONCE
    assert CANARY not in "".join(traceback.format_exception(caught.value))


def test_an_endpoint_that_wants_a_key_and_gets_none(endpoint, opened, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert one(opened()).text == "Blue.", "a server of one's own needs no key"
    endpoint.default = fails(401)
    with pytest.raises(UsageError, match="OPENAI_API_KEY is not set"):
        one(opened())


def test_no_credit_is_not_tried_again(endpoint, opened):
    endpoint.default = fails(429, code="insufficient_quota")
    with pytest.raises(UsageError, match="no credit"):
        one(opened())
    assert len(endpoint.seen) == 1


def test_an_unknown_model_is_told_those_there_are(endpoint, opened):
    endpoint.default = fails(404, "The model does not exist.", code=404)
    with pytest.raises(
        UsageError,
        match=r"no model 'smollm3'\. Did you mean 'smollm2'\? It lists smollm2, smol-large\.$",
    ):
        one(opened(model="smollm3"))
    with pytest.raises(UsageError, match="serves smollm2, but has no completions"):
        one(opened(), Question(text="The sky is"))


def test_an_address_without_an_api(endpoint, opened, monkeypatch):
    endpoint.default = says(b"<html>not found</html>", 404)
    monkeypatch.setattr(
        Handler, "do_GET", lambda handler: handler.send(404, b"<html>not found</html>")
    )
    with pytest.raises(UsageError, match="for example in /v1"):
        one(opened())


def test_nobody_there_is_a_sentence():
    # bound and not listening: nobody else can take the port meanwhile
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        serving = Serving(engine="openai", base_url=f"http://127.0.0.1:{held.getsockname()[1]}/v1")
        with (
            OpenAIEngine("smollm2", serving, patience=QUICK) as engine,
            pytest.raises(UsageError, match="Nothing answers"),
        ):
            one(engine)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (
            fails(
                400,
                "This model's maximum context length is 512 tokens. However, you asked for 9000.",
                code=400,
            ),
            "context_length",
        ),
        (fails(400, "too much", code="context_length_exceeded"), "context_length"),
        (fails(413), "context_length"),
        (fails(400, "flagged", code="content_filter"), "content_filter"),
        (fails(400, "Invalid prompt: try another", code="invalid_prompt"), "content_filter"),
        (fails(400, "filtered by Azure's content management policy"), "content_filter"),
        (
            says(
                {
                    "error": {
                        "code": 403,
                        "message": "no",
                        "metadata": {"reasons": ["x"], "flagged_input": "…"},
                    }
                },
                403,
            ),
            "content_filter",
        ),
        (fails(403, "openai/x requires moderation. Your input was flagged"), "content_filter"),
        (fails(400, "no", code="bad_value", param="user"), "endpoint: 400 (bad_value, user)"),
        (fails(422, "no", param=f"{CANARY}\x1b[31m"), "endpoint: 422 (…[31m)"),
        (says(b"<html>", 400), "endpoint: 400"),
        (says({"error": ["unsafe"]}, 418), "endpoint: 418"),
    ],
)
def test_the_text_of_an_error_is_never_an_answer(endpoint, opened, fault, problem):
    endpoint.default = fault
    assert one(opened()) == Reply("", problem=problem)
    assert len(endpoint.seen) == 1


def test_a_redirect_is_not_followed(endpoint, opened):
    elsewhere = Endpoint()
    thread = threading.Thread(target=elsewhere.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        endpoint.default = lambda handler: handler.send(
            307, b"", Location=f"{elsewhere.url}/chat/completions"
        )
        with pytest.raises(UsageError, match="elsewhere"):
            one(opened())
    finally:
        elsewhere.shutdown()
        thread.join()
        elsewhere.server_close()
    assert not elsewhere.seen and len(endpoint.seen) == 1


def test_a_body_is_read_up_to_a_bound(endpoint, opened, monkeypatch):
    monkeypatch.setattr(engines_openai, "MAX_BODY", 10_000)
    endpoint.script = [
        says(answer("w" * 20_000)),
        says(b"x" * 20_000, 500),
        says(answer(), Content_Encoding="gzip"),
    ]
    engine = opened()
    assert one(engine).problem == "endpoint: more than 10,000 bytes"
    assert one(engine).problem == "endpoint: more than 10,000 bytes"
    assert one(engine).problem == "endpoint: compressed though asked not to"
    assert one(engine).text == "Blue." and endpoint.seen[0][1]["Accept-Encoding"] == "identity"


# -- the journal
# -----------------------------------------------------------------------------------------------------------


def test_a_journal_keeps_answers_and_no_problems(endpoint, opened, tmp_path):
    def act(handler: Handler) -> None:
        sky = handler.body["messages"][-1]["content"].endswith("sky?")
        (says(chat_tops([("Blue", -0.2)])) if sky else fails(400))(handler)

    endpoint.default = act
    engine = opened()
    engine.journal = tmp_path / "scratch" / "answers.jsonl"
    sampling = Sampling(top_logprobs=1)
    first = engine.ask([SKY, SEA], sampling)
    assert [r.problem for r in first] == ["", "endpoint: 400"] and len(endpoint.seen) == 2
    again = opened()
    again.journal = engine.journal
    assert again.ask([SEA, SKY], sampling) == first[::-1]
    assert len(endpoint.seen) == 3, "only the question that got no answer is asked again"
    assert (
        stat.S_IMODE(engine.journal.stat().st_mode) == 0o600
        and "sky" not in engine.journal.read_text()
    )
    for other in (Sampling(top_logprobs=1, max_new_tokens=5), Sampling(top_logprobs=2)):
        again.ask([SKY], other)
    again.ask([Question.of("What colour is the sky?", draw=1)], sampling)
    assert len(endpoint.seen) == 6, "another sampling or draw is another question"


def test_a_torn_line_is_cut_off_and_a_broken_one_passed_over(endpoint, opened, tmp_path):
    journal = tmp_path / "answers.jsonl"
    endpoint.default = echo
    questions = [Question.of(f"Say {i}.") for i in range(3)]

    def ask() -> list[str]:
        engine = opened()
        engine.journal = journal
        return [r.text for r in engine.ask(questions, Sampling())]

    said = ask()
    whole = journal.read_bytes()
    lines = whole.splitlines(keepends=True)
    for keep in (0, 1, len(lines[0]), len(lines[0]) + 5, len(whole) - 1):
        journal.write_bytes(whole[:keep])
        sent = len(endpoint.seen)
        assert ask() == said and len(endpoint.seen) - sent == 3 - whole[:keep].count(b"\n")
        assert all(json.loads(line)["key"] for line in journal.read_bytes().splitlines())
    journal.write_bytes(lines[0] + b'{"key": 5}\nnull\n\xff\n' + lines[1] + lines[2])
    sent = len(endpoint.seen)
    assert ask() == said and len(endpoint.seen) == sent


def test_a_full_disk_stops_it_and_leaves_no_torn_line(endpoint, opened, tmp_path):
    engine = opened()
    engine.journal = tmp_path / "answers.jsonl"
    one(engine)
    before = engine.journal.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the kernel writes ten bytes of the line, no more
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        with pytest.raises(DiskError, match="free some space"):
            one(engine, SEA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert engine.journal.read_bytes() == before
    assert one(engine, SEA).text == "Blue." and engine.journal.read_bytes().count(b"\n") == 2


KILLED = """
import sys
from pathlib import Path
from auditgap.engines import Question, Sampling, Serving
from auditgap.engines.openai import OpenAIEngine
engine = OpenAIEngine("smollm2", Serving(engine="openai", base_url=sys.argv[1]))
engine.journal = Path(sys.argv[2])
for reply in engine.ask([Question.of(f"Say {i}.") for i in range(20)], Sampling()):
    print(reply.text)
"""


def test_a_kill_in_the_middle_of_a_portion_asks_nothing_twice(endpoint, tmp_path):
    """SIGKILL a real process when twelve answers are out; the next one asks for the other eight."""
    hold, arrived = threading.Event(), threading.Semaphore(0)

    def act(handler: Handler) -> None:
        if len(endpoint.seen) > 12 and not hold.is_set():
            arrived.release()
            hold.wait(60)
            return
        echo(handler)

    endpoint.default = act
    command = [sys.executable, "-c", KILLED, endpoint.url, str(tmp_path / "answers.jsonl")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    try:
        assert arrived.acquire(timeout=120)
        deadline = time.monotonic() + 30
        while (tmp_path / "answers.jsonl").read_bytes().count(
            b"\n"
        ) < 12 and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    hold.set()
    answered, sent = (tmp_path / "answers.jsonl").read_bytes().count(b"\n"), len(endpoint.seen)
    assert answered == 12
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.splitlines() == [f"Say {i}." for i in range(20)], done.stderr[-2000:]
    assert len(endpoint.seen) - sent == 20 - answered


# -- secrets and addresses
# -------------------------------------------------------------------------------------------------


def test_the_key_is_nowhere_but_in_its_header(endpoint, opened, tmp_path, capfd):
    """Logs at their loudest, sentences with their chains, reprs, identity and files: the canary is
    in none of them."""
    stream = io.StringIO()
    handler, root = logging.StreamHandler(stream), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(1)
    said: list[str] = []
    try:
        engine = opened()
        engine.journal = tmp_path / "answers.jsonl"
        said += [repr(engine), str(engine), json.dumps(engine.describe()), repr(engine._client)]
        leak = f"your key is {CANARY}"
        endpoint.script = [
            fails(500, leak),
            resets,
            fails(400, leak, code=leak, param=leak),
            fails(404, leak),
            fails(401, leak),
        ]
        endpoint.script += [
            fails(429, code="insufficient_quota"),
            lambda h: h.send(302, b"", Location=f"http://x/{CANARY}"),
        ]
        for i in range(6):
            try:
                said.append(repr(one(engine, Question.of(f"Say {i}."))))
            except AuditgapError as error:
                said.append("".join(traceback.format_exception(error)))
        one(engine)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    assert len(endpoint.script) == 0 and any("HTTP 401" in s for s in said)
    assert all(h["Authorization"] == f"Bearer {CANARY}" for _, h, _ in endpoint.seen)
    out, err = capfd.readouterr()
    everything = "\n".join(
        [
            *said,
            stream.getvalue(),
            out,
            err,
            *(p.read_text() for p in tmp_path.rglob("*") if p.is_file()),
        ]
    )
    assert CANARY not in everything
    assert "What colour is the sky?" not in stream.getvalue(), "nor is a prompt in a log"


@pytest.mark.parametrize(
    "key", [f"{CANARY}\nX-Other: 1", f"{CANARY}é", f"{CANARY} {CANARY}", f"{CANARY}\x7f"]
)
def test_a_key_that_no_header_can_hold_is_refused_unseen(endpoint, opened, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UsageError, match="OPENAI_API_KEY") as caught:
        opened()
    assert CANARY not in "".join(traceback.format_exception(caught.value)) and not endpoint.seen


def test_white_space_around_a_key_is_not_part_of_it(endpoint, opened, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {CANARY}\n")
    one(opened())
    assert endpoint.seen[0][1]["Authorization"] == f"Bearer {CANARY}"


def test_identity_is_where_and_what(endpoint, opened, monkeypatch):
    assert opened().describe() == {"base_url": endpoint.url, "model": "smollm2"}
    same = {
        identity("m", Serving(base_url=u))["base_url"]
        for u in ("http://Host:8000/v1/", " http://host:8000/v1")
    }
    assert same == {"http://host:8000/v1"}
    assert (
        identity("m", Serving(base_url="http://[::1]:8000/v1"))["base_url"]
        == "http://[::1]:8000/v1"
    )
    assert identity("m", Serving())["base_url"] == "https://api.openai.com/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://other/v1")
    assert Serving(engine="openai").describe("m") == {"base_url": "http://other/v1", "model": "m"}


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{CANARY}@host/v1",
        f"http://{CANARY}@host/v1",
        f"http://host/v1?key={CANARY}",
        f"http://host/v1#{CANARY}",
        "host/v1",
        "ftp://host/v1",
        "http://",
        "http://host:port/v1",
        "http://[::1/v1",
        "http://ho\nst/v1",
    ],
)
@pytest.mark.parametrize("source", ["--endpoint", "OPENAI_BASE_URL"])
def test_an_address_with_secrets_or_without_sense_is_refused(monkeypatch, url, source):
    monkeypatch.setenv("OPENAI_BASE_URL", url if source == "OPENAI_BASE_URL" else "")
    with pytest.raises(UsageError, match=source) as caught:
        identity("m", Serving(engine="openai", base_url=url if source == "--endpoint" else None))
    assert CANARY not in "".join(traceback.format_exception(caught.value))


def test_openai_itself_wants_a_key_and_no_endpoint_takes_a_template(monkeypatch):
    with pytest.raises(UsageError, match="chat template"):
        identity("m", Serving(engine="openai", chat_template="none"))
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UsageError, match="set OPENAI_API_KEY"):
        OpenAIEngine("m", Serving(engine="openai"))


def test_a_proxy_from_the_environment_is_used(endpoint, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", endpoint.url.removesuffix("/v1"))
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with OpenAIEngine(
        "m", Serving(engine="openai", base_url="http://model.invalid/v1"), patience=QUICK
    ) as engine:
        assert one(engine).text == "Blue."
    assert endpoint.seen[0][0] == "http://model.invalid/v1/chat/completions"


ABSENT = """
import sys
sys.modules["openai"] = None
from auditgap.engines import Serving
from auditgap.errors import UsageError
print(Serving(engine="openai", base_url="http://127.0.0.1:9/v1").describe("m")["model"])
try:
    Serving(engine="openai", base_url="http://127.0.0.1:9/v1").open("m")
except UsageError as error:
    print(error)
"""


def test_without_the_package_it_says_what_to_install():
    done = subprocess.run(
        [sys.executable, "-O", "-c", ABSENT],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        env=warm.optimised({**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[0] == "m" and "pip install" in done.stdout


def test_roles_are_sent_as_they_are(endpoint, opened):
    turns = (
        Message("user", "Hello"),
        Message("assistant", "Hello."),
        Message("user", "What colour is the sky?"),
    )
    one(opened(), Question(turns))
    assert [m["role"] for m in endpoint.seen[0][2]["messages"]] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("body", "reply"),
    [
        (answer("No.", reasoning_content="I think"), Reply("No.", chain="I think")),
        (answer("No.", reasoning="I think"), Reply("No.", chain="I think")),
        (answer("<think>I think</think>No."), Reply("No.", chain="I think")),
        (answer("I think\n</think>\nNo."), Reply("No.", chain="I think")),
        (answer("<think>I th", "length"), None),
        (answer(None, "length", reasoning_content="I th"), None),
        (answer("", "length", reasoning="I th"), None),
    ],
    ids=["apart", "apart, named otherwise", "inside", "prefilled", "cut", "cut apart", "no words"],
)
def test_judges_get_the_answer_and_not_the_chain(endpoint, opened, body, reply):
    endpoint.default = says(body)
    wanted = reply or Reply("", stopped=False, problem="unfinished", chain="I th")
    assert one(opened()) == wanted


def test_a_chain_has_tokens_of_its_own(endpoint, opened):
    endpoint.default = says(answer("Blue."))
    one(opened(), max_new_tokens=16, thinking_tokens=100)
    assert [body["max_tokens"] for _, _, body in endpoint.seen] == [116]
