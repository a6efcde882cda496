"""A server on loopback that speaks OpenAI's `/v1/files` and `/v1/batches`, and counts what it was
asked.

    with running() as server:
        server.url, server.asked["What is 3?"]
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """`takes` looks until a batch is over; `ends`: how; `silent`: words of questions without an
    answer in the file; `dies`: paths at which the connection is cut after the work is done."""

    daemon_threads = True

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.looks = 0
        self.takes, self.ends = 1, "completed"
        self.silent: tuple[str, ...] = ()
        self.says = ""  #: to every question; "": what it is about
        self.dies: list[str] = []
        self.asked: Counter[str] = Counter()  #: words, however they came
        self.alone = 0
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def answered(self, body: dict[str, Any]) -> dict[str, Any]:
        words = body["messages"][-1]["content"]
        message = {"role": "assistant", "content": self.says or f"about {words}"}
        return {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}

    def batch(self, told: dict[str, Any]) -> dict[str, Any]:
        name = f"batch_{len(self.batches)}"
        lines = [json.loads(x) for x in self.files[told["input_file_id"]].splitlines()]
        assert all(x["url"] == told["endpoint"] and x["method"] == "POST" for x in lines)
        words = [x["body"]["messages"][-1]["content"] for x in lines]
        self.asked.update(words)
        out = [
            {
                "custom_id": x["custom_id"],
                "response": {"status_code": 200, "body": self.answered(x["body"])},
            }
            for x, w in zip(lines, words, strict=True)
            if not any(s in w for s in self.silent)
        ]
        self.files[f"out_{name}"] = b"".join(json.dumps(x).encode() + b"\n" for x in reversed(out))
        self.batches[name] = {
            "id": name,
            "object": "batch",
            "completion_window": "24h",
            "created_at": 0,
            "endpoint": told["endpoint"],
            "input_file_id": told["input_file_id"],
            "metadata": told["metadata"],
            "looks": 0,
            "status": "in_progress",
        }
        return self.batches[name]

    def look(self, name: str) -> dict[str, Any]:
        batch = self.batches[name]
        batch["looks"] += 1
        self.looks += 1
        if batch["looks"] >= self.takes:
            batch |= {"status": self.ends, "output_file_id": f"out_{name}"}
        return batch

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is part of the play."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        server = self.server
        if self.path.endswith("/files"):
            assert b'name="purpose"' in raw and b"batch" in raw
            lines = [line for line in raw.split(b"\n") if line.startswith(b'{"custom_id"')]
            name = f"file_{len(server.files)}"
            server.files[name] = b"\n".join(lines)
            self.send(
                {
                    "id": name,
                    "object": "file",
                    "bytes": len(raw),
                    "created_at": 0,
                    "filename": "x",
                    "purpose": "batch",
                    "status": "processed",
                }
            )
        elif self.path.endswith("/batches"):
            self.send(server.batch(json.loads(raw)))
        else:
            body = json.loads(raw)
            server.asked[body["messages"][-1]["content"]] += 1
            server.alone += 1
            self.send(server.answered(body))

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.endswith("/content"):
            self.send(self.server.files[path.split("/")[-2]])
        elif path.endswith("/batches"):
            found = list(self.server.batches.values())[::-1]
            self.send({"object": "list", "data": found, "has_more": False})
        else:
            self.send(self.server.look(path.split("/")[-1]))

    def send(self, told: Any) -> None:
        for ending in self.server.dies:
            if self.path.endswith(ending):
                self.server.dies.remove(ending)
                self.close_connection = True
                self.connection.close()
                return
        body = told if isinstance(told, bytes) else json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def running() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
