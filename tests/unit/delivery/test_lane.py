"""
What a lane takes up, and that nothing is lost where its work fails.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from tests.waiting import eventually
from worker.delivery.lane import Lane, Run, headers_of, plain_args
from worker.delivery.pool import pool_with, running, signal_of

NAME = "some.task"
EMBED: dict[str, Any] = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def celery_args(
    *args: Any, embed: dict[str, Any] = EMBED, kwargs: dict[str, Any] | None = None, **request: Any
) -> tuple[Any, ...]:
    """What Celery's request hands to its pool."""
    about = {"id": "job", "task": NAME, "properties": {"delivery_tag": "tag"}, "args": list(args), **request}
    return NAME, "job", about, json.dumps([args, kwargs or {}, embed]), "application/json", "utf-8"


def test_a_message_that_asks_for_nothing_but_its_result_is_plain() -> None:
    """Also with what Celery always writes: no time limit, no retries, no group."""
    plain = celery_args(
        {"prompt": "hi"}, 2, timelimit=[None, None], retries=0, group=None, eta=None, ignore_result=False
    )
    assert plain_args(plain) == [{"prompt": "hi"}, 2]


@pytest.mark.parametrize(
    "unplain",
    [
        {"group": "g"},
        {"timelimit": [None, 5]},
        {"retries": 1},
        {"expires": "2030-01-01T00:00:00+00:00"},
        {"ignore_result": True},
        {"stamped_headers": ["tenant"]},
        {"shadow": "another name"},
        {"kwargs": {"prompt": "hi"}},
        {"embed": {**EMBED, "callbacks": [{"task": "next"}]}},
        {"embed": {**EMBED, "errbacks": [{"task": "next"}]}},
        {"embed": {**EMBED, "chain": [{"task": "next"}]}},
        {"embed": {**EMBED, "chord": {"task": "next"}}},
    ],
    ids=str,
)
def test_what_is_celerys_own_business_is_not_plain(unplain: dict[str, Any]) -> None:
    """Whoever links a task, limits its time or wants no result gets what Celery promises."""
    assert plain_args(celery_args("body", **unplain)) is None


def test_a_body_that_is_no_json_is_not_plain() -> None:
    """Celery refuses it, in its own words."""
    *head, _type, encoding = celery_args("body")
    assert plain_args((*head, "application/x-python-serialize", encoding)) is None


def test_headers_come_back_as_they_were_sent() -> None:
    """Celery's request adds what it knows of the delivery, and the decoded arguments."""
    sent = {"id": "job", "task": NAME, "root_id": "root", "argsrepr": "(...)", "mine": 1}
    added = {"properties": {}, "reply_to": None, "correlation_id": "job", "hostname": "h", "delivery_info": {}}
    assert headers_of({**sent, **added, "args": [], "kwargs": {}}) == sent


class Work:
    """Writes down its batches; the first waits until it may go on, so that others collect behind it."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.began = threading.Event()
        self.go = threading.Event()
        self.error: Exception | None = None

    def __call__(self, items: Sequence[Run]) -> None:
        if not items:
            return
        self.batches.append([run.task_id for run in items])
        self.began.set()
        assert self.go.wait(10)
        if self.error is not None:
            raise self.error
        for run in items:
            run.ended.set_result(None)


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def lane(work: Work) -> Iterator[Lane]:
    made = Lane("test", work, tick_s=0.01)
    made.start()
    yield made
    work.go.set()
    made.end()


def test_a_pool_gives_its_lane_plain_runs_and_its_threads_the_rest(work: Work, lane: Lane) -> None:
    """Both kinds can be told to stop, and are forgotten when they have ended."""
    pool = pool_with({NAME: lane})(limit=2)
    ran: list[str] = []

    def target(_name: str, job_id: str, *_: Any) -> None:
        ran.append(job_id)

    def apply(job_id: str, **unplain: Any) -> Any:
        return pool.apply_async(
            target,
            args=(NAME, job_id, *celery_args("body", **unplain)[2:]),
            correlation_id=job_id,
            callback=lambda _result: None,
        )

    try:
        plain, linked = apply("plain"), apply("linked", group="g")
        linked.wait(10)
        assert work.began.wait(10)
        assert ran == ["linked"]
        assert set(running()) == {"plain"}
        plain.terminate()
        assert signal_of("plain").reason == "cancelled"
        work.go.set()
        plain.wait(10)
        eventually(lambda: not running())
        assert work.batches == [["plain"]]
    finally:
        pool.on_stop()


def test_what_comes_while_a_batch_is_worked_on_is_the_next_batch(work: Work, lane: Lane) -> None:
    """That is what makes it fast under load, and costs nothing when there is none."""
    runs = [bare_run(str(number), []) for number in range(5)]
    lane.put(runs[0])
    assert work.began.wait(10)
    for run in runs[1:]:
        lane.put(run)
    work.go.set()
    for run in runs:
        run.ended.result(10)
    assert work.batches == [["0"], ["1", "2", "3", "4"]]


def test_work_that_fails_sends_its_batch_the_ordinary_way(work: Work, lane: Lane) -> None:
    """All but those that had ended by then; and the lane lives on."""
    ordinary: list[str] = []
    done, left, later = (bare_run(name, ordinary) for name in ("done", "left", "later"))
    done.ended.set_result(None)
    work.error = ZeroDivisionError("a bug")
    lane.put(left)
    assert work.began.wait(10)
    lane.put(done)
    lane.put(later)
    work.go.set()
    eventually(lambda: ordinary == ["left", "later"])
    assert lane.is_alive()


def bare_run(job_id: str, ordinary: list[str]) -> Run:
    """A run that only says that it goes the ordinary way."""
    return Run(
        task_id=job_id,
        headers={},
        properties={},
        args=(),
        signal=signal_of(job_id),
        on_accepted=lambda *_: None,
        on_success=lambda _: None,
        on_failure=lambda _: None,
        ordinary=lambda: ordinary.append(job_id),
        ended=Future(),
    )
