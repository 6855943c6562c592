"""
Celery's consumer, which no message can end: one that cannot be read ends its job as failed, and the next one comes.

Celery logs such a message and acknowledges it, so that its producer waits for ever; and some (a number for an id, a
list for an argument) raise in its loop, which ends the process: the next one gets the same message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import redis
from celery.worker.consumer import Consumer
from kombu.exceptions import OperationalError

from common.errors import InvalidRequest
from common.logs import get_logger
from worker.delivery.readable import check_message, job_id_of

logger = get_logger(__name__)

Refuse = Callable[[str, InvalidRequest], object]  # ends the job of this id with this error

_REDIS_AWAY = (redis.RedisError, OperationalError, OSError)  # Celery connects again, and the message comes again


class SafeConsumer(Consumer):
    """Takes up what can be read, and refuses the rest."""

    refuse: Refuse

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """Give what is called with each message that comes."""
        handle = super().create_task_handler(*args, **kwargs)

        def on_task_received(message: Any) -> None:
            try:
                check_message(
                    message.headers,
                    message.body,
                    content_type=message.content_type,
                    encoding=message.content_encoding,
                )
                handle(message)
            except InvalidRequest as error:
                self._refuse(message, error)
            except _REDIS_AWAY:
                raise
            except Exception as error:
                logger.exception("delivery.unreadable")
                self._refuse(message, InvalidRequest(f"The message cannot be taken up: {type(error).__name__}."))

        return on_task_received

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Refuse it: kombu could not decode it."""
        self._refuse(message, InvalidRequest(f"The message cannot be read: {exc}."))

    def on_invalid_task(self, _body: Any, message: Any, exc: Exception) -> None:
        """Refuse it: Celery could not make a request of it."""
        self._refuse(message, InvalidRequest(f"The message cannot be read: {exc}."))

    def on_unknown_message(self, _body: Any, message: Any) -> None:
        """Refuse it: it names no task."""
        self._refuse(message, InvalidRequest("The message is none of a Celery task."))

    def on_unknown_task(self, _body: Any, message: Any, _exc: Exception) -> None:
        """Refuse it: nobody here has its task."""
        self._refuse(message, InvalidRequest(f"There is no task {message.headers['task']!r:.100} here."))

    def _refuse(self, message: Any, error: InvalidRequest) -> None:
        job_id = job_id_of(message.headers)
        logger.warning("delivery.refused", job_id=job_id, problem=error.message)
        if job_id is not None:
            self.refuse(job_id, error)
        message.ack()


def consumer_with(refuse: Refuse) -> type[Consumer]:
    """Build the class for Celery; *refuse* stores the outcome of a job whose message cannot be read."""
    return type("Consumer", (SafeConsumer,), {"refuse": staticmethod(refuse)})
