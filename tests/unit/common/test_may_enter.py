"""
What is refused at the door: too large a job, too many of one tenant, and more than the router keeps up with.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest

from common.errors import OverLimit, QueueFull
from common.may_enter import Held, check_body, check_intake, check_share
from common.schemas import JobRequest
from common.settings import LimitSettings


def request(**fields: Any) -> JobRequest:
    return JobRequest.parse({"messages": [{"role": "user", "content": "Hi"}], **fields})


@pytest.mark.parametrize(
    ("fields", "limits", "setting"),
    [
        ({"max_tokens": 11}, {"max_tokens": 10}, "LIMIT_MAX_TOKENS"),
        ({"max_completion_tokens": 11}, {"max_tokens": 10}, "LIMIT_MAX_TOKENS"),
        ({"max_completion_tokens": 1, "max_tokens": 11}, {"max_tokens": 10}, "LIMIT_MAX_TOKENS"),
        ({"n": 3}, {"answers": 2}, "LIMIT_ANSWERS"),
        ({"n": "3"}, {"answers": 2}, "LIMIT_ANSWERS"),  # engines take the number in a text for a number
        ({"best_of": 3}, {"answers": 2}, "LIMIT_ANSWERS"),
        ({"messages": None, "prompt": ["a", "b"], "n": 2}, {"answers": 3}, "LIMIT_ANSWERS"),
        ({"messages": [{"role": "user", "content": "x" * 11}]}, {"prompt_chars": 10}, "LIMIT_PROMPT_CHARS"),
        ({"extra": "x" * 1000}, {"body_bytes": 1000}, "LIMIT_BODY_BYTES"),
        ({"messages": [{"role": "user", "content": "ü" * 500}]}, {"body_bytes": 1000}, "LIMIT_BODY_BYTES"),
    ],
)
def test_a_job_over_a_limit_is_refused_with_the_setting(
    fields: dict[str, Any], limits: dict[str, int], setting: str
) -> None:
    """Each limit by its name, and what is allowed; the shipped limits allow each of them."""
    body = request(**fields)
    check_body(body, LimitSettings())
    with pytest.raises(OverLimit, match=setting):
        check_body(body, LimitSettings(**limits))


@pytest.mark.parametrize(
    "fields",
    [{"max_tokens": 10}, {"n": 2}, {"messages": None, "prompt": [1, 2, 3]}, {"messages": None, "prompt": ["a", "b"]}],
)
def test_a_job_at_a_limit_may_enter(fields: dict[str, Any]) -> None:
    """Token ids are one prompt, however many they are."""
    check_body(request(**fields), LimitSettings(max_tokens=10, answers=2))


def test_a_tenant_never_has_more_than_its_share() -> None:
    """Every small world: a job is let in exactly if the share with it is within both limits."""
    body = request()
    size = body.size_bytes
    for jobs, held_bytes, max_jobs, max_bytes in product(range(4), range(4), range(1, 4), range(1, 4)):
        held = Held(jobs=jobs, bytes=held_bytes * size)
        limits = LimitSettings(tenant_jobs=max_jobs, tenant_bytes=max_bytes * size)
        fits = jobs + 1 <= max_jobs and held_bytes + 1 <= max_bytes
        with nullcontext() if fits else pytest.raises(QueueFull):
            check_share(body, held, limits)


@pytest.mark.parametrize(
    ("held", "limits", "retry_after_s"),
    [
        # 10 jobs of which 10 may be: one must end, and one ends every 7 s.
        (Held(jobs=10, bytes=1, gap_s=7.0), {"tenant_jobs": 10}, 7),
        # 13 jobs, the limit was lowered to 10: 4 must end.
        (Held(jobs=13, bytes=1, gap_s=2.0), {"tenant_jobs": 10}, 8),
        # Nobody has measured it.
        (Held(jobs=10, bytes=1), {"tenant_jobs": 10}, 5),
        # Never sooner than a second, and never later than an hour.
        (Held(jobs=10, bytes=1, gap_s=0.001), {"tenant_jobs": 10}, 1),
        (Held(jobs=10, bytes=1, gap_s=9999.0), {"tenant_jobs": 10}, 3600),
        # 1,000 bytes of 10 jobs of which 1,000 may be: as many must end as have the bytes of this one.
        (Held(jobs=10, bytes=1000, gap_s=10.0), {"tenant_bytes": 1000}, None),
    ],
)
def test_the_time_to_try_again_follows_from_the_rate_at_which_jobs_end(
    held: Held, limits: dict[str, int], retry_after_s: int | None
) -> None:
    """In the error, and in its sentence."""
    body = request()
    with pytest.raises(QueueFull) as refused:
        check_share(body, held, LimitSettings(**limits))
    expected = retry_after_s or -(-body.size_bytes * 10 * 10 // 1000)
    assert refused.value.retry_after_s == expected
    assert f"try again in {expected} s" in refused.value.message


def test_what_an_empty_queue_has_no_room_for_is_not_to_be_tried_again() -> None:
    """No retry can help."""
    with pytest.raises(OverLimit, match="LIMIT_TENANT_BYTES"):
        check_share(request(), Held(), LimitSettings(tenant_bytes=10))


def test_a_router_that_does_not_keep_up_closes_the_door() -> None:
    """At the limit, and not before."""
    limits = LimitSettings(unrouted_jobs=3)
    check_intake(2, limits)
    with pytest.raises(QueueFull, match="router"):
        check_intake(3, limits)
