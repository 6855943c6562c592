"""
Runs a Celery worker in this process, with our pool, our lanes and our shutdown.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from celery import Celery, bootsteps, signals
from celery.worker.control import Panel
from kombu import Queue

from common.logs import get_logger
from worker.delivery.lease import Lease
from worker.delivery.pool import TaskPool

logger = get_logger(__name__)

# SIGTERM begins Celery's soft shutdown: running jobs get `worker_soft_shutdown_timeout`, then they are told
# to stop and go back to their queue. Celery reads this when its worker module is first imported.
os.environ.setdefault("REMAP_SIGTERM", "SIGQUIT")


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
        Called once, from a signal handler, when the process was told to stop: must only set flags.
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
        signals.worker_shutting_down.connect(self._leaving, weak=False)
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

    def _leaving(self, **_: Any) -> None:
        self._on_leaving()


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
