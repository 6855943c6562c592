"""
Does a model that was loaded answer?
"""

from __future__ import annotations

from common.errors import LoadFailed, ShiftworkerError
from common.schemas import BodyKind
from worker.engines.base import Call, Engine, JobStopped, StopSignal
from worker.selection.placement import Placement

CANARY = "Say OK."


def verify(engine: Engine, placement: Placement, *, timeout_s: float) -> None:
    """
    See that the model answers a canary prompt with at least one token.

    Raises
    ------
    LoadFailed
        It does not; the message says what came instead.
    """
    model_id = placement.model_id
    embeds = "embedding" in placement.spec.capabilities and "chat" not in placement.spec.capabilities
    if embeds:
        call = Call(path=BodyKind.EMBEDDING, body={"model": model_id, "input": CANARY}, timeout_s=timeout_s)
    else:
        messages = [{"role": "user", "content": CANARY}]
        body = {"model": model_id, "messages": messages, "max_tokens": 4, "temperature": 0}
        call = Call(path=BodyKind.CHAT, body=body, timeout_s=timeout_s)
    try:
        response = engine.generate(model_id, call, StopSignal()).response
    except (ShiftworkerError, JobStopped) as error:
        raise LoadFailed(f"{model_id} was loaded but its canary prompt failed: {error}") from error
    if not response.get("data" if embeds else "choices"):
        raise LoadFailed(f"{model_id} was loaded but answered its canary prompt with nothing: {response!r:.200}")
