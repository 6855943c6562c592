"""
The lease: the living keep their deliveries, the dead lose them within two beats.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from celery import Celery
from kombu import Connection

from common import delivery_scripts as scripts
from common import keys
from common.backlog import job_id_of
from common.celery_app import create_app
from common.redis_client import RedisClient, connect
from common.redis_job_store import RedisJobStore
from common.schemas import Fault, JobState
from common.settings import Settings
from tests.integration.test_transport import Inbox, connection, publish
from tests.waiting import eventually
from worker.delivery.deaths import Deaths
from worker.delivery.lease import Lease
from worker.delivery.pool import leaving

NOW = 1_000_000.0
DELIVERIES = keys.UNACKED, keys.UNACKED_INDEX, keys.UNACKED_OWNER


@pytest.fixture
def app(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Celery:
    """An app on the empty Redis."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    return create_app(Settings.from_env(), owner="sweeper")


def lease(app: Celery, url: str, owner: str, **changes: Any) -> Lease:
    client = connect(url)
    given: dict[str, Any] = {
        "app": app,
        "client": client,
        "deaths": Deaths(client, RedisJobStore(client, ttl_s=60)),
        "owner": owner,
        "lease_s": 15,
        "visibility_timeout_s": 120,
        "held": set,
    }
    return Lease(**(given | changes))


def begun(store: RedisJobStore, messages: Sequence[Any]) -> list[str]:
    """Begin the job of each message; gives their ids."""
    job_ids = [id_of(found) for found in messages]
    for job_id, found in zip(job_ids, messages, strict=True):
        assert store.begin(job_id, delivery=found.delivery_tag)
    return job_ids


def id_of(message: Any) -> str:
    return job_id_of({"headers": message.headers, "properties": message.properties})


def test_a_dead_owners_delivery_goes_back_after_two_sweeps(app: Celery, redis_url: str, redis_client: Any) -> None:
    """One sweep without a lease raises the suspicion, the next one acts; the message is whole."""
    publish(redis_url, "job")
    with connection(redis_url, "dead") as conn:
        Inbox(conn).take()
        sweeper = lease(app, redis_url, "sweeper")
        assert [sweeper.sweep(now=time.time()) for _ in range(3)] == [0, 1, 0]
    assert redis_client.llen("work") == 1
    assert not redis_client.exists(keys.UNACKED, keys.UNACKED_OWNER, keys.UNACKED_INDEX)


@pytest.fixture
def store(redis_client: RedisClient) -> RedisJobStore:
    return RedisJobStore(redis_client, ttl_s=60)


@pytest.fixture
def told_to_leave() -> Iterator[None]:
    """Let this process have had its SIGTERM."""
    leaving.set()
    yield
    leaving.clear()


def test_what_ran_in_a_process_that_died_hears_of_it_and_in_what_company(
    app: Celery, redis_url: str, store: RedisJobStore
) -> None:
    """The two that had begun, not the one that was merely fetched; by the time they are in their queue again."""
    publish(redis_url, "runs", "runs too", "fetched", "handed back")
    with connection(redis_url, "there.42.0badf00d") as conn:
        *both, fetched, handed_back = Inbox(conn).take(4)
        first, second = begun(store, both)
        [back] = begun(store, [handed_back])
        store.hand_back(back, attempt=1)
        sweeper = lease(app, redis_url, "sweeper")
        assert [sweeper.sweep(now=time.time()) for _ in range(2)] == [0, 4]

    for job_id in (first, second):
        [fault] = store.view(job_id).faults
        assert (fault.kind, fault.worker, fault.attempt, fault.company) == ("WorkerDied", "there", 1, 2)
        assert fault.message == "The worker there was gone; it ran 2 jobs at once, this one among them."
        assert store.view(job_id).state is JobState.ROUTED
    for job_id in (back, id_of(fetched)):
        assert store.view(job_id).faults == ()


def test_two_that_find_the_same_death_count_it_once_with_the_whole_company(
    app: Celery, redis_url: str, store: RedisJobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one comes in the middle, when some have gone back: they were there all the same."""
    publish(redis_url, "one", "two", "three")
    lose = store.lose
    with connection(redis_url, "dead") as conn:
        job_ids = begun(store, Inbox(conn).take(3))
        sweepers = [lease(app, redis_url, name) for name in ("first", "second")]
        assert [sweeper.sweep(now=time.time()) for sweeper in sweepers] == [0, 0]
        told: list[str] = []

        def interrupted(_self: RedisJobStore, job_id: str, fault: Fault) -> bool:
            done = lose(job_id, fault)
            told.append(job_id)
            if len(told) == 1:
                sweepers[1].sweep(now=time.time())
            return done

        monkeypatch.setattr(RedisJobStore, "lose", interrupted)
        sweepers[0].sweep(now=time.time())
    assert len(told) > len(job_ids)  # the second did come in between
    assert [[fault.company for fault in store.view(job_id).faults] for job_id in job_ids] == [[3]] * 3


@pytest.mark.usefixtures("told_to_leave")
def test_a_process_that_was_told_to_leave_has_not_died_of_a_job(
    app: Celery, redis_url: str, store: RedisJobStore, redis_client: RedisClient
) -> None:
    """Its host's patience was shorter than its grace, and it was killed: the jobs go back as if it had handed them."""
    publish(redis_url, "job")
    with connection(redis_url, "leaves") as conn:
        [job_id] = begun(store, Inbox(conn).take())
        lease(app, redis_url, "leaves").renew(now=time.time())
        redis_client.delete(keys.lease("leaves"))
        sweeper = lease(app, redis_url, "sweeper")
        assert [sweeper.sweep(now=time.time()) for _ in range(2)] == [0, 1]
    assert store.view(job_id).faults == ()
    assert store.view(job_id).state is JobState.ROUTED


def test_one_that_was_taken_for_dead_and_came_back_may_die_yet(
    app: Celery, redis_url: str, store: RedisJobStore, redis_client: RedisClient
) -> None:
    """How many ran at its first death says nothing of the second."""
    publish(redis_url, "one", "two")
    sweeper, paused = lease(app, redis_url, "sweeper"), lease(app, redis_url, "paused")
    with connection(redis_url, "paused") as before, connection(redis_url, "paused") as after:
        begun(store, Inbox(before).take(2))
        assert [sweeper.sweep(now=time.time()) for _ in range(2)] == [0, 2]
        paused.renew(now=time.time())
        assert sweeper.sweep(now=time.time()) == 0
        [job_id] = begun(store, Inbox(after, prefetch=1).take())
        redis_client.delete(keys.lease("paused"))
        assert [sweeper.sweep(now=time.time()) for _ in range(2)] == [0, 1]
    assert [fault.company for fault in store.view(job_id).faults] == [2, 1]


def test_a_living_owner_keeps_its_deliveries(app: Celery, redis_url: str, redis_client: Any) -> None:
    """However many sweeps, as long as the lease is there."""
    publish(redis_url, "job")
    with connection(redis_url, "alive") as conn:
        Inbox(conn).take()
        lease(app, redis_url, "alive").renew(now=time.time())
        sweeper = lease(app, redis_url, "sweeper")
        assert [sweeper.sweep(now=time.time()) for _ in range(3)] == [0, 0, 0]
    assert redis_client.hlen(keys.UNACKED) == 1


def test_an_owner_that_comes_back_between_two_sweeps_is_not_dead(app: Celery, redis_url: str) -> None:
    """After an outage of Redis all leases have run out; the living get a beat to renew."""
    publish(redis_url, "job")
    with connection(redis_url, "away") as conn:
        Inbox(conn).take()
        sweeper, away = lease(app, redis_url, "sweeper"), lease(app, redis_url, "away")
        assert sweeper.sweep(now=time.time()) == 0
        away.renew(now=time.time())
        assert sweeper.sweep(now=time.time()) == 0


def test_ending_the_lease_frees_the_deliveries(app: Celery, redis_url: str) -> None:
    """A process that leaves in order does not make the others wait for its lease to run out."""
    publish(redis_url, "job")
    with connection(redis_url, "leaving") as conn:
        Inbox(conn).take()
        leaving, sweeper = lease(app, redis_url, "leaving"), lease(app, redis_url, "sweeper")
        leaving.renew(now=time.time())
        leaving.end()
        assert [sweeper.sweep(now=time.time()) for _ in range(2)] == [0, 1]


def test_what_a_living_process_forgot_goes_back_after_two_sweeps(
    app: Celery, redis_url: str, store: RedisJobStore
) -> None:
    """A delivery of our own that nothing here holds could not be given back at its time; what runs is kept."""
    publish(redis_url, "forgotten", "running")
    with connection(redis_url, "owner") as conn:
        forgotten, running = Inbox(conn).take(2)
        [job_id] = begun(store, [forgotten])
        owner = lease(app, redis_url, "owner", held=lambda: {running.delivery_tag})
        assert [owner.sweep(now=time.time()) for _ in range(3)] == [0, 1, 0]
    assert store.view(job_id).faults == ()
    with connection(redis_url, "next") as conn:
        assert Inbox(conn).take()[0].delivery_tag == forgotten.delivery_tag


def test_a_delivery_without_an_owner_goes_back_after_the_visibility_timeout(app: Celery, redis_url: str) -> None:
    """Stock kombu writes no owner; what it popped and lost is found by its age. What has an owner is not."""
    publish(redis_url, "stock", "ours")
    with connection(redis_url, "alive") as ours, Connection(redis_url) as stock:
        stocks = Inbox(stock, prefetch=1).take()[0]
        Inbox(ours).take()
        alive, sweeper = lease(app, redis_url, "alive"), lease(app, redis_url, "sweeper")
        alive.renew(now=time.time())
        assert sweeper.sweep(now=time.time() + 119) == 0
        assert sweeper.sweep(now=time.time() + 121) == 1
    with connection(redis_url, "next") as conn:
        assert Inbox(conn).take()[0].delivery_tag == stocks.delivery_tag


WHERE = '"delivery_tag": "%s", "delivery_info": {"exchange": "", "routing_key": "%s"}'


def entry(**changes: str) -> bytes:
    """What somebody pushed, each field as JSON."""
    fields = {"headers": "{}", "body": '"x"', "properties": f"{{{WHERE % ('tag', 'work')}}}", **changes}
    return "{{{}}}".format(", ".join(f'"{name}": {value}' for name, value in fields.items())).encode("latin-1")


@pytest.mark.parametrize(
    ("raw", "goes_back"),
    [
        (entry(headers="[1]"), False),
        (entry(more="0x1F"), False),  # a number to cjson, and to nobody else
        (entry(properties=f"{{{WHERE % ('tag', '')}}}"), False),  # it names no queue
        (entry(properties=f'{{{WHERE % ("tag", "work")}, "priority": 1e999}}'), False),
        (entry(headers='{"id": "\\ud800"}'), False),  # half a character
        (entry(body='"\xff"'), True),  # no UTF-8, which is replaced wherever a message is read
        (entry(headers='{"id": [1]}'), True),
    ],
)
def test_what_a_dead_process_held_and_is_no_message_stops_nobody(
    app: Celery, redis_url: str, redis_client: RedisClient, raw: bytes, *, goes_back: bool
) -> None:
    """It was killed between the pop and its look at it: what cannot go back is set aside, and the others go back."""
    redis_client.lpush("work", raw)
    arguments = "work", *DELIVERIES, keys.WAKE, keys.MALFORMED, "dead", 1, 1, "1"
    redis_client.execute_command("EVAL", scripts.POP, 1 + 5, *arguments, NEVER_DECODE=True)
    publish(redis_url, "job")
    with connection(redis_url, "dead") as conn:
        Inbox(conn).take()
        sweeper = lease(app, redis_url, "sweeper")
        assert [sweeper.sweep(now=time.time()) for _ in range(2)] == [0, 1 + goes_back]
    assert redis_client.llen(keys.MALFORMED) == (not goes_back)
    assert not redis_client.exists(*DELIVERIES)


def test_a_fault_of_ours_does_not_end_the_thread(app: Celery, redis_url: str, redis_client: RedisClient) -> None:
    """Else this process would be taken for dead, and its jobs run a second time elsewhere."""
    looks = iter([ZeroDivisionError("a bug")])

    def held() -> set[str]:
        if (fault := next(looks, None)) is not None:
            raise fault
        return set()

    beating = lease(app, redis_url, "me", lease_s=0.3, held=held)
    beating.start()
    eventually(lambda: redis_client.exists(keys.lease("me")), what="the next beat renews it")
    beating.end()
    beating.join(5)
    assert not beating.is_alive()


def test_a_missed_beat_does_not_end_the_thread(app: Celery, redis_url: str, own_redis: Any) -> None:
    """Redis away for a beat: the thread goes on and renews when it is back."""
    beating = lease(app, own_redis.url, "me", lease_s=0.3)
    own_redis.kill()
    beating.start()
    own_redis.start()
    client = connect(own_redis.url)
    until = time.monotonic() + 10
    while not client.exists(keys.lease("me")):
        assert time.monotonic() < until
    beating.end()
    beating.join(5)
    assert not beating.is_alive()
