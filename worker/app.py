"""
Runs a Celery worker in this process, with our pool, our lanes and our shutdown.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from celery import Celery, bootsteps, signals
from celery.worker.control import Panel
from kombu import Queue

from common.logs import get_logger
from worker.delivery.lease import Lease
from worker.delivery.pool import TaskPool, leaving

logger = get_logger(__name__)


class ConsumerProcess:
    """
    One Celery worker and the thread that keeps its lease.

    Parameters
    ----------
    name
        What Celery, Flower and `celery inspect` know the process by.
    own_queues
        Consumed from the start; a worker's model queues are added while it runs.
    on_leaving
        Called from a signal handler, as soon as the process is told to stop: must only set flags.
    """

    def __init__(
        self,
        *,
        app: Celery,
        name: str,
        lease: Lease,
        concurrency: int,
        own_queues: Sequence[str] = (),
        steps: Sequence[type[bootsteps.StartStopStep]] = (),
        on_leaving: Callable[[], None] = lambda: None,
    ) -> None:
        self._app = app
        self._name = name
        self._lease = lease
        self._concurrency = concurrency
        self._own_queues = frozenset(own_queues)
        self._on_leaving = on_leaving
        app.steps["consumer"].update(steps)

    def run(self) -> int:
        """
        Consume until told to stop; returns the exit code.

        The order of the end: take nothing new, let running jobs end or go back, give up the lease.
        """
        queues = self._app.amqp.queues
        for queue in set(queues) - self._own_queues:
            queues.deselect(queue)
        signals.setup_logging.connect(_leave_logging_alone, weak=False)
        signals.worker_ready.connect(self._listen_for_the_end, weak=False)
        self._lease.start()
        worker = self._app.Worker(
            hostname=self._name,
            pool_cls=TaskPool,
            concurrency=self._concurrency,
            loglevel=logging.getLogger().level,
            without_gossip=True,
            without_mingle=True,
        )
        try:
            worker.start()
        finally:
            self._lease.end()
        return int(worker.exitcode or 0)

    def _listen_for_the_end(self, **_: Any) -> None:
        """
        Hear of a stop before Celery does.

        Celery tells (worker_shutting_down) only after the soft shutdown's wait, when jobs were told to stop.
        """
        for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT):
            celerys = signal.getsignal(number)
            if callable(celerys):
                signal.signal(number, self._leave_then(celerys))

    def _leave_then(
        self, celerys: Callable[[int, FrameType | None], object]
    ) -> Callable[[int, FrameType | None], None]:
        def handle(number: int, frame: FrameType | None) -> None:
            leaving.set()
            self._on_leaving()
            celerys(number, frame)

        return handle


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
