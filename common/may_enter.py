"""
May this job enter the queue? Pure: the operator's limits on one job, on a tenant, and on what nobody has looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.errors import OverLimit, QueueFull
from common.schemas import JobRequest
from common.settings import LimitSettings

_RETRY_S = 5.0  # where nobody has measured how fast jobs end
_RETRY_MIN_S, _RETRY_MAX_S = 1.0, 3600.0


@dataclass(frozen=True, kw_only=True)
class Held:
    """What the jobs of one tenant that have not ended take."""

    jobs: int = 0
    bytes: int = 0  # of their bodies, as JSON
    gap_s: float | None = None  # a moving mean of the time between the ends of two jobs; None = not measured


@dataclass(frozen=True, kw_only=True)
class Taken:
    """The job's idempotency key is another job's, which has not ended, or whose outcome is kept."""

    job_id: str  # the other's
    same_body: bool


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a job holds from its routing to its end, and what its tenant may hold at most."""

    tenant: str
    bytes: int
    webhook: str | None
    max_jobs: int
    max_bytes: int
    deadline_at: float | None = None  # Unix seconds
    key: str | None = None  # its idempotency key
    body: str = ""  # where it has one: JobRequest.digest

    @classmethod
    def of(cls, request: JobRequest, limits: LimitSettings) -> Entry:
        """Describe the job of *request*."""
        return cls(
            tenant=request.tenant,
            bytes=request.size_bytes,
            webhook=request.webhook,
            max_jobs=limits.tenant_jobs,
            max_bytes=limits.tenant_bytes,
            deadline_at=request.deadline.timestamp() if request.deadline else None,
            key=request.idempotency_key,
            body=request.digest if request.idempotency_key is not None else "",
        )


def check_body(request: JobRequest, limits: LimitSettings) -> None:
    """
    See that one job is no larger, and asks for no more, than is allowed.

    Raises
    ------
    OverLimit
        Names what is too large, the limit, and its setting.
    """
    asked = max(request.max_tokens or 0, request.max_completion_tokens or 0)
    for what, amount, limit, setting in (
        ("The body has {} bytes as JSON", request.size_bytes, limits.body_bytes, "LIMIT_BODY_BYTES"),
        ("The prompt has {} characters", len(request.text), limits.prompt_chars, "LIMIT_PROMPT_CHARS"),
        ("The job asks for {} answers (n for each prompt)", request.answers, limits.answers, "LIMIT_ANSWERS"),
        ("The job asks for {} tokens", asked, limits.max_tokens, "LIMIT_MAX_TOKENS"),
    ):
        if amount > limit:
            raise OverLimit(
                f"{what.format(f'{amount:,}')}; {limit:,} are allowed. Ask for less, or split the job; the operator's "
                f"setting is {setting}."
            )


def check_share(request: JobRequest, held: Held, limits: LimitSettings) -> None:
    """
    See that the job's tenant has room for it.

    Raises
    ------
    OverLimit
        Not even an empty queue would have room.
    QueueFull
        Not now: too many jobs or bytes of this tenant have not ended. `retry_after_s` says, by the rate at which
        they ended of late, when enough of them will have.
    """
    if request.size_bytes > limits.tenant_bytes:
        raise OverLimit(
            f"The body has {request.size_bytes:,} bytes as JSON, and all jobs of one tenant together may have "
            f"{limits.tenant_bytes:,}. Make it smaller; the operator's setting is LIMIT_TENANT_BYTES."
        )
    jobs_over = held.jobs + 1 - limits.tenant_jobs
    bytes_over = held.bytes + request.size_bytes - limits.tenant_bytes
    if jobs_over <= 0 and bytes_over <= 0:
        return
    too_many, setting = (
        (f"{held.jobs:,} jobs", "LIMIT_TENANT_JOBS")
        if jobs_over > 0
        else (f"{held.bytes:,} bytes of jobs", "LIMIT_TENANT_BYTES")
    )
    to_end = max(jobs_over, bytes_over * held.jobs / max(held.bytes, 1))
    raise _full(
        f"Tenant {request.tenant!r} has {too_many} that have not ended; {setting} allows no more.",
        _RETRY_S if held.gap_s is None else to_end * held.gap_s,
    )


def check_intake(unrouted: int, limits: LimitSettings) -> None:
    """
    See that the router keeps up: *unrouted* jobs wait for it.

    Raises
    ------
    QueueFull
        It does not.
    """
    if unrouted >= limits.unrouted_jobs:
        raise _full(
            f"{unrouted:,} jobs wait for the router; LIMIT_UNROUTED_JOBS allows no more. Is a router running? "
            "`shiftworker status` says.",
            _RETRY_S,
        )


def _full(what: str, retry_after_s: float) -> QueueFull:
    wait_s = math.ceil(min(max(retry_after_s, _RETRY_MIN_S), _RETRY_MAX_S))
    return QueueFull(f"{what} Nothing was queued; try again in {wait_s} s.", wait_s)
