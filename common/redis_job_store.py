"""
The JobStore in Redis: a hash, an outcome, a stream and a cancel mark per job, each with a lifetime.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from common import keys
from common.dead_letters import SET_ASIDE, set_aside_args, set_aside_keys
from common.job_ends import ALIVE_S, END, HOLD, end_args, end_keys, hold_args, read_refusal
from common.may_enter import Entry, Held, Taken
from common.outcome_text import read_outcome
from common.redis_client import RedisClient
from common.retell import retell
from common.schemas import DeadLetter, Fault, JobState, JobView, Outcome, Route, utc_now

# A stream that is longer loses its first events; the writers add 20 in a second, so that is a run of 16 minutes.
STREAM_LENGTH = 20_000

# KEYS: the job's hash. ARGV: lifetime in seconds. One that has ended keeps what it has left.
_LIVE = "if redis.call('HEXISTS', KEYS[1], 'end') == 0 then redis.call('EXPIRE', KEYS[1], ARGV[1]) end"

# KEYS: the job's hash, unacked, the job's stream, its outcome. ARGV: this delivery's tag, lifetime in seconds, the
# state to set. Returns the attempt's number, or 0 if the job has ended, or another delivery of it is in flight.
# A reset throws away what earlier attempts said.
_BEGIN = """
local claim = redis.call('HGET', KEYS[1], 'claim')
if claim and claim ~= ARGV[1] and redis.call('HEXISTS', KEYS[2], claim) == 1 then return 0 end
if redis.call('EXISTS', KEYS[4]) == 1 then return 0 end
redis.call('HSET', KEYS[1], 'claim', ARGV[1], 'state', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[2])
local attempt = redis.call('HINCRBY', KEYS[1], 'attempts', 1)
if redis.call('HEXISTS', KEYS[1], 'stream') == 1 then
  redis.call('XADD', KEYS[3], 'MAXLEN', 1, '*', 'kind', 'reset', 'attempt', attempt)
  redis.call('EXPIRE', KEYS[3], ARGV[2])
end
return attempt
"""

# KEYS: the job's hash, its stream. ARGV: the attempt that speaks, its chunk as JSON, lifetime in seconds, length.
_ADD_CHUNK = """
if redis.call('HGET', KEYS[1], 'attempts') ~= ARGV[1] or redis.call('HEXISTS', KEYS[1], 'end') == 1 then return end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[4], '*', 'kind', 'chunk', 'attempt', ARGV[1], 'chunk', ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[3])
"""

# KEYS: the job's hash. ARGV: the attempt, lifetime in seconds, the state to set. Returns 1 if it was the newest.
_HAND_BACK = """
if redis.call('HGET', KEYS[1], 'attempts') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'state', ARGV[3])
redis.call('HDEL', KEYS[1], 'claim')
if redis.call('HEXISTS', KEYS[1], 'end') == 0 then redis.call('EXPIRE', KEYS[1], ARGV[2]) end
return 1
"""

# KEYS: the job's hash. ARGV: the attempt, lifetime in seconds, the fault as JSON. Returns all of the job's faults, a
# line for each, or nothing if the attempt is not the newest.
_ADD_FAULT = """
if redis.call('HGET', KEYS[1], 'attempts') ~= ARGV[1] then return end
local faults = redis.call('HGET', KEYS[1], 'faults')
faults = (faults and faults .. '\\n' or '') .. ARGV[3]
redis.call('HSET', KEYS[1], 'faults', faults)
if redis.call('HEXISTS', KEYS[1], 'end') == 0 then redis.call('EXPIRE', KEYS[1], ARGV[2]) end
return faults
"""

# KEYS: the job's hash. ARGV: the attempt, lifetime in seconds, the fault as JSON, the state to set. Returns 1 if the
# attempt was the newest, and still under way.
_LOSE = """
local found = redis.call('HMGET', KEYS[1], 'attempts', 'claim', 'end', 'faults')
if found[1] ~= ARGV[1] or not found[2] or found[3] then return 0 end
redis.call('HDEL', KEYS[1], 'claim')
redis.call('HSET', KEYS[1], 'state', ARGV[4], 'faults', (found[4] and found[4] .. '\\n' or '') .. ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[2])
return 1
"""

_FINISH = END + "return end_job()"

# KEYS: the job's hash, its outcome; held, tenants. ARGV: lifetime in seconds, the state to set, model, complexity, why,
# the job's id, then `hold_args`.
# Returns nothing, or why it was not noted: see `hold`.
_NOTE_ROUTED = (
    HOLD
    + """
if redis.call('EXISTS', KEYS[2]) == 0 then
  local refused = hold(KEYS[3], KEYS[4], ARGV[6], 7)
  if refused then return refused end
end
redis.call('HSET', KEYS[1], 'state', ARGV[2], 'model', ARGV[3], 'complexity', ARGV[4], 'why', ARGV[5])
if redis.call('HEXISTS', KEYS[1], 'end') == 0 then redis.call('EXPIRE', KEYS[1], ARGV[1]) end
"""
)


class RedisJobStore:
    """
    What Redis remembers of jobs; forgotten *ttl_s* seconds after their end, or ALIVE_S after the last change.

    Whoever stores an outcome drops the oldest answers beyond *max_bytes*; None = drops none.
    """

    def __init__(self, client: RedisClient, *, ttl_s: float, max_bytes: int | None = None) -> None:
        self._redis = client
        self._ttl_s = int(ttl_s)
        self._alive_s = max(self._ttl_s, ALIVE_S)
        self._max_bytes = max_bytes
        self._live = client.register_script(_LIVE)
        self._note_routed = client.register_script(_NOTE_ROUTED)
        self._begin = client.register_script(_BEGIN)
        self._add_chunk = client.register_script(_ADD_CHUNK)
        self._hand_back = client.register_script(_HAND_BACK)
        self._lose = client.register_script(_LOSE)
        self._add_fault = client.register_script(_ADD_FAULT)
        self._finish = client.register_script(_FINISH)
        self._set_aside = client.register_script(SET_ASIDE)

    def note_queued(self, job_id: str) -> None:
        """See JobStore."""
        key = keys.job(job_id)
        with self._redis.pipeline() as pipe:
            pipe.hsetnx(key, "queued_at", utc_now().timestamp())
            pipe.hsetnx(key, "state", JobState.QUEUED)
            self._live(keys=[key], args=[self._alive_s], client=pipe)
            pipe.execute()

    def note_deadline(self, job_id: str, deadline: datetime) -> None:
        """See JobStore."""
        self._redis.zadd(keys.DEADLINES, {job_id: deadline.timestamp()}, nx=True)

    def note_streams(self, job_id: str) -> None:
        """See JobStore."""
        self._change(job_id, stream="1")

    def note_routed(self, job_id: str, route: Route, entry: Entry | None = None) -> Held | Taken | None:
        """See JobStore."""
        refused = self._note_routed(
            keys=[keys.job(job_id), keys.outcome(job_id), keys.HELD, keys.TENANTS],
            args=[self._alive_s, JobState.ROUTED, route.model, route.complexity, route.why, job_id, *hold_args(entry)],
        )
        return None if refused is None else read_refusal(refused)

    def begin(self, job_id: str, *, delivery: str) -> int | None:
        """See JobStore."""
        found = self._begin(
            keys=[keys.job(job_id), keys.UNACKED, keys.stream(job_id), keys.outcome(job_id)],
            args=[delivery, self._alive_s, JobState.RUNNING],
        )
        return int(found) or None

    def add_chunks(self, chunks: Mapping[tuple[str, int], Mapping[str, Any]]) -> None:
        """See JobStore."""
        with self._redis.pipeline(transaction=False) as pipe:
            for (job_id, attempt), chunk in chunks.items():
                self._add_chunk(
                    keys=[keys.job(job_id), keys.stream(job_id)],
                    args=[attempt, json.dumps(chunk, separators=(",", ":")), self._alive_s, STREAM_LENGTH],
                    client=pipe,
                )
            pipe.execute()

    def hand_back(self, job_id: str, *, attempt: int) -> bool:
        """See JobStore."""
        return bool(self._hand_back(keys=[keys.job(job_id)], args=[attempt, self._alive_s, JobState.ROUTED]))

    def running(self, deliveries: Mapping[str, str]) -> dict[str, int]:
        """See JobStore."""
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in deliveries:
                pipe.hmget(keys.job(job_id), "claim", "end", "attempts")
            found = pipe.execute()
        return {
            job_id: int(attempts)
            for (job_id, tag), (claim, end, attempts) in zip(deliveries.items(), found, strict=True)
            if claim == tag and end is None
        }

    def lose(self, job_id: str, fault: Fault) -> bool:
        """See JobStore."""
        args = [fault.attempt, self._alive_s, fault.model_dump_json(exclude_none=True), JobState.ROUTED]
        return bool(self._lose(keys=[keys.job(job_id)], args=args))

    def add_fault(self, job_id: str, fault: Fault) -> tuple[Fault, ...] | None:
        """See JobStore."""
        args = [fault.attempt, self._alive_s, fault.model_dump_json(exclude_none=True)]
        found = self._add_fault(keys=[keys.job(job_id)], args=args)
        return None if found is None else _faults(found)

    def finish(self, outcome: Outcome, *, webhook: str | None = None) -> Outcome:
        """See JobStore."""

        def end(whole: str = "") -> str | None:
            args = end_args(outcome, ttl_s=self._ttl_s, max_bytes=self._max_bytes, webhook=webhook, whole=whole)
            stored: str | None = self._finish(keys=end_keys(outcome.job_id), args=args)
            return stored

        stored = end()
        if stored == "":
            stored = end(json.dumps(retell(outcome.response or {})))
        return outcome if stored is None else read_outcome(stored)

    def set_aside(self, outcome: Outcome, letter: DeadLetter) -> Outcome:
        """See JobStore."""
        args = end_args(outcome, ttl_s=self._ttl_s, max_bytes=self._max_bytes)
        stored = self._set_aside(
            keys=[*end_keys(outcome.job_id), *set_aside_keys()], args=[*args, *set_aside_args(letter)]
        )
        return outcome if stored is None else read_outcome(stored)

    def outcome(self, job_id: str) -> Outcome | None:
        """See JobStore."""
        stored = self._redis.get(keys.outcome(job_id))
        return None if stored is None else read_outcome(stored)

    def view(self, job_id: str) -> JobView:
        """See JobStore."""
        return _view(job_id, self._redis.hgetall(keys.job(job_id)))

    def views(self, job_ids: Sequence[str]) -> list[JobView]:
        """What `view` says of each, in one round trip."""
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hgetall(keys.job(job_id))
            return [_view(job_id, found) for job_id, found in zip(job_ids, pipe.execute(), strict=True)]

    def ask_cancel(self, job_id: str) -> None:
        """See JobStore."""
        self._redis.set(keys.cancel(job_id), "1", ex=self._alive_s)

    def asked_to_cancel(self, job_ids: Iterable[str]) -> frozenset[str]:
        """See JobStore."""
        ids = list(job_ids)
        marks = self._redis.mget([keys.cancel(job_id) for job_id in ids]) if ids else []
        return frozenset(job_id for job_id, mark in zip(ids, marks, strict=True) if mark)

    def _change(self, job_id: str, **fields: str | float) -> None:
        with self._redis.pipeline() as pipe:
            pipe.hset(keys.job(job_id), mapping=fields)
            self._live(keys=[keys.job(job_id)], args=[self._alive_s], client=pipe)
            pipe.execute()


def _faults(lines: str) -> tuple[Fault, ...]:
    return tuple(Fault.model_validate_json(line) for line in lines.splitlines())


def _view(job_id: str, found: Mapping[str, str]) -> JobView:
    queued_at = found.get("queued_at")
    return JobView(
        job_id=job_id,
        state=JobState(found.get("end") or found.get("state", JobState.UNKNOWN)),
        model=found.get("model"),
        complexity=float(found["complexity"]) if "complexity" in found else None,
        why=found.get("why"),
        queued_at=datetime.fromtimestamp(float(queued_at), UTC) if queued_at else None,
        attempts=int(found.get("attempts", 0)),
        webhook=found.get("webhook"),
        faults=_faults(found.get("faults", "")),
    )
