"""A server on this machine that speaks OpenAI's protocol, and fails as it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass
class Reply:
    """What the server sends back, once `hold` is set.

    Attributes:
        text: the model's answer.
        status: of the response.
        headers: further headers.
        raw: sent in place of an answer.
        hold: waited for; a reply that never comes has one that is never set.
    """

    text: str = "fine"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: str | None = None
    hold: threading.Event | threading.Barrier | None = None

    def body(self) -> bytes:
        message = {"role": "assistant", "content": self.text}
        whole = {
            "id": "1", "object": "chat.completion", "created": 0, "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        }  # fmt: skip
        return (self.raw if self.raw is not None else json.dumps(whole)).encode()


@dataclass
class Served:
    """The server's address and the requests that came."""

    url: str
    requests: list[Body]
    keys: list[str]


@contextmanager
def serving(reply: Callable[[int, Body], Reply]) -> Iterator[Served]:
    """A server whose replies depend on the number of the request and its body."""
    lock, released = threading.Lock(), threading.Event()
    served = Served("", [], [])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(served.requests)
                served.requests.append(body)
                served.keys.append(self.headers.get("Authorization", ""))
            answer = reply(number, body)
            if isinstance(answer.hold, threading.Barrier):
                answer.hold.wait(30)
            elif answer.hold is not None:
                while not (answer.hold.wait(0.05) or released.is_set()):
                    pass
            data = answer.body()
            try:
                self.send_response(answer.status)
                for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # who asked has gone

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        released.set()
        server.shutdown()
        server.server_close()
        thread.join()
