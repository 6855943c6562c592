"""
Who may leave the machine: what must hold of every job that does, and the reason of each that does not.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from common.schemas import JobRequest, Route
from worker.residency.may_leave import Cloud, Leave, may_leave

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
IMAGE = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]}
TOOLS = {**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]}
JSON = {**CHAT, "response_format": {"type": "json_object"}}
COMPLETION, EMBEDDING = {"prompt": "Hi"}, {"input": "Hi"}
NEEDS = [(CHAT, {"chat"}), (IMAGE, {"chat", "vision"}), (TOOLS, {"chat", "tools"}), (JSON, {"chat", "json"})]
NEEDS += [(COMPLETION, {"completion"}), (EMBEDDING, {"embedding"})]

CLOUD = Cloud(model="theirs", capabilities=frozenset({"chat"}))
ROUTE = Route(model="small", complexity=0.5, why="")


def ask(body: dict[str, Any], *, cloud: Cloud | None = CLOUD, stays: bool = False, others_ready: bool = False) -> Leave:
    request = JobRequest.parse({"privacy_required": False, **body})
    return may_leave(request, ROUTE.model_copy(update={"stays": stays}), cloud, others_ready=others_ready)


BODIES = [
    ({**body, **choice, **privacy, **hurry}, needs)
    for (body, needs), choice, privacy, hurry in product(
        NEEDS,
        ({}, {"model": "small"}, {"model": "an-alias"}, {"model": "AUTO"}),
        ({}, {"privacy_required": True}, {"privacy_required": False}),
        ({}, {"latency_sensitive": False}, {"latency_sensitive": False, "deadline": 1893456000}),
    )
]
CLOUDS = [
    None,
    *(
        Cloud(model="theirs", for_models=frozenset(models), capabilities=frozenset(capabilities))
        for models, capabilities in product(
            ((), ("small",), ("large",), ("small", "large")),
            (("chat",), ("chat", "completion", "tools", "vision", "json", "embedding"), ()),
        )
    ),
]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_job_leaves_if_and_only_if_everybody_has_said_so(cloud: Cloud | None) -> None:
    """The producer, the operator, and the endpoint's abilities; over every small world."""
    granted = 0
    for (body, needs), stays, others_ready in product(BODIES, (False, True), (False, True)):
        request = JobRequest.parse(body)
        leave = may_leave(request, ROUTE.model_copy(update={"stays": stays}), cloud, others_ready=others_ready)

        producer = body.get("privacy_required") is False and (
            body.get("latency_sensitive", True) or body.get("deadline") is not None
        )
        ours_to_choose = body.get("model", "auto").lower() == "auto"
        operator = cloud is not None and (
            "small" in cloud.for_models or (not cloud.for_models and ours_to_choose and not others_ready)
        )
        operator = operator and (not ours_to_choose or not others_ready)
        able = cloud is not None and needs <= cloud.capabilities - {"embedding"}
        assert leave.granted == (producer and operator and able and not stays), (body, leave)
        assert leave.reason
        granted += leave.granted
    assert (granted > 0) == (cloud is not None and bool(cloud.capabilities) and cloud.for_models != {"large"})


def test_without_a_word_of_the_producer_nothing_leaves() -> None:
    """The field's default is the safe one."""
    request = JobRequest.parse(CHAT)
    assert may_leave(request, ROUTE, CLOUD, others_ready=False) == Leave(
        granted=False, reason="the job requires privacy"
    )


@pytest.mark.parametrize(
    ("leave", "reason"),
    [
        (ask(CHAT), "theirs stands in for small, which cannot be made ready"),
        (ask(CHAT, cloud=None), "there is no cloud endpoint"),
        (ask({**CHAT, "privacy_required": True}), "the job requires privacy"),
        (ask(CHAT, stays=True), "the cloud endpoint has refused the job"),
        (
            ask(CHAT, cloud=Cloud(model="theirs", for_models=frozenset({"large"}))),
            "the cloud endpoint may not stand in for small",
        ),
        (ask({**CHAT, "model": "small"}), "the job names small"),
        (ask(CHAT, others_ready=True), "another model is ready here"),
        (ask(TOOLS), "the cloud endpoint has no tools"),
        (ask(EMBEDDING), "the cloud endpoint has no embedding"),
        (ask({**CHAT, "latency_sensitive": False}), "the job is in no hurry"),
    ],
)
def test_the_reason_names_who_decided(leave: Leave, reason: str) -> None:
    """For the ledger of those that leave; one question after the other for those that stay."""
    assert leave.reason == reason
