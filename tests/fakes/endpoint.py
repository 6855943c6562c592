"""
An endpoint that answers every request with the same, and notes what came: who asked where, with what key and body.
"""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWER = '{"choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}}]}'


class Endpoint(ThreadingHTTPServer):
    """It listens on a free port as soon as it is made."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/base/v9"
        self.status, self.text, self.headers = 200, ANSWER, dict[str, str]()
        self.list_status = 200
        self.seen: list[tuple[str, str, str | None]] = []
        self.bodies: list[str] = []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        """Nobody answers any more."""
        self.shutdown()
        self.server_close()

    def says(self, status: int, text: str = "{}", **headers: str) -> None:
        self.status, self.text, self.headers = status, text, headers


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def do_GET(self) -> None:
        self._answer(self.server.list_status, "{}", {})

    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self._answer(self.server.status, self.server.text, self.server.headers)

    def _answer(self, status: int, text: str, headers: dict[str, str]) -> None:
        self.server.seen.append((self.command, self.path, self.headers["Authorization"]))
        content = text.encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...
