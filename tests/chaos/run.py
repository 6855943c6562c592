"""
Runs the storm: jobs are sent while faults come and go, then everything is waited for, stopped and counted.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import shutil
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from common import keys
from common.client import JobClient
from common.redis_client import RedisClient, connect
from tests.chaos.ear import Ear
from tests.chaos.faults import Fault
from tests.chaos.feeder import Feeder, Order
from tests.chaos.report import Kept, Report, count_outcomes, judge, slowest_recovery
from tests.chaos.wishes import PLAIN, Wish, wish_of
from tests.chaos.world import LEASE_S, MODELS, World, texts
from tests.waiting import eventually

QUIET_S = 60.0  # after the last fault, every job must have ended within this
STRIKE_S = 30.0  # something to hit must be there again within this
SETTLE_S = 4 * LEASE_S  # for what is taken back, acknowledged and copied after the last outcome
CALLED_S = 40.0  # for webhooks: whoever takes one up holds it for 32 s here, and may be killed or cut off meanwhile


def make_jobs(count: int) -> list[dict[str, object]]:
    """*count* bodies, no two alike: by turns for each model, one in four streams, some more urgent than others."""
    return [
        {
            "model": MODELS[number % len(MODELS)],
            "messages": [{"role": "user", "content": f"Job {number}"}],
            "priority": (0, 3, 6, 9)[number // 7 % 4],
            "stream": number % 4 == 0,
        }
        for number in range(count)
    ]


def run_storm(
    jobs: Sequence[Mapping[str, object]],
    faults: Sequence[Fault],
    *,
    expected: Sequence[str | None] | None = None,
    seed: int = 0,
    keep: Path | None = None,
) -> tuple[Report, list[str | None]]:
    """
    Send *jobs* while *faults* happen; gives what came of it, and the text of each answer.

    Parameters
    ----------
    expected
        The answers of a quiet run with these jobs, or more; None = this is one, where all are to be answered. In a
        storm some jobs are cancelled, some have a deadline (wishes.py).
    seed
        Of the choice among several engines; shown in the report.
    keep
        Where to move the logs and Redis's files if a promise was broken.
    """
    # A short path: sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        world = World(folder, seed=seed)
        whole = False
        try:
            world.start()
            report, answers = _storm(world, jobs, faults, expected, seed)
            whole = report.whole
        finally:
            world.close()
            if keep is not None and not whole:
                shutil.move(folder, keep)
        return report, answers


def _storm(
    world: World,
    jobs: Sequence[Mapping[str, object]],
    faults: Sequence[Fault],
    expected: Sequence[str | None] | None,
    seed: int,
) -> tuple[Report, list[str | None]]:
    wishes = {str(uuid.uuid4()): PLAIN if expected is None else wish_of(number) for number in range(len(jobs))}
    ids = list(wishes)
    orders = {i: Order(body=body, wish=wish) for (i, wish), body in zip(wishes.items(), jobs, strict=True)}
    began = time.time()
    with contextlib.closing(Ear()) as ear:
        feeder = Feeder(world.redis.url, orders, over_s=sum(f.after_s for f in faults), hears=ear.url)
        feeder.start()
        mended = _let_happen(world, faults)
        feeder.join(QUIET_S)
        assert not feeder.is_alive(), "the producer does not get rid of its jobs"
        left = end_world(world, ids)
    kept = read_kept(world.redis.url, wishes, calls=ear.calls)
    ended = {job_id: job.ended_at for job_id, job in kept.items() if job.ended_at is not None}
    report = judge(
        kept,
        expected=expected,
        written=count_outcomes(world.folder / "redis"),
        seed=seed,
        faults=Counter(str(fault) for fault in faults),
        took_s=max(ended.values(), default=began) - began,
        left=left,
        taken_back=_taken_back(world.folder),
        slowest_recovery=slowest_recovery(mended, ended.values()),
        slowest_job_s=max((at - feeder.sent_at[job_id] for job_id, at in ended.items()), default=0.0),
    )
    return report, [None if job.outcome is None else job.outcome.answer for job in kept.values()]


def end_world(world: World, ids: Sequence[str]) -> list[str]:
    """Wait until each of *ids* has ended, stop the programs, and give what should be gone and is not."""
    with contextlib.closing(connect(world.redis.url)) as client:
        outcomes = [keys.outcome(job_id) for job_id in ids]
        with contextlib.suppress(AssertionError):  # what did not end is counted as lost
            eventually(lambda: client.exists(*outcomes) == len(ids), within_s=QUIET_S)
            eventually(lambda: not _unsettled(client), within_s=SETTLE_S)
            eventually(lambda: not client.exists(keys.WEBHOOKS), within_s=CALLED_S)
        left = [*(f"{name} has ended" for name in world.fallen()), *_unsettled(client)]
        left += ["webhooks that are owed"] * client.exists(keys.WEBHOOKS)
    world.stop()
    return [*left, *world.left()]


def _let_happen(world: World, faults: Sequence[Fault]) -> list[tuple[float, str]]:
    """Strike with each fault in turn and mend what is over; gives when each was."""
    over: list[tuple[float, int, Fault]] = []  # by when they end
    mended: list[tuple[float, str]] = []

    def mend_until(moment: float) -> None:
        while over and over[0][0] <= moment:
            at, _, fault = heapq.heappop(over)
            time.sleep(max(0.0, at - time.time()))
            world.mend(fault)
            world.note(f"{fault} is over")
            mended.append((time.time(), str(fault)))

    for number, fault in enumerate(faults):
        strikes_at = time.time() + fault.after_s
        mend_until(strikes_at)
        time.sleep(max(0.0, strikes_at - time.time()))
        while any(before.target is fault.target for _, _, before in over):
            mend_until(over[0][0])
        give_up_at = time.time() + STRIKE_S
        while not world.strike(fault):
            assert time.time() < give_up_at, f"no {fault.target} for {STRIKE_S:g} s"
            mend_until(time.time())
            time.sleep(0.05)
        world.note(str(fault))
        heapq.heappush(over, (time.time() + fault.lasts_s, number, fault))
    mend_until(float("inf"))
    return mended


def _unsettled(client: RedisClient) -> list[str]:
    """What is still in flight, waits, or is held by a job that has ended."""
    lists = [*keys.lists_of(keys.SUBMIT_QUEUE), *(n for m in MODELS for n in keys.lists_of(keys.model_queue(m)))]
    found = {
        "deliveries in flight": client.hlen(keys.UNACKED),
        "messages in queues": sum(client.llen(name) for name in lists),
        "messages in backlogs": sum(client.hlen(keys.backlog_messages(keys.model_queue(m))) for m in MODELS),
        "shares of tenants": client.hlen(keys.HELD),
        "malformed messages": client.llen(keys.MALFORMED),
    }
    return [f"{count} {what}" for what, count in found.items() if count]


def read_kept(
    url: str, jobs: Iterable[str] | Mapping[str, Wish], *, calls: Mapping[str, int] | None = None
) -> dict[str, Kept]:
    """What Redis has of each of *jobs*, with what was wanted of it, and how often its webhook was called."""
    wishes = jobs if isinstance(jobs, Mapping) else dict.fromkeys(jobs, PLAIN)
    with contextlib.closing(JobClient(url)) as client, contextlib.closing(connect(url)) as server:
        return {i: _read(client, server, i, wish, (calls or {}).get(i, 0)) for i, wish in wishes.items()}


def _read(client: JobClient, server: RedisClient, job_id: str, wish: Wish, calls: int) -> Kept:
    outcome = client.result(job_id)
    copy = server.get(f"{keys.CELERY_RESULT_PREFIX}{job_id}")
    stream = [fields for _, fields in server.xrange(keys.stream(job_id))] or None
    told = ""
    if stream and outcome is not None:
        for event in client.stream(job_id, timeout=1):
            told = "" if event.kind == "reset" else told + (event.text or "")
    finished_at = None if outcome is None else outcome.ledger.finished_at
    return Kept(
        outcome=outcome,
        celery=None if copy is None else json.loads(copy),
        attempts=client.status(job_id).attempts,
        ended_at=None if finished_at is None else finished_at.timestamp(),
        stream=stream,
        told=told,
        may_end=wish.may_end,
        calls=calls if wish.webhook else None,
    )


def _taken_back(folder: Path) -> int:
    """How many deliveries came back from the dead, by what the programs have logged."""
    found = (line for line in texts(folder.glob("*.log")) if '"event": "delivery.taken_back"' in line)
    return sum(json.loads(line)["deliveries"] for line in found)
