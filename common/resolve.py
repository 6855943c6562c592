"""
Which addresses does a host name have now?
"""

from __future__ import annotations

import socket
from concurrent.futures import Future
from threading import Thread


def resolve(host: str, port: int, *, timeout_s: float) -> list[str]:
    """
    Ask the system for the addresses of *host*; none if there is no such name, or nobody says so in time.

    The system's call cannot be stopped: it is left to itself on a thread that holds up nobody's end.
    """
    answer: Future[list[str]] = Future()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            found = []
        answer.set_result([str(address[0]) for *_, address in found])

    Thread(target=ask, name="resolve", daemon=True).start()
    try:
        return answer.result(timeout_s)
    except TimeoutError:
        return []
