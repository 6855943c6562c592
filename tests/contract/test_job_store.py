"""
What every JobStore promises: one outcome, counted attempts, no copy beside a job in flight, a stream of one voice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from common import keys
from common.dead_letters import DeadLetters
from common.errors import AttemptsExhausted, JobCancelled, NotEndedYet
from common.job_ends import ALIVE_S
from common.job_store import JobStore, MemoryJobStore
from common.job_stream import read_stream
from common.redis_client import RedisClient
from common.redis_job_store import RedisJobStore
from common.schemas import DeadLetter, ErrorBody, Fault, JobState, JobView, Ledger, Outcome, Route, StreamEvent, utc_now

TTL_S = 100.0
ROUTE = Route(model="small", complexity=0.25, why="simple enough")
THREADS = 20


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One implementation, and how its deliveries come and go."""

    store: JobStore
    fly: Callable[[str], object]  # a message with this tag is being worked on
    land: Callable[[str], object]  # it is acknowledged, or given back
    stream: Callable[[str], Sequence[StreamEvent]]  # what is on the job's stream now
    dead: Callable[[str], DeadLetter | None]  # its letter in the dead-letter queue

    def heard(self, job_id: str = "1") -> list[tuple[str, Any]]:
        """The stream's events, each with the attempt, the text or the state that makes it what it is."""
        return [
            (event.kind, event.state if event.kind == "end" else (event.attempt, event.text))
            for event in self.stream(job_id)
        ]


@pytest.fixture(params=["memory", "redis"])
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each store; for Redis, kombu's own hash says what is in flight."""
    if request.param == "memory":
        tags: set[str] = set()
        memory = MemoryJobStore(tags.__contains__)
        return Kind(store=memory, fly=tags.add, land=tags.discard, stream=memory.stream, dead=memory.dead.get)
    client: RedisClient = request.getfixturevalue("redis_client")
    return Kind(
        store=RedisJobStore(client, ttl_s=TTL_S),
        fly=lambda tag: client.hset(keys.UNACKED, tag, "[]"),
        land=lambda tag: client.hdel(keys.UNACKED, tag),
        stream=lambda job_id: stream_in(client, job_id),
        dead=DeadLetters(client).find,
    )


def stream_in(client: RedisClient, job_id: str) -> list[StreamEvent]:
    found = []
    try:
        for event in read_stream(client, job_id, after="0", timeout_s=0):
            found.append(event)  # noqa: PERF402 - those before the error are kept
    except NotEndedYet:
        pass
    return found


@pytest.fixture
def store(kind: Kind) -> JobStore:
    """The store alone."""
    return kind.store


def answered(text: str = "Hi", *, job_id: str = "1", attempt: int = 2) -> Outcome:
    response = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return Outcome(
        job_id=job_id, state=JobState.ANSWERED, response=response, ledger=Ledger(model="small", attempt=attempt)
    )


CANCELLED = Outcome(job_id="1", state=JobState.CANCELLED, error=ErrorBody.of(JobCancelled("Job 1 was cancelled.")))
SET_ASIDE = Outcome(job_id="1", state=JobState.FAILED, error=ErrorBody.of(AttemptsExhausted("Five times.")))


@pytest.mark.parametrize("outcome", [answered(), CANCELLED, SET_ASIDE], ids=lambda outcome: outcome.state)
def test_an_outcome_is_kept_as_it_is(store: JobStore, outcome: Outcome) -> None:
    """Answers, errors and ledgers come back equal."""
    assert store.outcome("1") is None
    assert store.finish(outcome) == outcome
    assert store.outcome("1") == outcome
    assert store.view("1").state is outcome.state


def test_the_first_outcome_is_kept(store: JobStore) -> None:
    """Whoever comes later gets it, and stores nothing."""
    store.finish(answered("first"))

    for later in (answered("second"), CANCELLED, SET_ASIDE):
        assert store.finish(later) == answered("first")
    assert store.outcome("1") == answered("first")
    assert store.outcome("2") is None


def test_of_many_at_once_one_is_first(store: JobStore) -> None:
    """Twenty threads with twenty answers all get the same one."""
    start = threading.Barrier(THREADS, timeout=20)

    def finish(number: int) -> Outcome:
        start.wait()
        return store.finish(answered(f"answer {number}"))

    with ThreadPoolExecutor(THREADS) as pool:
        kept = list(pool.map(finish, range(THREADS)))
    assert len({outcome.answer for outcome in kept}) == 1
    assert store.outcome("1") == kept[0]


def test_a_job_is_seen_on_its_way(store: JobStore) -> None:
    """Unknown, queued, routed, running, back in its queue, running again."""
    assert store.view("1") == JobView(job_id="1", state=JobState.UNKNOWN)

    before = utc_now()
    store.note_queued("1")
    queued = store.view("1")
    assert queued.state is JobState.QUEUED
    assert queued.queued_at is not None
    assert abs((queued.queued_at - before).total_seconds()) < 5

    store.note_routed("1", ROUTE)
    routed = store.view("1")
    assert routed == JobView(
        job_id="1", state=JobState.ROUTED, model="small", complexity=0.25, why="simple enough",
        queued_at=queued.queued_at,
    )  # fmt: skip

    store.begin("1", delivery="tag")
    assert store.view("1") == routed.model_copy(update={"state": JobState.RUNNING, "attempts": 1})
    assert store.hand_back("1", attempt=1)
    assert store.view("1") == routed.model_copy(update={"attempts": 1})


def test_a_job_that_was_handed_back_may_be_begun_by_another_message(kind: Kind) -> None:
    """The router's next one, say, while the first is not acknowledged yet."""
    kind.fly("first")
    kind.fly("second")
    kind.store.begin("1", delivery="first")
    assert kind.store.hand_back("1", attempt=1)

    assert kind.store.begin("1", delivery="second") == 2
    assert kind.store.begin("1", delivery="first") is None


def test_an_attempt_that_is_not_the_newest_changes_nothing(kind: Kind) -> None:
    """
    Its process was paused, and its message, under the same tag, has begun elsewhere: it neither ends nor blames that.

    Otherwise a copy could run beside it, and a death of long ago would count against it.
    """
    kind.fly("tag")
    assert [kind.store.begin("1", delivery="tag") for _ in range(2)] == [1, 2]
    before = kind.store.view("1")

    assert kind.store.hand_back("1", attempt=1) is False
    assert kind.store.add_fault("1", fault(attempt=1)) is None
    assert kind.store.view("1") == before
    kind.fly("copy")
    assert kind.store.begin("1", delivery="copy") is None


def test_the_first_time_it_was_queued_counts(store: JobStore) -> None:
    """A second delivery to the router changes neither the moment nor the state."""
    store.note_queued("1")
    store.note_routed("1", ROUTE)
    before = store.view("1")
    store.note_queued("1")

    assert store.view("1") == before


def test_the_end_of_a_job_is_final(store: JobStore) -> None:
    """Cancelled while the router or a worker had it in hand: whatever they note afterwards, it is cancelled."""
    store.finish(CANCELLED)
    for note in (
        lambda: store.note_queued("1"),
        lambda: store.note_routed("1", ROUTE),
        lambda: store.begin("1", delivery="tag"),
        lambda: store.hand_back("1", attempt=1),
        lambda: store.finish(answered()),
    ):
        note()
        assert store.view("1").state is JobState.CANCELLED


def test_attempts_are_counted(kind: Kind) -> None:
    """The same message again is the next attempt; so is another, once the first has landed."""
    kind.fly("tag")
    assert [kind.store.begin("1", delivery="tag") for _ in range(3)] == [1, 2, 3]
    kind.land("tag")

    kind.fly("other")
    assert kind.store.begin("1", delivery="other") == 4
    assert kind.store.view("1").attempts == 4
    assert kind.store.begin("2", delivery="third") == 1


def test_a_copy_of_a_job_in_flight_is_no_attempt(kind: Kind) -> None:
    """It may be dropped: the message in flight brings the outcome."""
    kind.fly("tag")
    kind.fly("copy")
    kind.store.begin("1", delivery="tag")

    assert kind.store.begin("1", delivery="copy") is None
    assert kind.store.view("1").attempts == 1
    assert kind.store.begin("1", delivery="tag") == 2  # the claim is still the first one's


def test_a_job_that_has_ended_is_not_begun(kind: Kind) -> None:
    """Cancelled, say, while it waited for its place in an engine: the message that is in hand has nothing to do."""
    kind.fly("tag")
    kind.store.finish(CANCELLED)
    assert kind.store.begin("1", delivery="tag") is None
    assert kind.store.view("1").attempts == 0


def test_of_many_copies_at_once_one_begins(kind: Kind) -> None:
    """Twenty messages with one job, all in flight."""
    start = threading.Barrier(THREADS, timeout=20)
    for number in range(THREADS):
        kind.fly(f"tag {number}")

    def begin(number: int) -> int | None:
        start.wait()
        return kind.store.begin("1", delivery=f"tag {number}")

    with ThreadPoolExecutor(THREADS) as pool:
        begun = list(pool.map(begin, range(THREADS)))
    assert sorted(begun, key=str) == [1, *[None] * (THREADS - 1)]


def fault(attempt: int = 1, **fields: Any) -> Fault:
    common = {"at": utc_now(), "worker": "here", "kind": "EngineDied", "message": "gone\nfor good", **fields}
    return Fault(attempt=attempt, **common)


def test_faults_are_kept_by_job(store: JobStore) -> None:
    """In their order, each as it was told; other jobs have none of them."""
    for job_id in ("1", "2"):
        store.begin(job_id, delivery=job_id)
    first, second = fault(company=7), fault(kind="EngineTimeout")

    assert store.view("1").faults == ()
    assert store.add_fault("1", first) == (first,)
    assert store.add_fault("1", second) == (first, second)
    assert store.view("1").faults == (first, second)
    assert store.view("2").faults == ()


def test_who_runs_by_which_message(kind: Kind) -> None:
    """Begun by it, not handed back, not ended; with the number of the attempt."""
    for job_id in ("runs", "back", "ended"):
        kind.fly(job_id)
        kind.store.begin(job_id, delivery=job_id)
    kind.store.begin("runs", delivery="runs")
    kind.store.hand_back("back", attempt=1)
    kind.store.finish(answered(job_id="ended"))

    assert kind.store.running({}) == {}
    assert kind.store.running({name: name for name in ("runs", "back", "ended", "never begun")}) == {"runs": 2}
    assert kind.store.running({"runs": "a copy"}) == {}


def test_an_attempt_is_lost_once(kind: Kind) -> None:
    """With the process that made it; the job waits again, its faults say why, and any message may begin it."""
    kind.fly("tag")
    kind.store.begin("1", delivery="tag")
    earlier, death = fault(company=9), fault(kind="WorkerDied", company=3)
    kind.store.add_fault("1", earlier)

    assert kind.store.lose("1", death)
    assert not kind.store.lose("1", death)  # somebody else has taken back the same
    assert kind.store.view("1").faults == (earlier, death)
    assert kind.store.view("1").state is JobState.ROUTED
    assert kind.store.running({"1": "tag"}) == {}
    kind.fly("other")
    assert kind.store.begin("1", delivery="other") == 2


@pytest.mark.parametrize("since", ["another attempt", "handed back", "ended", "never begun"])
def test_what_is_not_under_way_cannot_be_lost(kind: Kind, since: str) -> None:
    """Whoever was taken for dead has come back, and was the faster one."""
    kind.fly("tag")
    if since != "never begun":
        kind.store.begin("1", delivery="tag")
    if since == "another attempt":
        kind.store.begin("1", delivery="tag")
    if since == "handed back":
        kind.store.hand_back("1", attempt=1)
    if since == "ended":
        kind.store.finish(answered())
    before = kind.store.view("1")

    assert not kind.store.lose("1", fault(kind="WorkerDied", company=3))
    assert kind.store.view("1") == before


LETTER = DeadLetter(
    job_id="1",
    at=utc_now(),
    model="small",
    error=ErrorBody.of(AttemptsExhausted("Five times.")),
    faults=(fault(company=7), fault(company=1)),
    body={"messages": [{"role": "user", "content": "ä" * 10_000}]},
)


def test_a_job_that_is_set_aside_leaves_a_letter(kind: Kind) -> None:
    """Together with its outcome, which is as final as any."""
    kind.store.begin("1", delivery="tag")
    assert kind.store.set_aside(SET_ASIDE, LETTER) == SET_ASIDE

    assert kind.dead("1") == LETTER
    assert kind.dead("2") is None
    assert kind.store.outcome("1") == SET_ASIDE
    assert kind.store.finish(answered()) == SET_ASIDE


def test_a_job_that_had_ended_is_not_set_aside(kind: Kind) -> None:
    """Another attempt has answered it meanwhile."""
    kind.store.finish(answered())
    assert kind.store.set_aside(SET_ASIDE, LETTER) == answered()
    assert kind.dead("1") is None


def says(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


def test_a_stream_has_what_the_newest_attempt_says_and_the_end(kind: Kind) -> None:
    """Each attempt begins with a reset that throws away what came before; an older one adds nothing any more."""
    kind.store.note_streams("1")
    assert kind.heard() == []

    assert kind.store.begin("1", delivery="tag") == 1
    kind.store.add_chunks({("1", 1): says("Once")})
    kind.store.add_chunks({("1", 1): says(" upon")})
    assert kind.heard() == [("reset", (1, "")), ("chunk", (1, "Once")), ("chunk", (1, " upon"))]

    assert kind.store.begin("1", delivery="tag") == 2
    kind.store.add_chunks({("1", 1): says("a zombie"), ("1", 2): says("Twice")})
    kind.store.finish(answered())
    assert kind.heard() == [("reset", (2, "")), ("chunk", (2, "Twice")), ("end", JobState.ANSWERED)]


def test_an_answer_of_an_older_attempt_is_told_whole(kind: Kind) -> None:
    """It is the outcome, for it came first; whoever follows reads it to its end, and not another one's beginning."""
    kind.store.note_streams("1")
    for _ in range(2):
        kind.store.begin("1", delivery="tag")
    kind.store.add_chunks({("1", 2): says("A newer one beg")})
    older = answered("The whole answer", attempt=1)

    assert kind.store.finish(older) == older
    kind.store.add_chunks({("1", 2): says("ins")})
    assert kind.store.finish(answered("A newer one begins")) == older

    end = ("end", JobState.ANSWERED)
    assert kind.heard() == [("reset", (1, "")), ("chunk", (1, "The whole answer")), end]


def test_a_failure_of_an_older_attempt_leaves_the_words_of_the_newest(kind: Kind) -> None:
    """There is nothing to tell in their place; the end says that there is no answer."""
    kind.store.note_streams("1")
    for _ in range(2):
        kind.store.begin("1", delivery="tag")
    kind.store.add_chunks({("1", 2): says("Once")})
    kind.store.finish(SET_ASIDE)

    assert kind.heard() == [("reset", (2, "")), ("chunk", (2, "Once")), ("end", JobState.FAILED)]


def test_positions_only_grow(kind: Kind) -> None:
    """Also over a reset, so that a reader of the attempt before it goes on behind it."""
    kind.store.note_streams("1")
    kind.store.begin("1", delivery="tag")
    kind.store.add_chunks({("1", 1): says("Once")})
    before = [event.position for event in kind.stream("1")]
    kind.store.begin("1", delivery="tag")
    kind.store.finish(answered())

    order = [tuple(map(int, found.split("-"))) for found in (*before, *(e.position for e in kind.stream("1")))]
    assert order == sorted(set(order))


def test_nothing_follows_the_end_of_a_stream(kind: Kind) -> None:
    """Neither a token, nor another attempt, nor another end."""
    kind.store.note_streams("1")
    kind.store.begin("1", delivery="tag")
    kind.store.finish(CANCELLED)
    kind.store.add_chunks({("1", 1): says("too late")})
    kind.store.finish(answered())
    kind.store.begin("1", delivery="tag")

    assert kind.heard() == [("reset", (1, "")), ("end", JobState.CANCELLED)]


def test_chunks_of_many_jobs_are_added_at_once_each_to_its_own(kind: Kind) -> None:
    """One of them is not current any more, which is nothing to the others."""
    for job_id in ("1", "2", "3"):
        kind.store.note_streams(job_id)
        kind.store.begin(job_id, delivery=job_id)
    kind.store.begin("2", delivery="2")

    kind.store.add_chunks({(job_id, 1): says(job_id) for job_id in ("1", "2", "3")})

    heard = [kind.heard(job_id)[1:] for job_id in ("1", "2", "3")]
    assert heard == [[("chunk", (1, "1"))], [], [("chunk", (1, "3"))]]


def test_a_job_that_does_not_stream_leaves_no_stream(redis_client: RedisClient) -> None:
    """It pays nothing for those that do."""
    store = RedisJobStore(redis_client, ttl_s=TTL_S)
    store.begin("1", delivery="tag")
    store.finish(answered())

    assert not redis_client.exists(keys.stream("1"))


def test_who_should_stop(store: JobStore) -> None:
    """Of those that are asked about, also jobs that nobody has seen yet; asking twice changes nothing."""
    for job_id in ("1", "1", "3"):
        store.ask_cancel(job_id)

    assert store.asked_to_cancel([]) == frozenset()
    assert store.asked_to_cancel(["1", "2"]) == {"1"}
    assert store.asked_to_cancel(iter(["3", "1"])) == {"1", "3"}


def test_everything_in_redis_is_forgotten_in_time(redis_client: RedisClient) -> None:
    """Whichever note comes first: no key without a lifetime, and each change begins it anew; the end, the last one."""
    store = RedisJobStore(redis_client, ttl_s=TTL_S)
    for note in (
        lambda: store.note_queued("1"),
        lambda: store.note_streams("1"),
        lambda: store.note_routed("1", ROUTE),
        lambda: store.begin("1", delivery="tag"),
        lambda: store.add_chunks({("1", 1): says("Once")}),
        lambda: store.begin("1", delivery="tag") and store.hand_back("1", attempt=store.view("1").attempts),
        lambda: store.begin("1", delivery="tag") and store.add_fault("1", fault(store.view("1").attempts)),
        lambda: store.begin("1", delivery="tag") and store.lose("1", fault(store.view("1").attempts)),
        lambda: store.ask_cancel("1"),
        lambda: store.finish(answered()),
    ):
        for key in redis_client.scan_iter("*"):
            redis_client.expire(key, 10)
        before = {key: redis_client.ttl(key) for key in redis_client.scan_iter("*")}
        note()
        after = {key: redis_client.ttl(key) for key in redis_client.scan_iter("*")}
        assert all(0 < ttl <= ALIVE_S for ttl in after.values())
        assert any(ttl > before.get(key, 0) for key, ttl in after.items())

        redis_client.flushall()
        note()
        assert all(0 < redis_client.ttl(key) <= ALIVE_S for key in redis_client.scan_iter("*"))


def test_a_job_is_remembered_for_as_long_as_it_lives(redis_client: RedisClient) -> None:
    """However short outcomes are kept: forgotten alive, it would run after it was cancelled. What ended is not kept."""
    store = RedisJobStore(redis_client, ttl_s=TTL_S)
    store.note_queued("1")
    store.note_streams("1")
    store.note_routed("1", ROUTE)
    store.ask_cancel("1")
    assert store.begin("1", delivery="tag") == 1
    store.add_chunks({("1", 1): says("Once")})
    assert all(redis_client.ttl(key) > TTL_S for key in redis_client.scan_iter("*"))

    store.finish(answered())
    store.note_queued("1")
    store.note_routed("1", ROUTE)
    assert all(0 < redis_client.ttl(key) <= TTL_S for key in redis_client.scan_iter("*"))


def test_two_clients_of_one_redis_share_what_they_know(redis_client: RedisClient) -> None:
    """The router writes, the worker reads."""
    router, worker = (RedisJobStore(redis_client, ttl_s=TTL_S) for _ in range(2))
    router.note_queued("1")
    router.note_routed("1", ROUTE)
    worker.finish(answered())

    assert router.outcome("1") == answered()
    assert (router.view("1").state, router.view("1").model) == (JobState.ANSWERED, "small")
