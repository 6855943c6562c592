"""
Finds the deadlines of jobs that the router has not read yet: whoever sends a job by name tells nobody else of them.
"""

from __future__ import annotations

import base64
import json
from datetime import datetime
from typing import Any

from pydantic import AwareDatetime, TypeAdapter

from common import keys
from common.redis_client import RedisClient
from common.redis_job_store import RedisJobStore
from common.schemas import earliest

_AT_ONCE = 16  # messages a round trip: some are of megabytes
_MOMENT: TypeAdapter[datetime] = TypeAdapter(AwareDatetime)
# "deadline" as it looks within base64, where a text begins at one of three places in a group of bytes.
_SIGNS = (b"deadline", *(base64.b64encode(b"\0" * n + b"deadline")[n + bool(n) : -4] for n in range(3)))


class UnreadJobs:
    """The router's queue; each message in it is looked at once."""

    def __init__(self, client: RedisClient, store: RedisJobStore) -> None:
        self._redis = client
        self._store = store
        self._newest: dict[str, bytes] = {}  # of each list, when it was looked at last

    def note_deadlines(self) -> int:
        """Note the deadlines of what has come since the last look; returns how many jobs have one."""
        names = keys.lists_of(keys.SUBMIT_QUEUE)
        with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.llen(name)
            lengths = pipe.execute()
        return sum(self._read(name) for name, length in zip(names, lengths, strict=True) if length)

    def _read(self, name: str) -> int:
        """From the newest to the one that was the newest; what comes meanwhile only makes it read some twice."""
        until, newest, start, noted = self._newest.get(name), None, 0, 0
        while True:
            # As bytes: whatever somebody pushed, it must not stop who reads it.
            some = self._redis.execute_command("LRANGE", name, start, start + _AT_ONCE - 1, NEVER_DECODE=True)
            for raw in some:
                if raw == until:
                    break
                noted += self._note(raw)
            newest, start = newest or (some and some[0]), start + len(some)
            if len(some) < _AT_ONCE or until in some:
                break
        if newest:
            self._newest[name] = newest
        return noted

    def _note(self, raw: bytes) -> bool:
        if not any(sign in raw for sign in _SIGNS) and b'"expires": "' not in raw:
            return False
        try:
            message = json.loads(raw)
            deadline = _deadline_of(message)
            job_id = message["headers"]["id"]
            job_id.encode()  # as Redis will have it
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # the router says what is wrong
            return False
        if deadline is not None:
            self._store.note_deadline(job_id, deadline)
        return deadline is not None


def _deadline_of(message: dict[str, Any]) -> datetime | None:
    body = message["body"]
    if message["properties"].get("body_encoding") == "base64":
        body = base64.b64decode(body)
    args, fields, _ = json.loads(body)
    said = (args[0] if args else fields).get("deadline")
    expires = message["headers"].get("expires")
    return earliest(
        None if said is None else _MOMENT.validate_python(said),
        None if expires is None else datetime.fromisoformat(expires),
    )
