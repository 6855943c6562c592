"""
The backlog on a real Redis: who is served next, what each move leaves behind, and its cost at 100,000 jobs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from common import backlog_scripts as scripts
from common import keys
from common.backlog import PLACE_HEADER, Place, RedisBacklog
from common.redis_client import RedisClient
from common.schemas import JobRequest

NOW = 1_000_000.0
QUEUE = keys.model_queue("large")

# ARGV: how many, now. What the transport's pop does, without the books that it keeps.
TAKEN = f"""{scripts.LIBRARY}
local ids = {{}}
for i, job in ipairs(take(KEYS[1], tonumber(ARGV[1]), ARGV[2])) do ids[i] = cjson.decode(job[2])['headers']['id'] end
return ids
"""

# ARGV: job id, message, its place as JSON. As a delivery comes back.
GIVE_BACK = f"{scripts.LIBRARY} return give_back(KEYS[1], ARGV[1], cjson.decode(ARGV[3]), ARGV[2])"


def message(job_id: str, *, priority: int = 3, queue: str = QUEUE, **place: Any) -> dict[str, Any]:
    """A message as kombu gives it to the transport."""
    delivery = {"exchange": "", "routing_key": queue}
    properties = {"delivery_tag": f"tag of {job_id}", "delivery_info": delivery, "priority": priority}
    return {"body": "", "headers": {"id": job_id, PLACE_HEADER: {"queued_at": NOW, **place}}, "properties": properties}


class Line:
    """One backlog as its users see it."""

    def __init__(self, client: RedisClient, queue: str = QUEUE) -> None:
        self.client, self.queue, self.backlog = client, queue, RedisBacklog(client)

    def put(self, job_id: str, **place: Any) -> bool:
        sent = message(job_id, queue=self.queue, **place)
        return bool(self.backlog.put(self.queue, sent, json.dumps(sent), now=NOW))

    def take(self, most: int = 1, *, now: float = NOW) -> list[str]:
        found: list[str] = self.client.eval(TAKEN, 1, keys.backlog(self.queue), most, now)
        return found

    def give_back(self, job_id: str, **place: Any) -> None:
        sent = message(job_id, queue=self.queue, **place)
        where = {**Place.of(sent, now=NOW).model_dump(exclude_none=True), "exchange": "", "routing_key": self.queue}
        self.client.eval(GIVE_BACK, 1, keys.backlog(self.queue), job_id, json.dumps(sent), json.dumps(where))

    def remove(self, job_id: str) -> bool:
        raw = self.backlog.find(self.queue, job_id)
        return raw is not None and self.backlog.remove(self.queue, job_id, raw)

    def rank(self, job_id: str, *, now: float = NOW) -> int | None:
        return self.backlog.rank(self.queue, job_id, now=now)

    def waiting(self) -> list[str]:
        return [job_id for job_id, _ in self.backlog.walk(self.queue)]


@pytest.fixture
def line(redis_client: RedisClient) -> Line:
    return Line(redis_client)


def test_urgent_classes_come_first_and_arrivals_in_their_order(line: Line) -> None:
    """A priority between two steps belongs to the lower one."""
    for number, (job_id, priority) in enumerate([("batch", 6), ("a", 3), ("b", 4), ("c", 3), ("urgent", 0)]):
        line.put(job_id, priority=priority, queued_at=NOW + number)
    assert [line.rank(job_id) for job_id in ("urgent", "a", "b", "c", "batch", "nobody")] == [0, 1, 2, 3, 4, None]
    assert line.take(9) == ["urgent", "a", "b", "c", "batch"]


def test_a_tenant_that_sends_much_does_not_make_the_others_wait(line: Line) -> None:
    """Shares are of tokens: one large job of a tenant counts as much as its many small ones."""
    for number in range(100):
        line.put(f"many {number:02}", tenant="many", prompt_tokens=10, queued_at=NOW + number / 1000)
    line.put("large 0", tenant="large", prompt_tokens=50, queued_at=NOW + 1)
    line.put("large 1", tenant="large", prompt_tokens=50, queued_at=NOW + 2)
    line.put("late", tenant="late", queued_at=NOW + 3)
    assert line.take(9) == ["many 00", "large 0", "late", *(f"many {n:02}" for n in range(1, 6)), "large 1"]


def test_a_tenant_that_comes_later_shares_from_then_on(line: Line) -> None:
    """What was served before it came is nobody's debt; the others keep their turns."""
    for number in range(6):
        line.put(f"a{number}", tenant="a", prompt_tokens=10, queued_at=NOW + number)
    assert line.take(3) == ["a0", "a1", "a2"]
    for number in range(3):
        line.put(f"b{number}", tenant="b", prompt_tokens=10, queued_at=NOW + 10 + number)
    assert line.take(9) == ["b0", "a3", "b1", "a4", "b2", "a5"]


def test_a_job_past_its_bound_goes_before_all_that_are_not(line: Line) -> None:
    """Among those the class counts first, then the shares; a deadline that binds comes before both."""
    line.put("late batch", priority=6, max_wait_s=60)
    line.put("fresh", priority=0, queued_at=NOW + 50, max_wait_s=60)
    line.put("late", priority=3, queued_at=NOW + 1, max_wait_s=60)
    line.put("deadline", priority=6, deadline_at=NOW + 110, max_wait_s=60)
    line.put("closer", priority=6, queued_at=NOW + 30, deadline_at=NOW + 70)
    line.put("no bound", priority=0, queued_at=NOW + 51)
    assert line.waiting() == ["fresh", "no bound", "late", "late batch", "deadline", "closer"]
    assert [line.rank(job_id, now=NOW + 56) for job_id in ("closer", "deadline")] == [0, 1]
    assert line.take(9, now=NOW + 65) == ["closer", "deadline", "late", "late batch", "fresh", "no bound"]


def test_a_job_that_comes_back_is_the_first_of_its_class(line: Line) -> None:
    """Of several the oldest; urgent classes still come before it."""
    for number in range(4):
        line.put(f"job {number}", queued_at=NOW + number, prompt_tokens=5)
    assert line.take(2) == ["job 0", "job 1"]
    line.give_back("job 1", queued_at=NOW + 1)
    line.give_back("job 0", queued_at=NOW)
    line.put("urgent", priority=0, queued_at=NOW + 9)
    assert line.take(9) == ["urgent", "job 0", "job 1", "job 2", "job 3"]


def test_a_second_copy_of_a_job_takes_the_place_of_the_first(line: Line) -> None:
    """One waits, where the first one stood, and what is delivered is the newer message."""
    line.put("job", tenant="first")
    line.put("other", queued_at=NOW + 1)
    assert not line.put("job", tenant="second", queued_at=NOW + 2)
    assert line.waiting() == ["job", "other"]
    raw = line.backlog.find(QUEUE, "job")
    assert raw is not None
    assert json.loads(raw)["headers"][PLACE_HEADER]["tenant"] == "second"


def test_a_copy_that_comes_back_leaves_the_newer_one(line: Line) -> None:
    """While one copy ran, another was sent; there is one job, and it waits once."""
    line.put("job", tenant="old")
    line.take()
    line.put("job", tenant="new")
    line.give_back("job", tenant="old")
    raw = line.backlog.find(QUEUE, "job")
    assert raw is not None
    assert json.loads(raw)["headers"][PLACE_HEADER]["tenant"] == "new"
    assert line.take(9) == ["job"]


def test_nothing_is_left_of_jobs_that_are_gone(line: Line, redis_client: RedisClient) -> None:
    """However they went, every key of the backlog goes with the last job, the tenants' shares too."""
    other = Line(redis_client, keys.cloud_queue("large"))
    for number, how in enumerate(["taken", "removed", "moved", "sent"] * 3):
        priority = keys.PRIORITY_STEPS[number % 4]
        line.put(f"{how} {number}", priority=priority, tenant=how, deadline_at=NOW, max_wait_s=5, output_tokens=number)
    for job_id, raw in line.backlog.walk(QUEUE):
        how = job_id.split()[0]
        if how == "removed":
            assert line.backlog.remove(QUEUE, job_id, raw)
        elif how == "moved":
            assert line.backlog.move(job_id, raw, raw, queue=QUEUE, to=other.queue)
        elif how == "sent":
            assert line.backlog.send(job_id, raw, raw, queue=QUEUE, to_list="router")
    assert sorted(line.take(9)) == ["taken 0", "taken 4", "taken 8"]
    assert len(other.take(9)) == 3
    assert sorted(redis_client.keys()) == ["router", keys.WAKE]


def test_a_move_that_comes_too_late_does_nothing(line: Line, redis_client: RedisClient) -> None:
    """Taken, cancelled or replaced in between: the message that was read is no longer the one that waits."""
    line.put("job")
    raw = line.backlog.find(QUEUE, "job")
    assert raw is not None
    line.put("job", tenant="new")
    cloud = keys.cloud_queue("large")
    assert not line.backlog.move("job", raw, raw, queue=QUEUE, to=cloud)
    assert not line.backlog.send("job", raw, raw, queue=QUEUE, to_list="router")
    assert not line.backlog.remove(QUEUE, "job", raw)
    assert line.waiting() == ["job"]
    assert not redis_client.exists("router")


def test_what_a_stock_producer_pushes_to_the_list_joins_the_others(line: Line, redis_client: RedisClient) -> None:
    """In the list's order and class; what is no message is set aside, and does not stop what is behind it."""
    junk = [b"\xff", b"[]", b'{"properties": {"delivery_tag": "\\ud800", "delivery_info": {}}}', b"[" * 99_999]
    for raw in junk:
        redis_client.lpush(QUEUE, raw)
    for name, priority in zip(keys.lists_of(QUEUE), keys.PRIORITY_STEPS, strict=True):
        for number in range(2):
            redis_client.lpush(name, json.dumps(message(f"{priority} {number}", priority=priority, queued_at="soon")))
    line.put("ours", priority=6, queued_at=NOW - 1)
    assert line.backlog.adopt(QUEUE, now=NOW) == len(junk) + 8
    assert line.waiting() == ["0 0", "0 1", "3 0", "3 1", "ours", "6 0", "6 1", "9 0", "9 1"]
    assert redis_client.llen(keys.MALFORMED) == len(junk)
    assert line.backlog.adopt(QUEUE, now=NOW) == 0


@pytest.mark.parametrize(
    "said",
    [None, [], "x", {"queued_at": float("nan")}, {"tenant": "x" * 101}, {"prompt_tokens": -1}, {"deadline_at": {}},
     {"tenant": "\ud800"}],
)  # fmt: skip
def test_a_header_that_makes_no_sense_is_no_place(said: Any) -> None:
    """The job then counts as queued now, by the default tenant, in the class of its message."""
    sent = {"headers": {PLACE_HEADER: said}, "properties": {"priority": 7}}
    assert Place.of(sent, now=NOW) == Place(queued_at=NOW, priority=6)


def test_the_header_carries_the_place(line: Line) -> None:
    """What the router writes is what the order reads."""
    place = Place(queued_at=NOW, priority=3, tenant="t", prompt_tokens=1, deadline_at=NOW + 1, max_wait_s=2)
    assert Place.of({"headers": place.header(), "properties": {"priority": 3}}, now=0) == place


# --- The cost, at 100,000 jobs -------------------------------------------------------------------------


def commands(client: RedisClient) -> int:
    """How many commands Redis has carried out, those inside scripts counted."""
    return sum(stats["calls"] for stats in client.info("commandstats").values())


def test_a_job_describes_its_place_and_keeps_its_time_when_it_is_routed_again() -> None:
    """Four bytes of the prompt are a token; an answer of any length, and a header that is nonsense, say nothing."""
    body = {"messages": [{"role": "user", "content": "x" * 40}], "priority": 4, "tenant": "t", "deadline": NOW + 9}
    job = JobRequest.parse(body)
    place = Place.of_job(job, now=NOW)
    assert place == Place(queued_at=NOW, priority=4, tenant="t", prompt_tokens=10, deadline_at=NOW + 9, any_model=True)
    assert Place.of_job(job.model_copy(update={"model": "small"}), now=NOW).any_model is None
    assert Place.of_job(job, now=NOW + 5, earlier=place.header()[PLACE_HEADER]).queued_at == NOW
    assert Place.of_job(job, now=NOW + 5, earlier={"queued_at": "soon"}).queued_at == NOW + 5


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": [1, 2, 3]}, {"prompt_tokens": 3}),
        ({"prompt": [[1, 2], [3]]}, {"prompt_tokens": 3}),
        ({"prompt": ["four", "five five"]}, {"prompt_tokens": 3}),
        ({"prompt": "", "max_tokens": 10**30}, {"prompt_tokens": 0, "output_tokens": 10**9}),
        ({"prompt": "", "deadline": "9999-12-31T00:00:00Z"}, {"prompt_tokens": 0, "deadline_at": 1e10 - 1}),
        ({"prompt": "", "deadline": "0001-01-01T00:00:00Z"}, {"prompt_tokens": 0, "deadline_at": 0}),
    ],
)
def test_every_job_has_a_place(fields: dict[str, Any], says: dict[str, float]) -> None:
    """Whatever its body says, it can be queued: token ids are counted, and what is beyond all measure is cut."""
    assert Place.of_job(JobRequest.parse(fields), now=NOW) == Place.model_validate(
        {"queued_at": NOW, "priority": 3, "any_model": True, **says}
    )


@pytest.fixture
def cost(redis_client: RedisClient) -> Callable[[Callable[[], object]], int]:
    """Counts the commands of a deed."""

    def of(deed: Callable[[], object]) -> int:
        redis_client.config_resetstat()
        before = commands(redis_client)
        deed()
        return commands(redis_client) - before - 1

    return of


# ARGV: from which number, how many. Jobs as the router's, put one by one, without a round trip for each.
FILL = f"""{scripts.LIBRARY}
for i = tonumber(ARGV[1]), ARGV[1] + ARGV[2] - 1 do
  put(KEYS[1], 'job ' .. i, {{
    priority = 3 * (i % 3), tenant = 'tenant ' .. i % 5, queued_at = {NOW} + i, prompt_tokens = 100, output_tokens = 50,
    deadline_at = {NOW} + 1e6, max_wait_s = 1e6, delivery_tag = 'x', exchange = '', routing_key = 'x',
  }}, 'message ' .. i)
end
"""


def test_a_reading_and_each_move_cost_the_same_at_100_000_jobs(
    line: Line, redis_client: RedisClient, cost: Any
) -> None:
    """The number of Redis commands depends on the lanes, and not on the jobs that wait in them."""

    def fill(first: int, how_many: int) -> None:
        redis_client.eval(FILL, 1, keys.backlog(QUEUE), first, how_many)

    def costs(job: int) -> dict[str, int]:
        about = {
            "tenant": "tenant 1",
            "prompt_tokens": 9,
            "output_tokens": 9,
            "deadline_at": NOW + 1e6,
            "max_wait_s": 1,
        }
        return {
            "read": cost(lambda: line.backlog.read(QUEUE)),
            "rank": cost(lambda: line.rank(f"job {job}", now=0)),
            "put": cost(lambda: line.put(f"new {job}", queued_at=NOW + 1e5, **about)),
            "overtake": cost(
                lambda: line.backlog.overtake(QUEUE, 1, prompt_token_s=1, output_token_s=0, among=8, now=0)
            ),
            "remove": cost(lambda: line.remove(f"job {job}")),
            "take": cost(lambda: redis_client.eval(f"{scripts.LIBRARY} take(KEYS[1], 8, 0)", 1, keys.backlog(QUEUE))),
        }

    fill(0, 60)
    line.backlog.overtake("another", 1, prompt_token_s=1, output_token_s=0, among=8)
    line.backlog.read("another")  # Redis knows the scripts now
    few = costs(55)
    for first in range(60, 100_000, 9_994):
        fill(first, 9_994)
    assert line.backlog.count(QUEUE) > 99_000
    assert costs(99_000) == few
    assert max(few.values()) < 200, few
    [(sums, heads, _)] = line.backlog.read(QUEUE)
    assert len(heads) == 15
    jobs = [int(value) for name, value in zip(sums[::2], sums[1::2], strict=True) if name.startswith("jobs")]
    assert sum(jobs) == line.backlog.count(QUEUE)


def test_a_prompt_without_a_token_is_taken_like_any(line: Line) -> None:
    """Its sum goes down by nothing, which Lua calls -0 and Redis no integer: the job would be lost in mid-script."""
    line.put("short", prompt_tokens=0, output_tokens=0)
    assert line.take() == ["short"]
    assert line.client.keys(f"{keys.backlog(QUEUE)}*") == []
