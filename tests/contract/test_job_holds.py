"""
What every JobStore promises of a job between its routing and its end: its share is counted once and given back once.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from celery import Celery

from common import keys
from common.errors import AnswerDropped, JobCancelled
from common.job_store import JobStore, MemoryJobStore
from common.may_enter import Entry, Held
from common.outcome_text import pack, read_outcome
from common.redis_client import RedisClient
from common.redis_job_store import RedisJobStore
from common.schemas import ErrorBody, JobState, Ledger, Outcome, Route

TTL_S = 100.0
MIB = 2**20
ROUTE = Route(model="small", complexity=0.25, why="simple enough")
ENTRY = Entry(tenant="Ü 1", bytes=10, webhook=None, max_jobs=3, max_bytes=100)


def ended(job_id: str, text: str = "Hi") -> Outcome:
    response = {"choices": [{"message": {"content": text}}], "tools": []}
    return Outcome(job_id=job_id, state=JobState.ANSWERED, response=response, ledger=Ledger(model="small"))


def cancelled(job_id: str) -> Outcome:
    return Outcome(job_id=job_id, state=JobState.CANCELLED, error=ErrorBody.of(JobCancelled("Cancelled.")))


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> JobStore:
    if request.param == "memory":
        return MemoryJobStore()
    return RedisJobStore(request.getfixturevalue("redis_client"), ttl_s=TTL_S)


@pytest.fixture
def redis_store(redis_client: RedisClient) -> RedisJobStore:
    return RedisJobStore(redis_client, ttl_s=TTL_S, max_bytes=MIB)


# --- Shares -----------------------------------------------------------------------------------------------


def test_a_tenant_gets_its_share_and_no_more(store: JobStore) -> None:
    """The fourth of three is refused with what the tenant holds, and nothing is noted of it; others may enter."""
    assert [store.note_routed(str(number), ROUTE, ENTRY) for number in range(3)] == [None] * 3
    assert store.note_routed("3", ROUTE, ENTRY) == Held(jobs=3, bytes=30)
    assert store.view("3").state is JobState.UNKNOWN
    assert store.note_routed("3", ROUTE, replace(ENTRY, tenant="other")) is None


def test_bytes_count_as_jobs_do(store: JobStore) -> None:
    """Every small world of two jobs: the second enters exactly if both fit."""
    for number, (first, second) in enumerate(product((0, 1, 49, 50, 99, 100), repeat=2)):
        tenant = replace(ENTRY, tenant=f"tenant {number}")
        assert store.note_routed(f"{number} a", ROUTE, replace(tenant, bytes=first)) is None
        full = store.note_routed(f"{number} b", ROUTE, replace(tenant, bytes=second))
        assert full == (None if first + second <= 100 else Held(jobs=1, bytes=first))


def test_a_message_that_comes_twice_is_counted_once(store: JobStore) -> None:
    """Also where the tenant has no room left by then: it has its share already."""
    for _ in range(5):
        for number in range(3):
            assert store.note_routed(str(number), ROUTE, ENTRY) is None
    assert store.note_routed("3", ROUTE, ENTRY) == Held(jobs=3, bytes=30)


@pytest.mark.parametrize("end", [ended, cancelled])
def test_an_end_gives_the_share_back_once(store: JobStore, end: Callable[[str], Outcome]) -> None:
    """However the job ends, and however often the end is stored."""
    for number in range(3):
        store.note_routed(str(number), ROUTE, ENTRY)
    for _ in range(3):
        store.finish(end("0"))
    assert store.note_routed("3", ROUTE, ENTRY) is None
    full = store.note_routed("4", ROUTE, ENTRY)
    assert full is not None
    assert (full.jobs, full.bytes) == (3, 30)


def test_a_job_that_has_ended_takes_no_share(store: JobStore) -> None:
    """A copy of its message comes late, or it was cancelled before anybody had looked at it."""
    for number in range(5):
        store.finish(cancelled(str(number)))
        assert store.note_routed(str(number), ROUTE, ENTRY) is None
    for number in range(5, 8):
        assert store.note_routed(str(number), ROUTE, ENTRY) is None


def test_of_many_at_once_as_many_enter_as_have_room(redis_store: RedisJobStore, redis_client: RedisClient) -> None:
    """Twenty threads, each job routed and ended by two of them: never more than three at once, and none at the end."""
    start = threading.Barrier(20, timeout=20)
    most = 0

    def work(number: int) -> int:
        nonlocal most
        start.wait()
        entered = 0
        for job_id in (f"{number // 2}-{turn}" for turn in range(20)):  # each pair of threads has the same jobs
            if redis_store.note_routed(job_id, ROUTE, ENTRY) is None:
                entered += 1
                most = max(most, int(redis_client.hget(keys.TENANTS, f"jobs {ENTRY.tenant}") or 0))
                redis_store.finish(ended(job_id))
        return entered

    with ThreadPoolExecutor(20) as pool:
        assert sum(pool.map(work, range(20))) > 0
    assert most <= 3
    assert redis_client.hgetall(keys.HELD) == {}
    assert redis_client.hgetall(keys.TENANTS) == {}


def test_the_time_between_two_ends_is_measured(redis_store: RedisJobStore, redis_client: RedisClient) -> None:
    """A moving mean for each tenant; a tenant that nothing is held of leaves nothing behind."""
    for number in range(3):
        redis_store.note_routed(str(number), ROUTE, ENTRY)
    redis_store.finish(ended("0"))
    ago = float(redis_client.hget(keys.TENANTS, f"ended {ENTRY.tenant}")) - 30
    redis_client.hset(keys.TENANTS, f"ended {ENTRY.tenant}", ago)
    redis_store.finish(ended("1"))

    full = redis_store.note_routed("3", ROUTE, replace(ENTRY, max_jobs=1))
    assert full is not None
    assert full.gap_s == pytest.approx(30, abs=5)
    redis_store.finish(ended("2"))
    assert redis_client.hgetall(keys.TENANTS) == {}


@pytest.mark.parametrize("tenant", ['"', "\\", "a b", "\x00\n", "{}", "ü" * 100, "%d %s", "😀", "1"])
def test_any_name_of_a_tenant_is_its_own(redis_store: RedisJobStore, redis_client: RedisClient, tenant: str) -> None:
    """Names are text from outside."""
    assert redis_store.note_routed("1", ROUTE, replace(ENTRY, tenant=tenant, max_jobs=1)) is None
    assert redis_store.note_routed("2", ROUTE, replace(ENTRY, tenant=tenant, max_jobs=1)) == Held(jobs=1, bytes=10)
    redis_store.finish(ended("1"))
    assert redis_client.hgetall(keys.TENANTS) == {}


# --- Webhooks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [ended, cancelled])
def test_a_webhook_falls_due_with_the_end(store: JobStore, end: Callable[[str], Outcome]) -> None:
    """Not before, and not for a job that names none."""
    store.note_routed("1", ROUTE, replace(ENTRY, webhook="https://a.example/x?y=1"))
    store.note_routed("2", ROUTE, ENTRY)
    assert store.view("1").webhook is None
    store.finish(end("1"))
    store.finish(end("2"))
    assert store.view("1").webhook == "due"
    assert store.view("2").webhook is None


def test_a_job_that_is_refused_tells_its_webhook_too(store: JobStore) -> None:
    """It was never routed; and one that was cancelled before is told when the router sees it."""
    store.finish(cancelled("1"), webhook="https://a.example")
    assert store.view("1").webhook == "due"
    store.finish(cancelled("2"))
    assert store.view("2").webhook is None
    assert store.finish(ended("2"), webhook="https://a.example") == cancelled("2")
    assert store.view("2").webhook == "due"


def test_a_webhook_falls_due_once(redis_store: RedisJobStore, redis_client: RedisClient) -> None:
    """However often the end is told, also after the call was made."""
    redis_store.note_routed("1", ROUTE, replace(ENTRY, webhook="https://a.example"))
    redis_store.finish(ended("1"))
    assert redis_client.zrange(keys.WEBHOOKS, 0, -1) == ["1"]
    call = json.loads(redis_client.hget(keys.WEBHOOK_CALLS, "1"))
    assert (call["url"], call["calls"]) == ("https://a.example", 0)

    redis_client.delete(keys.WEBHOOKS, keys.WEBHOOK_CALLS)
    redis_store.finish(ended("1"), webhook="https://a.example")
    assert not redis_client.exists(keys.WEBHOOKS, keys.WEBHOOK_CALLS)


# --- What is kept -----------------------------------------------------------------------------------------


def noise(size: int) -> str:
    """Text that cannot be packed: as many different characters as there are."""
    return "".join(chr(33 + (number * number * 7919 + number // 94) % 94) for number in range(size))


def test_a_large_answer_comes_back_as_it_was(store: JobStore) -> None:
    """However large, whatever is in it."""
    for job_id, text in {"1": "word " * 100_000, "2": noise(50_000), "3": "ü😀\n" * 9000, "4": "x" * 8000}.items():
        assert store.finish(ended(job_id, text)) == ended(job_id, text)
        assert store.outcome(job_id) == ended(job_id, text)
        assert store.finish(cancelled(job_id)) == ended(job_id, text)


def test_a_large_answer_is_kept_small() -> None:
    """A small one as it is; a large one packed, unless that makes it larger."""
    small, large = ended("1").model_dump_json(), ended("1", "word " * 10_000).model_dump_json()
    assert pack(small) == small
    assert len(pack(large)) < len(large) / 20
    assert read_outcome(pack(large)) == ended("1", "word " * 10_000)


def answers_in(store: RedisJobStore, job_ids: list[str]) -> list[str]:
    """Those of the jobs whose answers are still there."""
    return [job_id for job_id in job_ids if (found := store.outcome(job_id)) and found.error is None]


def test_the_oldest_answers_make_room_for_new_ones(redis_store: RedisJobStore, redis_client: RedisClient) -> None:
    """The job stays answered and never runs again; its outcome says what became of the answer."""
    ids = [str(number) for number in range(12)]
    for job_id in ids:
        redis_store.finish(ended(job_id, "word " * 30_000))  # 150 KB, and 0.2 KB packed: seven fit into 1 MiB
    assert 5 <= len(answers_in(redis_store, ids)) <= 7
    assert answers_in(redis_store, ids) == ids[-len(answers_in(redis_store, ids)) :]
    assert int(redis_client.get(keys.KEPT_BYTES)) <= MIB

    dropped = redis_store.outcome("0")
    assert dropped is not None
    assert dropped.error is not None
    assert (dropped.job_id, dropped.state) == ("0", JobState.ANSWERED)
    assert isinstance(dropped.error.as_exception(), AnswerDropped)
    assert redis_store.finish(ended("0")) == dropped
    assert 0 < redis_client.ttl(keys.outcome("0")) <= TTL_S


def test_celerys_copy_goes_with_the_answer(redis_store: RedisJobStore, redis_url: str) -> None:
    """Whoever asks for it later gets the same error; nobody waits for ever, and no room is taken."""
    app = Celery(backend=redis_url)
    app.backend.store_result('a"b', {"choices": []}, "SUCCESS")
    redis_store.finish(ended('a"b', "word " * 30_000))
    for number in range(8):
        redis_store.finish(ended(str(number), "word " * 30_000))
    pending: Any = app.AsyncResult('a"b')
    with pytest.raises(AnswerDropped, match="JOB_RESULT_MAX_BYTES"):
        pending.get(timeout=5)
    assert redis_store.outcome('a"b') is not None


def test_streams_count_and_go_with_the_answer(redis_store: RedisJobStore, redis_client: RedisClient) -> None:
    """What was said token by token is the answer too."""
    ids = [str(number) for number in range(8)]
    for job_id in ids:
        redis_store.note_streams(job_id)
        assert redis_store.begin(job_id, delivery=job_id) == 1
        for number in range(20):
            redis_store.add_chunks({(job_id, 1): {"choices": [{"text": noise(10_000), "n": number}]}})
        redis_store.finish(ended(job_id).model_copy(update={"ledger": Ledger(attempt=1)}))  # 200 KB behind a short one
    kept = answers_in(redis_store, ids)
    assert 3 <= len(kept) <= 5
    assert kept == ids[-len(kept) :]
    assert [job_id for job_id in ids if redis_client.exists(keys.stream(job_id))] == kept
    assert int(redis_client.get(keys.KEPT_BYTES)) <= MIB


def test_the_newest_answer_is_kept_however_large(redis_store: RedisJobStore) -> None:
    """Somebody has just waited for it."""
    redis_store.finish(ended("1"))
    redis_store.finish(ended("2", noise(2 * MIB)))
    assert answers_in(redis_store, ["1", "2"]) == ["2"]


def test_errors_are_never_dropped(redis_store: RedisJobStore) -> None:
    """They are small, and somebody must be able to see them."""
    redis_store.finish(cancelled("1"))
    redis_store.finish(ended("2", noise(2 * MIB)))
    assert redis_store.outcome("1") == cancelled("1")


def test_what_has_expired_no_longer_counts(redis_store: RedisJobStore, redis_client: RedisClient) -> None:
    """A few of them are struck off at each end, so that the sum follows what is there."""
    for number in range(8):
        redis_store.finish(ended(str(number)))
    for entry in redis_client.zrange(keys.KEPT, 0, -1):
        redis_client.zadd(keys.KEPT, {entry: 1.0})
    redis_store.finish(ended("new"))
    (entry,) = redis_client.zrange(keys.KEPT, 0, -1)
    assert entry.endswith("new")
    assert int(redis_client.get(keys.KEPT_BYTES)) == int(entry.split()[0])


def test_a_store_without_a_limit_drops_nothing(redis_client: RedisClient) -> None:
    """A producer that cancels stores an outcome too; what is kept is none of its business."""
    RedisJobStore(redis_client, ttl_s=TTL_S, max_bytes=MIB).finish(ended("1"))
    producer = RedisJobStore(redis_client, ttl_s=TTL_S)
    producer.finish(ended("2", noise(2 * MIB)))
    assert answers_in(producer, ["1", "2"]) == ["1", "2"]
