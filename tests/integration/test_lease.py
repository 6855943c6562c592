"""
The lease: the living keep their deliveries, the dead lose them within two beats.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
from celery import Celery
from kombu import Connection

from common import keys
from common.celery_app import create_app
from common.redis_client import connect
from common.settings import Settings
from tests.integration.test_transport import Inbox, connection, publish
from worker.delivery.lease import Lease

NOW = 1_000_000.0


@pytest.fixture
def app(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Celery:
    """An app on the empty Redis."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    return create_app(Settings.from_env(), owner="sweeper")


def lease(app: Celery, url: str, owner: str, held: set[str] | None = None) -> Lease:
    return Lease(
        app=app, client=connect(url), owner=owner, lease_s=15, visibility_timeout_s=120, held=lambda: held or set()
    )


def test_a_dead_owners_delivery_goes_back_after_two_sweeps(app: Celery, redis_url: str, redis_client: Any) -> None:
    """One sweep without a lease raises the suspicion, the next one acts; the message is whole."""
    publish(redis_url, "job")
    with connection(redis_url, "dead") as conn:
        Inbox(conn).take()
        sweeper = lease(app, redis_url, "sweeper")
        assert [sweeper.sweep(now=time.time()) for _ in range(3)] == [0, 1, 0]
    assert redis_client.llen("work") == 1
    assert not redis_client.exists(keys.UNACKED, keys.UNACKED_OWNER, keys.UNACKED_INDEX)


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


def test_what_a_living_process_forgot_goes_back_after_two_sweeps(app: Celery, redis_url: str) -> None:
    """A delivery of our own that nothing here holds could not be given back at its time; what runs is kept."""
    publish(redis_url, "forgotten", "running")
    with connection(redis_url, "owner") as conn:
        forgotten, running = Inbox(conn).take(2)
        owner = lease(app, redis_url, "owner", held={running.delivery_tag})
        assert [owner.sweep(now=time.time()) for _ in range(3)] == [0, 1, 0]
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


def test_a_missed_beat_does_not_end_the_thread(app: Celery, redis_url: str, own_redis: Any) -> None:
    """Redis away for a beat: the thread goes on and renews when it is back."""
    beating = Lease(app=app, client=connect(own_redis.url), owner="me", lease_s=0.3, visibility_timeout_s=120, held=set)
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
