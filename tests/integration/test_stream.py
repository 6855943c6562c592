"""
Following a job's stream on a real Redis: from any position, by many readers, until the end, and never for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from common import JobClient, JobState, NotEndedYet, Outcome, StreamEvent, keys
from common.errors import InvalidRequest, RedisUnavailable
from common.redis_client import RedisClient
from common.redis_job_store import RedisJobStore
from common.schemas import Ledger
from tests.waiting import eventually
from worker.embedded_redis import EmbeddedRedis

Follow = Callable[..., list[StreamEvent]]


@pytest.fixture
def store(redis_client: RedisClient) -> RedisJobStore:
    """The worker's side."""
    return RedisJobStore(redis_client, ttl_s=60)


@pytest.fixture
def client(redis_url: str) -> Iterator[JobClient]:
    """The producer's side."""
    made = JobClient(redis_url)
    yield made
    made.close()


@pytest.fixture(params=["sync", "asyncio"])
def follow(request: pytest.FixtureRequest, client: JobClient) -> Follow:
    """Read a stream to its end, either way."""

    async def collect(*args: Any, **kwargs: Any) -> list[StreamEvent]:
        return [event async for event in client.astream(*args, **kwargs)]

    def run(*args: Any, **kwargs: Any) -> list[StreamEvent]:
        if request.param == "sync":
            return list(client.stream(*args, **kwargs))
        return asyncio.run(collect(*args, **kwargs))

    return run


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as threads:
        yield threads


def says(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


def begin(store: RedisJobStore, job_id: str = "1") -> int:
    store.note_streams(job_id)
    attempt = store.begin(job_id, delivery="tag")
    assert attempt is not None
    return attempt


def end(store: RedisJobStore, job_id: str = "1") -> None:
    ledger = Ledger(attempt=store.view(job_id).attempts)
    store.finish(Outcome(job_id=job_id, state=JobState.ANSWERED, response={"choices": []}, ledger=ledger))


def text_of(events: list[StreamEvent]) -> str:
    return "".join(event.text for event in events)


def waits(redis_client: RedisClient, count: int = 1) -> bool:
    """Do so many readers block in Redis?"""
    return int(redis_client.info("clients")["blocked_clients"]) >= count


def test_a_stream_is_followed_while_it_is_written(
    follow: Follow, store: RedisJobStore, redis_client: RedisClient, pool: ThreadPoolExecutor
) -> None:
    """The reader waits before the job is there, hears every word, and stops at the end."""
    reader: Future[list[StreamEvent]] = pool.submit(follow, "1", timeout=20)
    eventually(lambda: waits(redis_client))
    attempt = begin(store)
    for word in ("Once", " upon", " \u2028 a \x00", " \U0001f600"):
        store.add_chunks({("1", attempt): says(word)})
    end(store)

    events = reader.result(10)
    assert [event.kind for event in events] == ["reset", "chunk", "chunk", "chunk", "chunk", "end"]
    assert [event.attempt for event in events] == [1, 1, 1, 1, 1, None]
    assert events[1].chunk == says("Once")
    assert text_of(events) == "Once upon \u2028 a \x00 \U0001f600"
    assert events[-1].state is JobState.ANSWERED


def test_a_reader_that_was_cut_off_goes_on_from_any_position(follow: Follow, store: RedisJobStore) -> None:
    """What it had and what it gets make the whole, wherever the cut was; from the end there is only the end."""
    attempt = begin(store)
    for number in range(5):
        store.add_chunks({("1", attempt): says(f"{number} ")})
    end(store)
    whole = follow("1")

    for cut in range(len(whole) - 1):
        assert whole[: cut + 1] + follow("1", whole[cut].position) == whole
    last = whole[-1]
    assert follow("1", last.position) == [last]


def test_many_readers_hear_the_same(
    follow: Follow, store: RedisJobStore, redis_client: RedisClient, pool: ThreadPoolExecutor
) -> None:
    """Nobody takes a word from another."""
    readers = [pool.submit(follow, "1", timeout=20) for _ in range(8)]
    eventually(lambda: waits(redis_client, 8))
    attempt = begin(store)
    for number in range(50):
        store.add_chunks({("1", attempt): says(f"{number} ")})
    end(store)

    heard = [reader.result(10) for reader in readers]
    assert text_of(heard[0]) == "".join(f"{number} " for number in range(50))
    assert all(events == heard[0] for events in heard)


def test_a_new_attempt_takes_back_what_was_said(
    follow: Follow, store: RedisJobStore, redis_client: RedisClient, pool: ThreadPoolExecutor
) -> None:
    """A reader in the middle of the first hears the reset; one who comes later never hears of the first."""
    attempt = begin(store)
    store.add_chunks({("1", attempt): says("Boo")})
    reader = pool.submit(follow, "1", timeout=20)
    eventually(lambda: waits(redis_client))
    attempt = begin(store)
    store.add_chunks({("1", attempt): says("Once")})
    end(store)

    told = [(event.kind, event.attempt, event.text) for event in reader.result(10)]
    again = [("reset", 2, ""), ("chunk", 2, "Once"), ("end", None, "")]
    assert told == [("reset", 1, ""), ("chunk", 1, "Boo"), *again]
    assert [(event.kind, event.attempt, event.text) for event in follow("1")] == again


@pytest.mark.parametrize("why", ["its stream has expired", "it does not stream"])
def test_a_job_without_a_stream_has_only_its_end(
    follow: Follow, store: RedisJobStore, redis_client: RedisClient, why: str
) -> None:
    """Told by the outcome of record."""
    if why == "its stream has expired":
        begin(store)
    end(store)
    redis_client.delete(keys.stream("1"))

    [event] = follow("1", timeout=5)
    assert (event.kind, event.state, event.position) == ("end", JobState.ANSWERED, "0")


def test_an_end_without_an_event_is_heard_while_waiting(
    follow: Follow, store: RedisJobStore, redis_client: RedisClient, pool: ThreadPoolExecutor
) -> None:
    """A job that does not stream, followed before it has ended."""
    reader = pool.submit(follow, "1", timeout=20)
    eventually(lambda: waits(redis_client))
    end(store)

    assert [event.kind for event in reader.result(5)] == ["end"]


def test_silence_has_an_end(follow: Follow, store: RedisJobStore) -> None:
    """Of a job nobody knows, and of one that has begun; the message says where to go on."""
    with pytest.raises(NotEndedYet, match=r"job 1 for 0\.1 s.*after='0'"):
        follow("1", timeout=0.1)

    attempt = begin(store)
    store.add_chunks({("1", attempt): says("Once")})
    with pytest.raises(NotEndedYet, match=r"after='\d+-\d+'"):
        follow("1", timeout=0.1)


def test_the_time_that_the_reader_itself_takes_is_no_silence(client: JobClient, store: RedisJobStore) -> None:
    """Every event that is there already is given, also without any patience."""
    attempt = begin(store)
    for number in range(3):
        store.add_chunks({("1", attempt): says(f"{number}")})
    events = client.stream("1", timeout=0)
    assert next(events).kind == "reset"
    end(store)

    assert [event.kind for event in events] == ["chunk", "chunk", "chunk", "end"]


@pytest.mark.parametrize("after", ["", "$", "yesterday", "1-", "-1", "1-2-3", "9" * 30])
def test_what_is_no_position_is_refused(follow: Follow, after: str) -> None:
    """Before anything is asked of Redis."""
    with pytest.raises(InvalidRequest, match="is no position of a stream"):
        follow("1", after)


def test_a_reader_hears_that_redis_is_gone_and_goes_on_later(own_redis: EmbeddedRedis) -> None:
    """A clear error, and from the last position the rest: streams are in the append-only file."""
    client = JobClient(own_redis.url)
    store = RedisJobStore(client._redis, ttl_s=60)
    attempt = begin(store)
    store.add_chunks({("1", attempt): says("Once")})
    events = client.stream("1", timeout=20)
    first = [next(events), next(events)]
    own_redis.stop()
    with pytest.raises(RedisUnavailable, match="stream of job 1 broke off"):
        next(events)

    own_redis.start()
    store.add_chunks({("1", attempt): says(" upon")})
    end(store)
    rest = list(client.stream("1", first[-1].position, timeout=20))
    assert text_of([*first, *rest]) == "Once upon"
    client.close()
