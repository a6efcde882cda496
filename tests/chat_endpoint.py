"""A chat endpoint on loopback, a real server, for tests that say what it answers.

with Endpoint(lambda body: "complied").running() as endpoint:
    endpoint.url, endpoint.asked["judge"], endpoint.seen[0]["messages"]
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

#: Of a request's body: the answer's text, or the fields of its choice; None: it fails (HTTP 500).
Answer = Callable[[dict[str, Any]], str | dict[str, Any] | None]


class Endpoint(ThreadingHTTPServer):
    """Counts what it is asked, by model and by the key that asks."""

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: Counter[str] = Counter()
        self.asked_with: Counter[str] = Counter()
        self.seen: list[dict[str, Any]] = []  #: bodies of what was answered
        self.lists: list[dict[str, str]] = []  #: entries of /models
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def answered(self) -> Counter[str]:
        """Requests that were answered, by model."""
        return Counter(body["model"] for body in self.seen)

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Until the block ends."""
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send({"object": "list", "data": self.server.lists})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        server.asked[body["model"]] += 1
        server.asked_with[self.headers["authorization"]] += 1
        said = server.answer(body)
        if said is None:
            return self._send({}, 500)
        server.seen.append(body)
        choice = said if isinstance(said, dict) else {"message": {"content": said}}
        message = {"role": "assistant", **choice["message"]}
        told = {"index": 0, "finish_reason": "stop", **choice, "message": message}
        return self._send({"model": body["model"], "choices": [told]})

    def _send(self, value: dict[str, Any], status: int = 200) -> None:
        data = json.dumps({"id": "1", "created": 0, **value}).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
