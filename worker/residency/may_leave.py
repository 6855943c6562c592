"""
May this job leave the machine? Pure: to the cloud endpoint, in place of a model that cannot be made ready.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.find_choices import needs_of
from common.schemas import AUTO, BodyKind, JobRequest, Route

_SERVES = {BodyKind.CHAT: "chat", BodyKind.COMPLETION: "completion"}


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """What the operator has said of the endpoint."""

    model: str  # the name there
    for_models: frozenset[str] = frozenset()  # those it may stand in for; empty = all, for jobs that name none
    capabilities: frozenset[str] = frozenset({"chat"})


@dataclass(frozen=True, kw_only=True)
class Leave:
    """The answer."""

    granted: bool
    reason: str


def may_leave(request: JobRequest, route: Route, cloud: Cloud | None, *, others_ready: bool) -> Leave:
    """
    Decide whether the job of *request*, whose model cannot be made ready here, may be answered by *cloud*.

    The questions, in order; a job stays unless every answer lets it go:

    1. Is there an endpoint?                      It is off unless the operator names one.
    2. Does the job say that privacy is not       Nothing but "privacy_required": false says so.
       required?
    3. Has the endpoint refused it already?       Asked again, it would again.
    4. May it stand in for this model?            If the operator has named some, for those.
    5. Does the job leave the choice of the       Else only a model that the operator has named: what a producer
       model to us?                               names is obeyed. Where another model is ready (*others_ready*),
                                                  it is the one to answer.
    6. Can the endpoint's model do it?            What it is not said to can do, it cannot. No embeddings: vectors of
                                                  two models cannot be compared.
    7. Is the job in a hurry?                     If it is neither sensitive to latency nor has a deadline, it waits:
                                                  waiting costs nothing.
    """
    # (1) Off.
    if cloud is None:
        return Leave(granted=False, reason="there is no cloud endpoint")

    # (2) Private.
    if request.privacy_required:
        return Leave(granted=False, reason="the job requires privacy")

    # (3) Refused.
    if route.stays:
        return Leave(granted=False, reason="the cloud endpoint has refused the job")

    # (4) Not for this model.
    if cloud.for_models and route.model not in cloud.for_models:
        return Leave(granted=False, reason=f"the cloud endpoint may not stand in for {route.model}")

    # (5) Whose choice?
    named = request.model.casefold() != AUTO
    if named and route.model not in cloud.for_models:
        return Leave(granted=False, reason=f"the job names {request.model}")
    if others_ready and not named:
        return Leave(granted=False, reason="another model is ready here")

    # (6) Able.
    needs = [_SERVES.get(request.kind, "embedding"), *needs_of(request)]
    if missing := [need for need in needs if need not in cloud.capabilities or need == "embedding"]:
        return Leave(granted=False, reason=f"the cloud endpoint has no {missing[0]}")

    # (7) In no hurry.
    if not request.latency_sensitive and request.deadline is None:
        return Leave(granted=False, reason="the job is in no hurry")
    return Leave(granted=True, reason=f"{cloud.model} stands in for {route.model}, which cannot be made ready")
