"""
Brings files into the page cache from a thread in the background, as gently as the system allows.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from common.logs import get_logger
from worker.residency.prefetch import Prefetch

logger = get_logger(__name__)

_CHUNK_BYTES = 4 * 2**20  # between two looks whether something else is wanted; a slow disk reads it in 0.1 s
_NICEST = 19


class PageCache:
    """
    Reads the files of the model that is wanted, once, and stops as soon as another one is, or none.

    *files_of* names a model's files; it may look at the disk.
    """

    def __init__(self, files_of: Callable[[str], Iterable[Path]]) -> None:
        self._files_of = files_of
        self._changed = threading.Condition()
        self._wanted: Prefetch | None = None
        self._done: str | None = None  # the model that was read last: its files need no second look
        self._closed = False
        self._thread: threading.Thread | None = None

    def want(self, prefetch: Prefetch) -> None:
        """Read the files of this model from now on; what is under way for another one ends. Returns at once."""
        with self._changed:
            if prefetch.model_id is None:
                self._wanted = self._done = None
            elif prefetch.model_id != self._done and not self._wants(prefetch.model_id):
                self._wanted = prefetch
                logger.info("residency.prefetch", model_id=prefetch.model_id, reason=prefetch.reason)
                self._thread = self._thread or self._start()
            self._changed.notify_all()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is left to read; False if something still is after *timeout_s*."""
        with self._changed:
            return self._changed.wait_for(lambda: self._wanted is None, timeout_s)

    def close(self) -> None:
        """Stop, in the middle of a file too; returns when no file is read any more."""
        with self._changed:
            self._closed, self._wanted = True, None
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _wants(self, model_id: str) -> bool:
        return self._wanted is not None and self._wanted.model_id == model_id

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        with suppress(OSError, AttributeError):  # Linux: of this thread alone, and its reads come last as well
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICEST)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._wanted is not None)
                if self._closed:
                    return
                wanted = self._wanted
            if wanted is not None and wanted.model_id is not None:
                self._read(wanted.model_id, wanted)

    def _read(self, model_id: str, wanted: Prefetch) -> None:
        began, read = time.monotonic(), 0
        try:
            for file in self._files_of(model_id):
                if self._wanted is not wanted:
                    break
                read += self._read_file(file, wanted, wanted.most_bytes - read)
        except OSError as error:  # a load will say more of it
            logger.warning("residency.prefetch_failed", model_id=model_id, error=str(error))
        with self._changed:
            if self._wanted is wanted:
                self._wanted, self._done = None, model_id
                logger.info(
                    "residency.prefetched", model_id=model_id, bytes=read, seconds=round(time.monotonic() - began, 2)
                )
            self._changed.notify_all()

    def _read_file(self, file: Path, wanted: Prefetch, most: int) -> int:
        """Read *file* from its beginning, at most *most* bytes; returns how many."""
        read = 0
        with file.open("rb", buffering=0) as opened:
            buffer = memoryview(bytearray(_CHUNK_BYTES))
            while self._wanted is wanted and read < most:
                got = opened.readinto(buffer[: most - read])
                if not got:
                    break
                read += got
        return read
