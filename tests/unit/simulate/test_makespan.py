"""
How soon all jobs of a made-up trace have ended: beside the best there is, and beside what no schedule can beat.
"""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import combinations, permutations, product
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lower_bound import lower_bound_s
from tests.traces import KINDS, World, make_costs, make_job, make_world
from worker.simulate.costs import ModelCosts
from worker.simulate.policies import PolicyName
from worker.simulate.trace import TracedJob


def ends_at(world: World, order: tuple[TracedJob | str, ...]) -> float:
    """Start the jobs in this order, each as soon as it can; a name is a model that is loaded ahead of its jobs."""
    at = read_at = 0.0
    ready, started = "", set[str]()
    places: list[float] = []
    for item in order:
        model = item if isinstance(item, str) else item.model
        cost = world.costs[model]
        if model != ready:
            at = max([at, *places]) + (cost.wake_s if model in started else cost.load_s)
            ready, started, places, read_at = model, started | {model}, [], at
        if isinstance(item, str):
            continue
        begins = max(at, read_at, item.arrival_s)
        if len(places) == cost.max_num_seqs:
            begins = max(begins, heappop(places))
        at, read_at = begins, begins + item.prompt_tokens / cost.prefill_tokens_per_s
        heappush(places, read_at + item.output_tokens / cost.decode_tokens_per_s)
    return max([at, *places])


def best_makespan_s(world: World) -> float:
    """Try every order of the jobs, with any models loaded ahead; it knows the future. The first job comes at 0."""
    some = (models for ahead in range(len(world.costs)) for models in combinations(sorted(world.costs), ahead))
    items: list[list[TracedJob | str]] = [[*world.jobs, *models] for models in some]
    return min(ends_at(world, order) for each in items for order in permutations(each))


few = st.lists(
    st.tuples(st.sampled_from("ab"), st.floats(0, 40, width=16), st.floats(0.125, 8, width=16)), min_size=1, max_size=5
)


@settings(max_examples=150, deadline=None)
@given(few, st.integers(1, 3), st.floats(0, 20, width=16), st.floats(0, 5, width=16), st.floats(0, 0.875, width=16))
def test_no_schedule_beats_the_lower_bound(
    drawn: list[tuple[str, float, float]], places: int, load_s: float, wake_s: float, read_share: float
) -> None:
    """Neither the best of all, which knows the future, nor ours, which is no better than that."""
    rows = sorted(drawn, key=lambda row: row[1])
    jobs = [make_job(n, model, at - rows[0][1], size=size) for n, (model, at, size) in enumerate(rows)]
    wake_s = min(wake_s, load_s)
    costs = make_costs(load_s=load_s, wake_s=wake_s, job_s=2.0, at_once=places, read_share=read_share)
    world = World(jobs=jobs, costs={"a": costs, "b": costs})
    best_s = best_makespan_s(world)

    assert lower_bound_s(world) <= best_s + 1e-6
    assert best_s <= world.report().makespan_s + 1e-6


def test_nobody_who_does_not_know_the_future_is_within_a_tenth_of_the_best() -> None:
    """
    A job of each of two models waits, that of a is done, and a switch takes 10 s, the first one too.

    Whenever a worker leaves for b, another job of a may come just then, or none at all; staying for ever ends nothing.
    This is about every trace together and decisions without dice: it does not say which random trace is out of reach.
    """
    switch_s, moment = 10.0, 0.001
    costs = dict.fromkeys("ab", make_costs(load_s=switch_s, wake_s=switch_s, job_s=moment))
    waiting = [make_job(0, "a"), make_job(1, "b")]
    if_none_s = best_makespan_s(World(jobs=waiting, costs=costs))
    for left_s in (switch_s + step / 10 for step in range(1, 1000)):
        one_more = World(jobs=[*waiting, make_job(2, "a", left_s + moment)], costs=costs)
        takes_s = left_s + switch_s
        assert max(takes_s / if_none_s, (takes_s + switch_s) / best_makespan_s(one_more)) > 1.36


@pytest.mark.parametrize("kind", KINDS)
def test_the_makespan_is_near_the_lower_bound(kind: str) -> None:
    """
    At most a tenth above what no schedule can beat, for up to four jobs at once and traces that are not short.

    At the end of a trace, a schedule that knows the future waits where we switch. With many jobs at once, a turn ends
    with places that fall empty one by one, while jobs come or in the last turn; the bound is that of orders without.
    """
    for seed in range(24):
        world = make_world(seed, kind, count=2000)
        if all(cost.max_num_seqs <= 4 for cost in world.costs.values()):
            assert world.report().makespan_s <= 1.10 * lower_bound_s(world), seed


@pytest.mark.parametrize("seed", [1, 3, 7, 8, 11, 19, 22])
def test_with_many_places_a_batch_ends_near_the_lower_bound(seed: int) -> None:
    """
    Of the first 24 seeds, those with 16 and 64 places but one, whose last turn is long: within 6 %.

    Never later than in the order of arrival, as collation has it; nobody pays for it with his waiting.
    """
    world = make_world(seed, "at once", count=2000)
    ours, plain = world.report(), world.report(PolicyName.COLLATE)

    assert min(cost.max_num_seqs for cost in world.costs.values()) >= 16
    assert ours.makespan_s <= 1.06 * lower_bound_s(world)
    assert ours.makespan_s <= plain.makespan_s + 1e-6
    assert ours.p95_wait_s <= plain.p95_wait_s + 1e-6


AN_HOUR = {"steady": (20, 28, 29, 48, 56), "bursts": (24, 39, 53, 56), "bursts of one model": (8, 30, 39)}


@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for kind, seeds in AN_HOUR.items() for seed in seeds])
def test_with_many_places_an_hour_is_near_the_lower_bound(kind: str, seed: int) -> None:
    """
    Likewise with 16 and 64 places, where jobs come for an hour.

    Of the first sixty seeds those whose load can be carried within the bound on the waiting, and that do not take long.
    """
    world = make_world(seed, kind, lasts_s=3600)
    found = world.report()

    assert min(cost.max_num_seqs for cost in world.costs.values()) >= 16
    assert not found.bound_violations
    assert found.makespan_s <= 1.10 * lower_bound_s(world)


def test_jobs_that_are_there_at_once_end_as_soon_as_they_can() -> None:
    """Against the best of all orders, one job at a time: each model has one turn."""
    for seed in range(20):
        world = make_world(seed, "at once", count=6)
        costs = {model: cost.model_copy(update={"max_num_seqs": 1}) for model, cost in world.costs.items()}
        used = {job.model for job in world.jobs}
        world = World(jobs=world.jobs, costs={model: cost for model, cost in costs.items() if model in used})
        best_s = min(ends_at(world, order) for order in permutations(world.jobs))

        assert world.report(max_wait_s=1e6).makespan_s == pytest.approx(best_s), seed


def best_turn_s(cost: ModelCosts, jobs: list[TracedJob]) -> float:
    """Search every order in which the jobs of one turn can start on its places."""

    def takes_s(order: tuple[TracedJob, ...]) -> float:
        free, read_at = [0.0] * cost.max_num_seqs, 0.0
        for job in order:
            read_at = max(read_at, heappop(free)) + job.prompt_tokens / cost.prefill_tokens_per_s
            heappush(free, read_at + job.output_tokens / cost.decode_tokens_per_s)
        return max(free)

    return min(takes_s(order) for order in permutations(jobs))


def test_jobs_with_several_places_end_near_the_best() -> None:
    """
    Against all orders within each turn, on 24 traces of up to 14 jobs: 2 % above the best in the mean, 16 % at worst.

    So few keep the order of arrival: the last jobs of a turn may be long ones, while other places are empty already.
    """
    ratios = []
    for seed, places in product(range(12), (2, 3)):
        world = make_world(seed, "at once", count=14)
        queues = {model: [job for job in world.jobs if job.model == model][:7] for model in world.costs}
        jobs = [job for some in queues.values() for job in some]
        costs = {model: cost.model_copy(update={"max_num_seqs": places}) for model, cost in world.costs.items()}
        best = sum(costs[model].load_s + best_turn_s(costs[model], some) for model, some in queues.items() if some)
        ratios.append(World(jobs=jobs, costs=costs).report(max_wait_s=1e6).makespan_s / best)

    assert min(ratios) >= 1 - 1e-9
    assert mean(ratios) <= 1.03
    assert max(ratios) <= 1.16
