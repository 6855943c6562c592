"""
Carries the jobs that producers hand to RabbitMQ to the router's queue in Redis, each acknowledged when it is there.

RabbitMQ is a door, no more: what waits for a model waits in Redis, where it is ordered, counted and cancelled. A job
may come twice (Redis has it and the acknowledgement was lost); both have one id, and so one outcome.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Self

from celery import Celery
from kombu import Connection, Consumer, Exchange, Queue
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from common import keys
from common.logs import get_logger
from common.redis_client import without_password

logger = get_logger(__name__)

_CONNECT_S = 3.0
_HEARTBEAT_S = 10.0
_LOOK_EVERY_S = 0.5  # whether it should end
_AGAIN_S = 1.0  # after a failure: RabbitMQ or Redis is away, or Redis is full
_TAKES = 100  # messages that RabbitMQ hands out before the first is acknowledged
_END_S = 5.0

# As Celery declares the queue for whoever sends to it by name.
_QUEUE = Queue(keys.SUBMIT_QUEUE, Exchange(keys.SUBMIT_QUEUE), routing_key=keys.SUBMIT_QUEUE)
_PROPERTIES = ("correlation_id", "reply_to", "priority")


class RabbitDoor(threading.Thread):
    """Takes from the broker at *url* and puts with *app*, while it is entered as a context."""

    def __init__(self, url: str, app: Celery) -> None:
        super().__init__(name="rabbit", daemon=True)
        self._url = url
        self._app = app
        broker = Connection(url)
        # A channel's too: RabbitMQ refuses a queue that somebody has declared otherwise.
        self._away = (KombuError, RedisError, OSError, *broker.connection_errors, *broker.channel_errors)
        self._ending = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Take nothing more; what is not acknowledged stays with RabbitMQ."""
        self._ending.set()
        self.join(_END_S)

    def run(self) -> None:
        """Carry until the end, over every outage of either side."""
        while not self._ending.is_set():
            try:
                with Connection(self._url, connect_timeout=_CONNECT_S, heartbeat=_HEARTBEAT_S) as connection:
                    self._carry(connection)
            except self._away as error:
                logger.warning("rabbit.away", url=without_password(self._url), error=f"{type(error).__name__}: {error}")
                self._ending.wait(_AGAIN_S)

    def _carry(self, connection: Connection) -> None:
        consumer = Consumer(connection, [_QUEUE], on_message=self._put, prefetch_count=_TAKES, accept=["json"])
        with consumer, self._app.producer_or_acquire() as producer:
            self._producer = producer
            logger.info("rabbit.carrying", url=without_password(self._url))
            while not self._ending.is_set():
                try:
                    connection.drain_events(timeout=_LOOK_EVERY_S)
                except TimeoutError:
                    connection.heartbeat_check()

    def _put(self, message: Any) -> None:
        """Pass it on as it is: whether it can be read is the router's question."""
        self._producer.publish(
            message.body,
            content_type=message.content_type,
            content_encoding=message.content_encoding,
            headers=message.headers,
            exchange="",  # straight into the queue: a Redis that came back empty has forgotten all bindings
            routing_key=_QUEUE.name,
            **{name: message.properties[name] for name in _PROPERTIES if message.properties.get(name) is not None},
        )
        message.ack()
