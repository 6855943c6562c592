"""
Asks workers to leave as SIGTERM does, through Celery's remote control: one by its name, or all of this host.
"""

from __future__ import annotations

import os
import signal
from socket import gethostname
from typing import Any

from celery import Celery
from celery.worker.control import Panel

_COMMAND = "drain"
_ANSWER_S = 3.0  # for those who hear it to say so; nobody can know how many will


def hear_drain() -> None:
    """Let this process hear the command; Celery's own `shutdown`, which waits for the last job, becomes the same."""
    Panel.data |= {_COMMAND: _drain, "shutdown": _drain}


def ask_to_drain(app: Celery, worker: str | None) -> tuple[str, ...]:
    """Ask *worker*, or with None all workers of this host, to leave; returns the names of those that heard it."""
    where = {"destination": [f"worker@{worker}"]} if worker else {"pattern": "worker@*", "matcher": "glob"}
    host = None if worker else gethostname()
    replies = app.control.broadcast(_COMMAND, arguments={"host": host}, reply=True, timeout=_ANSWER_S, **where)
    said = {name: draining for reply in replies or () for name, draining in reply.items()}
    return tuple(sorted(name.removeprefix("worker@") for name, draining in said.items() if draining is True))


def _drain(state: Any, host: str | None = None, **_unknown: Any) -> bool:
    """Begin to leave; False if another *host* is meant."""
    if host not in {None, gethostname()}:
        return False
    state.consumer.call_soon(os.kill, os.getpid(), signal.SIGTERM)  # after the answer
    return True
