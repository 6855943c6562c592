"""
What the worker's decision promises, on made-up traces: the bound, and waits no worse than collation's.
"""

from __future__ import annotations

import random
from functools import cache
from itertools import accumulate, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces import KINDS, MAX_WAIT_S, World, make_costs, make_job, make_mixed, make_starvation, make_world
from worker.simulate.policies import PolicyName
from worker.simulate.report import Report, find_violations
from worker.simulate.trace import TracedJob

SEEDS = range(24)


@cache
def reports(kind: str, seed: int) -> tuple[Report, Report]:
    """Ours, and plain collation's."""
    world = make_world(seed, kind)
    return world.report(), world.report(PolicyName.COLLATE)


@pytest.mark.parametrize("kind", KINDS)
def test_waits_are_no_worse_than_collation_s(kind: str) -> None:
    """
    Where collation keeps the bound, 95 % of the jobs wait no longer than under it.

    Where it breaks the bound, keeping it may cost the others something: at most a tenth here.
    """
    for seed in SEEDS:
        ours, plain = reports(kind, seed)
        allowed = plain.p95_wait_s * (1.0 if plain.max_wait_s <= MAX_WAIT_S else 1.1)
        assert ours.p95_wait_s <= allowed + 1e-6, seed


@pytest.mark.parametrize(
    ("kind", "seed"), [("bursts", 116), ("bursts of one model", 188), ("bursts of one model", 281), ("steady", 57)]
)
def test_a_rare_model_does_not_go_before_jobs_that_wait_as_long(kind: str, seed: int) -> None:
    """Traces on which a detour to a rare model once made the others wait longer than under collation."""
    ours, plain = reports(kind, seed)
    assert plain.max_wait_s <= MAX_WAIT_S
    assert ours.p95_wait_s <= plain.p95_wait_s + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_makespan_is_that_of_collation(kind: str) -> None:
    """Within 5 %."""
    for seed in SEEDS:
        ours, plain = reports(kind, seed)
        assert ours.makespan_s <= 1.05 * plain.makespan_s, seed


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_waits_longer_than_the_bound_where_collation_keeps_it(kind: str) -> None:
    """A load that plain collation carries within the bound is carried within it."""
    for seed in SEEDS:
        ours, plain = reports(kind, seed)
        if not plain.bound_violations:
            assert not ours.bound_violations, seed


@pytest.mark.parametrize("seed", range(8))
def test_a_rare_model_is_not_starved(seed: int) -> None:
    """Steady traffic keeps another one busy for ninety minutes: collation lets it wait, we do not."""
    world = make_starvation(seed)
    ours, plain = world.report(), world.report(PolicyName.COLLATE)

    assert ours.max_wait_s <= plain.max_wait_s / 2
    assert ours.bound_violations == 0
    assert ours.makespan_s <= 1.05 * plain.makespan_s


@pytest.mark.parametrize("minutes", [20, 40, 90])
@pytest.mark.parametrize("load", [1.0, 1.2])
@pytest.mark.parametrize("seed", range(3))
def test_a_rare_model_waits_half_as_long_in_short_traces_and_overloads(seed: int, load: float, minutes: int) -> None:
    """Long before the bound where a detour is short beside the turn; and though the busy model cannot keep up."""
    world = make_starvation(seed, load=load, minutes=minutes)

    assert world.report().max_wait_s <= world.report(PolicyName.COLLATE).max_wait_s / 2


def test_urgency_does_not_drown_a_worker() -> None:
    """
    Every model has interactive, usual and batch jobs with deadlines, few of which can be met, at a load of 0.85.

    To hop after each urgent job would cost more time than there is: all would wait longer, the urgent ones too.
    """
    dice = random.Random(1)
    costs = {model: make_costs(job_s=1.2, at_once=8, load_s=20) for model in "abcde"}
    jobs, at = [], 0.0
    for number in range(10_000):
        at += dice.expovariate(0.85 * 8 / 1.2)
        jobs.append(
            make_job(
                number, dice.choice("abcde"), at, size=dice.expovariate(1), priority=dice.choice((0, 3, 3, 9)),
                deadline_s=at + dice.uniform(10, 2000) if dice.random() < 0.3 else None,
            )
        )  # fmt: skip
    world = World(jobs=jobs, costs=costs)
    ours, plain = world.report(), world.report(PolicyName.COLLATE)

    assert ours.bound_violations == 0
    assert ours.mean_wait_s <= 1.3 * plain.mean_wait_s
    assert ours.deadline_misses <= plain.deadline_misses


MIXED = (4, 7, 12, 17, 22, 39, 42, 46, 52, 55, 56, 57, 60, 65, 76, 85)


@cache
def mixed_reports(seed: int) -> tuple[Report, Report]:
    """Ours, and plain collation's."""
    world = make_mixed(seed)
    return world.report(), world.report(PolicyName.COLLATE)


@pytest.mark.parametrize("seed", MIXED)
def test_the_bound_holds_beside_classes_and_deadlines(seed: int) -> None:
    """
    Fifteen thousand jobs of three classes, three of ten with deadlines; collation keeps the bound.

    Traces on which a turn once went to a deadline or to a more urgent class though a batch job was due meanwhile.
    """
    ours, plain = mixed_reports(seed)
    assert plain.bound_violations == 0
    assert ours.bound_violations == 0


def test_more_deadlines_are_met_than_by_collation() -> None:
    """Over all these traces: at least a tenth of those that collation misses."""
    ours, plain = (
        sum(report.deadline_misses for report in some) for some in zip(*map(mixed_reports, MIXED), strict=True)
    )
    assert ours <= 0.9 * plain


feasible = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.floats(0, 6000, width=16),
        st.sampled_from((0, 3, 9)),
        st.one_of(st.none(), st.integers(1, 1000)),  # seconds until its deadline
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(feasible, st.integers(1, 5), st.integers(0, 20))
def test_the_bound_holds_where_the_load_is_feasible(
    drawn: list[tuple[str, float, int, int | None]], job_s: int, wake_s: int
) -> None:
    """
    All there is to do, with a switch for each model, fits into the bound: nobody waits longer.

    Whatever comes when, however often a model would have to come back, and however urgent others are.
    """
    costs = {model: make_costs(load_s=wake_s + 10, wake_s=wake_s, job_s=job_s) for model in "abc"}
    jobs = [
        make_job(n, model, at, priority=priority, deadline_s=None if deadline is None else at + deadline)
        for n, (model, at, priority, deadline) in enumerate(sorted(drawn, key=lambda row: row[1]))
    ]
    bound_s = len(jobs) * job_s + 3 * (wake_s + 10) + 3 * wake_s
    assert World(jobs=jobs, costs=costs).report(max_wait_s=bound_s).bound_violations == 0


@pytest.mark.parametrize("switch_s", [2, 5, 10])
@pytest.mark.parametrize("job_s", [1, 3])
def test_a_bound_shorter_than_a_turn_is_kept(switch_s: int, job_s: int) -> None:
    """Two switches, one of which may just have begun, and two jobs: in all worlds of a backlog and two such jobs."""
    costs = {model: make_costs(load_s=switch_s, wake_s=switch_s, job_s=job_s) for model in "ab"}
    a_bit_more = {m: make_costs(load_s=switch_s + 0.001, wake_s=switch_s + 0.001, job_s=job_s) for m in "ab"}
    for backlog, first, gap in product((10, 20, 40), range(0, 31, 3), range(0, 21, 2)):
        jobs = [make_job(0, "a")] * backlog
        jobs += [make_job(1, "b", at, max_wait_s=2.0 * (switch_s + job_s)) for at in (first, first + gap)]
        run = World(jobs=sorted(jobs, key=lambda job: job.arrival_s), costs=costs).run()
        assert find_violations(run, a_bit_more, max_wait_s=MAX_WAIT_S) == [], (backlog, first, gap)


@pytest.mark.parametrize("places", [1, 8])
@pytest.mark.parametrize("switch_s", [2, 5, 10, 20])
def test_a_short_bound_holds_beside_steady_traffic(switch_s: int, places: int) -> None:
    """
    One model at a load of 0.6, and jobs of another one that may wait for two switches and a bit.

    They come in pairs: the second one when the worker has just gone back.
    """
    costs = {model: make_costs(load_s=switch_s, wake_s=switch_s, at_once=places) for model in "ab"}
    for seed in range(5):
        dice = random.Random(seed)
        jobs = [make_job(0, "a", at) for at in accumulate(dice.expovariate(0.6 * places) for _ in range(1800 * places))]
        for at in accumulate(dice.uniform(200, 300) for _ in range(10)):
            jobs += [make_job(1, "b", at + after, max_wait_s=2.0 * switch_s + 4) for after in (0, switch_s + 3)]
        world = World(jobs=sorted(jobs, key=lambda job: job.arrival_s), costs=costs)
        assert world.report().bound_violations == 0


def busy_with(other: TracedJob, *, busy_priority: int = 3) -> World:
    """A model with 200 jobs of 1 s at once, and one job of another model."""
    jobs = [make_job(n, "a", priority=busy_priority) for n in range(200)] + [other]
    jobs.sort(key=lambda job: job.arrival_s)
    return World(jobs=jobs, costs={"a": make_costs(), "b": make_costs()})


def test_a_deadline_brings_its_model_in_time() -> None:
    """It comes at 20 and is to be done at 100: it is served at the last moment, and the rest resumes."""
    world = busy_with(make_job(200, "b", 20.0, deadline_s=100.0))
    run = world.run()
    (late,) = [n for n, job in enumerate(world.jobs) if job.model == "b"]

    assert 90 < run.ends[late] <= 100
    assert [turn.model for turn in run.turns] == ["a", "b", "a"]
    assert "should start within" in run.turns[1].reason


def test_a_job_with_a_bound_of_its_own_is_served_within_it() -> None:
    """It comes at 20 and may wait for 30 s: then the job in flight ends and its model is loaded. Else it is last."""
    world = busy_with(make_job(200, "b", 20.0, max_wait_s=30.0))
    assert world.report().bound_violations == 0
    assert max(world.run().starts) > 200
    assert next(turn for turn in world.run().turns if turn.model == "b").ready_s <= 20 + 30 + 1 + 10

    patient = busy_with(make_job(200, "b", 20.0))
    assert [turn.model for turn in patient.run().turns] == ["a", "b"]


def test_interactive_jobs_come_before_batch_and_batch_resumes() -> None:
    """Once the turn has paid for two switches and the job in flight: (10 + 2 + 1) s are a fifth of 65 s."""
    world = busy_with(make_job(200, "b", 20.0, priority=0), busy_priority=9)
    run = world.run()
    (urgent,) = [n for n, job in enumerate(world.jobs) if job.model == "b"]

    assert [turn.model for turn in run.turns] == ["a", "b", "a"]
    assert run.starts[urgent] == pytest.approx(10 + 65 + 10, abs=2)
    assert "more urgent" in run.turns[1].reason


def test_the_bound_of_interactive_jobs_holds_in_an_overload_of_batch() -> None:
    """Batch jobs for four hours, at once, and interactive ones for another model now and then."""
    jobs = [make_job(n, "a", priority=9) for n in range(14_400)]
    jobs += [make_job(20_000 + n, "b", 1000.0 * n, priority=0) for n in range(14)]
    jobs.sort(key=lambda job: job.arrival_s)
    world = World(jobs=jobs, costs={"a": make_costs(), "b": make_costs()})
    run = world.run()
    waits = [start - job.arrival_s for job, start in zip(world.jobs, run.starts, strict=True) if job.model == "b"]

    assert max(waits) <= 75
    assert max(run.ends) <= 1.05 * 14_400


def test_a_group_over_two_models_loads_each_once() -> None:
    """Two hundred drafts, each judged on another model once it is done: all drafts first, then all verdicts."""
    drafts = [make_job(n, "draft") for n in range(200)]
    verdicts = [make_job(200 + n, "judge", 10.0 + n + 1) for n in range(200)]
    world = World(jobs=drafts + verdicts, costs={"draft": make_costs(), "judge": make_costs()})

    assert [(turn.model, turn.jobs) for turn in world.run().turns] == [("draft", 200), ("judge", 200)]
