"""
What jobs take, as the answers tell it: means that follow the newest jobs, and rates that fit what was seen.
"""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import timedelta
from heapq import heappop, heappush

import pytest

from common.schemas import JobRequest, ModelPace, utc_now
from worker.engines.base import Completion
from worker.jobs.paces import Paces, pace_of
from worker.state.backlog import Backlog, Lane, Waiting
from worker.state.residency import Level, Residency, Resident

REQUEST = JobRequest.parse({"prompt": "Hi", "max_tokens": 100})
LANE = Lane(count=10, prompt_tokens=1000, output_tokens=1000)


def make_paces(*earlier: ModelPace, at_once: int = 4, in_flight: int = 3) -> Paces:
    return Paces("w", at_once=lambda _model: at_once, in_flight=lambda _model: in_flight, earlier=earlier)


def completion(run_s: float = 2.0, *, prefill_s: float | None = 0.5, output: int = 50) -> Completion:
    return Completion(
        response={}, run_s=run_s, prefill_s=prefill_s, decode_s=None if prefill_s is None else run_s - prefill_s,
        prompt_tokens=100, completion_tokens=output,
    )  # fmt: skip


def make_pace(worker: str = "w", model: str = "m", **changes: object) -> ModelPace:
    facts = {
        "worker": worker, "model": model, "count": 50, "at_once": 4, "in_flight": 4.0, "run_s": 2.0,
        "deviation_s": 0.5, "at": utc_now(),
    }  # fmt: skip
    return ModelPace.model_validate({**facts, **changes})


def test_nothing_is_known_before_the_first_answer() -> None:
    """A model that nobody has measured is absent; the first job's figures are the means."""
    paces = make_paces()
    assert paces.known(["m"]) == {}
    paces.answered("m", REQUEST, completion(), now=0.0)
    found = paces.known(["m", "other"])["m"]
    assert (found.count, found.run_s, found.deviation_s, found.in_flight) == (1, 2.0, 0.0, 4.0)
    assert (found.prompt_tokens, found.prefill_s, found.output_tokens, found.decode_s) == (100, 0.5, 50, 1.5)
    assert found.output_share == 0.5


def test_the_means_follow_the_newest_jobs() -> None:
    """One long job moves them a little, many move them all the way; the deviation tells how scattered they are."""
    paces = make_paces()
    for _ in range(20):
        paces.answered("m", REQUEST, completion(1.0, prefill_s=None), now=0.0)
    paces.answered("m", REQUEST, completion(5.0, prefill_s=None), now=0.0)
    found = paces.known(["m"])["m"]
    assert found.run_s == pytest.approx(1.2)
    assert found.deviation_s == pytest.approx(4 * (0.05 * 0.95) ** 0.5)
    for _ in range(200):
        paces.answered("m", REQUEST, completion(5.0, prefill_s=None), now=0.0)
    assert paces.known(["m"])["m"].run_s == pytest.approx(5.0, rel=0.01)


def test_what_was_measured_here_counts_before_what_others_did() -> None:
    """Of others the newest; after a restart, what this worker kept goes on."""
    old = utc_now() - timedelta(days=1)
    paces = make_paces(make_pace("a", run_s=7.0, at=old), make_pace("b", run_s=8.0), make_pace("w", "n", run_s=3.0))
    known = paces.known(["m", "n"])
    assert (known["m"].run_s, known["n"].run_s) == (8.0, 3.0)

    paces.answered("m", REQUEST, completion(1.0), now=0.0)
    assert paces.known(["m"])["m"].run_s == 1.0
    paces.answered("n", REQUEST, completion(4.0), now=0.0)
    assert paces.known(["n"])["n"].run_s == pytest.approx(3.05)
    assert [(found.worker, found.model) for found in paces.unsaved()] == [("w", "n"), ("w", "m")]
    assert paces.unsaved() == ()


class Turns:
    """A model's turns as the worker sees them: looks at every fifth of a second, bursts of answers from all places."""

    def __init__(self, paces: Paces, *, at_once: int) -> None:
        self._paces, self._at_once = paces, at_once

    def turn(self, jobs: int, *, since: float, look_at: float, wave_s: float) -> None:
        """One turn of so many *jobs* that begins at *since*; the first look comes *look_at* later."""
        residency = Residency(
            capacity=1, max_residents=1, residents=(Resident(model_id="m", level=Level.READY, bytes=1, since=since),)
        )
        waves = range(1, jobs // self._at_once + 1)
        looks = [since + look_at + 0.2 * n for n in range(round(wave_s * len(waves) * 5) + 5)]
        events = [(since + wave * wave_s, True) for wave in waves] + [(at, False) for at in looks]
        left = jobs
        for now, answers in sorted(events):
            if answers:
                left -= self._at_once
                for _ in range(self._at_once):
                    self._paces.answered("m", REQUEST, completion(0.5), now=now)
            else:
                waits = max(0, left - self._at_once)
                self._paces.look(residency, Backlog(by_model={"m": Waiting(count=waits, oldest_at=0.0)}), now=now)
        self._paces.look(replace(residency, residents=()), Backlog(), now=since + wave_s * (len(waves) + 1))


@pytest.mark.parametrize("look_at", [0.0, 0.05, 0.1, 0.15, 0.199])
@pytest.mark.parametrize("jobs", [24, 40, 400])
def test_what_a_job_costs_is_seen_while_others_wait(jobs: int, look_at: float) -> None:
    """
    Four at once end every 0.52 s, though each ran 0.5 s: what lies between them counts, wherever the looks fall.

    In short turns too: it is counted from burst to burst, with what comes before the first and after the last left out.
    """
    paces = make_paces()
    turns = Turns(paces, at_once=4)
    for number in range(3):
        turns.turn(jobs, since=1000.0 * number, look_at=look_at, wave_s=0.52)
    assert paces.known(["m"])["m"].job_s == pytest.approx(0.13, rel=0.001)


def test_what_a_job_costs_is_seen_of_a_large_engine_and_not_forgotten() -> None:
    """256 at once, a few turns: known, and told at once after the next start."""
    paces = make_paces(at_once=256)
    turns = Turns(paces, at_once=256)
    for number in range(2):
        turns.turn(2048, since=1000.0 * number, look_at=0.1, wave_s=2.0)
    [kept] = paces.unsaved()
    assert kept.job_s == pytest.approx(2.0 / 256)
    assert make_paces(kept, at_once=256).known(["m"])["m"].job_s == pytest.approx(2.0 / 256)


def test_what_a_job_costs_is_seen_where_they_end_one_by_one() -> None:
    """Four places, times of jobs scattered by half their mean of 0.5 s: 2 % of 0.125 s after two thousand."""
    dice, paces = random.Random(1), make_paces()
    residency = Residency(
        capacity=1, max_residents=1, residents=(Resident(model_id="m", level=Level.READY, bytes=1, since=0.0),)
    )
    waits = Backlog(by_model={"m": Waiting(count=5, oldest_at=0.0)})
    places, looked_at = [0.5 * dice.gammavariate(4, 1 / 4) for _ in range(4)], 0.0
    for _ in range(2000):
        now = heappop(places)
        while looked_at < now:
            paces.look(residency, waits, now=looked_at)
            looked_at += 0.2
        paces.answered("m", REQUEST, completion(0.5), now=now)
        heappush(places, now + 0.5 * dice.gammavariate(4, 1 / 4))
    assert paces.known(["m"])["m"].job_s == pytest.approx(0.125, rel=0.05)


def test_idle_seconds_are_no_job_s() -> None:
    """Nothing waits for ten seconds; what was answered before them begins no new count."""
    paces = make_paces()
    turns = Turns(paces, at_once=4)
    turns.turn(40, since=0.0, look_at=0.1, wave_s=0.5)
    before = paces.known(["m"])["m"].job_s
    residency = Residency(
        capacity=1, max_residents=1, residents=(Resident(model_id="m", level=Level.READY, bytes=1, since=0.0),)
    )
    waits = Backlog(by_model={"m": Waiting(count=5, oldest_at=0.0)})
    for tenth in range(100):
        paces.look(residency, Backlog(), now=10 + tenth / 10)
    for now in (20.0, 20.2, 20.4):
        paces.look(residency, waits, now=now)
    assert paces.known(["m"])["m"].job_s == before == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("pace", "work_s", "one_s"),
    [
        (make_pace(), 5.0, 2.0),  # 10 jobs of 2 s, 4 at once
        (make_pace(in_flight=5.0), 4.0, 2.0),  # 5 in hand: of the 2 s, a part is waiting in the engine
        (make_pace(in_flight=1.0), 5.0, 2.0),  # seldom busy: it can do 4 at once all the same
        (make_pace(job_s=0.6), 6.0, 2.4),  # seen while others waited
    ],
)
def test_without_tokens_a_job_takes_the_time_of_a_usual_one(pace: ModelPace, work_s: float, one_s: float) -> None:
    """Whatever its own length."""
    found = pace_of(pace)
    assert (found.work_s(LANE), found.one_s(LANE)) == (pytest.approx(work_s), pytest.approx(one_s))


def test_with_tokens_jobs_are_told_apart_and_answers_are_as_long_as_of_late() -> None:
    """100 tokens read in 0.5 s, 50 written in 1.5 s, half of what is allowed: 10 x (0.5 + 1.5) s, four at once."""
    measured = make_pace(prompt_tokens=100, prefill_s=0.5, output_tokens=50, decode_s=1.5, output_share=0.5)
    found = pace_of(measured)
    assert found.work_s(LANE) == pytest.approx(5.0)
    assert found.work_s(Lane(count=10, prompt_tokens=1000)) == pytest.approx(5.0)  # nobody says how long it may be

    slower = pace_of(measured.model_copy(update={"job_s": 1.0}))  # where one was seen to end every second
    assert slower.work_s(LANE) == pytest.approx(10.0)
