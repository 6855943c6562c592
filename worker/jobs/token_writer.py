"""
Carries what engines say to the streams of their jobs: all jobs together, twenty times a second, never in their way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import redis

from common.job_store import JobStore
from common.logs import get_logger
from worker.engines.assemble import join
from worker.engines.base import OnChunk

logger = get_logger(__name__)

_EVERY_S = 0.05  # a reader sees no difference; Redis gets one command per job for what came in the meantime


class TokenWriter:
    """
    Writes chunks to a JobStore from a thread of its own, which starts with the first job that streams.

    What comes while Redis is slow or away waits in memory, joined into one chunk per job: never more than the answers
    themselves.
    """

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._lock = threading.Lock()  # of what follows; held for moments only
        self._pending: dict[tuple[str, int], dict[str, Any]] = {}
        self._thread: threading.Thread | None = None
        self._said = threading.Event()
        self._writing = threading.Lock()  # one flush at a time, so that a job's chunks keep their order

    def listener(self, job_id: str, attempt: int) -> OnChunk:
        """Give what an engine calls with each chunk of this attempt; it never blocks."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="token-writer", daemon=True)
                self._thread.start()

        def on_chunk(chunk: Mapping[str, Any]) -> None:
            with self._lock:
                join(self._pending.setdefault((job_id, attempt), {}), chunk)
            self._said.set()

        return on_chunk

    def flush(self) -> None:
        """
        Write what was said until now; afterwards it is in Redis.

        Raises
        ------
        redis.RedisError
            It could not be written, and waits for the next flush.
        """
        with self._writing:
            with self._lock:
                taken, self._pending = self._pending, {}
            if not taken:
                return
            try:
                self._store.add_chunks(taken)
            except BaseException:
                self._put_back(taken)
                raise

    def _put_back(self, taken: dict[tuple[str, int], dict[str, Any]]) -> None:
        with self._lock:
            for speaker, chunk in self._pending.items():
                join(taken.setdefault(speaker, {}), chunk)
            self._pending = taken

    def _run(self) -> None:
        while self._said.wait():
            self._said.clear()
            try:
                self.flush()
            except redis.RedisError as error:
                logger.warning("tokens.not_written", error=f"{type(error).__name__}: {error}")
                self._said.set()
            time.sleep(_EVERY_S)
