"""
The pool whose jobs can be told to stop, and whose switch lane is never full.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery.exceptions import Reject

from common import keys
from tests.waiting import eventually
from worker.delivery.pool import Handle, TaskPool, leaving, running, signal_of

WAIT_S = 10.0


@pytest.fixture
def pool() -> Iterator[TaskPool]:
    """A pool of two threads; at the end every job is told to stop."""
    made = TaskPool(limit=2)
    yield made
    for signal in running().values():
        signal.stop("handback")
    made.on_stop()


def start(pool: TaskPool, job_id: str, target: Callable[..., object], *args: object, **options: Any) -> Handle:
    """As Celery starts a task: its name and id come first."""
    handle = pool.apply_async(target, args=args, correlation_id=job_id, callback=lambda _result: None, **options)
    assert isinstance(handle, Handle)
    return handle


def until_stopped(job_id: str) -> str | None:
    """A job that runs until it is told to stop, and says why."""
    signal = signal_of(job_id)
    assert signal.wait(WAIT_S)
    return signal.reason


def reason_of(pool: TaskPool, job_id: str, stop: Callable[[Handle], object], **options: Any) -> str | None:
    """Start a job, do *stop* once a thread has taken it up, and give the reason that the job saw."""
    taken_up = threading.Event()
    seen: list[str | None] = []

    def job() -> None:
        taken_up.set()
        seen.append(until_stopped(job_id))

    handle = start(pool, job_id, job, **options)
    assert taken_up.wait(WAIT_S)
    stop(handle)
    handle.wait(WAIT_S)
    (reason,) = seen
    return reason


def test_a_revoked_job_is_cancelled(pool: TaskPool) -> None:
    """`revoke(terminate=True)` reaches the job through its handle."""
    assert reason_of(pool, "job", Handle.terminate) == "cancelled"


def test_a_job_is_handed_back_when_the_worker_leaves(pool: TaskPool) -> None:
    """Celery ends what is left in the same way; then it is nobody's wish that the job ends."""
    leaving.set()
    try:
        assert reason_of(pool, "job", Handle.terminate) == "handback"
    finally:
        leaving.clear()


def test_a_handle_lives_as_long_as_its_job(pool: TaskPool) -> None:
    """Celery keeps only a weak reference to it, and comes back to it to end the job."""
    kept = weakref.ref(start(pool, "job", until_stopped, "job"))
    gc.collect()
    handle = kept()
    assert handle is not None
    handle.terminate()


@pytest.mark.parametrize("limits", [{"timeout": 0.01}, {"soft_timeout": 0.01, "timeout": 60}])
def test_a_time_limit_stops_the_job(pool: TaskPool, limits: dict[str, float]) -> None:
    """The soft one if there is one, for a thread knows no other."""
    assert reason_of(pool, "job", lambda _handle: None, **limits) == "time limit"


def test_the_first_reason_stays(pool: TaskPool) -> None:
    """A job that was cancelled is cancelled, also if its time runs out while it stops."""

    def twice(handle: Handle) -> None:
        handle.terminate()
        signal_of("job").stop("time limit")

    assert reason_of(pool, "job", twice) == "cancelled"


def test_a_job_stopped_before_a_thread_took_it_up_sees_that(pool: TaskPool) -> None:
    """Two run, the third waits; its signal is there already."""
    for job_id in ("1", "2"):
        start(pool, job_id, until_stopped, job_id)
    seen: list[str | None] = []
    third = start(pool, "3", lambda: seen.append(signal_of("3").reason))
    third.terminate()
    assert set(running()) == {"1", "2", "3"}

    running()["1"].stop("cancelled")
    third.wait(WAIT_S)
    assert seen == ["cancelled"]


def test_a_switch_runs_while_every_thread_is_taken(pool: TaskPool) -> None:
    """Its lane is its own; one switch at a time."""
    for job_id in ("1", "2", "3"):
        start(pool, job_id, until_stopped, job_id)
    began, go = threading.Event(), threading.Event()

    def switch(_name: str) -> None:
        began.set()
        assert go.wait(WAIT_S)

    first = start(pool, "switch 1", switch, keys.SWITCH_TASK)
    assert began.wait(WAIT_S)
    ended: list[str] = []
    second = start(pool, "switch 2", ended.append, keys.SWITCH_TASK)
    assert ended == []
    go.set()
    for handle in (first, second):
        handle.wait(WAIT_S)
    assert ended == [keys.SWITCH_TASK]
    assert {"1", "2", "3"} <= set(running())  # nobody had to make room


def test_a_job_that_has_ended_is_forgotten(pool: TaskPool) -> None:
    """Whoever asks for its signal then gets a fresh one."""
    start(pool, "fine", str).wait(WAIT_S)
    eventually(lambda: running() == {})


def test_what_a_run_leaves_behind_goes_at_once(pool: TaskPool) -> None:
    """It is no cycle, which would stay, with Celery's request and the message, until the garbage collector comes."""
    gc.disable()
    try:
        handle = start(pool, "fine", str)
        handle.wait(WAIT_S)
        eventually(lambda: running() == {})
        left = weakref.ref(handle)
        del handle
        eventually(lambda: left() is None, what="nothing holds it")
    finally:
        gc.enable()


def test_a_run_that_breaks_outside_its_task_gives_the_message_back(
    pool: TaskPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Celery could not store the result, say: without a word the message would be held for ever."""
    monkeypatch.setattr("worker.delivery.pool._GIVE_BACK_PAUSE_S", 0)
    told: list[Any] = []
    start(pool, "broken", int, "no number", error_callback=told.append)

    eventually(lambda: told)
    (info,) = told
    reject = info.exception.exc  # billiard wraps it with its traceback
    assert isinstance(reject, Reject)
    assert reject.requeue
    eventually(lambda: running() == {})


def test_a_second_delivery_keeps_its_own_signal(pool: TaskPool) -> None:
    """The first run of the same id ends later, and takes only its own away."""
    old_began, new_began, old_may_end = threading.Event(), threading.Event(), threading.Event()

    def old() -> None:
        old_began.set()
        assert old_may_end.wait(WAIT_S)

    def new() -> str | None:
        signal = signal_of("job")
        new_began.set()
        signal.wait(WAIT_S)
        return signal.reason

    first = start(pool, "job", old)
    assert old_began.wait(WAIT_S)
    second = start(pool, "job", new)
    assert new_began.wait(WAIT_S)
    old_may_end.set()
    first.wait(WAIT_S)

    assert running() == {"job": second.signal}


def test_outside_the_pool_nobody_is_told_to_stop() -> None:
    """Tests and eager mode get a signal that stays quiet."""
    assert signal_of("unknown").reason is None
    assert signal_of("unknown") is not signal_of("unknown")
