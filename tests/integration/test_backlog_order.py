"""
The order of waiting jobs against a plain reference, on random traces and a real Redis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from random import Random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import keys
from common.backlog import Place
from common.redis_client import RedisClient
from tests.integration.test_backlog import NOW, Line, message


@dataclass
class Reference:
    """The same backlog in plain Python: a dictionary, and `min`."""

    jobs: dict[str, tuple[Place, float]] = field(default_factory=dict)  # id -> place and tag
    virtual: dict[int, float] = field(default_factory=dict)
    ends: dict[tuple[int, str], float] = field(default_factory=dict)
    first: set[str] = field(default_factory=set)  # those that were let overtake the others of their class

    def key(self, job_id: str, now: float) -> tuple[Any, ...]:
        place, tag = self.jobs[job_id]
        if place.deadline_at is not None and (place.queued_at + place.deadline_at) / 2 <= now:
            level, x = 0, place.deadline_at
        else:
            overdue = place.max_wait_s is not None and place.queued_at + place.max_wait_s <= now
            level, x = 1 if overdue else 2, 0 if job_id in self.first else tag
        return level, place.priority, x, place.queued_at, job_id

    def order(self, now: float) -> list[str]:
        return sorted(self.jobs, key=lambda job_id: self.key(job_id, now))

    def put(self, job_id: str, place: Place, *, tag: float | None = None) -> None:
        if job_id in self.jobs:
            return
        if tag is None:
            who = place.priority, place.tenant
            tag = max(self.virtual.get(place.priority, 0), self.ends.get(who, 0))
            self.ends[who] = tag + max(1, (place.prompt_tokens or 0) + (place.output_tokens or 0))
        self.jobs[job_id] = place, tag

    def overtake(self, least: int, among: int, now: float) -> None:
        level, job_class, *_ = self.key(self.order(now)[0], now)
        mates = [job_id for job_id in self.order(now) if self.key(job_id, now)[:2] == (level, job_class)][:among]
        if level:
            self.first |= {job_id for job_id in mates if takes(self.jobs[job_id][0]) >= least}

    def remove(self, job_id: str) -> tuple[Place, float] | None:
        self.first.discard(job_id)
        gone = self.jobs.pop(job_id, None)
        if gone is not None and not any(place.priority == gone[0].priority for place, _ in self.jobs.values()):
            self.virtual.pop(gone[0].priority, None)
            self.ends = {who: end for who, end in self.ends.items() if who[0] != gone[0].priority}
        return gone

    def take(self, most: int, now: float) -> list[str]:
        taken = self.order(now)[:most]
        for job_id in taken:
            level, priority, x, *_ = self.key(job_id, now)
            if level:
                self.virtual[priority] = max(self.virtual.get(priority, 0), x)
            self.remove(job_id)
        return taken


def takes(place: Place) -> int:
    """Seconds that a job takes, if each token of its prompt takes two and each of its answer one."""
    return 2 * (place.prompt_tokens or 0) + (place.output_tokens or 0)


OTHER_STEPS = ["give_back", "remove", "rank", "move_away", "move_home", "overtake"]


def make_trace(random: Random) -> Iterator[tuple[Any, ...]]:
    """Few classes and tenants, many puts and short bounds, so that jobs meet."""

    def maybe(value: float) -> float | None:
        return value if random.random() < 0.5 else None

    for number in range(random.randint(20, 200)):
        job_id = f"job {random.randint(0, number)}"
        what = random.choice(["put"] * 6 + ["take"] * 3 + OTHER_STEPS)
        if what == "put":
            yield what, job_id, {
                "priority": random.choice([0, 3, 4]),
                "tenant": random.choice(["", "a", "b:c", "ß\n"]),
                "prompt_tokens": maybe(random.randint(0, 9)),
                "output_tokens": maybe(random.randint(0, 9)),
                "deadline_at": maybe(NOW + random.randint(1, 900)) if random.random() < 0.3 else None,
                "max_wait_s": maybe(random.randint(0, 90)),
            }  # fmt: skip
        elif what == "overtake":
            yield what, random.randint(0, 25), random.randint(1, 9)
        else:
            yield what, random.randint(1, 3) if what == "take" else job_id


class Both:
    """A backlog and the one beside it, in Redis and in the reference; each step is made in both and compared."""

    def __init__(self, client: RedisClient) -> None:
        self.line, self.beside = Line(client), Line(client, keys.cloud_queue("large"))
        self.reference, self.reference_beside = Reference(), Reference()
        self.sent: dict[str, dict[str, Any]] = {}  # the copy of each job that was sent first
        self.now = NOW

    def put(self, job_id: str, about: dict[str, Any]) -> None:
        fields = {**about, "queued_at": self.now}
        new = job_id not in self.reference.jobs
        if new:
            self.sent[job_id] = fields
        assert self.line.put(job_id, **fields) == new
        self.reference.put(job_id, self.place(job_id))

    def place(self, job_id: str) -> Place:
        return Place.of(message(job_id, **self.sent[job_id]), now=self.now)

    def take(self, most: int) -> None:
        assert self.line.take(most, now=self.now) == self.reference.take(most, self.now)

    def give_back(self, job_id: str) -> None:
        if job_id in self.sent:
            self.line.give_back(job_id, **self.sent[job_id])
            self.reference.put(job_id, self.place(job_id), tag=0)

    def remove(self, job_id: str) -> None:
        assert self.line.remove(job_id) == (self.reference.remove(job_id) is not None)

    def overtake(self, least: int, among: int) -> None:
        self.line.backlog.overtake(
            self.line.queue, least, prompt_token_s=2.0, output_token_s=1.0, among=among, now=self.now
        )
        if self.reference.jobs:
            self.reference.overtake(least, among, self.now)

    def rank(self, job_id: str) -> None:
        order = self.reference.order(self.now)
        assert self.line.rank(job_id, now=self.now) == (order.index(job_id) if job_id in order else None)

    def move_away(self, job_id: str) -> None:
        self._move(job_id, (self.line, self.reference), (self.beside, self.reference_beside))

    def move_home(self, job_id: str) -> None:
        self._move(job_id, (self.beside, self.reference_beside), (self.line, self.reference))

    def _move(self, job_id: str, start: tuple[Line, Reference], end: tuple[Line, Reference]) -> None:
        (line, reference), (to, to_reference) = start, end
        raw = line.backlog.find(line.queue, job_id)
        moved = raw is not None and line.backlog.move(job_id, raw, raw, queue=line.queue, to=to.queue)
        gone = reference.remove(job_id)
        assert moved == (gone is not None)
        if gone is not None:
            to_reference.put(job_id, gone[0], tag=gone[1])

    def end(self) -> None:
        for line, reference in ((self.line, self.reference), (self.beside, self.reference_beside)):
            assert read(line) == sums_of(reference.jobs)
            assert line.take(99, now=self.now) == reference.take(99, self.now)
        assert set(self.line.client.keys()) <= {keys.WAKE}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), pace=st.integers(0, 5))
def test_the_order_is_that_of_the_reference_on_every_trace(redis_client: RedisClient, seed: int, pace: int) -> None:
    """
    Level, class, share, arrival, id: whatever was put, taken, given back, cancelled, moved or let overtake before.

    The sums are those of the jobs that wait, and nothing is left behind when they are gone.
    """
    redis_client.flushall()
    both = Both(redis_client)
    for what, *about in make_trace(Random(seed)):
        getattr(both, what)(*about)
        both.now += pace
    both.end()


def read(line: Line) -> dict[str, dict[str, float]]:
    """What `READ` says of each lane."""
    [(sums, heads, _)] = line.backlog.read(line.queue)
    found: dict[str, dict[str, float]] = {}
    for name, value in zip(sums[::2], sums[1::2], strict=True):
        what, _, lane = name.partition(" ")
        if int(value):
            found.setdefault(lane, {})[what] = int(value)
    for lane, oldest, newest, deadline, max_wait in heads:
        found[lane] |= {"oldest": float(oldest), "newest": float(newest)}
        if deadline is not None:
            found[lane]["deadline"] = float(deadline)
        if max_wait is not None:
            found[lane]["max_wait"] = float(max_wait)
    return found


def sums_of(jobs: dict[str, tuple[Place, float]]) -> dict[str, dict[str, float]]:
    """The same, counted job by job."""

    def lane(job: tuple[str, Place]) -> str:
        return f"{job[1].priority}:{job[1].tenant}"

    found: dict[str, dict[str, float]] = {}
    for name, group in groupby(sorted(((job_id, place) for job_id, (place, _) in jobs.items()), key=lane), key=lane):
        together = list(group)
        places = [place for _, place in together]
        first = min(together, key=lambda job: (job[1].queued_at, job[0]))[1]
        arrivals = [place.queued_at for place in places]
        sums: dict[str, float] = {"jobs": len(places), "oldest": min(arrivals), "newest": max(arrivals)}
        for what in ("prompt_tokens", "output_tokens"):
            said = [value for place in places if (value := getattr(place, what)) is not None]
            sums |= {key: value for key, value in ((what, sum(said)), (f"{what}?", len(places) - len(said))) if value}
        if deadlines := [place.deadline_at for place in places if place.deadline_at is not None]:
            sums["deadline"] = min(deadlines)
        if first.max_wait_s is not None:
            sums["max_wait"] = first.max_wait_s
        found[name] = sums
    return found
