"""
Makes the running Celery consumer take from the queues that are asked for, and no others.

Ask for a set of queues from any thread; the change is made on the consumer's own thread, because kombu's
channels are not thread safe, and made again after every reconnect.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from celery import bootsteps
from kombu import Queue

from common.logs import get_logger

logger = get_logger(__name__)

_EVENTS_MOST = 500  # in one message


class CeleryConsumer:
    """The worker's consumer as the runtime sees it."""

    def __init__(self) -> None:
        self._wanted: frozenset[str] = frozenset()
        self._at_once: int | None = None
        self._allowed = 0  # messages in hand, as the consumer knows it
        self._consumer: Any = None
        self._lock = threading.Lock()

    def serve(self, queues: Iterable[str], *, at_once: int | None = None) -> None:
        """
        Take messages from exactly these queues, as soon as the consumer's thread gets to it.

        *at_once* is how many may be in hand together; None = as many as there are threads.
        """
        wanted = frozenset(queues)
        with self._lock:
            if (wanted, at_once) == (self._wanted, self._at_once):
                return
            self._wanted, self._at_once = wanted, at_once
            consumer = self._consumer
        if consumer is not None:
            consumer.call_soon(self._reconcile, consumer)

    def _reconcile(self, consumer: Any) -> None:
        if consumer.task_consumer is None:  # the connection is gone; `start` reconciles when it is back
            return
        self._allow(consumer, self._at_once or consumer.initial_prefetch_count)
        now = {name for name in _queue_names(consumer) if consumer.task_consumer.consuming_from(name)}
        for queue in sorted(now - self._wanted):
            consumer.cancel_task_queue(queue)
        for queue in sorted(self._wanted - now):
            consumer.add_task_queue(queue)
        if now != self._wanted:
            logger.info("scheduling.serving", queues=sorted(self._wanted))

    def _allow(self, consumer: Any, count: int) -> None:
        """Let *count* messages be in hand; those that wait for their time (ETA) count beside them, as ever."""
        more, self._allowed = count - self._allowed, count
        if more > 0:
            consumer.qos.increment_eventually(more)
        elif more < 0:
            consumer.qos.decrement_eventually(-more)

    def step(self) -> type[bootsteps.StartStopStep]:
        """The bootstep that ties this object to Celery's consumer, over every reconnect."""
        outer = self

        class Serving(bootsteps.StartStopStep):
            requires = ("celery.worker.consumer.tasks:Tasks",)

            def start(self, parent: Any) -> None:
                with outer._lock:
                    outer._consumer = parent
                    outer._allowed = parent.initial_prefetch_count
                outer._reconcile(parent)

            def stop(self, _parent: Any) -> None:
                with outer._lock:
                    outer._consumer = None

        return Serving


def _queue_names(consumer: Any) -> list[str]:
    return [queue.name for queue in consumer.task_consumer.queues]


def control_lane(queue: str) -> type[bootsteps.StartStopStep]:
    """
    Build a bootstep that consumes *queue* on a channel of its own.

    The jobs' prefetch limit does not hold there, so a switch task is received while every place is taken.
    """

    class ControlLane(bootsteps.StartStopStep):
        requires = ("celery.worker.consumer.tasks:Tasks",)

        def __init__(self, parent: Any, **kwargs: Any) -> None:
            self._channel: Any = None
            super().__init__(parent, **kwargs)

        def start(self, parent: Any) -> None:
            self._channel = parent.connection.channel()
            consumer = parent.app.amqp.TaskConsumer(
                self._channel, queues=[Queue(queue, routing_key=queue)], on_decode_error=parent.on_decode_error
            )
            consumer.on_message = parent.create_task_handler()
            consumer.consume()

        def stop(self, _parent: Any) -> None:
            channel, self._channel = self._channel, None
            if channel is not None:
                channel.close()

    return ControlLane


def calm_events(seconds: float) -> type[bootsteps.StartStopStep]:
    """
    Build a bootstep that sends what Celery tells of its tasks every few *seconds*, many events in one message.

    Celery sends them with each turn of its loop: a publish for a job or two, which costs more than the job's own steps.
    """

    class CalmEvents(bootsteps.StartStopStep):
        requires = ("celery.worker.consumer.tasks:Tasks",)

        def __init__(self, parent: Any, **kwargs: Any) -> None:
            self._timer: Any = None
            super().__init__(parent, **kwargs)

        def start(self, parent: Any) -> None:
            events = parent.event_dispatcher
            events.on_send_buffered, events.buffer_limit = None, _EVENTS_MOST
            self._timer = parent.timer.call_repeatedly(seconds, events.flush)

        def stop(self, parent: Any) -> None:
            if self._timer is not None:
                self._timer.cancel()
            if parent.event_dispatcher is not None:
                parent.event_dispatcher.flush()

    return CalmEvents


def every(seconds: float, deed: Callable[[], object]) -> type[bootsteps.StartStopStep]:
    """Build a bootstep that does *deed* again and again on the consumer's own loop: proof that the loop turns."""

    class Every(bootsteps.StartStopStep):
        requires = ("celery.worker.consumer.tasks:Tasks",)

        def __init__(self, parent: Any, **kwargs: Any) -> None:
            self._timer: Any = None
            super().__init__(parent, **kwargs)

        def start(self, parent: Any) -> None:
            deed()
            self._timer = parent.timer.call_repeatedly(seconds, deed)

        def stop(self, _parent: Any) -> None:
            if self._timer is not None:
                self._timer.cancel()

    return Every
