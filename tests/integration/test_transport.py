"""
The transport's invariants, on a real Redis.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from queue import Empty
from typing import Any

import pytest
from celery import Celery
from kombu import Connection, Consumer, Queue

from common import keys
from common.transport import Channel, Transport, deliveries_in_flight, give_back

QUEUE = Queue("work", routing_key="work")


def connection(url: str, owner: str = "me", transport: Any = Transport) -> Connection:
    return Connection(url, transport=transport, transport_options={"owner": owner, "priority_steps": [0, 3, 6, 9]})


def publish(url: str, *bodies: Any, transport: Any = Transport, priority: int = 0) -> None:
    with connection(url, "producer", transport) as conn, conn.Producer() as producer:
        for body in bodies:
            producer.publish(body, routing_key="work", declare=[QUEUE], exchange="", priority=priority)


class Inbox:
    """Takes messages as a worker does, without acknowledging them by itself."""

    def __init__(self, conn: Connection, *, no_ack: bool = False, prefetch: int = 0) -> None:
        self.conn = conn
        self.messages: list[Any] = []
        self.channel = conn.channel()
        self.channel.basic_qos(0, prefetch, False)
        self.consumer = Consumer(self.channel, [QUEUE], no_ack=no_ack, on_message=self.messages.append)
        self.consumer.consume()

    def take(self, count: int = 1) -> list[Any]:
        """Wait until *count* more messages came."""
        wanted = len(self.messages) + count
        while len(self.messages) < wanted:
            self.conn.drain_events(timeout=5)
        return self.messages[-count:]


def test_a_popped_message_stands_in_unacked_with_its_owner(redis_url: str, redis_client: Any) -> None:
    """Between the pop and the acknowledgement the message is on the books, under the owner's name."""
    publish(redis_url, {"n": 1})
    with connection(redis_url, "worker-a") as conn:
        [message] = Inbox(conn).take()

        assert redis_client.llen("work") == 0
        assert redis_client.hgetall(keys.UNACKED_OWNER) == {message.delivery_tag: "worker-a"}
        assert json.loads(redis_client.hget(keys.UNACKED, message.delivery_tag))[0]["body"] == message._raw["body"]
        assert message.delivery_tag in deliveries_in_flight()

        message.ack()
        assert not redis_client.exists(keys.UNACKED, keys.UNACKED_INDEX, keys.UNACKED_OWNER)


def test_messages_come_in_order_of_priority_then_arrival(redis_url: str) -> None:
    """0 is served first; a priority between two steps belongs to the lower one."""
    publish(redis_url, "batch", priority=6)
    publish(redis_url, "first", "second", priority=3)
    publish(redis_url, "urgent", priority=0)
    publish(redis_url, "almost", priority=4)
    with connection(redis_url) as conn:
        got = [message.payload for message in Inbox(conn).take(5)]
    assert got == ["urgent", "first", "second", "almost", "batch"]


def test_a_stock_producer_is_heard(redis_url: str) -> None:
    """Stock kombu does not write to the wake stream; its message is found when the wait ends."""
    with connection(redis_url) as conn:
        inbox = Inbox(conn)
        with pytest.raises(TimeoutError):
            conn.drain_events(timeout=0.05)
        publish(redis_url, "from stock", transport="redis")
        assert inbox.take()[0].payload == "from stock"


def test_a_redis_that_has_forgotten_its_scripts_is_told_again(redis_url: str, redis_client: Any) -> None:
    """It started anew, say: whoever waits there still gets each message, once."""
    with connection(redis_url) as conn:
        inbox = Inbox(conn)
        publish(redis_url, "before")
        assert inbox.take()[0].payload == "before"
        redis_client.script_flush()
        publish(redis_url, "after", "that")
        assert [message.payload for message in inbox.take(2)] == ["after", "that"]
        redis_client.script_flush()
        publish(redis_url, "got")
        message = conn.channel().basic_get("work")
        assert message.decode() == "got"
        assert redis_client.hlen(keys.UNACKED) == 4


def test_only_the_owner_can_acknowledge(redis_url: str, redis_client: Any) -> None:
    """A delivery that was taken back and given to another survives the first owner's late acknowledgement."""
    publish(redis_url, "job")
    with connection(redis_url, "slow") as slow, connection(redis_url, "quick") as quick:
        [late] = Inbox(slow).take()
        helper = quick.channel()
        assert give_back(helper, late.delivery_tag, owner="slow")
        [again] = Inbox(quick).take()
        assert again.delivery_tag == late.delivery_tag
        assert again.headers["redelivered"] is True

        late.ack()
        assert redis_client.hgetall(keys.UNACKED_OWNER) == {again.delivery_tag: "quick"}
        again.ack()
        assert not redis_client.exists(keys.UNACKED)


def test_a_delivery_is_given_back_once(redis_url: str, redis_client: Any) -> None:
    """Two sweepers that see the same dead owner put its message back once, not twice."""
    publish(redis_url, "job")
    with connection(redis_url, "dead") as dead, connection(redis_url, "sweeper") as sweeper:
        [message] = Inbox(dead).take()
        channel = sweeper.channel()
        assert [give_back(channel, message.delivery_tag, owner="dead") for _ in range(2)] == [True, False]
        assert redis_client.llen("work") == 1


def test_a_requeued_message_is_next(redis_url: str) -> None:
    """A job that is handed back does not lose its place to those that came after it."""
    publish(redis_url, "first", "second")
    with connection(redis_url) as conn:
        inbox = Inbox(conn, prefetch=1)
        [first] = inbox.take()
        first.requeue()
        [again] = inbox.take()
        again.ack()
        [after] = inbox.take()
    assert [again.payload, after.payload] == ["first", "second"]


@pytest.mark.parametrize(
    "junk",
    ["not json", "[]", "{}", "null", '{"properties": {}}', '{"properties": {"delivery_tag": 7, "delivery_info": {}}}',
     "[" * 5000 + "]" * 5000],
)  # fmt: skip
def test_junk_in_a_queue_is_set_aside_and_blocks_nothing(redis_url: str, redis_client: Any, junk: str) -> None:
    """An entry that is no message goes to the malformed list; the next message is delivered."""
    redis_client.lpush("work", junk)
    publish(redis_url, "good")
    with connection(redis_url) as conn:
        [message] = Inbox(conn).take()
        assert message.payload == "good"
    assert redis_client.lrange(keys.MALFORMED, 0, -1) == [junk]


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m["properties"].update(body_encoding="rot13"),
        lambda m: m.update(body="abc"),
        lambda m: m.update(body=7),
        lambda m: m.update(headers=[1]),
    ],
)
def test_a_message_that_kombu_cannot_build_is_set_aside(redis_url: str, redis_client: Any, damage: Any) -> None:
    """It looks like a message and is none: the consumer's loop would end over it, and the next one's too."""
    publish(redis_url, "bad")
    message = json.loads(redis_client.rpop("work"))
    damage(message)
    redis_client.lpush("work", json.dumps(message))
    publish(redis_url, "good")
    with connection(redis_url) as conn:
        [got] = Inbox(conn).take()
        assert got.payload == "good"
        got.ack()
    assert [json.loads(entry) for entry in redis_client.lrange(keys.MALFORMED, 0, -1)] == [message]
    assert not redis_client.exists(keys.UNACKED, keys.UNACKED_OWNER, keys.UNACKED_INDEX)


def test_empty_lists_in_a_message_stay_lists(redis_url: str) -> None:
    """Lua's JSON turns [] into {}; the message is stored as it came, so giving it back changes nothing."""
    publish(redis_url, {"tools": [], "stop": {}})
    with connection(redis_url, "a") as one, connection(redis_url, "b") as two:
        [message] = Inbox(one).take()
        give_back(two.channel(), message.delivery_tag, owner="a")
        assert Inbox(two).take()[0].payload == {"tools": [], "stop": {}}


def test_a_no_ack_consumer_leaves_nothing_behind(redis_url: str, redis_client: Any) -> None:
    """Replies to remote control are consumed without acknowledgement, so they are not put on the books."""
    publish(redis_url, "reply")
    with connection(redis_url) as conn:
        Inbox(conn, no_ack=True).take()
    assert not redis_client.exists(keys.UNACKED, keys.UNACKED_OWNER)


def test_basic_get_is_atomic_too(redis_url: str, redis_client: Any) -> None:
    """Polling takes a message the same way, and an empty queue gives None."""
    publish(redis_url, "one")
    with connection(redis_url, "poller") as conn:
        channel: Channel = conn.channel()
        message = channel.basic_get("work")
        assert redis_client.hgetall(keys.UNACKED_OWNER) == {message.delivery_tag: "poller"}
        message.ack()
        assert channel.basic_get("work") is None
        with pytest.raises(Empty):
            channel._get("work")


def test_a_lost_connection_keeps_the_messages_of_running_jobs(redis_url: str, redis_client: Any) -> None:
    """Closing a channel outside a shutdown hands nothing out again: the jobs still run here."""
    publish(redis_url, "job")
    conn = connection(redis_url, "worker")
    Inbox(conn).take()
    conn.close()
    assert redis_client.llen("work") == 0
    assert redis_client.hlen(keys.UNACKED) == 1


def test_closing_over_a_dead_socket_does_not_raise(redis_url: str) -> None:
    """Kombu 5.7.0 ends the worker here; ours closes."""
    conn = connection(redis_url)
    inbox = Inbox(conn)
    with pytest.raises(TimeoutError):
        conn.drain_events(timeout=0.02)  # a pop or a wait is outstanding now
    inbox.channel.client.connection._sock.close()
    inbox.channel.close()
    assert inbox.channel.closed


def test_a_task_keeps_its_id_and_eta_over_the_transport(redis_url: str, redis_client: Any) -> None:
    """Celery's own messages pass: the app takes the transport from the setting, with a plain redis:// URL."""
    app = Celery("t", broker=redis_url, set_as_current=False)
    app.conf.broker_transport = "common.transport:Transport"
    eta = datetime(2100, 1, 1, tzinfo=UTC)
    app.send_task("any.task", args=[{}], task_id="job-1", eta=eta, queue=QUEUE.name)
    app.close()
    assert redis_client.xlen(keys.WAKE) == 1  # stock kombu would wake nobody

    with connection(redis_url) as conn:
        [message] = Inbox(conn).take()
    sent = {name: message.headers[name] for name in ("task", "id", "eta")}
    assert sent == {"task": "any.task", "id": "job-1", "eta": eta.isoformat()}
