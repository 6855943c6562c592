"""
The doors of the engines: who waits for whom, and who is counted when an engine dies.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import pytest

from common.errors import EngineNotReady
from tests.waiting import eventually
from worker.engines.base import JobStopped, StopSignal
from worker.jobs.usher import Usher


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40) as made:
        yield made


class Guest:
    """A job that stays in the engine until it is told to leave."""

    def __init__(
        self,
        usher: Usher,
        pool: ThreadPoolExecutor,
        job_id: str,
        company: int | None,
        *,
        model: str = "small",
        in_worker: bool = False,
    ) -> None:
        self.stop = StopSignal()
        self.inside = threading.Event()
        self._leave = threading.Event()
        self._enter = partial(usher.enter, model, job_id, company, self.stop, in_worker=in_worker)
        self.done: Future[None] = pool.submit(self._stay)

    def _stay(self) -> None:
        with self._enter():
            self.inside.set()
            assert self._leave.wait(20)

    def leave(self) -> None:
        self._leave.set()
        self.done.result(10)


def test_others_come_in_when_the_last_suspect_has_left(pool: ThreadPoolExecutor) -> None:
    """Those who were there first leave, the suspects go in, then the others; none is beside one of the other kind."""
    usher = Usher()
    first = Guest(usher, pool, "first", None)
    assert first.inside.wait(5)
    suspects = [Guest(usher, pool, f"suspect {n}", 2) for n in range(2)]
    eventually(lambda: usher._engines["small"].suspects_waiting == 2)
    late = Guest(usher, pool, "late", None)
    with pytest.raises(EngineNotReady), usher.enter("small", "lane", None, StopSignal(), wait=False):
        pass

    first.leave()
    for suspect in suspects:
        assert suspect.inside.wait(5)
    assert not late.inside.is_set()
    suspects[0].leave()
    assert not late.inside.is_set()
    suspects[1].leave()
    assert late.inside.wait(5)
    late.leave()


def test_a_job_that_waits_at_the_door_can_be_stopped(pool: ThreadPoolExecutor) -> None:
    """At once, with the reason; and whoever waited behind it goes in."""
    usher = Usher()
    first = Guest(usher, pool, "first", None)
    assert first.inside.wait(5)
    suspect = Guest(usher, pool, "suspect", 1)
    eventually(lambda: usher._engines["small"].suspects_waiting)
    late = Guest(usher, pool, "late", None)

    suspect.stop.stop("cancelled")
    with pytest.raises(JobStopped, match="cancelled"):
        suspect.done.result(5)
    assert late.inside.wait(5)
    first.leave()
    late.leave()


def test_models_have_doors_of_their_own() -> None:
    """A suspect of one keeps nobody out of another."""
    usher = Usher()
    with (
        usher.enter("small", "a", 1, StopSignal(), wait=False),
        usher.enter("large", "b", None, StopSignal(), wait=False),
    ):
        pass


def test_a_suspect_of_the_whole_worker_is_alone_in_all_engines() -> None:
    """It waits until those of every model have left, and keeps others out; then each model has its own door again."""
    usher = Usher()
    with ExitStack() as inside:
        inside.enter_context(usher.enter("large", "a", None, StopSignal()))
        with pytest.raises(EngineNotReady), usher.enter("small", "b", 1, StopSignal(), wait=False, in_worker=True):
            pass
        with usher.enter("small", "c", None, StopSignal(), wait=False):  # that one does not wait any more
            pass
    with usher.enter("small", "b", 1, StopSignal(), wait=False, in_worker=True):
        for company in (None, 1, 7):
            with pytest.raises(EngineNotReady), usher.enter("large", "d", company, StopSignal(), wait=False):
                pass
    with usher.enter("small", "b", 1, StopSignal(), wait=False), usher.enter("large", "d", None, StopSignal()):
        pass


def test_while_a_suspect_of_the_whole_worker_waits_nobody_else_goes_in(pool: ThreadPoolExecutor) -> None:
    """At no door: it would wait for ever."""
    usher = Usher()
    first = Guest(usher, pool, "first", None)
    assert first.inside.wait(5)
    suspect = Guest(usher, pool, "suspect", 1, model="large", in_worker=True)
    eventually(lambda: usher._engines["large"].suspects_waiting)
    with pytest.raises(EngineNotReady), usher.enter("middle", "late", None, StopSignal(), wait=False):
        pass
    first.leave()
    assert suspect.inside.wait(5)
    suspect.leave()
    with usher.enter("middle", "late", None, StopSignal(), wait=False):
        pass


def test_all_who_were_there_are_told_the_same_number() -> None:
    """They ask one after the other, and leave meanwhile; the next death is another one."""
    usher = Usher()

    def enter(*job_ids: str) -> list[ExitStack]:
        places = []
        for job_id in job_ids:
            place = ExitStack()
            place.enter_context(usher.enter("small", job_id, None, StopSignal()))
            places.append(place)
        return places

    for place, job_id in zip(enter("a", "b", "c"), "abc", strict=True):
        assert usher.died_with("small", job_id) == 3
        place.close()
    for place, job_id in zip(enter("a", "b"), "ab", strict=True):
        assert usher.died_with("small", job_id) == 2
        place.close()


def test_one_who_was_there_and_left_otherwise_counts_at_its_next_death_anew() -> None:
    """It was cancelled in the moment of the death, say: what it would have been told then is void."""
    usher = Usher()
    with usher.enter("small", "a", None, StopSignal()), usher.enter("small", "b", None, StopSignal()):
        assert usher.died_with("small", "a") == 2
    with usher.enter("small", "b", 1, StopSignal()):
        assert usher.died_with("small", "b") == 1


def test_many_at_once_never_break_a_bound(pool: ThreadPoolExecutor) -> None:
    """Forty threads with bounds from one to none, again and again: each looks around while it is inside."""
    usher = Usher()
    inside: dict[str, int | None] = {}
    lock = threading.Lock()
    dice = random.Random(7)

    def visit(job_id: str, company: int | None, stay_s: float) -> None:
        with usher.enter("small", job_id, company, StopSignal()):
            with lock:
                inside[job_id] = company
                bounds = list(inside.values())
                assert len({bound is None for bound in bounds}) == 1
                assert all(bound is None or len(bounds) <= bound for bound in bounds)
            time.sleep(stay_s)
            with lock:
                del inside[job_id]

    visits = [
        pool.submit(visit, f"{n}", dice.choice([None, None, 1, 2, 4, 16]), dice.uniform(0, 0.004)) for n in range(400)
    ]
    for done in visits:
        done.result(30)
