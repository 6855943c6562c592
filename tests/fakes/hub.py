"""
A small Hugging Face hub on the loopback, so that the hub's own client is what is tested.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self


class Hub(ThreadingHTTPServer):
    """
    A hub with a few files; remembers what it was asked. Runs while it is entered.

    Parameters
    ----------
    files
        Path of the request -> content.
    errors
        Beginning of a path -> status and the hub's code for it; any other missing file is EntryNotFound.
    """

    def __init__(self, files: Mapping[str, bytes], errors: Mapping[str, tuple[int, str]] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files = files
        self.errors = errors or {}
        self.asked: list[str] = []
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Answer(BaseHTTPRequestHandler):
    """Answers as the hub does: an etag and a commit for a file, a range of it, or an error code in a header."""

    def do_HEAD(self) -> None:
        """Say what is known of a file."""
        self.do_GET()

    def do_GET(self) -> None:
        """Give a file, or an error with the hub's code for it."""
        assert isinstance(self.server, Hub)
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        body = self.server.files.get(path)
        if body is None:
            errors = self.server.errors.items()
            status, code = next((e for prefix, e in errors if path.startswith(prefix)), (404, "EntryNotFound"))
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            body = b""
        elif asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, size = int(asked[1]), len(body)
            body = body[first : int(asked[2]) + 1]
            self.send_response(206 if body else 416)
            self.send_header("Content-Range", f"bytes {f'{first}-{first + len(body) - 1}' if body else '*'}/{size}")
        else:
            self.send_response(200)
            self.send_header("ETag", f'"{len(body):040x}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Stay silent."""
