"""
The physics of the simulator: rows with the arithmetic beside them, and what must hold in every run.
"""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces import World, make_costs, make_job
from worker.simulate.costs import ModelCosts
from worker.simulate.policies import PolicyName
from worker.simulate.trace import TracedJob

READS = ModelCosts(load_s=10, wake_s=2, prefill_tokens_per_s=100, decode_tokens_per_s=10, max_num_seqs=2)


def test_prompts_are_read_one_after_the_other() -> None:
    """Each job reads 1 s and writes 10 s, two at once: the second starts a second later, the third in its place."""
    world = World(jobs=[make_job(n, "a") for n in range(3)], costs={"a": READS})
    run = world.run()

    assert run.starts == [10, 11, 21]  # load 10
    assert run.ends == [21, 22, 32]


def test_the_first_start_loads_and_later_ones_wake() -> None:
    """Load 10, wake 2, jobs of 1 s that come when the other model is ready."""
    jobs = [make_job(0, "a"), make_job(1, "b", 1.0), make_job(2, "a", 15.0)]
    run = World(jobs=jobs, costs={"a": make_costs(), "b": make_costs()}).run()

    assert run.starts == pytest.approx([10, 21, 24])
    assert [(turn.model, turn.jobs) for turn in run.turns] == [("a", 1), ("b", 1), ("a", 1)]


def test_a_switch_waits_for_the_jobs_in_flight() -> None:
    """Asked for at 11, when b's job comes; a's runs until 10 + 5; then 10 s of loading."""
    jobs = [make_job(0, "a", size=5), make_job(1, "b", 11.0)]
    run = World(jobs=jobs, costs={"a": make_costs(), "b": make_costs()}).run()

    assert run.turns[1].asked_s == 11
    assert run.turns[1].ready_s == pytest.approx(25)


def test_fifo_switches_for_every_other_job() -> None:
    """Two models in turn: a load each, then wakes."""
    jobs = [make_job(n, "ab"[n % 2]) for n in range(6)]
    world = World(jobs=jobs, costs={"a": make_costs(), "b": make_costs()})

    assert world.report(PolicyName.FIFO).switches == 6
    assert world.report(PolicyName.FIFO).makespan_s == pytest.approx(10 + 10 + 4 * 2 + 6)
    assert world.report(PolicyName.COLLATE).makespan_s == pytest.approx(10 + 10 + 6)


def test_round_robin_goes_by_name() -> None:
    """Though another one's job came before."""
    jobs = [make_job(0, "a"), make_job(1, "c", 1.0), make_job(2, "b", 2.0)]
    world = World(jobs=jobs, costs={model: make_costs() for model in "abc"})

    assert [turn.model for turn in world.run(PolicyName.ROUND_ROBIN).turns] == ["a", "b", "c"]
    assert [turn.model for turn in world.run(PolicyName.COLLATE).turns] == ["a", "c", "b"]


def test_jobs_whose_deadline_binds_start_first_then_the_urgent_ones() -> None:
    """After 10 s of loading, half of the first one's time is gone; batch comes last."""
    jobs = [
        make_job(0, "a", priority=9),
        make_job(1, "a"),
        make_job(2, "a", deadline_s=100.0),
        make_job(3, "a", priority=0),
        make_job(4, "a", deadline_s=20.0),
    ]
    run = World(jobs=jobs, costs={"a": make_costs()}).run()

    assert sorted(range(5), key=run.starts.__getitem__) == [4, 3, 1, 2, 0]


def test_the_policy_is_asked_only_where_its_answer_can_change() -> None:
    """Once a turn where jobs come one by one; and not for each job with a deadline, if an earlier one is known."""
    costs = {model: make_costs() for model in "ab"}
    rare = World(jobs=[make_job(n, "ab"[n % 2], 100.0 * n) for n in range(200)], costs=costs).run()
    pressed = [make_job(n, "ab"[n % 2], 0.6 * n, deadline_s=0.6 * n + 3000) for n in range(2000)]

    assert rare.decisions <= len(rare.turns) + 5
    assert World(jobs=pressed, costs=costs).run().decisions <= 200


def test_two_workers_take_two_models() -> None:
    """Each is loaded once, side by side; one worker alone takes the sum."""
    jobs = [make_job(n, "ab"[n % 2]) for n in range(40)]
    world = World(jobs=jobs, costs={"a": make_costs(), "b": make_costs()})

    pair = world.run(workers=2)
    assert sorted((turn.worker, turn.model) for turn in pair.turns) == [("worker1", "a"), ("worker2", "b")]
    assert max(pair.ends) == pytest.approx(10 + 20)
    assert max(world.run().ends) == pytest.approx(2 * (10 + 20))


def test_a_second_worker_joins_where_that_pays() -> None:
    """Half of 100 s is worth a load of 10 s; half of 10 s is not."""
    for count, loads in ((100, 2), (10, 1)):
        world = World(jobs=[make_job(n, "a") for n in range(count)], costs={"a": make_costs()})
        assert len(world.run(workers=2).turns) == loads, count


jobs_of_three = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.floats(0, 2000, width=16),
        st.integers(1, 50),
        st.sampled_from((0, 3, 9)),
        st.one_of(st.none(), st.integers(0, 3000)),
        st.sampled_from(("x", "y")),
    ),
    min_size=1,
    max_size=40,
)
some_costs = st.fixed_dictionaries(
    {
        model: st.builds(
            make_costs,
            load_s=st.integers(0, 90),
            wake_s=st.integers(0, 10),
            job_s=st.integers(1, 5),
            at_once=st.sampled_from((1, 3)),
            read_share=st.sampled_from((0.0, 0.3)),
        )
        for model in "abc"
    }
)


def trace_of(drawn: list[tuple[str, float, int, int, int | None, str]]) -> list[TracedJob]:
    rows = sorted(drawn, key=lambda row: row[1])
    return [
        make_job(n, model, at, size=size / 5, priority=priority, deadline_s=deadline, tenant=tenant)
        for n, (model, at, size, priority, deadline, tenant) in enumerate(rows)
    ]


@settings(max_examples=150, deadline=None)
@given(jobs_of_three, some_costs, st.sampled_from(PolicyName), st.sampled_from((1, 2, 3)))
def test_every_job_runs_once_under_its_model_and_every_turn_serves_some(
    drawn: list[tuple[str, float, int, int, int | None, str]],
    costs: dict[str, ModelCosts],
    policy: PolicyName,
    workers: int,
) -> None:
    """None is lost, none starts before it came; never more at once than places; twice the same run is the same."""
    world = World(jobs=trace_of(drawn), costs=costs)
    run = world.run(policy, workers=workers)

    assert sum(turn.jobs for turn in run.turns) == len(world.jobs)
    for job, start, end in zip(world.jobs, run.starts, run.ends, strict=True):
        cost = costs[job.model]
        assert start >= job.arrival_s
        assert end - start == pytest.approx(
            job.prompt_tokens / cost.prefill_tokens_per_s + job.output_tokens / cost.decode_tokens_per_s
        )
    for model, cost in costs.items():
        most = cost.max_num_seqs * workers
        events = sorted(
            event
            for job, start, end in zip(world.jobs, run.starts, run.ends, strict=True)
            if job.model == model
            for event in ((start, 1), (end, -1))
        )
        running = 0
        for _, change in events:
            running += change
            assert running <= most
    if workers == 1:
        _check_one_model_at_a_time(world, run.starts, run.ends)
        assert all(turn.jobs for turn in run.turns if policy is not PolicyName.FIFO)
    again = world.run(policy, workers=workers)
    assert (again.starts, again.ends, again.turns) == (run.starts, run.ends, run.turns)


def _check_one_model_at_a_time(world: World, starts: list[float], ends: list[float]) -> None:
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for job, start, end in zip(world.jobs, starts, ends, strict=True):
        spans[job.model].append((start, end))
    in_order = sorted((start, end, model) for model, found in spans.items() for start, end in found)
    last_end, last_model = 0.0, ""
    for start, end, model in in_order:
        assert model == last_model or start >= last_end - 1e-9
        last_end, last_model = max(last_end, end) if model == last_model else end, model
