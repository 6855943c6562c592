"""
Every Redis key, queue and task name, and what lies under each: the map of our Redis.

Celery's and kombu's own keys stand at the end, because the transport and the lease share them.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Final
from urllib.parse import quote

_PREFIX: Final = "shiftworker:"  # of every key that is ours alone
_BACKLOG: Final = f"{_PREFIX}backlog:"

# --- Tasks: the names a producer or an operator sends by -----------------------------------------------

SUBMIT_TASK: Final = "shiftworker.submit"
GENERATE_TASK: Final = "shiftworker.generate"
SWITCH_TASK: Final = "shiftworker.switch"

# --- Queues: lists of Celery, but for those that have a backlog ------------------------------------------

SUBMIT_QUEUE: Final = "shiftworker"  # where producers put jobs; the router reads it
MODEL_QUEUE_PREFIX: Final = "model."
CLOUD_QUEUE_PREFIX: Final = "cloud."


def model_queue(model_id: str) -> str:
    """The queue of one model's routed jobs; consumed only while that model is ready."""
    return f"{MODEL_QUEUE_PREFIX}{model_id}"


def cloud_queue(model_id: str) -> str:
    """The queue of jobs of one model that the cloud endpoint answers; consumed while the model cannot be loaded."""
    return f"{CLOUD_QUEUE_PREFIX}{model_id}"


def control_queue(worker: str) -> str:
    """The queue of one worker's switch tasks."""
    return f"control.{worker}"


# kombu keeps one list per step: the queue's own name for the first, a suffix for the others. A job's priority is
# rounded down to a step.
PRIORITY_STEPS: Final = (0, 3, 6, 9)
_PRIORITY_SEPARATOR: Final = "\x06\x16"


def lists_of(queue: str) -> tuple[str, ...]:
    """The Redis lists that make up *queue*, first served first."""
    return tuple(f"{queue}{_PRIORITY_SEPARATOR}{step}" if step else queue for step in PRIORITY_STEPS)


def list_of(queue: str, priority: int) -> str:
    """The Redis list where *queue* keeps its messages of *priority*."""
    return lists_of(queue)[bisect_right(PRIORITY_STEPS, priority) - 1]


def queue_of(name: str) -> str:
    """The queue that the Redis list or the backlog *name* is a part of."""
    return name.removeprefix(_BACKLOG).partition(_PRIORITY_SEPARATOR)[0]


def has_backlog(queue: str) -> bool:
    """Do the messages of *queue* wait in a backlog, and not in lists?"""
    return queue.startswith((MODEL_QUEUE_PREFIX, CLOUD_QUEUE_PREFIX))


def backlog(queue: str) -> str:
    """Prefix of what makes up the backlog of *queue*; common/backlog_scripts.py says what lies under each name."""
    return f"{_BACKLOG}{queue}"


def backlog_order(queue: str) -> str:
    """Sorted set: the jobs that wait in *queue*, in the order in which they are served."""
    return f"{backlog(queue)}:order"


def backlog_messages(queue: str) -> str:
    """Hash: job id -> its message."""
    return f"{backlog(queue)}:messages"


# --- Jobs ----------------------------------------------------------------------------------------------


def job(job_id: str) -> str:
    """
    Hash: state, end (set with the outcome), dead (set if it was set aside), model, complexity, why, queued_at,
    attempts, claim (a tag), begun_by (the owner whose lane began it last), faults (each a Fault as JSON, on
    a line of its own), stream (set if the job streams), webhook (how the call stands: due, delivered, or why it was
    given up).
    """
    return f"{_PREFIX}job:{job_id}"


def outcome(job_id: str) -> str:
    """String: the result of record, an Outcome as outcome_text.py writes it. Written once, kept until it expires."""
    return f"{_PREFIX}outcome:{job_id}"


def stream(job_id: str) -> str:
    """
    Capped stream of a job that streams: what the current attempt has said so far, and the job's end.

    Fields: kind; attempt (of reset and chunk); chunk (OpenAI's, as JSON); state (of the end).
    """
    return f"{_PREFIX}stream:{job_id}"


def cancel(job_id: str) -> str:
    """String: "1" when somebody asked for the job to be cancelled; expires with the job."""
    return f"{_PREFIX}cancel:{job_id}"


def same_key(tenant: str, idempotency_key: str) -> str:
    """Hash: job (the one that has this key of this tenant), body (a digest of it); kept as long as its outcome."""
    return f"{_PREFIX}key:{quote(tenant, safe='')}:{idempotency_key}"


def twins(job_id: str) -> str:
    """List: the messages of other jobs with the same key, until this one ends; then the router gets them back."""
    return f"{_PREFIX}twins:{job_id}"


HELD: Final = f"{_PREFIX}held"  # hash: a routed job that has not ended -> its may_enter.Entry as JSON
DEADLINES: Final = f"{_PREFIX}deadlines"  # sorted set: a job that has not ended -> its deadline, Unix seconds
TENANTS: Final = f"{_PREFIX}tenants"  # hash: "jobs T", "bytes T", "ended T", "gap T" of each tenant T in `held`
KEPT: Final = f"{_PREFIX}kept"  # sorted set: "<bytes> <state> <job id>" of each outcome, by the time of its end
KEPT_BYTES: Final = f"{_PREFIX}kept-bytes"  # integer: the sum of those bytes
DEAD: Final = f"{_PREFIX}dead"  # sorted set: id of each job that was set aside, by when
DEAD_LETTERS: Final = f"{_PREFIX}dead-letters"  # hash: job id -> DeadLetter as JSON, packed as outcomes are
WEBHOOKS: Final = f"{_PREFIX}webhooks"  # sorted set: job id of each webhook that is owed, by when the next call is due
WEBHOOK_CALLS: Final = f"{_PREFIX}webhook-calls"  # hash: job id -> url, calls (how many), since, as JSON

# --- Workers and hardware ------------------------------------------------------------------------------

FLEET: Final = f"{_PREFIX}fleet"  # hash: worker -> Offer as JSON; the last known, also of a worker now away


# hash: one way to load a model, as JSON -> the last Measurement of it, predicted beside measured, as JSON
MEASURED: Final = f"{_PREFIX}measured"


def status(worker: str) -> str:
    """String with a lifetime: the HardwareStatus of one worker as JSON. Gone = the worker is gone."""
    return f"{_PREFIX}status:{worker}"


PACES: Final = f"{_PREFIX}paces"  # hash: [worker, model] as JSON -> what its jobs take there, a ModelPace as JSON
TURNS: Final = f"{_PREFIX}turns"  # hash: worker -> models it serves or loads, as JSON; "#" -> how often it changed
FORECASTS: Final = f"{_PREFIX}forecasts"  # hash: model -> when its waiting jobs will end, a Forecast as JSON

STATUS_CHANNEL: Final = f"{_PREFIX}status"  # pub/sub: every HardwareStatus as it is published
STATUS_STREAM: Final = f"{_PREFIX}status-log"  # capped stream, field "status": the same, to look back


def switch_epoch(worker: str) -> str:
    """Integer: the number of the newest switch asked of a worker; older switch tasks do nothing."""
    return f"{_PREFIX}epoch:{worker}"


def switch_log(worker: str) -> str:
    """Capped list: the worker's last switches, each a SwitchRecord as JSON, newest first."""
    return f"{_PREFIX}switches:{worker}"


def switch_times(worker: str) -> str:
    """Hash: [from, to, level] as JSON -> what such a switch takes on this worker, a SwitchTime as JSON."""
    return f"{_PREFIX}switch-times:{worker}"


def sleep_notes(worker: str) -> str:
    """Hash: [model, level] as JSON -> how it sleeps there on this worker, or why it does no more; a SleepNote."""
    return f"{_PREFIX}sleep-notes:{worker}"


# --- Delivery: shared by the transport and the lease ---------------------------------------------------


def lease(owner: str) -> str:
    """String with a lifetime: one process says "I live". *owner* names one start of one process."""
    return f"{_PREFIX}lease:{owner}"


def death(owner: str) -> str:
    """Integer: how many jobs a process ran when it died; 0 = it had been told to leave, which is nobody's fault."""
    return f"{_PREFIX}death:{owner}"


CELERY_RESULT_PREFIX: Final = "celery-task-meta-"  # Celery's copy of each outcome, behind it the job's id
UNACKED: Final = "unacked"  # kombu's hash: delivery tag -> [message, exchange, routing key]
UNACKED_INDEX: Final = "unacked_index"  # kombu's sorted set: delivery tag -> time of delivery or renewal
UNACKED_OWNER: Final = "unacked_owner"  # ours, hash: delivery tag -> owner
WAKE: Final = f"{_PREFIX}wake"  # ours, tiny capped stream: a push happened somewhere, look again
MALFORMED: Final = f"{_PREFIX}malformed"  # ours, list: queue entries that are no messages at all
