"""
The transport's invariants for messages that wait in a backlog, on a real Redis.
"""

from __future__ import annotations

import json
import multiprocessing
from itertools import cycle
from typing import Any

from kombu import Connection, Consumer, Queue

from common import keys
from common.backlog import PLACE_HEADER, RedisBacklog
from common.redis_client import RedisClient, connect
from common.transport import Channel, Transport, deliveries_in_flight, give_back

SMALL, LARGE = keys.model_queue("small"), keys.model_queue("large")
NOW = 1_000_000.0


def connection(url: str, owner: str = "me", transport: Any = Transport) -> Connection:
    options = {"owner": owner, "priority_steps": list(keys.PRIORITY_STEPS)}
    return Connection(url, transport=transport, transport_options=options)


def publish(
    url: str, *job_ids: str, queue: str = LARGE, priority: int = 3, transport: Any = Transport, **place: Any
) -> None:
    """Send a message for each job, as Celery does."""
    with connection(url, "producer", transport) as conn, conn.Producer() as producer:
        for job_id in job_ids:
            headers = {"id": job_id, PLACE_HEADER: {"queued_at": NOW, **place}}
            producer.publish(
                {"tools": []}, exchange="", routing_key=queue, declare=[Queue(queue, routing_key=queue)],
                headers=headers, priority=priority,
            )  # fmt: skip


class Inbox:
    """Takes messages as a worker does, without acknowledging them by itself."""

    def __init__(self, conn: Connection, *queues: str, prefetch: int = 0, no_ack: bool = False) -> None:
        self.conn = conn
        self.messages: list[Any] = []
        self.channel: Channel = conn.channel()
        self.channel.basic_qos(0, prefetch, False)
        consumed = [Queue(queue, routing_key=queue) for queue in queues or (LARGE,)]
        self.consumer = Consumer(self.channel, consumed, no_ack=no_ack, on_message=self.messages.append)
        self.consumer.consume()

    def take(self, count: int = 1) -> list[Any]:
        """Wait until *count* more messages came."""
        wanted = len(self.messages) + count
        while len(self.messages) < wanted:
            self.conn.drain_events(timeout=5)
        return self.messages[-count:]


def ids(messages: list[Any]) -> list[str]:
    return [message.headers["id"] for message in messages]


def waiting(client: RedisClient, queue: str = LARGE) -> list[str]:
    return [job_id for job_id, _ in RedisBacklog(client).walk(queue)]


def test_a_popped_message_stands_in_unacked_with_its_owner(redis_url: str, redis_client: RedisClient) -> None:
    """It is in the backlog, then on the books under the owner's name, then nowhere."""
    publish(redis_url, "job")
    assert not redis_client.exists(LARGE)
    with connection(redis_url, "worker-a") as conn:
        inbox = Inbox(conn)
        assert inbox.channel._size(LARGE) == 1
        [message] = inbox.take()
        assert waiting(redis_client) == []
        assert redis_client.hgetall(keys.UNACKED_OWNER) == {message.delivery_tag: "worker-a"}
        assert json.loads(redis_client.hget(keys.UNACKED, message.delivery_tag)) == [message._raw, "", LARGE]
        assert message.payload == {"tools": []}
        assert message.delivery_tag in deliveries_in_flight()

        message.ack()
        assert redis_client.keys() == [keys.WAKE]


def test_the_most_urgent_job_of_all_queues_comes_first(redis_url: str) -> None:
    """A batch in one queue does not hold up what is interactive in another one that is consumed too."""
    publish(redis_url, "batch a", "batch b", priority=6, queue=SMALL)
    publish(redis_url, "usual", priority=3, queue=LARGE)
    publish(redis_url, "urgent", priority=0, queue=SMALL)
    with connection(redis_url) as conn:
        inbox = Inbox(conn, SMALL, LARGE, prefetch=1)
        got = []
        for _ in range(4):
            [message] = inbox.take()
            got += ids([message])
            message.ack()
    assert got == ["urgent", "usual", "batch a", "batch b"]


def test_a_stock_producers_list_is_served_beside_the_backlog(redis_url: str) -> None:
    """Somebody may still push to the list, or an older router has."""
    publish(redis_url, "ours")
    publish(redis_url, "from stock", transport="redis")
    with connection(redis_url) as conn:
        assert sorted(ids(Inbox(conn).take(2))) == ["from stock", "ours"]


def test_a_delivery_goes_back_to_its_place_and_once(redis_url: str, redis_client: RedisClient) -> None:
    """Two sweepers that see the same dead owner put its job back once, before those that came after it."""
    publish(redis_url, "first", "second", "third")
    with connection(redis_url, "dead") as dead, connection(redis_url, "sweeper") as sweeper:
        first, second = Inbox(dead, prefetch=2).take(2)
        channel = sweeper.channel()
        for message in (second, first):
            moved = [give_back(channel, message.delivery_tag, owner="dead") for _ in range(2)]
            assert moved == [True, False]
        assert waiting(redis_client) == ["first", "second", "third"]
        assert not redis_client.exists(keys.UNACKED, keys.UNACKED_OWNER, keys.UNACKED_INDEX)

        again = Inbox(sweeper, prefetch=1).take()[0]
        assert (ids([again]), again.headers["redelivered"], again.payload) == (["first"], True, {"tools": []})
        first.ack()  # late: it is another's now
        assert redis_client.hgetall(keys.UNACKED_OWNER) == {again.delivery_tag: "sweeper"}


def test_what_a_queue_held_when_it_lost_its_turn_goes_back(redis_url: str, redis_client: RedisClient) -> None:
    """A pop that was out when the consumer was cancelled brings messages that nobody takes: they keep their order."""
    publish(redis_url, "a", "b", "c", queue=SMALL)
    with connection(redis_url) as conn:
        inbox = Inbox(conn, SMALL, LARGE)
        conn.transport.cycle._register_BRPOP(inbox.channel)  # the pop is on its way
        inbox.consumer.cancel_by_queue(SMALL)
        conn.drain_events(timeout=5)
    assert inbox.messages == []
    assert waiting(redis_client, SMALL) == ["a", "b", "c"]
    assert not redis_client.exists(keys.UNACKED)


def test_a_copy_that_a_dying_router_left_runs_once(redis_url: str, redis_client: RedisClient) -> None:
    """It published, and died before it acknowledged; the next one publishes again."""
    publish(redis_url, "job", "other")
    publish(redis_url, "job")
    with connection(redis_url) as conn:
        assert ids(Inbox(conn).take(2)) == ["job", "other"]
    assert waiting(redis_client) == []


def test_a_message_that_kombu_cannot_build_is_set_aside(redis_url: str, redis_client: RedisClient) -> None:
    """It blocks nothing and does not come again."""
    damaged = {
        "body": "abc", "headers": {"id": "bad"},
        "properties": {
            "body_encoding": "rot13", "delivery_tag": "x", "delivery_info": {"exchange": "", "routing_key": LARGE},
        },
    }  # fmt: skip
    RedisBacklog(redis_client).put(LARGE, damaged, json.dumps(damaged), now=NOW)
    publish(redis_url, "good")
    with connection(redis_url) as conn:
        [message] = Inbox(conn).take()
        assert ids([message]) == ["good"]
        message.ack()
    assert [json.loads(entry) for entry in redis_client.lrange(keys.MALFORMED, 0, -1)] == [damaged]
    assert not redis_client.exists(keys.UNACKED)


def test_polling_takes_from_the_backlog_too(redis_url: str, redis_client: RedisClient) -> None:
    """One message a call, and none from an empty queue; without acknowledgement it is gone at once."""
    publish(redis_url, "one", "two")
    with connection(redis_url, "poller") as conn:
        channel: Channel = conn.channel()
        assert ids([channel.basic_get(LARGE, no_ack=True)]) == ["one"]
        assert not redis_client.exists(keys.UNACKED)
        assert ids([channel.basic_get(LARGE)]) == ["two"]
        assert redis_client.hlen(keys.UNACKED) == 1
        assert channel.basic_get(LARGE) is None


def test_a_no_ack_consumer_leaves_nothing_behind(redis_url: str, redis_client: RedisClient) -> None:
    """Nobody would take its deliveries off the books."""
    publish(redis_url, "job")
    with connection(redis_url) as conn:
        Inbox(conn, no_ack=True).take()
    assert not redis_client.exists(keys.UNACKED, keys.UNACKED_OWNER)


# --- Deaths --------------------------------------------------------------------------------------------


def answer(url: str, owner: str) -> None:
    """Take jobs, note each as done, acknowledge it, until killed."""
    redis = connect(url)
    with connection(url, owner) as conn:

        def done(message: Any) -> None:
            redis.rpush("done", message.headers["id"])
            message.ack()

        channel = conn.channel()
        channel.basic_qos(0, 8, False)
        with Consumer(channel, [Queue(SMALL), Queue(LARGE)], on_message=done):
            while True:
                conn.drain_events()


def test_no_job_is_lost_however_often_its_holder_is_killed(redis_url: str, redis_client: RedisClient) -> None:
    """Killed in the middle of pops and acknowledgements; what the dead held goes back, and is done at last."""
    sent = [f"job {number:04}" for number in range(3000)]
    pipe = redis_client.pipeline(transaction=False)
    backlog = RedisBacklog(pipe)
    for job_id, queue in zip(sent, cycle((SMALL, LARGE)), strict=False):
        message = {
            "body": "e30=", "headers": {"id": job_id}, "content-type": "application/json", "content-encoding": "utf-8",
            "properties": {
                "body_encoding": "base64", "delivery_tag": job_id, "priority": 3,
                "delivery_info": {"exchange": "", "routing_key": queue},
            },
        }  # fmt: skip
        backlog.put(queue, message, json.dumps(message), now=NOW)
    pipe.execute()

    def left() -> int:
        held: int = redis_client.hlen(keys.UNACKED)
        return held + sum(RedisBacklog(redis_client).count(queue) for queue in (SMALL, LARGE))

    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    kills = 0
    with connection(redis_url, "sweeper") as sweeper:
        channel = sweeper.channel()
        while left():
            owner, enough = f"worker {kills}", redis_client.llen("done") + 200 + kills
            child = processes.Process(target=answer, args=(redis_url, owner), daemon=True)
            child.start()
            while left() and redis_client.llen("done") < enough:
                pass
            child.kill()
            child.join(10)
            kills += 1
            for tag, holder in redis_client.hgetall(keys.UNACKED_OWNER).items():
                assert holder == owner
                assert give_back(channel, tag, owner=holder)

    done = redis_client.lrange("done", 0, -1)
    assert kills > 10
    assert set(done) == set(sent)
    assert len(done) - len(sent) <= kills, "of each death at most the job between its end and its acknowledgement"
    assert not redis_client.exists(keys.UNACKED, keys.UNACKED_INDEX, keys.UNACKED_OWNER)
