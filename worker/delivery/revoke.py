"""
Celery's own ways to end a task that has not begun, made to last: `revoke`, and `expires`.

Celery keeps what was revoked in the memory of its workers, and of a task that has expired only its own record. Here
such a job has its outcome of record as any other: a worker that starts again does not run it, and its tenant's share is
free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import signals
from celery.worker.control import Panel

from common import keys
from common.errors import DeadlineExceeded, JobCancelled, ShiftworkerError
from common.redis_job_store import RedisJobStore
from common.waiting_jobs import RedisWaitingJobs, cancelled_waiting

End = Callable[[str, ShiftworkerError], object]  # stores that the job of this id ends with this error

_JOBS = {keys.SUBMIT_TASK, keys.GENERATE_TASK}


def remember_revokes(store: RedisJobStore, waiting: RedisWaitingJobs, end: End) -> None:
    """Have the Celery worker of this process end jobs for good that it discards."""
    in_memory = Panel.data["revoke"]

    def revoke(state: Any, task_id: str | list[str], *args: Any, **options: Any) -> Any:
        job_ids = [task_id] if isinstance(task_id, str) else list(task_id or ())
        waiting.end([cancelled_waiting(view) for view in store.views(job_ids)])
        return in_memory(state, task_id, *args, **options)

    def on_discarded(sender: Any, request: Any, *, expired: bool, **_: Any) -> None:
        if sender.name not in _JOBS:
            return
        what = DeadlineExceeded("The task's `expires` passed before a worker took it up.")
        end(request.id, what if expired else JobCancelled(f"Job {request.id} was revoked."))

    Panel.data["revoke"] = revoke
    signals.task_revoked.connect(on_discarded, weak=False)
