"""
The order of simulated jobs is that of the real backlog, and what is read of them is their sums.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from common.backlog import Place
from tests.integration.test_backlog_order import Reference
from tests.traces import World, make_costs, make_job
from worker.simulate.queue import Queue

BOUND_S = 60.0

drawn_jobs = st.lists(
    st.tuples(
        st.integers(0, 40),  # seconds since the job before it came
        st.sampled_from((0, 3, 9)),
        st.sampled_from("xyz"),
        st.integers(1, 9),
        st.one_of(st.none(), st.integers(1, 200)),  # seconds from the end of the trace to its deadline
        st.integers(0, 2),  # jobs that are taken when it has come
        st.sampled_from((None, 20.0, 90.0)),  # its own bound
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(drawn_jobs)
def test_jobs_are_served_in_the_order_of_the_real_backlog(
    drawn: list[tuple[int, int, str, int, int | None, int, float | None]],
) -> None:
    """
    The reference is the one that the backlog in Redis is held to: levels, classes, fair shares, arrival.

    No deadline passes: such jobs have left the real backlog.
    """
    ends = sum(gap for gap, *_ in drawn) + BOUND_S / 2
    jobs, at = [], 0.0
    for number, (gap, priority, tenant, size, deadline, _, own_s) in enumerate(drawn):
        at += gap
        due = None if deadline is None else ends + deadline
        changes = {"priority": priority, "tenant": tenant, "deadline_s": due, "max_wait_s": own_s}
        jobs.append(make_job(number, "a", at, size=size, **changes))
    queue, reference = Queue(jobs, bytearray(len(jobs)), BOUND_S, by_arrival=False), Reference()

    def take(most: int, now: float) -> None:
        most = min(most, len(queue))
        assert [queue.take(now) for _ in range(most)] == [int(job_id) for job_id in reference.take(most, now)]

    for number, job in enumerate(jobs):
        queue.put(number)
        place = Place(
            queued_at=job.arrival_s, priority=job.priority, tenant=job.tenant, prompt_tokens=job.prompt_tokens,
            output_tokens=job.output_tokens, deadline_at=job.deadline_s, max_wait_s=job.max_wait_s or BOUND_S,
        )  # fmt: skip
        reference.put(f"{number:03}", place)
        take(drawn[number][5], job.arrival_s)
    take(len(queue), at + BOUND_S / 2)


def test_a_deadline_that_has_passed_presses_nobody() -> None:
    """It binds from half of its time on, and until then it is over; a real worker ends such a job."""
    for now, first in ((10.0, 0), (30.0, 1), (45.0, 0)):
        jobs = [make_job(0, "a", 0.0), make_job(1, "a", 1.0, deadline_s=40.0)]
        queue = Queue(jobs, bytearray(2), BOUND_S, by_arrival=False)
        queue.put(0)
        queue.put(1)
        assert [queue.take(now), queue.take(now)] == [first, 1 - first]


def test_a_tenant_with_many_jobs_does_not_hold_up_another() -> None:
    """Ninety jobs of one tenant, then ten of another, all at once: these are served in turn with the first ones."""
    jobs = [make_job(n, "a", tenant="many" if n < 90 else "few") for n in range(100)]
    run = World(jobs=jobs, costs={"a": make_costs()}).run()

    assert sorted(range(100), key=run.starts.__getitem__)[:6] == [0, 90, 1, 91, 2, 92]


def test_the_reading_sums_up_each_class() -> None:
    """Jobs, tokens, first and last arrival, the first deadline that has not passed; what has been taken is out."""
    jobs = [
        make_job(0, "a", 1.0),
        make_job(1, "a", 2.0, tenant="x", deadline_s=50.0),
        make_job(2, "a", 3.0, size=2, deadline_s=90.0),
        make_job(3, "a", 4.0, priority=9),
    ]
    queue = Queue(jobs, bytearray(4), BOUND_S, by_arrival=False)
    for number in range(4):
        queue.put(number)

    usual, batch = queue.read(4.0).lanes
    assert (usual.count, usual.prompt_tokens, usual.oldest_at, usual.newest_at) == (3, 400, 1.0, 3.0)
    assert (usual.deadline_at, batch.priority, batch.count, batch.deadline_at) == (50.0, 9, 1, None)
    assert queue.take(4.0) == 0
    assert queue.read(55.0).lanes[0].deadline_at == 90.0
    assert queue.read(55.0).oldest_at == 2.0


def test_jobs_with_another_bound_are_read_as_another_lane() -> None:
    """Their class and its shares stay one."""
    jobs = [make_job(0, "a", 1.0), make_job(1, "a", 2.0, max_wait_s=9.0), make_job(2, "a", 3.0)]
    queue = Queue(jobs, bytearray(3), BOUND_S, by_arrival=False)
    for number in range(3):
        queue.put(number)

    assert [(lane.count, lane.max_wait_s, lane.oldest_at) for lane in queue.read(3.0).lanes] == [
        (2, None, 1.0),
        (1, 9.0, 2.0),
    ]
    assert [queue.take(11.0) for _ in range(3)] == [1, 0, 2]


@settings(max_examples=300, deadline=None)
@given(drawn_jobs, st.integers(1, 10))
def test_the_longest_job_that_is_level_with_the_first_overtakes(
    drawn: list[tuple[int, int, str, int, int | None, int, float | None]], long_s: int
) -> None:
    """If it is long enough, and the first one has no deadline that binds; as the backlog in Redis would let it."""
    jobs, places = [], {}
    for number, (_, priority, tenant, size, deadline, _, _) in enumerate(drawn):
        due = None if deadline is None else 2.0 * len(drawn) + deadline  # when all are taken, it has not passed
        jobs.append(make_job(number, "a", 0.0, size=size, priority=priority, tenant=tenant, deadline_s=due))
    queue, reference = Queue(jobs, bytearray(len(jobs)), BOUND_S, by_arrival=False, costs=make_costs()), Reference()
    for number, job in enumerate(jobs):
        queue.put(number)
        places[number] = Place(
            queued_at=0.0, priority=job.priority, tenant=job.tenant, prompt_tokens=job.prompt_tokens,
            output_tokens=job.output_tokens, deadline_at=job.deadline_s, max_wait_s=BOUND_S,
        )  # fmt: skip
        reference.put(f"{number:03}", places[number])
    for step in range(len(jobs)):
        now = 2.0 * step
        order = [int(job_id) for job_id in reference.order(now)]
        binds, job_class = (reference.key(f"{order[0]:03}", now)[n] for n in (0, 1))
        mates = [n for n in order if reference.key(f"{n:03}", now)[:2] == (binds, job_class)]
        most_s = max(jobs[n].prompt_tokens for n in mates) / 100
        taken = queue.take(now, long_s=long_s)
        if binds and most_s >= long_s:
            assert jobs[taken].prompt_tokens == 100 * most_s
            assert taken in mates
            reference.remove(f"{taken:03}")
        else:
            assert [f"{taken:03}"] == reference.take(1, now)
