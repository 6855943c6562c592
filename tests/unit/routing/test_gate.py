"""
The router's door: what is looked at before a job is routed, and what the names in it lead to.
"""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import AddressRefused, InvalidRequest, OverLimit, QueueFull
from common.job_store import MemoryJobStore
from common.schemas import JobRequest, JobState, Route
from common.settings import EgressSettings, LimitSettings
from worker.routing.gate import Gate

ROUTE = Route(model="small", complexity=0.5, why="simple enough")
NAMES = {"public.example": ["93.184.216.34"], "inside.example": ["10.0.0.1"], "both.example": ["8.8.8.8", "::1"]}


def gate(*, webhooks: bool = True, limits: dict[str, int] | None = None, **egress: Any) -> Gate:
    return Gate(
        limits=LimitSettings(**(limits or {})),
        egress=EgressSettings(**egress),
        webhooks=webhooks,
        find=lambda host, _port: NAMES.get(host, [host] if host[0].isdigit() else []),
    )


def request(*urls: str, **fields: Any) -> JobRequest:
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return JobRequest.parse({"messages": [{"role": "user", "content": content or "Hi"}], **fields})


@pytest.mark.parametrize("url", ["https://public.example/x.png", "data:image/png;base64,xx", "http://8.8.8.8/"])
def test_public_media_may_come(url: str) -> None:
    """Or the content itself; from any name if the operator says so."""
    gate(media_domains=("*",)).check(request(url))


def test_a_name_that_nobody_has_named_may_be_another_host_tomorrow() -> None:
    """The engine looks at it again, later. An address stays what it is."""
    with pytest.raises(AddressRefused, match="EGRESS_MEDIA_DOMAINS"):
        gate().check(request("https://public.example/x.png"))
    gate().check(request("http://8.8.8.8/", "data:image/png;base64,xx"))


@pytest.mark.parametrize(
    "url",
    [
        "http://inside.example/", "http://both.example/", "http://10.0.0.1/", "http://127.0.0.1:6379/",
        "http://169.254.169.254/latest/meta-data/", "http://nowhere.example/", "file:///etc/passwd", "ftp://8.8.8.8/",
    ],
)  # fmt: skip
@pytest.mark.parametrize("position", [0, 1])
def test_media_from_inside_is_refused(url: str, position: int) -> None:
    """Also behind one that is good."""
    urls = ["https://public.example/x.png"]
    urls.insert(position, url)
    with pytest.raises(AddressRefused):
        gate(media_domains=("*",)).check(request(*urls))


def test_the_operator_allows_what_is_inside() -> None:
    """By host or network."""
    for allowed in (("inside.example",), ("10.0.0.0/8",)):
        gate(allow=allowed, media_domains=("*",)).check(request("http://inside.example/"))


def test_where_media_may_come_from_can_be_named() -> None:
    """Then nothing else will do, public or not."""
    named = gate(media_domains=("Public.example",))
    named.check(request("https://public.example/x.png"))
    with pytest.raises(AddressRefused, match="EGRESS_MEDIA_DOMAINS"):
        named.check(request("http://8.8.8.8/"))


def test_a_job_has_only_so_many_urls() -> None:
    """Each takes a look at the name servers."""
    with pytest.raises(AddressRefused, match="more than 100"):
        gate().check(request(*["https://8.8.8.8/"] * 101))


def test_a_webhook_needs_a_secret_and_a_public_address() -> None:
    """One whose name has no address yet may get one until it is called."""
    with pytest.raises(InvalidRequest, match="WEBHOOK_SECRET"):
        gate(webhooks=False).check(request(webhook="https://public.example/"))
    for inside in ("http://inside.example/", "http://127.0.0.1/", "file:///x"):
        with pytest.raises(AddressRefused):
            gate().check(request(webhook=inside))
    for good in ("https://public.example/", "https://later.example/"):
        gate().check(request(webhook=good))


def test_a_job_without_urls_asks_nobody() -> None:
    """So it can be looked at together with many others."""
    assert gate().plain(request())
    assert gate().plain(request("data:image/png;base64,xx"))
    assert not gate().plain(request("https://public.example/"))
    assert not gate().plain(request(webhook="https://public.example/"))


@pytest.mark.parametrize(
    ("body", "webhook"),
    [
        ({"webhook": "https://a.example/x"}, "https://a.example/x"),
        ({"webhook": "https://a.example/x", "messages": 5}, "https://a.example/x"),
        ({"webhook": "https://a.example/" + "x" * 2000}, None),
        ({"webhook": "http://\ud800/"}, None),
        ({"webhook": 5}, None),
        ({}, None),
        ("text", None),
    ],
)
def test_the_webhook_of_a_body_that_cannot_be_read_is_told_all_the_same(body: object, webhook: str | None) -> None:
    """If it is one; and nobody's while webhooks are off."""
    assert gate().webhook_of(body) == webhook
    assert gate(webhooks=False).webhook_of(body) is None


def test_a_tenant_over_its_share_is_refused_and_nothing_is_noted() -> None:
    """With the time to try again; what does not fit at all, without."""
    store, small = MemoryJobStore(), gate(limits={"tenant_jobs": 1})
    small.enter(store, "1", request(), ROUTE)
    with pytest.raises(QueueFull) as refused:
        small.enter(store, "2", request(), ROUTE)
    assert refused.value.retry_after_s
    assert store.view("2").state is JobState.UNKNOWN
    with pytest.raises(OverLimit):
        gate(limits={"tenant_bytes": 1}).enter(store, "3", request(), ROUTE)
