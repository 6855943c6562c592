"""
The door that every job goes through: who gets in, who is counted, and who is waited for.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from common.errors import EngineNotReady
from worker.residency.board import ResidencyBoard
from worker.state.residency import Level, Quarantine, Resident, Switching

THREADS = 50


def resident(model_id: str = "small", *, level: Level = Level.READY, since: float = 0.0) -> Resident:
    return Resident(model_id=model_id, level=level, bytes=1, since=since)


@pytest.fixture
def board() -> ResidencyBoard:
    """A board with one model ready."""
    made = ResidencyBoard(capacity=10, max_residents=2)
    made.put(resident())
    return made


@pytest.fixture
def impatient_threads() -> Iterator[None]:
    """Threads that take turns as often as they can, so that a lost update shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_flight(board: ResidencyBoard, model_id: str = "small") -> int:
    found = board.read().resident(model_id)
    assert found is not None
    return found.in_flight


@pytest.mark.parametrize("level", [Level.STARTING, Level.STOPPING])
def test_nobody_enters_a_model_that_is_not_ready(board: ResidencyBoard, level: Level) -> None:
    """Neither starting nor stopping nor unknown; and nobody is counted."""
    board.set_level("small", level)

    for model_id in ("small", "unknown"):
        with pytest.raises(EngineNotReady, match=f"{model_id} is not ready"), board.enter(model_id):
            pass
    assert in_flight(board) == 0


def test_a_job_that_fails_leaves_too(board: ResidencyBoard) -> None:
    """The door counts whatever happens behind it."""

    def job() -> None:
        with board.enter("small"):
            assert in_flight(board) == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        job()
    assert in_flight(board) == 0


def test_the_board_says_when_each_job_in_flight_began(board: ResidencyBoard) -> None:
    """In that order; who leaves is taken out, whoever came first."""

    def begun() -> tuple[float, ...]:
        found = board.read().resident("small")
        assert found is not None
        return found.begun

    first = board.enter("small")
    first.__enter__()
    [at] = begun()
    with board.enter("small"):
        assert len(begun()) == 2
        assert begun()[0] == at <= begun()[1] <= time.time()
        second = begun()[1]
        first.__exit__(None, None, None)
        assert begun() == (second,)
    assert begun() == ()


def test_waiting_ends_when_the_last_job_leaves(board: ResidencyBoard) -> None:
    """Not when the first of two does."""
    with ThreadPoolExecutor(1) as pool:
        with ExitStack() as jobs:
            jobs.enter_context(board.enter("small"))
            with board.enter("small"):
                waiting = pool.submit(board.wait_empty, "small", timeout_s=30)
            assert not waiting.done()
        assert waiting.result(timeout=30)


def test_waiting_has_an_end(board: ResidencyBoard) -> None:
    """False says that jobs are left."""
    with board.enter("small"):
        assert not board.wait_empty("small", timeout_s=0)
    assert board.wait_empty("small", timeout_s=0)
    assert board.wait_empty("unknown", timeout_s=0)


@pytest.mark.usefixtures("impatient_threads")
def test_jobs_are_counted_right_while_the_switcher_writes(board: ResidencyBoard) -> None:
    """Fifty threads go in and out while another model comes and goes; nobody is lost, nobody stays."""
    all_in = threading.Barrier(THREADS + 1, timeout=20)
    counted = threading.Barrier(THREADS + 1, timeout=20)

    def job() -> None:
        for _ in range(30):
            with board.enter("small"):
                pass
        with board.enter("small"):
            all_in.wait()
            counted.wait()

    with ThreadPoolExecutor(THREADS) as pool:
        jobs = [pool.submit(job) for _ in range(THREADS)]
        for _ in range(500):
            board.put(resident("other"))
            board.remove("other")
        all_in.wait()
        assert in_flight(board) == THREADS
        counted.wait()
        assert [done.result() for done in jobs] == [None] * THREADS
    assert in_flight(board) == 0


def test_a_model_may_go_under_a_job(board: ResidencyBoard) -> None:
    """Its engine died: the job leaves a place that is not there any more."""
    with board.enter("small"):
        board.remove("small")
        assert board.wait_empty("small", timeout_s=0)
    assert board.read().residents == ()


def test_a_job_of_the_dead_engine_does_not_leave_the_next_one(board: ResidencyBoard) -> None:
    """The new engine's job is still in flight when the old one's has gone; draining must wait for it."""
    with ExitStack() as new:
        with board.enter("small"):
            board.remove("small")
            board.put(resident(since=1.0))
            new.enter_context(board.enter("small"))
        assert in_flight(board) == 1
    assert in_flight(board) == 0


def test_stopping_keeps_the_count(board: ResidencyBoard) -> None:
    """A model that drains still has its jobs."""
    with board.enter("small"):
        board.set_level("small", Level.STOPPING)
        assert in_flight(board) == 1
        assert not board.read().ready("small")


def test_what_was_read_does_not_change(board: ResidencyBoard) -> None:
    """A reading is frozen; the board goes on."""
    before = board.read()
    board.switching(Switching(to_model="b", epoch=1, since=0.0))
    board.quarantine("b", Quarantine(until=1.0, failures=1, reason=""))
    board.remove("small")

    assert (before.switching, dict(before.quarantined), before.ready_models) == (None, {}, ("small",))
    assert board.read().is_quarantined("b", 0.5)
    board.quarantine("b", None)
    assert not board.read().is_quarantined("b", 0.5)
