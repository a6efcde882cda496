"""A real S3 server on the loopback: moto's, in a process of its own, behind a door that can be shut
and that counts requests.

    with serving() as s3:
        s3.url("run")              # s3://auditgap-tests/4f1c…/run: nobody else's
        s3.environment             # what makes a process find it: endpoint and (canary) keys
        s3.shut(); s3.open()       # connection refused; the same objects again
"""

from __future__ import annotations

import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

BUCKET = "auditgap-tests"
KEY_ID, SECRET = "AKIACANARYCANARY0001", "canary/secret+never+to+be+shown+0123456789"
#: moto's server, in which a PUT on a condition is one step, as it is in S3: moto looks first and
#: writes then.
SERVE = """
import sys, threading
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple
moto, one = DomainDispatcherApplication(create_backend_app), threading.Lock()
moto.debug = True

def served(environ, answer):
    if environ["REQUEST_METHOD"] != "PUT":
        return moto(environ, answer)
    with one:
        return moto(environ, answer)

run_simple("127.0.0.1", int(sys.argv[1]), served, threaded=True, request_handler=MotoRequestHandler)
"""
_REQUEST = re.compile(rb"(GET|PUT|HEAD|POST|DELETE) (\S+) HTTP/1")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """What `serving` gives."""

    def __init__(self) -> None:
        self._behind = free_port()
        self.port = free_port()
        self.requests: list[str] = []  #: method and path, in order
        self._sockets: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(self._behind)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._behind), timeout=1).close()
                break
            except OSError:
                if self.process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(
                        "moto's server did not start; is moto[server] installed?"
                    ) from None
                time.sleep(0.05)
        self.open()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def url(self, name: str) -> str:
        return f"s3://{BUCKET}/{secrets.token_hex(6)}/{name}"

    # -- the door
    # ------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def shut(self) -> None:
        """From here on nobody answers."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # or the thread in accept() keeps the port open
            listener.close()
        for one in list(self._sockets):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._sockets.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                if self._listener is not listener:
                    client.close()
                    return
                server = socket.create_connection(("127.0.0.1", self._behind))
                self._sockets |= {client, server}
                threading.Thread(target=self._carry, args=(client, server), daemon=True).start()

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        """One connection, until both sides have ended."""
        asking = threading.Thread(target=self._pump, args=(client, server, True), daemon=True)
        asking.start()
        self._pump(server, client, False)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)  # or the other thread waits for a word more
        asking.join()
        self._sockets -= {client, server}
        client.close()
        server.close()

    def _pump(self, source: socket.socket, sink: socket.socket, count: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if count and (request := _REQUEST.match(data)):
                    self.requests.append(b" ".join(request.groups()).decode())
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.shut()
        self.process.kill()
        self.process.wait()


@contextmanager
def serving() -> Iterator[Server]:
    """A server with the bucket `BUCKET`; ended by its process id."""
    server = Server()
    try:
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            line.sendall(
                f"PUT /{BUCKET} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length:"
                " 0\r\n\r\n".encode()
            )
            answer = line.recv(1 << 16)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"no bucket: {answer[:200]!r}")
        yield server
    finally:
        server.close()
