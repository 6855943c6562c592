"""
One way to log: events with a name and fields, one line per thing that happened.

`logger.info("residency.switched", model_id=..., seconds=...)`; around a task `job_id` is bound once with
`structlog.contextvars.bound_contextvars` and appears in every line.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

import structlog

_SHARED: list[structlog.typing.Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


def get_logger(name: str) -> Any:
    """The logger of one module; its lines go through the standard library, beside Celery's."""
    return structlog.stdlib.get_logger(name)


def configure(level: str = "INFO", style: Literal["auto", "console", "json"] = "auto") -> None:
    """Send every log line of this process, ours and the libraries', to stderr in one form."""
    if style == "auto":
        style = "console" if sys.stderr.isatty() else "json"
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if style == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[*_SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_SHARED,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # Celery's lines about each task repeat its result, and a traceback for each message that is given back: answers
    # are no business of a log, and ours say what happened.
    for repeating in ("celery.app.trace", "celery.worker.strategy"):
        logging.getLogger(repeating).setLevel(logging.ERROR)
    for chatty in ("httpx", "httpcore", "asyncio", "amqp", "filelock", "urllib3"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))
