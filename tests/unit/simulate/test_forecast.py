"""
When a waiting job will end: the range holds for as many jobs as it says.
"""

from __future__ import annotations

import random
from statistics import mean, pstdev

import pytest

from tests.traces import KINDS, MAX_WAIT_S, MIN_TURN_S, World, make_costs, make_job, make_world
from worker.simulate.forecast import Finish, Snapshot, Traffic, forecast_finish
from worker.simulate.machine import Queue, rank
from worker.simulate.run import Run
from worker.state.backlog import Backlog


def snapshot_of(world: World, run: Run, now: float, **changes: object) -> tuple[Snapshot, dict[str, list[int]]]:
    """What a worker would see of a run at a moment, and the jobs that wait for each model, in their order."""
    waits = bytearray(len(world.jobs))
    queues = {model: Queue(world.jobs, waits, MAX_WAIT_S, by_arrival=False) for model in world.costs}
    line: dict[str, list[int]] = {model: [] for model in world.costs}
    for number, job in enumerate(world.jobs):
        if job.arrival_s <= now < run.starts[number]:
            queues[job.model].put(number)
            line[job.model].append(number)
    for numbers in line.values():
        numbers.sort(key=lambda n: rank(world.jobs[n], n, MAX_WAIT_S))
    turn = max((turn for turn in run.turns if turn.ready_s <= now), key=lambda turn: turn.ready_s, default=None)
    coming = next((turn for turn in run.turns if turn.asked_s <= now < turn.ready_s), None)
    running = [n for n in range(len(world.jobs)) if run.starts[n] <= now < run.ends[n]]
    sizes = [job.output_tokens for job in world.jobs]
    facts: dict[str, object] = {
        "now": now,
        "backlog": Backlog(by_model={model: queue.read(now) for model, queue in queues.items() if queue}),
        "costs": world.costs,
        "max_wait_s": MAX_WAIT_S,
        "min_turn_s": MIN_TURN_S,
        "spread": pstdev(sizes) / mean(sizes),
        "ready": None if coming and not running else turn and turn.model,
        "target": coming and coming.model,
        "target_in_s": coming.ready_s - now if coming and not running else None,
        "ready_since": turn.ready_s if turn else 0.0,
        "in_flight_s": tuple(run.ends[n] - now for n in running),
        "started": frozenset(turn.model for turn in run.turns if turn.ready_s <= now),
    }
    return Snapshot(**{**facts, **changes}), line  # type: ignore[arg-type]


def noisy(world: World, spread: float) -> World:
    """The same trace with jobs that take what they take: the sizes that nobody knows before."""
    dice = random.Random(1)
    sized = [
        job._replace(output_tokens=max(1, round(job.output_tokens * dice.gammavariate(1 / spread**2, spread**2))))
        for job in world.jobs
    ]
    return World(jobs=sized, costs=world.costs)


def test_four_of_five_jobs_end_within_their_range() -> None:
    """
    Asked when the last job of each trace has come; the times of jobs are scattered by half their mean, or more.

    At least 75 % end within the range of 10 to 90 %, over all traces together.
    """
    inside = asked = 0
    for kind in KINDS:
        for seed in range(2):
            world = noisy(make_world(seed, kind, count=200), 0.5)
            run = world.run()
            now = max(job.arrival_s for job in world.jobs)
            snapshot, line = snapshot_of(world, run, now)
            for model, numbers in line.items():
                for ahead in range(0, len(numbers), max(1, len(numbers) // 2)):
                    found = forecast_finish(snapshot, model, ahead=ahead)
                    assert isinstance(found, Finish)
                    asked += 1
                    inside += found.low_at <= run.ends[numbers[ahead]] <= found.high_at
    assert asked > 40
    assert inside / asked >= 0.75


def test_the_range_holds_while_jobs_keep_coming() -> None:
    """With what is known of the traffic: steady traces, asked in their middle."""
    inside = asked = 0
    for seed in range(3):
        world = noisy(make_world(seed, "steady", count=300), 0.5)
        run = world.run()
        now = world.jobs[150].arrival_s
        seconds = world.jobs[-1].arrival_s
        traffic = {
            model: Traffic(
                per_s=sum(job.model == model for job in world.jobs) / seconds, prompt_tokens=100, output_tokens=100
            )
            for model in world.costs
        }
        snapshot, line = snapshot_of(world, run, now, traffic=traffic)
        for model, numbers in line.items():
            for ahead in range(0, len(numbers), max(1, len(numbers) // 2)):
                found = forecast_finish(snapshot, model, ahead=ahead)
                assert isinstance(found, Finish)
                asked += 1
                inside += found.low_at <= run.ends[numbers[ahead]] <= found.high_at
    assert asked > 15
    assert inside / asked >= 0.75


def test_a_job_behind_another_model_waits_for_its_switch() -> None:
    """20 jobs of 1 s are served first, then 10 s of loading, then its own second."""
    jobs = [make_job(n, "a") for n in range(20)] + [make_job(20, "b")]
    world = World(jobs=jobs, costs={"a": make_costs(), "b": make_costs()})
    snapshot, _ = snapshot_of(world, world.run(), 0.0)
    found = forecast_finish(snapshot, "b", ahead=0)

    assert found is not None
    assert found.low_at < found.middle_at < found.high_at
    assert found.middle_at == pytest.approx(10 + 20 + 10 + 1, rel=0.1)
    assert found.switches == 2


def test_nobody_waits_there() -> None:
    """None, for a place in the queue that is not taken."""
    world = World(jobs=[make_job(0, "a")], costs={"a": make_costs()})
    snapshot, _ = snapshot_of(world, world.run(), 0.0)

    assert forecast_finish(snapshot, "a", ahead=1) is None
    assert forecast_finish(snapshot, "b", ahead=0) is None


def test_a_long_backlog_is_played_in_bundles() -> None:
    """100,000 jobs of 1 s: 10 s of loading, then a second for each before it."""
    jobs = [make_job(n, "a") for n in range(100_000)]
    world = World(jobs=jobs, costs={"a": make_costs()})
    waits = Queue(jobs, bytearray(len(jobs)), MAX_WAIT_S, by_arrival=False)
    for number in range(len(jobs)):
        waits.put(number)
    snapshot = Snapshot(
        now=0.0, backlog=Backlog(by_model={"a": waits.read(0.0)}), costs=world.costs,
        max_wait_s=MAX_WAIT_S, min_turn_s=MIN_TURN_S,
    )  # fmt: skip
    found = forecast_finish(snapshot, "a", ahead=49_999)

    assert found is not None
    assert found.middle_at == pytest.approx(50_010, rel=0.05)
