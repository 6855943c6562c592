"""
Carries the requests of one hosted engine over its connection: many at once, whose answers come when they come.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from common.errors import EngineDied, EngineTimeout
from worker.engines.assemble import complete, join
from worker.engines.base import Call, Completion, JobStopped, OnAnswer, OnChunk, Read, StopSignal
from worker.engines.channel import Frame, Kind, Order, Unpacker, pack
from worker.engines.interpret import completion_of, interpret, read_chunk

SEND_S = 30.0  # its event loop reads all the time; a loop that stands still for so long does not come back

_RECEIVE_BYTES = 256 * 1024
_TIMEVAL = struct.Struct("@ll")  # seconds, microseconds
_LAST_EVENT = b"[DONE]"


class Link:
    """
    One engine's connection, a `Channel`; *on_news* hears, on the reader's thread, what answers no request.

    The last news is ENDED, whether the host has said it or the connection broke. An engine that takes nothing for
    *send_s* seconds while there is something to send counts as ended: it hangs.
    """

    def __init__(
        self,
        connection: socket.socket,
        *,
        name: str,
        log: Path,
        on_news: Callable[[Frame], object],
        send_s: float = SEND_S,
    ) -> None:
        # Of sending alone: a timeout of Python's would be of receiving too.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(send_s), int(send_s % 1 * 1e6)))
        self.ended = False
        self._connection = connection
        self._name = name
        self._log = log
        self._on_news = on_news
        self._sending = threading.Lock()
        self._held: list[bytes] | None = None  # what is to be sent in one piece; None = nothing is held back
        self._numbers = count(1)
        self._waiting: dict[int, _Waiting] = {}  # callers, by number; who takes one out settles it
        self._gone = threading.Event()

    def start(self, order: Order) -> None:
        """Give the host its *order*, and hear what comes."""
        self._transmit(Frame(Kind.START, body=order.pack()))
        threading.Thread(target=self._read, name=f"engine-{self._name}", daemon=True).start()

    def wait_gone(self, timeout_s: float) -> bool:
        """Wait until the engine has ended; False if *timeout_s* was not enough."""
        return self._gone.wait(timeout_s)

    def close(self) -> None:
        """Let the connection go."""
        self._connection.close()

    def tell(self, kind: Kind, body: bytes, *, within_s: float) -> bytes:
        """Send one frame and wait for its answer; raises TimeoutError or EngineDied."""
        answer = Future[bytes]()

        def settle(found: _Found) -> None:
            if isinstance(found, bytes):
                answer.set_result(found)
            else:
                answer.set_exception(found)

        number = self._send(kind, body, _Waiting(settle=settle))
        try:
            return answer.result(within_s)
        finally:
            self._waiting.pop(number, None)

    def generate(self, call: Call, stop: StopSignal) -> Completion:
        """Answer one request; see `Engine`."""
        answered = Future[Read]()
        expire = self.ask(call, stop, answered.set_result)
        try:
            read = answered.result(call.timeout_s)
        except TimeoutError:
            expire()
            read = answered.result()
        return read()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Send what is asked within this context in one piece; see `Channel`."""
        with self._sending:
            self._held = []
        try:
            yield
        finally:
            with self._sending:
                held, self._held = self._held, None
                self._write(b"".join(held or ()))

    def ask(self, call: Call, stop: StopSignal, done: OnAnswer) -> Callable[[], object]:
        """Send one request; see `Channel`."""
        if stop.reason is not None:
            raise JobStopped(stop.reason)
        began, limit_s = time.monotonic(), call.timeout_s
        stream = None if call.on_chunk is None else _Stream(call.on_chunk)

        def settle(found: _Found) -> None:
            run_s = time.monotonic() - began

            def read() -> Completion:
                if found is None:
                    raise JobStopped(stop.reason or "")
                if isinstance(found, Exception):
                    raise found
                if stream is not None and stream.began:
                    return completion_of(stream.whole(), run_s=run_s)
                status, _, content = found.partition(b"\n")
                return interpret(status=int(status), content=content, run_s=run_s)

            done(read)

        def expire() -> None:
            self._give_up(
                number,
                EngineTimeout(
                    f"The engine did not answer within {limit_s:g} s. Ask for fewer tokens, or raise JOB_TIMEOUT_S."
                ),
            )

        body = call.path.encode() + b"\n" + json.dumps(call.body).encode()
        number = self._send(Kind.ASK, body, _Waiting(settle=settle, stream=stream))
        stop.on_stop(lambda: self._give_up(number, None))
        return expire

    def _send(self, kind: Kind, body: bytes, waiting: _Waiting) -> int:
        number = next(self._numbers)
        self._waiting[number] = waiting
        self._transmit(Frame(kind, number, body))
        if self.ended:  # looked at after the caller is in its place: either we see the end, or the reader sees us
            self._settle(number, self._died())
        return number

    def _transmit(self, frame: Frame) -> None:
        with self._sending:
            if self._held is not None:
                self._held.append(pack(frame))
            else:
                self._write(pack(frame))

    def _write(self, data: bytes) -> None:
        try:
            self._connection.sendall(data)
        except OSError:  # broken, or it takes no more: either way in the middle of a frame
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)  # the reader sees that, and tells every caller

    def _read(self) -> None:
        """Hand out what the engine says, until it has ended."""
        unpacker, code = Unpacker(), b""
        with suppress(OSError):
            while not code and (data := self._connection.recv(_RECEIVE_BYTES)):
                for frame in unpacker.feed(data):
                    if frame.kind == Kind.ANSWER:
                        self._settle(frame.number, frame.body)
                    elif frame.kind == Kind.EVENT:
                        self._stream(frame)
                    elif frame.kind == Kind.ENDED:
                        code = frame.body
                    else:
                        self._on_news(frame)
        self.ended = True
        self._gone.set()
        for number in list(self._waiting):
            self._settle(number, self._died())
        self._on_news(Frame(Kind.ENDED, body=code))

    def _settle(self, number: int, found: bytes | Exception) -> None:
        waiting = self._waiting.pop(number, None)
        if waiting is not None:  # else it was given up meanwhile
            waiting.settle(found)

    def _give_up(self, number: int, why: Exception | None) -> None:
        waiting = self._waiting.pop(number, None)
        if waiting is not None:
            self._transmit(Frame(Kind.ABORT, number))
            waiting.settle(why)

    def _stream(self, frame: Frame) -> None:
        waiting = self._waiting.get(frame.number)
        if waiting is None or waiting.stream is None:
            return
        try:
            waiting.stream.take(frame.body)
        except Exception as error:  # noqa: BLE001 - it is the caller's: an error of the engine, or of its listener
            self._give_up(frame.number, error)

    def _died(self) -> EngineDied:
        return EngineDied(f"The engine of {self._name} ended while it worked on the job; its log: {self._log}.")


_Found = bytes | Exception | None  # an engine's answer, or what came instead; None = the caller was told to stop


@dataclass(frozen=True, kw_only=True, eq=False)
class _Waiting:
    """
    One who waits for an answer.

    Nothing here leads back to itself, as a future with its callbacks does: what a job leaves behind goes with its last
    reference, and not when the garbage collector finds it among the jobs that run.
    """

    settle: Callable[[_Found], object]  # called once
    stream: _Stream | None = None


class _Stream:
    """The chunks of one answer on their way to the one who asked."""

    def __init__(self, on_chunk: OnChunk) -> None:
        self.began = False
        self._on_chunk = on_chunk
        self._joined: dict[str, Any] = {}
        self._last = b""

    def take(self, event: bytes) -> None:
        """Hand on one event; raises what it says, if that is an error (see `read_chunk`)."""
        self.began, self._last = True, event
        if event != _LAST_EVENT:
            chunk = read_chunk(event)
            join(self._joined, chunk)
            self._on_chunk(chunk)

    def whole(self) -> dict[str, Any]:
        """Give the whole response; raises EngineDied if the end is missing."""
        if self._last != _LAST_EVENT:
            raise EngineDied("The engine's stream ended in the middle of the answer.")
        return complete(self._joined)
