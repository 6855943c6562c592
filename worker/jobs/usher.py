"""
Lets jobs into engines, each in the company that it may have, and counts who was there when one died.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from common.errors import EngineNotReady
from worker.engines.base import JobStopped, StopSignal
from worker.jobs.isolate import may_join

_LOOK_S = 1.0  # a wait is over when somebody leaves or a stop is told; this is for what nobody tells


@dataclass(eq=False)
class _Engine:
    """Who is in one model's engine, and who is at its door."""

    inside: set[str] = field(default_factory=set)  # job ids
    suspects: dict[str, int] = field(default_factory=dict)  # those of them that have a bound, and which
    suspects_waiting: int = 0
    died_with: int = 0  # at the last death
    unheard: set[str] = field(default_factory=set)  # of those, who has not asked about it yet


class Usher:
    """The doors of all engines of a worker; used from many threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._engines: dict[str, _Engine] = defaultdict(_Engine)
        self._joined = 0  # who is bound in the whole worker, inside or waiting: until they leave, all doors are one

    @contextmanager
    def enter(
        self,
        model_id: str,
        job_id: str,
        company: int | None,
        stop: StopSignal,
        *,
        wait: bool = True,
        in_worker: bool = False,
    ) -> Iterator[None]:
        """
        Be in the engine of *model_id* meanwhile, with *company* jobs at most; None = it is no suspect.

        With *in_worker* there are as many in all engines together.

        Raises
        ------
        EngineNotReady
            Suspects are there or wait for it, and *wait* is false.
        JobStopped
            The job was told to stop at the door.
        """
        with self._doors_joined() if in_worker else nullcontext():
            with self._changed:
                engine = self._engines[model_id]
                if not self._may_join(engine, company):
                    if not wait:
                        raise EngineNotReady("Jobs under which an engine has died run alone; this one waits for them.")
                    self._wait(engine, company, stop)
                engine.inside.add(job_id)
                if company is not None:
                    engine.suspects[job_id] = company
                engine.unheard.discard(job_id)
            try:
                yield
            finally:
                with self._changed:
                    engine.inside.remove(job_id)
                    engine.suspects.pop(job_id, None)
                    self._changed.notify_all()

    def died_with(self, model_id: str, job_id: str) -> int:
        """
        How many were in the engine when it died, this job among them; asked by each, from inside.

        The first one who asks counts for all, since they leave one after the other.
        """
        with self._changed:
            engine = self._engines[model_id]
            if job_id not in engine.unheard:
                engine.died_with, engine.unheard = len(engine.inside), set(engine.inside)
            engine.unheard.remove(job_id)
            return engine.died_with

    def _wait(self, engine: _Engine, company: int | None, stop: StopSignal) -> None:
        """Wait at the door; the lock is held before and after."""
        stop.on_stop(self._look_again)
        engine.suspects_waiting += company is not None
        try:
            while stop.reason is None and not self._may_join(engine, company):
                self._changed.wait(_LOOK_S)
        finally:
            engine.suspects_waiting -= company is not None
            self._changed.notify_all()
        if stop.reason is not None:
            raise JobStopped(stop.reason)

    def _may_join(self, engine: _Engine, company: int | None) -> bool:
        behind = list(self._engines.values()) if self._joined else [engine]
        return may_join(
            company,
            inside=sum(len(each.inside) for each in behind),
            suspects=[bound for each in behind for bound in each.suspects.values()],
            suspects_wait=any(each.suspects_waiting for each in behind),
        )

    @contextmanager
    def _doors_joined(self) -> Iterator[None]:
        with self._changed:
            self._joined += 1
        try:
            yield
        finally:
            with self._changed:
                self._joined -= 1
                self._changed.notify_all()

    def _look_again(self) -> None:
        with self._changed:
            self._changed.notify_all()
