"""
The storm in short, and what it is judged by: a judge that sees nothing would let everything pass.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from common import keys
from common.client import JobClient
from common.redis_client import connect
from common.schemas import JobState, Ledger, Outcome
from tests.chaos.faults import EVERY_KIND, Fault, Kind, Target, draw_faults
from tests.chaos.report import (
    Kept,
    Recovery,
    count_outcomes,
    is_unlike,
    is_untold,
    is_wrong,
    judge,
    slowest_recovery,
    writes,
)
from tests.chaos.run import end_world, make_jobs, read_kept, run_storm
from tests.chaos.soak import SLACK, Sample, growth, leaks
from tests.chaos.world import LEASE_S, World
from tests.waiting import eventually
from worker.embedded_redis import EmbeddedRedis

SEED = 20261121


JOBS = make_jobs(160)


@pytest.fixture(scope="module")
def expected() -> list[str | None]:
    """The answers of a quiet run, which breaks no promise itself."""
    quiet, answers = run_storm(JOBS, ())
    assert quiet.whole, quiet
    return answers


@pytest.fixture
def running() -> Iterator[World]:
    """A system at work."""
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        world = World(Path(folder))
        try:
            world.start()
            yield world
        finally:
            world.close()


@pytest.mark.timeout(300)
def test_a_short_storm_breaks_no_promise(expected: list[str | None], tmp_path: Path) -> None:
    """Every kind of fault once among 160 jobs: each has one outcome, the answer of a quiet run, and nothing is left."""
    faults = draw_faults(SEED, len(EVERY_KIND), lease_s=LEASE_S)
    report, _ = run_storm(JOBS, faults, expected=expected, seed=SEED, keep=tmp_path / "storm")
    assert report.whole, report
    assert sum(report.faults.values()) == len(EVERY_KIND)


@pytest.mark.timeout(300)
def test_what_a_worker_says_after_a_long_pause_counts_for_nothing(running: World, expected: list[str | None]) -> None:
    """
    A worker is paused until its jobs run elsewhere; its late answers, tokens and acknowledgements change nothing.

    They are taken back within two leases, give or take a beat.
    """
    pause = Fault(target=Target.WORKER, kind=Kind.PAUSE, after_s=0, lasts_s=0)
    url = running.redis.url
    with closing(JobClient(url)) as client, closing(connect(url)) as redis:
        ids = [client.submit(body) for body in JOBS[:60]]

        def held() -> set[str]:
            owners = redis.hgetall(keys.UNACKED_OWNER)
            return {tag for tag, owner in owners.items() if owner.startswith("one.")}

        def begun() -> bool:
            return bool(held() & {redis.hget(keys.job(i), "claim") for i in ids})

        eventually(begun, within_s=30, what="its engine works on some")
        running.strike(pause)
        eventually(lambda: not held(), within_s=2 * LEASE_S + 2, what="they are taken back")
        eventually(lambda: any(client.status(i).attempts > 1 for i in ids), within_s=60, what="one runs elsewhere")
        running.mend(pause)
        left = end_world(running, ids)
        kept = read_kept(url, ids)
        report = judge(kept, expected=expected, written=count_outcomes(running.folder / "redis"), left=left)
    assert report.whole, report


def test_faults_are_drawn_alike_from_the_same_seed() -> None:
    """A run can be repeated; another seed is another run."""
    first, again, other = (draw_faults(seed, 40, lease_s=3) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("count", [len(EVERY_KIND), 36, 100])
def test_every_kind_of_fault_comes_equally_often(count: int) -> None:
    """However many are drawn, no kind is left out, and none comes twice as often as another has once more."""
    drawn = Counter((fault.target, fault.kind) for fault in draw_faults(7, count, lease_s=3))
    assert set(drawn) == set(EVERY_KIND)
    assert max(drawn.values()) - min(drawn.values()) <= 1


def test_pauses_are_longer_than_a_lease_and_shorter() -> None:
    """So that both are seen: a worker that comes back in time, and one whose jobs run elsewhere by then."""
    lasting = [fault.lasts_s for fault in draw_faults(7, 200, lease_s=3) if fault.kind is not Kind.KILL]
    assert min(lasting) < 1
    assert 2 * 3 < max(lasting) <= 3 * 3


def test_redis_writes_down_each_outcome_that_it_is_given(own_redis: EmbeddedRedis, tmp_path: Path) -> None:
    """The witness counts an outcome that is written twice, also over a kill of Redis; others once."""
    client = connect(own_redis.url)
    client.set(keys.outcome("once"), "a")
    client.set(keys.outcome("twice"), "a", ex=100)
    own_redis.kill()
    own_redis.start()
    client.eval("redis.call('SET', KEYS[1], 'a')", 1, keys.outcome("twice"))
    client.set("something else", "a")
    client.close()
    own_redis.stop()
    assert count_outcomes(tmp_path / "redis") == {"once": 1, "twice": 2}


def test_a_command_that_was_cut_off_is_left_out() -> None:
    """Redis was killed while it wrote the last one."""
    whole = b"*2\r\n$3\r\nGET\r\n$1\r\na\r\n"
    assert list(writes(whole + whole[:-4])) == [[b"GET", b"a"]]


def kept(text: str = "one", *, copy: str | None = None, stream: str = "", told: str | None = None) -> Kept:
    """A job whose second attempt answered *text*; *stream* has a letter and the attempt's number for each event."""
    kinds = {"r": "reset", "c": "chunk", "e": "end"}
    choices = [{"index": 0, "message": {"role": "assistant", "content": text}}]
    outcome = Outcome(job_id="a", state=JobState.ANSWERED, response={"choices": choices}, ledger=Ledger(attempt=2))
    other = outcome.model_copy(update={"response": {"choices": [{"message": {"content": copy}}]}})
    return Kept(
        outcome=outcome,
        celery={"status": "SUCCESS", "result": (other if copy else outcome).result()},
        attempts=1,
        ended_at=1.0,
        stream=[{"kind": kinds[event[0]], **({"attempt": event[1:]} if event[1:] else {})} for event in stream.split()]
        or None,
        told=text if told is None else told,
    )


def test_the_judge_sees_what_is_wrong() -> None:
    """Another answer than expected, another copy than the record or none, an end that nobody asked for, no call."""
    assert is_wrong(kept("one"), "two")
    assert not is_wrong(kept("one"), "one")
    assert is_unlike(kept("one", copy="two"))
    assert is_unlike(replace(kept("one"), celery=None)), "its AsyncResult would wait for ever"
    assert not is_unlike(kept("one"))

    cancelled = replace(kept("one"), outcome=Outcome(job_id="a", state=JobState.CANCELLED, ledger=Ledger()))
    assert is_unlike(cancelled)
    assert not is_unlike(replace(cancelled, celery={"status": "REVOKED"}))
    asked = replace(cancelled, may_end=frozenset(JobState), celery={"status": "REVOKED"})
    assert judge({"a": replace(asked, calls=1)}, expected=None, written={"a": 1}).whole
    assert judge({"a": replace(asked, calls=0)}, expected=None, written={"a": 1}).unheard == ["a"]
    assert list(judge({"a": cancelled}, expected=None, written={}).unanswered) == ["a"]


def test_the_judge_reads_the_streams() -> None:
    """One end, the last event; the tokens of one attempt, which are the answer."""
    assert not is_untold(kept(stream="r2 c2 e"))
    for events, told in (
        ("e", ""),
        ("r2 c2", "one"),
        ("c2 e e", "one"),
        ("e c2", "one"),
        ("r2 c1 e", "one"),
        ("r2 c2 e", "on"),
    ):
        assert is_untold(kept(stream=events, told=told)), events


def test_a_recovery_lasts_until_the_next_outcome() -> None:
    """The longest of them counts; a fault after the last outcome has none."""
    mended = [(10.0, "redis killed"), (20.0, "router paused"), (99.0, "all killed")]
    assert slowest_recovery(mended, [12.0, 21.0, 5.0]) == Recovery(seconds=2.0, fault="redis killed")
    assert slowest_recovery(mended, []) is None


def samples(sizes: list[int], descriptors: int = 5, more: int = 0) -> list[Sample]:
    """Samples of these sizes; the last third of the last half has *more* descriptors."""
    late = len(sizes) - len(sizes) // 6
    return [Sample(bytes=s, descriptors=descriptors + more * (i >= late), threads=3) for i, s in enumerate(sizes)]


def test_growth_is_that_of_the_last_half() -> None:
    """A warm-up counts for nothing; what goes on growing shows, and so does a leaked descriptor."""
    assert growth(samples([*range(100, 200), *[200] * 100])) == 0
    assert growth(samples(list(range(100, 300)))) > 0.3
    assert not leaks(samples([1] * 100))
    assert not leaks(samples([1] * 100, more=SLACK))
    assert leaks(samples([1] * 100, more=SLACK + 1))


def test_the_targets_of_the_issue_are_hit() -> None:
    """Engine, worker, router, Redis and all of them are killed; each of the first four is paused; two are cut off."""
    killed, paused, cut = ({t for t, kind in EVERY_KIND if kind is wanted} for wanted in Kind)
    assert killed == set(Target)
    assert paused == set(Target) - {Target.ALL}
    assert cut == {Target.WORKER, Target.OTHER, Target.ROUTER}
