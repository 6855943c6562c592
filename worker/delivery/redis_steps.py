"""
Takes many jobs one step further in one round trip: routed, begun, ended; each job's step is one script.

A step moves the job and its message together. It refuses what is not plain (the job has ended, somebody cancelled it,
another copy is in flight): then nothing has happened, and the task's ordinary way finds out what to do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from celery import Celery, states

from common import keys
from common.backlog import place_json
from common.backlog_scripts import LIBRARY
from common.bounds import Bounds
from common.job_ends import ALIVE_S, END, HOLD, end_args, end_keys, hold_args
from common.may_enter import Entry
from common.redis_client import RedisClient, run_for_each
from common.schemas import JobState, Outcome, utc_now

# KEYS: outcome, job's hash, unacked, unacked_index, unacked_owner, held, tenants, the backlog to put it into.
# ARGV: tag, owner, message, lifetime in seconds, now, the job's id, `hold_args`, its place, then fields of the hash.
# Returns 1 if it was moved, 0 if the job has ended or `hold` does not take it, -1 if the delivery is another's now.
_ROUTE = (
    HOLD
    + LIBRARY
    + """
if redis.call('HGET', KEYS[5], ARGV[1]) ~= ARGV[2] then return -1 end
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
if hold(KEYS[6], KEYS[7], ARGV[6], 7) then return 0 end
redis.call('HSETNX', KEYS[2], 'queued_at', ARGV[5])
redis.call('HSET', KEYS[2], unpack(ARGV, 16))
redis.call('EXPIRE', KEYS[2], ARGV[4])
put(KEYS[8], ARGV[6], cjson.decode(ARGV[15]), ARGV[3])
redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('ZREM', KEYS[4], ARGV[1])
redis.call('HDEL', KEYS[5], ARGV[1])
return 1
"""
)

# KEYS: outcome, cancel mark, job's hash, unacked, the job's stream, Celery's result.
# ARGV: tag, lifetime in seconds, the state to set, Celery's copy of it, its lifetime, owner.
# As RedisJobStore.begin, for jobs under which nothing has failed yet. Returns {attempt, queued_at}, or false. Asked
# again by the same owner, whose connection broke before the answer came, it is the same attempt.
_BEGIN = """
if redis.call('EXISTS', KEYS[1], KEYS[2]) > 0 then return false end
local found = redis.call('HMGET', KEYS[3], 'claim', 'queued_at', 'stream', 'faults', 'begun_by', 'attempts')
if found[4] then return false end
if found[1] == ARGV[1] and found[5] == ARGV[6] then return {found[6], found[2] or ''} end
if found[1] and found[1] ~= ARGV[1] and redis.call('HEXISTS', KEYS[4], found[1]) == 1 then return false end
redis.call('HSET', KEYS[3], 'claim', ARGV[1], 'state', ARGV[3], 'begun_by', ARGV[6])
redis.call('EXPIRE', KEYS[3], ARGV[2])
local attempt = redis.call('HINCRBY', KEYS[3], 'attempts', 1)
if found[3] then
  redis.call('XADD', KEYS[5], 'MAXLEN', 1, '*', 'kind', 'reset', 'attempt', attempt)
  redis.call('EXPIRE', KEYS[5], ARGV[2])
end
redis.call('SETEX', KEYS[6], ARGV[5], ARGV[4])
redis.call('PUBLISH', KEYS[6], ARGV[4])
return {attempt, found[2] or ''}
"""

# KEYS: `end_keys`; unacked, unacked_index, unacked_owner, Celery's result.
# ARGV: `end_args`; tag, owner, Celery's copy, its lifetime in seconds.
# Returns 1; or 0, and nothing has happened: it had an outcome already, or its answer must be told anew (see END).
_END = (
    END
    + """
if end_job() then return 0 end
local tag, owner, result, ttl = unpack(ARGV, 10)
redis.call('SETEX', KEYS[13], ttl, result)
redis.call('PUBLISH', KEYS[13], result)
if redis.call('HGET', KEYS[12], tag) == owner then
  redis.call('HDEL', KEYS[10], tag)
  redis.call('ZREM', KEYS[11], tag)
  redis.call('HDEL', KEYS[12], tag)
end
return 1
"""
)

_DELIVERIES = (keys.UNACKED, keys.UNACKED_INDEX, keys.UNACKED_OWNER)


@dataclass(frozen=True, kw_only=True)
class Routed:
    """A job on its way to a model's queue."""

    job_id: str
    delivery: str
    message: Mapping[str, Any]  # as kombu would publish it
    queue: str
    fields: Mapping[str, str | float]  # of the job's hash
    entry: Entry | None = None  # what it holds until it ends


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A job at the start of an attempt."""

    attempt: int
    queued_at: float | None  # Unix seconds


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A job with its outcome, and Celery's copy of it."""

    delivery: str
    outcome: Outcome
    parent_id: str | None


class RedisSteps:
    """
    The three steps, for many jobs at once. Every method may raise redis.RedisError; then each job may or may not have
    made its step, and the ordinary way finds out.
    """

    def __init__(
        self, client: RedisClient, app: Celery, *, owner: str, ttl_s: float, max_bytes: int | None = None
    ) -> None:
        self._redis = client
        self._backend = app.backend
        self._owner = owner
        self._ttl_s = int(ttl_s)
        self._alive_s = max(self._ttl_s, ALIVE_S)
        self._max_bytes = max_bytes
        options = app.conf.broker_transport_options
        self._bounds = Bounds.parse(options["max_wait_s"], options["max_waits"]) if "max_wait_s" in options else None
        self._result_ttl_s = int(self._backend.expires or ttl_s)

    def route(self, jobs: Sequence[Routed], *, now: float) -> list[int]:
        """Put each job's message into its backlog and acknowledge the one it came with: 1, 0 or -1, see _ROUTE."""
        calls = [
            (
                [
                    keys.outcome(job.job_id), keys.job(job.job_id), *_DELIVERIES, keys.HELD, keys.TENANTS,
                    keys.backlog(job.queue),
                ],
                [
                    job.delivery, self._owner, json.dumps(job.message), self._alive_s, now, job.job_id,
                    *hold_args(job.entry), place_json(job.message, now=now, bounds=self._bounds),
                    *chain.from_iterable(job.fields.items()),
                ],
            )
            for job in jobs
        ]  # fmt: skip
        wake = "XADD", keys.WAKE, "MAXLEN", 8, "*", "q", ""
        return [int(found) for found in run_for_each(self._redis, _ROUTE, calls, *wake)]

    def begin(self, jobs: Mapping[str, str], *, hostname: str) -> dict[str, Begun | None]:
        """Start an attempt of each job (id -> delivery), on *hostname* as Celery tells it; None where it must not."""
        started = {"pid": os.getpid(), "hostname": hostname}
        calls = [
            (
                [
                    keys.outcome(job_id), keys.cancel(job_id), keys.job(job_id), keys.UNACKED, keys.stream(job_id),
                    self._backend.get_key_for_task(job_id),
                ],
                [
                    delivery, self._alive_s, JobState.RUNNING.value, _meta(job_id, states.STARTED, started),
                    self._result_ttl_s, self._owner,
                ],
            )
            for job_id, delivery in jobs.items()
        ]  # fmt: skip
        found = run_for_each(self._redis, _BEGIN, calls)
        return {
            job_id: Begun(attempt=int(reply[0]), queued_at=float(reply[1]) if reply[1] else None) if reply else None
            for job_id, reply in zip(jobs, found, strict=True)
        }

    def end(self, jobs: Sequence[Ended]) -> list[bool]:
        """Store each job's outcome and acknowledge its message; False where nothing has changed, see _END."""
        done_at = utc_now().isoformat()
        calls = []
        for job in jobs:
            job_id, parent = job.outcome.job_id, {"parent_id": job.parent_id} if job.parent_id else {}
            result = _meta(job_id, states.SUCCESS, job.outcome.result(), date_done=done_at, **parent)
            names = [*end_keys(job_id), *_DELIVERIES, self._backend.get_key_for_task(job_id)]
            kept = end_args(job.outcome, ttl_s=self._ttl_s, max_bytes=self._max_bytes)
            calls.append((names, [*kept, job.delivery, self._owner, result, self._result_ttl_s]))
        return [bool(found) for found in run_for_each(self._redis, _END, calls)]


def _meta(job_id: str, status: str, result: Mapping[str, Any], **more: str) -> str:
    """What Celery's backend stores of a task (celery/backends/base.py, _get_result_meta)."""
    common: dict[str, Any] = {"traceback": None, "children": [], "date_done": None, "task_id": job_id}
    return json.dumps({"status": status, "result": result, **common, **more})
