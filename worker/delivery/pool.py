"""
A Celery threads pool whose running jobs can be told to stop, with a lane of its own for the switch task.

Celery's threads pool enforces no time limit, cannot end a job, and raises NotImplementedError in a soft
shutdown (celery 5.7.0). Here every run carries a StopSignal: `revoke(terminate=True)`, a time limit and a
shutdown set it, and the task does what it says. Threads cannot be killed: a task that never looks at its
signal runs on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from celery.concurrency import thread
from celery.concurrency.base import apply_target
from celery.worker import state

from common import keys
from worker.engines.base import StopSignal

_signals: dict[str, StopSignal] = {}  # by task id; one process has one pool


def signal_of(task_id: str) -> StopSignal:
    """The stop signal of a task that runs in this process; a fresh one outside the pool (tests, eager mode)."""
    return _signals.get(task_id) or StopSignal()


def running() -> dict[str, StopSignal]:
    """Every task that this process runs or has taken up, by id."""
    return dict(_signals)


class Handle(thread.ApplyResult):
    """What Celery holds of one run; `terminate` is its way to end it."""

    def __init__(self, signal: StopSignal) -> None:
        self.signal = signal

    def attach(self, future: Future[Any]) -> None:
        """Take the future of the run, once it is submitted."""
        super().__init__(future)

    def terminate(self, _signal: int | None = None) -> None:
        """End the run: given back if the worker shuts down, cancelled if somebody revoked it."""
        leaving = state.should_stop is not None or state.should_terminate is not None
        self.signal.stop("handback" if leaving else "cancelled")


class TaskPool(thread.TaskPool):
    """Threads for jobs, and one thread more for switches, which never wait behind them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._switch_lane = ThreadPoolExecutor(max_workers=1, thread_name_prefix="switch")

    def on_apply(  # noqa: PLR0917 - Celery's signature
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        callback: Callable[..., Any] | None = None,
        accept_callback: Callable[..., Any] | None = None,
        correlation_id: str = "",
        timeout: float | None = None,
        soft_timeout: float | None = None,
        **_options: Any,
    ) -> Handle:
        """Start one run; its time limit counts from the moment a thread takes it up."""
        signal = _signals[correlation_id] = StopSignal()
        handle = Handle(signal)
        limit_s = soft_timeout or timeout

        def run() -> None:
            timer = threading.Timer(limit_s, signal.stop, args=("deadline",)) if limit_s else None
            if timer is not None:
                timer.daemon = True
                timer.start()
            try:
                apply_target(target, args, kwargs or {}, callback, accept_callback)
            finally:
                if timer is not None:
                    timer.cancel()
                if _signals.get(correlation_id) is signal:
                    del _signals[correlation_id]

        lane = self._switch_lane if args and args[0] == keys.SWITCH_TASK else self.executor
        handle.attach(lane.submit(run))
        return handle

    def on_stop(self) -> None:
        """Wait for the runs that are left; they were told to stop or are ending."""
        self._switch_lane.shutdown(cancel_futures=True)
        super().on_stop()

    def on_terminate(self) -> None:
        """Nothing to kill: every run was told to stop through its handle."""

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        """Do nothing: *pid* is this whole process; the run itself is told through its handle."""
