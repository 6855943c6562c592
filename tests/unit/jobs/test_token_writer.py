"""
From what engines say to the streams of their jobs: nothing lost, in order, together, and nobody blocked.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import pytest
import redis

from common.job_store import MemoryJobStore
from tests.waiting import eventually
from worker.jobs.token_writer import TokenWriter


class SlowStore(MemoryJobStore):
    """A store whose writes can be held up, or fail."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.open.set()
        self.failures = 0
        self.writes: list[dict[tuple[str, int], str]] = []
        for job_id in ("a", "b"):
            self.note_streams(job_id)
            self.begin(job_id, delivery=job_id)

    def add_chunks(self, chunks: Mapping[tuple[str, int], Mapping[str, Any]]) -> None:
        self.writes.append({speaker: chunk["choices"][0]["delta"]["content"] for speaker, chunk in chunks.items()})
        assert self.open.wait(20)
        if self.failures:
            self.failures -= 1
            raise redis.ConnectionError("gone")
        super().add_chunks(chunks)

    def said(self, job_id: str) -> str:
        """All that is on the job's stream."""
        return "".join(event.text for event in self.stream(job_id))


def says(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


def test_tokens_come_by_themselves() -> None:
    """Nobody need flush while the engine speaks."""
    store = SlowStore()
    on_chunk = TokenWriter(store).listener("a", 1)
    for word in ("Once ", "upon ", "a ", "time"):
        on_chunk(says(word))

    eventually(lambda: store.said("a") == "Once upon a time", within_s=5)


def test_after_a_flush_everything_is_written() -> None:
    """Also what the writer's own thread had in hand; in order."""
    store = SlowStore()
    writer = TokenWriter(store)
    on_chunk = writer.listener("a", 1)
    words = [f"{number} " for number in range(2000)]
    for word in words:
        on_chunk(says(word))
    writer.flush()

    assert store.said("a") == "".join(words)


def test_what_is_said_while_redis_is_slow_becomes_one_chunk_for_each_job() -> None:
    """The engine's thread is not held up, and Redis gets one write for all jobs afterwards."""
    store = SlowStore()
    writer = TokenWriter(store)
    first, second = writer.listener("a", 1), writer.listener("b", 1)
    store.open.clear()
    first(says("0 "))
    eventually(lambda: len(store.writes) == 1)  # under way, and stuck
    for number in range(1, 100):
        first(says(f"{number} "))
        second(says(f"{number} "))
    store.open.set()
    writer.flush()

    numbers = "".join(f"{number} " for number in range(1, 100))
    assert store.writes == [{("a", 1): "0 "}, {("a", 1): numbers, ("b", 1): numbers}]
    assert (store.said("a"), store.said("b")) == (f"0 {numbers}", numbers)


def test_what_could_not_be_written_is_written_later() -> None:
    """Redis says no three times: the tokens wait, and stay in order with those said meanwhile."""
    store = SlowStore()
    writer = TokenWriter(store)
    on_chunk = writer.listener("a", 1)
    store.failures = 3
    on_chunk(says("Once "))
    eventually(lambda: store.failures == 0, within_s=5)
    on_chunk(says("upon"))

    eventually(lambda: store.said("a") == "Once upon", within_s=5)


def test_who_flushes_hears_that_it_failed() -> None:
    """The job must not end as if its stream were whole; the tokens wait."""
    store = SlowStore()
    writer = TokenWriter(store)
    on_chunk = writer.listener("a", 1)
    store.open.clear()
    on_chunk(says("Once "))
    eventually(lambda: len(store.writes) == 1)
    on_chunk(says("upon"))
    store.failures = 10**6
    store.open.set()
    with pytest.raises(redis.ConnectionError):
        writer.flush()
    store.failures = 0

    eventually(lambda: store.said("a") == "Once upon", within_s=5)


def test_a_lost_attempt_speaks_into_the_void() -> None:
    """The writer does not ask whose turn it is; the store does."""
    store = SlowStore()
    writer = TokenWriter(store)
    zombie = writer.listener("a", 1)
    store.begin("a", delivery="a")
    zombie(says("Boo"))
    writer.flush()

    assert [event.kind for event in store.stream("a")] == ["reset"]


def test_a_writer_that_nobody_listens_with_has_no_thread() -> None:
    """Jobs that do not stream pay nothing."""
    before = threading.active_count()
    writer = TokenWriter(SlowStore())
    writer.flush()

    assert threading.active_count() == before
