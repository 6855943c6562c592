"""
Engine, the protocol: what the worker asks of a program that runs models.

An engine is asked for a state, with a deadline, and verifies it:

| asked            | found                 | done                                                     |
| ---------------- | --------------------- | -------------------------------------------------------- |
| `ensure_ready`   | ready                 | nothing                                                  |
|                  | asleep                | wake it                                                  |
|                  | stopped, or dead      | start it, wait until it answers its health check         |
| `ensure_asleep`  | asleep at that level  | nothing                                                  |
|                  | ready                 | give its card's memory back, all but what a process      |
|                  |                       | keeps; its requests have ended before                    |
| `ensure_stopped` | stopped               | nothing                                                  |
|                  | anything else         | end the whole process tree, wait until it is gone        |
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Protocol, runtime_checkable

from common.errors import EngineFailed
from worker.catalog.spec import EngineKind
from worker.memory.measured import Measured
from worker.selection.placement import Placement
from worker.state.residency import Level


class EngineState(StrEnum):
    """What an engine says of one model."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    ASLEEP = "asleep"
    DEAD = "dead"  # it was ready, and its process ended by itself


OnChunk = Callable[[Mapping[str, Any]], object]


@dataclass(frozen=True, kw_only=True)
class Call:
    """
    One request for an engine.

    With *on_chunk* the body says `stream: true`, and every chunk of the answer is given to it as it comes, in
    OpenAI's form and in order, from whatever thread the engine reads on: it must not block, and must not change
    the chunk. After `generate` has returned none comes; after it has raised, one or two may still be on their way.
    """

    path: str  # OpenAI's path, e.g. /v1/chat/completions
    body: Mapping[str, Any]  # OpenAI's body, the model already resolved
    timeout_s: float
    on_chunk: OnChunk | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What an engine gave back: OpenAI's response, and what was measured."""

    response: Mapping[str, Any]
    run_s: float  # from sending the request to having the whole answer
    prefill_s: float | None = None  # None = this engine does not say
    decode_s: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a successful load measured, or a wake."""

    seconds: float
    level: Level = Level.COLD  # from where: its files, a process that stood ready, or its sleep
    pids: tuple[int, ...] = ()  # the process tree, for NVML and for people
    rss_bytes: int | None = None  # of the tree; None where the engine has no process of its own
    measured: Measured = field(default_factory=Measured)  # what the engine itself says of its memory
    details: Mapping[str, Any] = field(default_factory=dict)


class StopSignal:
    """
    Tells one running job to stop, from any thread, with the reason; can be waited on and listened to.

    The first reason stays. A listener added after the stop is called at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], object]] = []
        self._event: threading.Event | None = None  # made for the first who waits: few do
        self._reason: str | None = None

    @property
    def reason(self) -> str | None:
        """Why the job should stop: "cancelled", "time limit", "handback"; None while it may run."""
        return self._reason

    def stop(self, reason: str) -> None:
        """Ask the job to stop."""
        with self._lock:
            if self._reason is not None:
                return
            self._reason = reason
            listeners, self._listeners = self._listeners, []
            if self._event is not None:
                self._event.set()
        for listener in listeners:
            listener()

    def on_stop(self, listener: Callable[[], object]) -> None:
        """Call *listener* once, in the stopper's thread, when the job should stop."""
        with self._lock:
            if self._reason is None:
                self._listeners.append(listener)
                return
        listener()

    def wait(self, timeout: float) -> bool:
        """Wait up to *timeout* seconds; True if the job should stop."""
        with self._lock:
            if self._reason is not None:
                return True
            event = self._event = self._event or threading.Event()
        return event.wait(timeout)


Read = Callable[[], Completion]  # gives what came of a request, or raises as `Engine.generate` does
OnAnswer = Callable[[Read], object]


class Channel(Protocol):
    """A way to ask one ready model many things at once, without a thread for each."""

    def together(self) -> AbstractContextManager[object]:
        """Send what is asked within this context in one piece, at its end."""
        ...

    def ask(self, call: Call, stop: StopSignal, done: OnAnswer) -> Callable[[], object]:
        """
        Send one request and return; *done* is called once with what came of it, from any thread, and must not block.

        Calling what is returned gives the request up: it ends as one that took longer than `call.timeout_s`, which is
        the caller's to watch.

        Raises
        ------
        JobStopped
            *stop* was set already; *done* is not called.
        """
        ...


@runtime_checkable
class HasChannels(Protocol):
    """An engine that can be asked without a thread."""

    def channel(self, model_id: str) -> Channel | None:
        """Give the way to ask a ready model; None if this one has none."""
        ...


class Engine(Protocol):
    """One kind of engine; it may run several models, each in a process tree of its own."""

    @property
    def kind(self) -> EngineKind | None:
        """Which kind of catalogue entry this engine runs; None = none, it stands in for models of any kind."""
        ...

    def ensure_ready(self, placement: Placement, *, timeout_s: float) -> Loaded:
        """
        Make the model of *placement* answer requests; one that sleeps, and was loaded by the same placement, wakes.

        Raises
        ------
        LoadFailed
            It ended, or did not become ready in *timeout_s*; nothing of it is left running. The message
            carries the last lines the engine printed.
        OutOfMemory
            The same, for want of memory: a smaller placement may do.
        EngineMissing, ModelMissing
            It cannot be started here at all.
        """
        ...

    @property
    def standby(self) -> Level:
        """From where a model starts that is not here: SPARE if a process stands ready for any, else COLD; cheap."""
        ...

    def standby_bytes(self) -> int:
        """What the process that stands ready takes of the host, in bytes; 0 without one."""
        ...

    def sleep_levels(self, placement: Placement) -> tuple[Level, ...]:
        """The levels at which this engine can put the model of *placement* to sleep; empty = it cannot."""
        ...

    def ensure_asleep(self, model_id: str, level: Level, *, timeout_s: float) -> None:
        """
        Put a ready model, whose requests have ended, to sleep at one of its `sleep_levels`.

        Raises
        ------
        EngineFailed
            It did not fall asleep within *timeout_s*; nothing of it is left running.
        """
        ...

    def ensure_stopped(self, model_id: str, *, timeout_s: float) -> None:
        """
        End the model's process tree and see it gone. Running requests fail with EngineDied.

        Raises
        ------
        EngineTimeout
            A process is still there after *timeout_s* and SIGKILL.
        """
        ...

    def state(self, model_id: str) -> EngineState:
        """What is known of *model_id* now; cheap, asks the operating system and not the engine."""
        ...

    def generate(self, model_id: str, call: Call, stop: StopSignal) -> Completion:
        """
        Answer one request; called from many threads at once.

        The completion is whole, also if `call.on_chunk` has had each piece of it.

        Raises
        ------
        EngineNotReady, EngineDied, EngineFailed, EngineTimeout
            The engine was not there, went away, failed by itself, or took longer than `call.timeout_s`.
        InvalidRequest, PromptTooLong
            The engine refused the body.
        JobStopped
            *stop* was set; the request was aborted in the engine.
        """
        ...

    def close(self) -> None:
        """Stop every model and free everything; the last call."""
        ...


class NeverAsleep:
    """For engines that cannot sleep, and keep nothing ready for the next model."""

    standby: Final = Level.COLD

    def standby_bytes(self) -> int:
        """See `Engine`."""
        return 0

    def sleep_levels(self, placement: Placement) -> tuple[Level, ...]:  # noqa: ARG002 - the protocol's signature
        """See `Engine`."""
        return ()

    def ensure_asleep(self, model_id: str, level: Level, *, timeout_s: float) -> None:  # noqa: ARG002 - as above
        """See `Engine`."""
        raise EngineFailed(f"The engine of {model_id} cannot sleep; end it instead.")


class JobStopped(Exception):
    """The job was told to stop and did; `reason` says why. Never leaves the worker."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
