"""
Ends jobs that no engine works on: the outcome, Celery's copy of it, and the end of their waiting are one step in Redis.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass

from celery import states
from celery.exceptions import TaskRevokedError

from common import keys
from common.backlog_scripts import LIBRARY
from common.errors import JobCancelled
from common.job_ends import END, end_args, end_keys
from common.redis_client import RedisClient
from common.schemas import ErrorBody, JobState, JobView, Outcome, utc_now

# KEYS: `end_keys`; unacked, Celery's result, the backlog where the message waits.
# ARGV: `end_args`; "1" if a job in an engine ends too, Celery's copy, the message ("" = it stays, or nobody has it).
# Returns 1 if the job has ended now, 0 if it had before, or runs.
_END = (
    END
    + LIBRARY
    + """
local running_too, copy, message = unpack(ARGV, 10)
local now = redis.call('HMGET', KEYS[2], 'state', 'claim')
local runs = now[1] == 'running' and now[2] and redis.call('HEXISTS', KEYS[10], now[2]) == 1
if runs and running_too ~= '1' then return 0 end
redis.call('ZREM', DEADLINES, ARGV[1])
if end_job() then return 0 end
redis.call('SETEX', KEYS[11], ARGV[4], copy)
redis.call('PUBLISH', KEYS[11], copy)
if message ~= '' and redis.call('HGET', KEYS[12] .. ':messages', ARGV[1]) == message then drop(KEYS[12], ARGV[1]) end
return 1
"""
)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a job ends that was seen as *view* a moment ago."""

    view: JobView
    outcome: Outcome
    running_too: bool = False


def cancelled_waiting(view: JobView) -> Ending:
    """How a job ends that somebody has cancelled."""
    error = JobCancelled(f"Job {view.job_id} was cancelled.")
    ledger = view.ledger.model_copy(update={"finished_at": utc_now()})
    outcome = Outcome(job_id=view.job_id, state=JobState.CANCELLED, error=ErrorBody.of(error), ledger=ledger)
    return Ending(view=view, outcome=outcome)


class RedisWaitingJobs:
    """The jobs that wait, wherever they do; forgotten *ttl_s* seconds after their end."""

    def __init__(self, client: RedisClient, *, ttl_s: float, max_bytes: int | None = None) -> None:
        self._redis = client
        self._ttl_s = int(ttl_s)
        self._max_bytes = max_bytes
        self._end = client.register_script(_END)

    def end(self, endings: Sequence[Ending]) -> list[bool]:
        """
        End each job unless it has ended or an engine works on it; says which have ended now.

        A message whose end Celery must tell others of stays until its turn comes, and then only does that.
        """
        messages = self._messages([ending.view for ending in endings])
        with self._redis.pipeline(transaction=False) as pipe:
            for ending, (backlog, message) in zip(endings, messages, strict=True):
                job_id = ending.view.job_id
                self._end(
                    keys=[*end_keys(job_id), keys.UNACKED, f"{keys.CELERY_RESULT_PREFIX}{job_id}", backlog],
                    args=[
                        *end_args(ending.outcome, ttl_s=self._ttl_s, max_bytes=self._max_bytes),
                        int(ending.running_too), _celerys_copy(ending.outcome), message,
                    ],
                    client=pipe,
                )  # fmt: skip
            return [bool(found) for found in pipe.execute()]

    def _messages(self, views: Sequence[JobView]) -> list[tuple[str, str]]:
        """Where each job's message waits, and the message as far as it may go without its turn."""
        places = [
            (queue, view.job_id)
            for view in views
            for queue in (keys.model_queue(view.model or ""), keys.cloud_queue(view.model or ""))
        ]
        with self._redis.pipeline(transaction=False) as pipe:
            for queue, job_id in places:
                pipe.hget(keys.backlog_messages(queue), job_id)
            found = pipe.execute()
        in_model, in_cloud = places[::2], places[1::2]
        return [
            (keys.backlog(cloud if there else model), _may_go(here or there))
            for (model, _), (cloud, _), here, there in zip(in_model, in_cloud, found[::2], found[1::2], strict=True)
        ]


def _may_go(message: str | None) -> str:
    """
    Give the message, unless Celery must tell others of its task's end than who waits: a chord, a chain.

    One that cannot be read stays too: whoever gets it says what is wrong with it.
    """
    if message is None:
        return ""
    try:
        found = json.loads(message)
        _args, _kwargs, embed = json.loads(base64.b64decode(found["body"]))
        told = found["headers"].get("group") or any((embed or {}).get(name) for name in ("chord", "chain", "errbacks"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        told = True
    return "" if told else message


def _celerys_copy(outcome: Outcome) -> str:
    """What Celery's backend stores of a task that has failed or was revoked (celery/backends/base.py)."""
    assert outcome.error is not None  # noqa: S101 - whoever waits has no answer
    error: Exception = outcome.error.as_exception()
    revoked = outcome.state is JobState.CANCELLED
    if revoked:
        error = TaskRevokedError(outcome.error.message)
    result = {
        "exc_type": type(error).__name__,
        "exc_message": list(error.args),
        "exc_module": type(error).__module__,
    }
    return json.dumps({
        "status": states.REVOKED if revoked else states.FAILURE,
        "result": result, "traceback": None, "children": [], "date_done": None, "task_id": outcome.job_id,
    })  # fmt: skip
