"""
The link to a hosted engine, when the other end goes silent, deaf, or away.
"""

from __future__ import annotations

import gc
import queue
import socket
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.errors import EngineDied, EngineTimeout
from tests.waiting import eventually
from worker.engines.base import Call, Read, StopSignal
from worker.engines.channel import Frame, Kind, Order, Unpacker, pack
from worker.engines.vllm_link import Link

ORDER = Order(arguments=[], env={}, folder="", log="")


class Ends:
    """Both ends of a link."""

    def __init__(self, *, send_s: float) -> None:
        ours, self.engine = socket.socketpair()
        self.news: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self.link = Link(ours, name="m", log=Path("m.log"), on_news=self.news.put, send_s=send_s)
        self.link.start(ORDER)

    def heard(self) -> Iterator[Frame]:
        """What arrives at the engine's end."""
        unpacker = Unpacker()
        while data := self.engine.recv(2**16):
            yield from unpacker.feed(data)


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends(send_s=0.3)
    yield made
    made.engine.close()
    assert made.link.wait_gone(5)
    made.link.close()


def test_answers_find_their_callers(ends: Ends) -> None:
    """By number, in whatever order they come; one that nobody waits for is dropped."""
    heard = ends.heard()
    assert next(heard).kind == Kind.START
    with ThreadPoolExecutor(2) as pool:
        asked = {body: pool.submit(ends.link.tell, Kind.ASK, body, within_s=5) for body in (b"one", b"two")}
        first, last = next(heard), next(heard)
        ends.engine.sendall(pack(Frame(Kind.ANSWER, 99, b"?")))
        for frame in (last, first):
            ends.engine.sendall(pack(Frame(Kind.ANSWER, frame.number, b"answer to " + frame.body)))

        assert {body: found.result(5) for body, found in asked.items()} == {
            b"one": b"answer to one", b"two": b"answer to two",
        }  # fmt: skip


def test_a_silent_engine_costs_the_deadline_of_each_request(ends: Ends) -> None:
    """It is told that the answer is not wanted any more; the link goes on."""
    heard = ends.heard()
    call = Call(path="/v1/completions", body={}, timeout_s=0.1)
    with pytest.raises(EngineTimeout, match=r"0\.1 s"):
        ends.link.generate(call, StopSignal())
    with pytest.raises(TimeoutError):
        ends.link.tell(Kind.PING, b"", within_s=0.05)

    assert [next(heard).kind for _ in range(4)] == [Kind.START, Kind.ASK, Kind.ABORT, Kind.PING]
    assert not ends.link.ended


def test_what_an_answered_request_leaves_behind_goes_at_once(ends: Ends) -> None:
    """It is no cycle, which would stay, with its job, until the garbage collector comes."""
    heard, answered = ends.heard(), queue.SimpleQueue[Read]()

    class Job:
        expire: Callable[[], object]

        def done(self, read: Read) -> None:
            answered.put(read)

    next(heard)
    gc.disable()
    try:
        job, stop = Job(), StopSignal()
        left = weakref.ref(job), weakref.ref(stop)
        job.expire = ends.link.ask(Call(path="/v1/completions", body={}, timeout_s=60), stop, job.done)
        ends.engine.sendall(pack(Frame(Kind.ANSWER, next(heard).number, b"500\n{}")))
        answered.get(timeout=5)
        del job, stop
        eventually(lambda: [ref() for ref in left] == [None, None], what="nothing holds them")
    finally:
        gc.enable()


def test_a_deaf_engine_blocks_nobody_for_ever(ends: Ends) -> None:
    """It takes no more bytes: whoever sends, and whoever waits, hears within the link's deadline that it is gone."""
    with pytest.raises(EngineDied, match=r"m\.log"):
        ends.link.tell(Kind.ASK, b"x" * 2**24, within_s=60)

    assert ends.link.wait_gone(5)
    assert ends.news.get(timeout=5) == Frame(Kind.ENDED)
    with pytest.raises(EngineDied):
        ends.link.tell(Kind.PING, b"", within_s=60)


def test_an_engine_that_goes_takes_its_callers_along(ends: Ends) -> None:
    """The last news is its end, with the exit code if the host has told it."""
    ends.engine.sendall(pack(Frame(Kind.ENDED, body=b"137")))

    assert ends.news.get(timeout=5) == Frame(Kind.ENDED, body=b"137")
    with pytest.raises(EngineDied):
        ends.link.tell(Kind.PING, b"", within_s=60)
