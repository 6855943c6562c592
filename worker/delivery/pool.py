"""
A Celery threads pool whose running jobs can be told to stop, with lanes for the tasks that need no thread each.

Celery's threads pool enforces no time limit, cannot end a job, and raises NotImplementedError in a soft
shutdown (celery 5.7.0). Here every run carries a StopSignal: `revoke(terminate=True)`, a time limit and a
shutdown set it, and the task does what it says. Threads cannot be killed: a task that never looks at its
signal runs on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.concurrency import thread
from celery.concurrency.base import apply_target
from celery.exceptions import Reject

from common import keys
from common.logs import get_logger
from worker.delivery.lane import Lane, Run, headers_of, plain_args
from worker.engines.base import StopSignal

logger = get_logger(__name__)

_LEAVE_S = 10.0  # for the runs that are left when the pool stops
leaving = threading.Event()  # set as soon as this process is told to stop: what is ended then is given back

_handles: dict[str, Handle] = {}  # by task id, while it runs: Celery itself keeps only a weak reference
_GIVE_BACK_PAUSE_S = 1.0  # after a failure outside the task: what failed (Redis, mostly) would fail again at once


def signal_of(task_id: str) -> StopSignal:
    """The stop signal of a task that runs in this process; a fresh one outside the pool (tests, eager mode)."""
    handle = _handles.get(task_id)
    return handle.signal if handle else StopSignal()


def running() -> dict[str, StopSignal]:
    """The signal of every task that this process runs or has taken up, by id."""
    return {task_id: handle.signal for task_id, handle in list(_handles.items())}


class Handle(thread.ApplyResult):
    """What Celery holds of one run; `terminate` is its way to end it."""

    def __init__(self, signal: StopSignal) -> None:
        self.signal = signal
        self.in_lane = False

    def attach(self, future: Future[Any]) -> None:
        """Take the future of the run, once it is submitted."""
        super().__init__(future)

    def terminate(self, _signal: int | None = None) -> None:
        """End the run: given back if the worker shuts down, cancelled if somebody revoked it."""
        self.signal.stop("handback" if leaving.is_set() else "cancelled")


class TaskPool(thread.TaskPool):
    """
    Threads for jobs, and one thread more for switches, which never wait behind them.

    The plain runs of a task that has a lane (see lane.py) go there.
    """

    lanes: Mapping[str, Lane] = {}  # by task name; see `pool_with`

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
        error_callback: Callable[[ExceptionInfo], Any] | None = None,
        correlation_id: str = "",
        timeout: float | None = None,
        soft_timeout: float | None = None,
        **_options: Any,
    ) -> Handle:
        """Start one run; its time limit counts from the moment a thread takes it up."""
        signal = StopSignal()
        handle = _handles[correlation_id] = Handle(signal)
        limit_s = soft_timeout or timeout

        def run() -> None:
            timer = threading.Timer(limit_s, signal.stop, args=("time limit",)) if limit_s else None
            if timer is not None:
                timer.daemon = True
                timer.start()
            try:
                apply_target(target, args, kwargs or {}, callback, accept_callback)
            except Exception:
                # Outside the task: Celery could not store its state or its result, say. Nobody reads this future;
                # without a word the request would count as running, and its message as held, for ever.
                logger.exception("delivery.run_broke", task_id=correlation_id)
                signal.wait(_GIVE_BACK_PAUSE_S)
                if error_callback is not None:
                    error_callback(_given_back())
            finally:
                if timer is not None:
                    timer.cancel()

        def ordinary() -> None:
            threads = self._switch_lane if args and args[0] == keys.SWITCH_TASK else self.executor
            ended = threads.submit(run)
            ended.add_done_callback(lambda _done: future.set_result(None))  # also if it never ran

        future: Future[None] = Future()
        future.add_done_callback(lambda done: _forget(correlation_id, done))  # with *handle* in it they were a cycle
        handle.attach(future)
        lane = self.lanes.get(args[0]) if args else None
        plain = plain_args(args) if lane is not None and not limit_s else None
        if lane is None or plain is None:
            ordinary()
            return handle
        handle.in_lane, request = True, args[2]
        lane.put(
            Run(
                task_id=correlation_id,
                headers=headers_of(request),
                properties=request["properties"],
                args=plain,
                signal=signal,
                on_accepted=accept_callback or _nothing,
                on_success=callback or _nothing,
                on_failure=error_callback or _nothing,
                ordinary=ordinary,
                ended=future,
            )
        )
        return handle

    def on_stop(self) -> None:
        """Wait for the runs that are left; they were told to stop or are ending."""
        self._switch_lane.shutdown(cancel_futures=True)
        # A lane may need a thread for its last runs yet.
        wait([handle.f for handle in list(_handles.values()) if handle.in_lane], timeout=_LEAVE_S)
        super().on_stop()

    def on_terminate(self) -> None:
        """Nothing to kill: every run was told to stop through its handle."""

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        """Do nothing: *pid* is this whole process; the run itself is told through its handle."""


def pool_with(lanes: Mapping[str, Lane]) -> type[TaskPool]:
    """Build the pool class that Celery makes its pool of, with *lanes* by task name."""
    return type("TaskPool", (TaskPool,), {"lanes": lanes})


def _nothing(*_: Any) -> None: ...


def _forget(task_id: str, done: Future[None]) -> None:
    handle = _handles.get(task_id)
    if handle is not None and handle.f is done:  # a second delivery of the task may have taken its place
        del _handles[task_id]


def _given_back() -> ExceptionInfo:
    """What Celery takes for "this task asks for its message to be given back"."""
    try:
        raise Reject("the run broke outside the task", requeue=True)  # noqa: TRY301 - it must have a traceback
    except Reject:
        return ExceptionInfo()
