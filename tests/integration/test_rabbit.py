"""
RabbitMQ as the broker, with Redis as the store: what producers hand to it is routed and answered, whatever dies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from celery import Celery
from kombu import Connection

from common import JobClient, Unavailable, keys
from common.celery_app import create_app
from common.redis_client import RedisClient, connect
from common.schemas import JobState
from common.settings import Settings
from tests.e2e.nodes import ProgramNode
from tests.rabbit import Rabbit, why_no_rabbit
from tests.waiting import eventually
from worker.delivery.rabbit import RabbitDoor
from worker.embedded_redis import EmbeddedRedis

BODY = {"messages": [{"role": "user", "content": "Hi"}]}
SETTINGS = {
    "WORKER_STUB_ENGINE": "1",
    "WORKER_HARDWARE": "cpu",
    "WORKER_STUB_LOAD_S": "0.1",
    "WORKER_STUB_RUN_S": "0.05",
}

needs_rabbit = pytest.mark.skipif(why_no_rabbit() is not None, reason=why_no_rabbit() or "")


def router_queue(client: RedisClient) -> int:
    return sum(client.llen(name) for name in keys.lists_of(keys.SUBMIT_QUEUE))


def test_each_message_is_carried_as_it_is(
    redis_url: str, redis_client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its id, body and priority; one that is no JSON goes on too: it is the router who refuses it."""
    url = "memory://carried"
    monkeypatch.setenv("REDIS_URL", redis_url)
    app = create_app(Settings.from_env())
    producer = Celery(broker=url)
    with RabbitDoor(url, app):
        for priority in (0, 9):
            producer.send_task(
                keys.SUBMIT_TASK, args=[BODY], queue=keys.SUBMIT_QUEUE, priority=priority, task_id=f"p{priority}"
            )
        with producer.producer_or_acquire() as raw:
            raw.publish(b"\xff\x00", content_type="application/x-python-serialize", routing_key=keys.SUBMIT_QUEUE,
                        exchange=keys.SUBMIT_QUEUE)  # fmt: skip
        eventually(lambda: router_queue(redis_client) == 3, what="all three are in Redis")
    with Connection(url) as connection:
        assert connection.default_channel._size(keys.SUBMIT_QUEUE) == 0
    found = []
    with app.connection_for_read() as connection:
        while (message := connection.default_channel.basic_get(keys.SUBMIT_QUEUE, no_ack=True)) is not None:
            found.append((message.headers.get("id"), message.properties.get("priority"), message.content_type))
    assert ("p0", 0, "application/json") in found
    assert ("p9", 9, "application/json") in found
    assert "application/x-python-serialize" in {kind for _, _, kind in found}


@pytest.fixture
def rabbit(tmp_path: Path) -> Iterator[Rabbit]:
    """A RabbitMQ."""
    server = Rabbit(tmp_path / "rabbit")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def box(rabbit: Rabbit, own_redis: EmbeddedRedis, tmp_path: Path) -> Iterator[ProgramNode]:
    """A router and a worker that know of both; gives the router."""
    env = {**SETTINGS, "REDIS_URL": own_redis.url, "BROKER_URL": rabbit.url, "LOG_FORMAT": "json"}
    nodes = [
        ProgramNode("router", tmp_path, env, " ready."),
        ProgramNode("worker", tmp_path, env, '"outcome": "ready"'),
    ]
    for node in nodes:
        node.ready()
    yield nodes[0]
    for node in nodes:
        node.teardown()


@needs_rabbit
@pytest.mark.timeout(200)
def test_jobs_that_come_by_rabbit_are_answered_whatever_dies(
    box: ProgramNode, rabbit: Rabbit, own_redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a stock Celery app and from JobClient; over a kill of the router, of Redis and of RabbitMQ."""
    monkeypatch.setenv("BROKER_URL", rabbit.url)
    stock = Celery(broker=rabbit.url, backend=own_redis.url)
    with closing(JobClient(own_redis.url)) as client:
        answer = stock.send_task(keys.SUBMIT_TASK, args=[BODY], queue=keys.SUBMIT_QUEUE).get(timeout=30)
        assert answer["choices"]
        assert client.wait(client.submit(BODY), timeout=30).answer is not None

        ids = []
        box.kill()
        ids += [client.submit(BODY) for _ in range(20)]  # RabbitMQ keeps them
        box.start()
        own_redis.kill()
        # A stock app with a result backend subscribes there when it sends, and this one is away.
        unheard = Celery(broker=rabbit.url)
        ids += [unheard.send_task(keys.SUBMIT_TASK, args=[BODY], queue=keys.SUBMIT_QUEUE).id for _ in range(20)]
        own_redis.start()
        eventually(lambda: all(client.result(i) for i in ids), within_s=60, what="all are answered")

        rabbit.kill()
        with pytest.raises(Unavailable, match=r"amqp://guest:\.\.\.@"):
            client.submit(BODY)
        rabbit.start()
        eventually(lambda: box.logs().count("rabbit.carrying") >= 3, within_s=30, what="the router is back")
        ids.append(client.submit(BODY))
        eventually(lambda: client.result(ids[-1]), within_s=30)
        assert {client.result(i).state for i in ids} == {JobState.ANSWERED}
    with closing(connect(own_redis.url)) as redis:
        assert router_queue(redis) == 0
