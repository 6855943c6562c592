"""
Celery's Redis result backend without the subscription that every sent task leaves behind.
"""

from __future__ import annotations

from typing import Any

from celery.backends.redis import RedisBackend

from common.redis_client import patience_is_over


class ResultBackend(RedisBackend):
    """
    Keeps Celery's copy of the outcomes.

    Stock Celery subscribes to a task's channel when the task is sent. A router that sends every job on would
    collect subscriptions for ever, and a send with Redis away would block for 19 s (celery 5.7.0). Whoever
    waits for a result subscribes then, and looks at what is stored first.
    """

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Do nothing when a task is sent."""

    def exception_safe_to_retry(self, exc: Exception) -> bool:
        """Try again, but not in a process that leaves: `result_backend_always_retry` has no end."""
        return not patience_is_over() and bool(super().exception_safe_to_retry(exc))
