"""
What vLLM and llama.cpp share: one server process tree per model, asked for a state, spoken to over HTTP.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from common.errors import EngineDied, EngineFailed, EngineNotReady, EngineTimeout
from worker.catalog.spec import EngineKind, ModelSpec
from worker.engines.assemble import complete, join
from worker.engines.base import Call, Completion, EngineState, Loaded, NeverAsleep, OnChunk, StopSignal
from worker.engines.http import EngineHttp
from worker.engines.interpret import completion_of, interpret, read_chunk
from worker.engines.process import EngineProcess, Launch
from worker.memory.measured import Measured
from worker.selection.placement import Placement

FilesOf = Callable[[ModelSpec], Path | str]  # a local path, or a repository that the engine fetches itself

# Time to end a tree after a failed load: the guard's grace, and the kernel's time to free gigabytes.
END_S = 15.0
# A server that lost its engine answers 500 first and ends a moment later; so long we wait to tell the two apart.
DEATH_NOTICE_S = 1.0
# In the middle of a stream vLLM's server has answered already, and ends only when it looks again: every 5 s.
STREAM_DEATH_NOTICE_S = 6.0


class ServerEngine(NeverAsleep, ABC):
    """
    An `Engine` whose models are server processes.

    Parameters
    ----------
    run_dir
        A short private path for sockets and logs; made if it is not there.
    files_of
        Finds a model's files; raises ModelMissing. It may download, so ask it before a switch.
    """

    kind: ClassVar[EngineKind]

    def __init__(self, *, run_dir: Path, files_of: FilesOf) -> None:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._run_dir = run_dir.absolute()
        self._files_of = files_of
        self._processes: dict[str, EngineProcess] = {}
        self._locks: dict[str, threading.Lock] = {}  # one per model: a start and a stop never interleave
        self._http = EngineHttp()

    @abstractmethod
    def launch(self, placement: Placement, files: Path | str, socket: Path) -> Launch:
        """Say how to start the server for *placement* on *socket*."""

    def read_log(self, log: str) -> Measured:  # noqa: ARG002 - for those whose engine says something
        """Read what the engine printed of the memory that its load took."""
        return Measured()

    def ensure_ready(self, placement: Placement, *, timeout_s: float) -> Loaded:
        """Make the model answer; see `Engine`."""
        model_id, began = placement.model_id, time.monotonic()
        with self._lock(model_id, timeout_s):
            process = self._processes.get(model_id)
            if process is not None and process.ready and process.alive:
                return self._loaded(process, seconds=0.0)
            self._end(model_id, timeout_s=END_S)

            files = self._files_of(placement.spec)
            process = EngineProcess(
                name=model_id, run_dir=self._run_dir, launch=lambda socket: self.launch(placement, files, socket)
            )
            self._processes[model_id] = process
            try:
                process.wait_ready(timeout_s=max(0.0, began + timeout_s - time.monotonic()))
            except BaseException:
                self._end(model_id, timeout_s=END_S)
                raise
            return self._loaded(process, seconds=time.monotonic() - began)

    def ensure_stopped(self, model_id: str, *, timeout_s: float) -> None:
        """End the model's process tree; see `Engine`."""
        deadline = time.monotonic() + timeout_s
        if process := self._processes.get(model_id):
            process.ask_to_stop()  # before the lock: a load under way ends now and lets the lock go
        with self._lock(model_id, timeout_s):
            self._end(model_id, timeout_s=max(0.0, deadline - time.monotonic()))

    def state(self, model_id: str) -> EngineState:
        """What is known of *model_id*; see `Engine`."""
        process = self._processes.get(model_id)
        if process is None or process.asked_to_stop:
            return EngineState.STOPPED
        if not process.ready:
            return EngineState.STARTING
        return EngineState.READY if process.alive else EngineState.DEAD

    def generate(self, model_id: str, call: Call, stop: StopSignal) -> Completion:
        """Answer one request; see `Engine`."""
        process = self._processes.get(model_id)
        if process is None or self.state(model_id) is not EngineState.READY:
            raise EngineNotReady(f"{model_id} is {self.state(model_id)} on this worker; the job waits for its turn.")
        began = time.monotonic()
        whole: dict[str, Any] = {}
        take = None if call.on_chunk is None else partial(_take, whole, call.on_chunk)
        try:
            answer = self._http.post(
                process.socket, call.path, call.body, timeout_s=call.timeout_s, stop=stop, on_event=take
            )
            run_s = time.monotonic() - began
            if answer.streamed:
                return completion_of(complete(whole), run_s=run_s)
            return interpret(status=answer.status, content=answer.content, run_s=run_s)
        except (EngineDied, EngineFailed) as error:
            if process.wait_deaf(DEATH_NOTICE_S if take is None else STREAM_DEATH_NOTICE_S):
                raise EngineDied(
                    f"The engine of {model_id} ended while it worked on the job; its log: {process.log}."
                ) from error
            raise EngineFailed(error.message) from error

    def close(self) -> None:
        """Stop every model and free everything; see `Engine`."""
        for process in list(self._processes.values()):
            process.ask_to_stop()  # all at once, so that their graces pass together
        for model_id in list(self._processes):
            self.ensure_stopped(model_id, timeout_s=END_S)
        self._http.close()

    def _loaded(self, process: EngineProcess, *, seconds: float) -> Loaded:
        return Loaded(
            seconds=seconds,
            pids=process.pids(),
            rss_bytes=process.rss_bytes(),
            measured=self.read_log(process.head()),
            details={"log": str(process.log)},
        )

    def _end(self, model_id: str, *, timeout_s: float) -> None:
        if process := self._processes.get(model_id):
            process.stop(timeout_s=timeout_s)
            self._http.forget(process.socket)
            del self._processes[model_id]

    @contextmanager
    def _lock(self, model_id: str, timeout_s: float) -> Iterator[None]:
        lock = self._locks.setdefault(model_id, threading.Lock())
        if not lock.acquire(timeout=timeout_s):
            raise EngineTimeout(f"{model_id} was being started or stopped by somebody else for {timeout_s:g} s.")
        try:
            yield
        finally:
            lock.release()


def _take(whole: dict[str, Any], on_chunk: OnChunk, event: bytes) -> None:
    """Add what came to *whole*, and hand it on."""
    chunk = read_chunk(event)
    join(whole, chunk)
    on_chunk(chunk)
