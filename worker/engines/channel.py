"""
How the worker and a hosted engine talk: frames on one stream, many requests at once.

Standard library only: the engine's side runs in vLLM's Python, which has nothing of ours but this folder.

| from   | kind     | body                                                                      |
| ------ | -------- | ------------------------------------------------------------------------- |
| worker | START    | an `Order`: the connection is this engine's from then on                  |
| worker | ASK      | OpenAI's path, a line feed, OpenAI's body                                 |
| worker | ABORT    | nothing: the answer to this number is not wanted any more                 |
| worker | PING     | nothing: answer when the engine's loop comes by                           |
| worker | SLEEP    | the level, 1 or 2: answer when the card's memory is given back            |
| worker | WAKE     | the level it sleeps at: answer when it can serve again                    |
| engine | STARTED  | its pid                                                                   |
| engine | READY    | nothing: it answers from now on                                           |
| engine | FAILED   | why it could not load: the exception's class and message                  |
| engine | EVENT    | the data of one server-sent event of a streamed answer                    |
| engine | ANSWER   | the HTTP status, a line feed, the whole answer; nothing more after events |
| host   | ENDED    | the engine's exit code: its process is gone                               |
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import NamedTuple

_HEADER = struct.Struct(">IQB")  # bytes of the body, number, kind


class Kind(IntEnum):
    """What a frame says."""

    START = 1
    ASK = 2
    ABORT = 3
    PING = 4
    STARTED = 5
    READY = 6
    FAILED = 7
    EVENT = 8
    ANSWER = 9
    ENDED = 10
    SLEEP = 11
    WAKE = 12


class Frame(NamedTuple):
    """One message."""

    kind: int
    number: int = 0  # of the request, chosen by the worker
    body: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which engine the host should fork."""

    arguments: Sequence[str]  # as of vLLM's own server
    env: Mapping[str, str]  # on top of the host's
    folder: str  # its own: where it runs, and its temporary files
    log: str

    def pack(self) -> bytes:
        """Write it as a frame's body."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def unpack(cls, body: bytes) -> Order:
        """Read it from a frame's body."""
        return cls(**json.loads(body))


def pack(frame: Frame) -> bytes:
    """Write *frame* as it travels."""
    return _HEADER.pack(len(frame.body), frame.number, frame.kind) + frame.body


class Unpacker:
    """Cuts a stream into frames; what is not yet whole is kept for the next piece."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take the next piece of the stream; gives every frame that is whole now."""
        self._rest += data
        start = 0
        while len(self._rest) - start >= _HEADER.size:
            length, number, kind = _HEADER.unpack_from(self._rest, start)
            end = start + _HEADER.size + length
            if end > len(self._rest):
                break
            yield Frame(kind, number, bytes(self._rest[start + _HEADER.size : end]))
            start = end
        del self._rest[:start]
