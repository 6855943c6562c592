"""
Runs a Celery worker in this process, with our pool, our lanes and our shutdown.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from celery import Celery, bootsteps, signals
from celery.worker.control import Panel
from kombu import Queue
from kombu.serialization import register
from kombu.utils import json as kombu_json

from common.logs import get_logger
from common.redis_client import end_patience
from worker.delivery.consumer import Refuse, consumer_with
from worker.delivery.drain import hear_drain
from worker.delivery.lane import Lane
from worker.delivery.lease import Lease
from worker.delivery.pool import leaving, pool_with, running
from worker.scheduling.celery_consumer import calm_events

logger = get_logger(__name__)

_EVENTS_EVERY_S = 0.1  # what Flower sees is at most so old
_LOOK_EVERY_S = 0.05  # for the end of the last running job, while the process leaves
_ACKNOWLEDGE_S = 1.0  # for the loop to acknowledge what has ended; it does not turn while Redis is away
_END_S = 25.0  # from the end of the grace: for jobs to go back and engines to end
_COLLECT_AT = 20_000  # objects more than at its last look; some 200 jobs
_FAILED = 1
_END = signal.SIGQUIT  # what the process sends itself when the grace is over


def read_json(data: str | bytes) -> Any:
    """Read a message's body as kombu does; where it names no type to bring back, without a call for each object."""
    text = data if isinstance(data, str) else data.decode()
    return kombu_json.loads(text) if "__type__" in text else json.loads(text)


class ConsumerProcess:
    """
    One Celery worker and the thread that keeps its lease.

    Parameters
    ----------
    name
        What Celery, Flower and `celery inspect` know the process by.
    own_queues
        Consumed from the start; a worker's model queues are added while it runs.
    lanes
        By task name: who takes up the plain runs of that task, many at once.
    refuse
        Ends a job whose message cannot be read.
    grace_s
        How long running jobs may take after the process was told to stop; then they go back to their queue.
    on_leaving
        Called as soon as the process is told to stop; must return at once.
    """

    def __init__(
        self,
        *,
        app: Celery,
        name: str,
        lease: Lease,
        concurrency: int,
        grace_s: float,
        refuse: Refuse,
        own_queues: Sequence[str] = (),
        lanes: Mapping[str, Lane] | None = None,
        steps: Sequence[type[bootsteps.StartStopStep]] = (),
        on_leaving: Callable[[], None] = lambda: None,
    ) -> None:
        self._app = app
        self._name = name
        self._lease = lease
        self._concurrency = concurrency
        self._own_queues = frozenset(own_queues)
        self._grace_s = grace_s
        self._lanes = lanes or {}
        self._on_leaving = on_leaving
        self._hurry = threading.Event()
        self._grace_over = False
        app.conf.worker_consumer = consumer_with(refuse)
        app.steps["consumer"].update([*steps, calm_events(_EVENTS_EVERY_S)])

    def run(self) -> int:
        """
        Consume until told to stop; returns the exit code: 0 only if it was told.

        The order of the end: take nothing new, let running jobs end or go back, give up the lease.
        """
        queues = self._app.amqp.queues
        for queue in set(queues) - self._own_queues:
            queues.deselect(queue)
        signals.setup_logging.connect(_leave_logging_alone, weak=False)
        signals.worker_ready.connect(self._listen_for_the_end, weak=False)
        signals.worker_ready.connect(_spare_the_collector, weak=False)
        hear_drain()
        register("json", kombu_json.dumps, read_json, content_type="application/json", content_encoding="utf-8")
        self._lease.start()
        for lane in self._lanes.values():
            lane.start()
        worker = self._app.Worker(
            hostname=self._name,
            pool_cls=pool_with(self._lanes),
            concurrency=self._concurrency,
            loglevel=logging.getLogger().level,
            without_gossip=True,
            without_mingle=True,
        )
        try:
            worker.start()
        finally:
            for lane in self._lanes.values():
                lane.end()
            self._lease.end()
        if leaving.is_set():
            return 0
        return int(worker.exitcode or _FAILED)  # Celery says nothing of some ends that nobody asked for

    def _listen_for_the_end(self, sender: Any, **_: Any) -> None:
        """
        Take SIGTERM, SIGQUIT and Ctrl-C: a grace for what runs, then Celery's cold shutdown, which gives back the rest.

        Celery's own soft shutdown blocks its loop for its whole timeout, also when the last job ends at once, and
        tells of the stop (worker_shutting_down) only afterwards. Here the loop turns on meanwhile: messages are
        acknowledged, Redis may go away and come back.
        """
        celerys_cold_shutdown = signal.getsignal(signal.SIGQUIT)

        def handle(number: int, frame: FrameType | None) -> None:
            if self._grace_over:
                if number == _END and callable(celerys_cold_shutdown):
                    celerys_cold_shutdown(number, frame)
            elif leaving.is_set():  # again: whoever stops us is in a hurry
                self._hurry.set()
            else:
                leaving.set()
                threading.Thread(target=self._leave, args=(sender,), name="leaving", daemon=True).start()

        for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT):
            signal.signal(number, handle)

    def _leave(self, consumer: Any) -> None:
        """Take nothing new, wait for what runs, and end this process."""
        logger.info("worker.leaving", process=self._name, running=len(running()), grace_s=self._grace_s)
        consumer.call_soon(_take_nothing, consumer)
        self._on_leaving()
        until = time.monotonic() + self._grace_s
        while running() and time.monotonic() < until and not self._hurry.wait(_LOOK_EVERY_S):
            pass
        acknowledged = threading.Event()
        consumer.call_soon(acknowledged.set)
        acknowledged.wait(_ACKNOWLEDGE_S)
        self._grace_over = True
        end_patience()
        os.kill(os.getpid(), _END)
        time.sleep(_END_S)
        logger.error("worker.cut_short", reason=f"not ended {_END_S:g} s after the grace: does Redis answer?")
        os._exit(_FAILED)  # engines end with us, and the lease gives back what we hold


def _take_nothing(consumer: Any) -> None:
    """Stop consuming; after a reconnect, too. On the consumer's own thread."""
    queues = consumer.app.amqp.queues
    for queue in list(queues.consume_from):
        queues.deselect(queue)
        if consumer.task_consumer is not None:
            consumer.task_consumer.cancel_by_queue(queue)


def _spare_the_collector(**_: Any) -> None:
    """
    Hide what stays until the end from the garbage collector, and let it look seldom.

    It took a quarter of a busy process. What a job leaves behind is no cycle, so it goes without the collector.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AT, *gc.get_threshold()[1:])


def _leave_logging_alone(**_: Any) -> None:
    """Keep Celery from setting up logging: a receiver of this signal takes it over, and ours is set up already."""


def show_in_flower(about: Callable[[], dict[str, Any]], queues: Sequence[str]) -> type[bootsteps.StartStopStep]:
    """
    Build a step that puts *about* on Flower's page of this worker, and let Flower count *queues*.

    Flower's broker page shows the queues that live workers say they consume; those of models that are not
    ready now would be missing.
    """
    consumed_now = Panel.data["active_queues"]

    def active_queues(state: Any, **_options: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = consumed_now(state)
        known = {queue["name"] for queue in found}
        return found + [Queue(q, routing_key=q).as_dict(recurse=True) for q in queues if q not in known]

    Panel.data["active_queues"] = active_queues

    class About(bootsteps.StartStopStep):
        requires = ("celery.worker.consumer.tasks:Tasks",)

        def info(self, _parent: Any) -> dict[str, Any]:
            return about()

    return About
