"""
Which job killed the engine? Played on made-up engines: every innocent is answered, every culprit is set aside.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.schemas import Fault, utc_now
from worker.jobs.isolate import Again, isolate, may_join

MAX_ATTEMPTS = 5
MAX_DEATHS = 2
MAX_WORKER_DEATHS = 3
FREE = Again(reason="")


def fault(company: int | None = None, kind: str = "EngineDied") -> Fault:
    return Fault(at=utc_now(), worker="here", attempt=1, kind=kind, message="gone", company=company)


def worker_died(company: int) -> Fault:
    return fault(company, "WorkerDied")


def judge(faults: Sequence[Fault]) -> Again:
    return isolate(
        faults,
        max_attempts=MAX_ATTEMPTS,
        max_deaths=MAX_DEATHS,
        max_worker_deaths=MAX_WORKER_DEATHS,
        first_pause_s=1.0,
    )


def decide(*companies: int | None) -> Again:
    return judge([fault(company) for company in companies])


@pytest.mark.parametrize(
    ("companies", "company", "set_aside"),
    [
        ([], None, False),
        ([40], 20, False),
        ([40, 20, 7], 4, False),  # fewer were there than might have been: half of those
        ([40, 39], 20, False),  # two workers: the smallest counts
        ([3], 2, False),
        ([2], 1, False),
        ([1], 1, False),
        ([64, 32, 16, 8, 4, 2, 1], 1, False),
        ([64, 32, 16, 8, 4, 2, 1, 1], None, True),
        ([1, 40, 1], None, True),
        ([None] * 4, None, False),
        ([None] * 4 + [8] * 9, 4, False),  # deaths in company never sum up
        ([None] * 5, None, True),
    ],
)
def test_the_company_is_halved_by_each_death(
    companies: Sequence[int | None], company: int | None, *, set_aside: bool
) -> None:
    """Down to one; the second death alone is the end, and so is the fifth failure of an engine that lives."""
    found = decide(*companies)
    assert (found.company, found.set_aside) == (company, set_aside)
    assert found.reason


def test_only_a_failure_of_a_living_engine_needs_a_pause() -> None:
    """It doubles, up to a bound; an engine that died takes its time anyway."""
    assert [decide(*[None] * count).pause_s for count in range(1, 5)] == [1, 2, 4, 8]
    assert decide(None, None, 4).pause_s == 0
    often = isolate([fault()] * 9, max_attempts=99, max_deaths=2, max_worker_deaths=3, first_pause_s=1.0)
    assert often.pause_s == 10


@pytest.mark.parametrize(
    ("faults", "company", "in_worker", "set_aside"),
    [
        ([worker_died(40)], None, False, False),  # a power cut, somebody's kill -9: it says nothing
        ([worker_died(1)], None, False, False),
        ([worker_died(40), worker_died(40)], 20, True, False),
        ([worker_died(1), worker_died(40)], 20, True, False),  # the first one is never counted as company
        ([worker_died(1), worker_died(1)], 1, True, False),
        ([worker_died(1)] * 3, None, False, True),
        ([worker_died(9)] * 9, 5, True, False),
        ([worker_died(40), fault(8)], 4, False, False),  # only the engine's death makes it a suspect, and in the engine
        ([fault(8), worker_died(40), worker_died(40)], 4, True, False),
        ([fault(1), worker_died(1)], 1, False, False),  # one death alone of each: neither is enough
        ([fault(1), worker_died(1), worker_died(1), fault(1)], None, False, True),
        ([fault()] * 4 + [worker_died(1)] * 2, 1, True, False),
    ],
)
def test_a_worker_dies_of_many_things(
    faults: Sequence[Fault], company: int | None, *, in_worker: bool, set_aside: bool
) -> None:
    """Its first death makes nobody a suspect; then the whole worker's company is halved; three alone are the end."""
    found = judge(faults)
    assert (found.company, found.in_worker, found.set_aside) == (company, in_worker, set_aside)
    assert found.reason


@pytest.mark.parametrize(
    ("company", "inside", "suspects_wait", "joins"),
    [
        (None, [], False, True),
        (None, [None, None], False, True),
        (None, [], True, False),  # suspects come first, or they would wait as long as new jobs come
        (None, [4], False, False),
        (2, [], True, True),
        (2, [None], True, False),
        (2, [2], True, True),
        (2, [2, 2], True, False),
        (9, [2], True, True),
        (9, [2, 9], True, False),  # the bound of the one who is there counts too
        (1, [9], True, False),
        (9, [1], True, False),
        (1, [], True, True),
    ],
)
def test_suspects_are_among_themselves_in_the_company_that_each_may_have(
    company: int | None, inside: Sequence[int | None], *, suspects_wait: bool, joins: bool
) -> None:
    """And nobody else comes near them."""
    suspects = [bound for bound in inside if bound is not None]
    assert may_join(company, inside=len(inside), suspects=suspects, suspects_wait=suspects_wait) is joins


@dataclass
class Engine:
    """An engine with *places*, or a worker; it dies when a culprit's moment comes, under everybody who is in it."""

    places: int
    culprits: frozenset[int]
    dice: random.Random
    kind: str
    faults: dict[int, list[Fault]] = field(default_factory=dict)  # of each job
    answered: set[int] = field(default_factory=set)
    set_aside: set[int] = field(default_factory=set)
    deaths: int = 0

    def again(self, job: int) -> Again:
        return judge(self.faults[job]) if job in self.faults else FREE

    def play(self, jobs: int) -> None:
        """Run until every job has ended: jobs come in any order, and the engine ends any of them first."""
        waiting, inside = list(range(jobs)), list[int]()
        while waiting or inside:
            self.dice.shuffle(waiting)
            for job in list(waiting):
                suspects_wait = any(self.again(other).company is not None for other in waiting)
                suspects = [bound for other in inside if (bound := self.again(other).company) is not None]
                mine = self.again(job).company
                if len(inside) < self.places and may_join(
                    mine, inside=len(inside), suspects=suspects, suspects_wait=suspects_wait
                ):
                    waiting.remove(job)
                    inside.append(job)
            assert inside, "nobody may go in, and nobody is there"
            next_to_end = self.dice.choice(inside)
            if next_to_end not in self.culprits:
                inside.remove(next_to_end)
                self.answered.add(next_to_end)
                continue
            self.deaths += 1
            for job in inside:
                self.faults.setdefault(job, []).append(fault(len(inside), self.kind))
                (self.set_aside.add if self.again(job).set_aside else waiting.append)(job)
            inside.clear()


@st.composite
def engines(draw: st.DrawFn) -> tuple[Engine, int]:
    jobs = draw(st.integers(1, 80))
    culprits = draw(st.frozensets(st.integers(0, jobs - 1), max_size=jobs))
    places = draw(st.integers(1, 80))
    kind = draw(st.sampled_from(["EngineDied", "WorkerDied"]))
    return Engine(places=places, culprits=culprits, dice=random.Random(draw(st.integers(0, 2**32))), kind=kind), jobs


@settings(max_examples=300, deadline=None)
@given(engines())
def test_every_innocent_is_answered_and_every_culprit_set_aside(world: tuple[Engine, int]) -> None:
    """
    However many culprits there are, whoever is with whom: and the engine dies c * (log2(n) + 2) times at most.

    A worker once more for each culprit, for its first death says nothing, and once more until it is sure.
    """
    engine, jobs = world
    engine.play(jobs)

    assert engine.set_aside == engine.culprits
    assert engine.answered == set(range(jobs)) - engine.culprits
    together = min(engine.places, jobs)
    alone = MAX_DEATHS if engine.kind == "EngineDied" else 1 + MAX_WORKER_DEATHS
    assert engine.deaths <= len(engine.culprits) * (math.ceil(math.log2(together)) + alone)
    assert all(len(found) <= math.ceil(math.log2(together)) + alone for found in engine.faults.values())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 80), min_size=1, max_size=20))
def test_deaths_in_company_alone_set_nobody_aside(companies: list[int]) -> None:
    """However often somebody else kills the engine, or the worker."""
    others = [company for company in companies if company > 1]
    assert not decide(*others).set_aside
    assert not judge([worker_died(company) for company in others]).set_aside
