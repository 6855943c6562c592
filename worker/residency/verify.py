"""
Does a model that was loaded answer, and one that woke up as before?
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any

from common.errors import LoadFailed, ShiftworkerError
from common.schemas import BodyKind
from worker.engines.base import Call, Engine, JobStopped, StopSignal
from worker.selection.placement import Placement

CANARY = "Say OK."
_TOKENS = 16
_SAME_COSINE = 0.999


@dataclass(frozen=True, kw_only=True)
class Said:
    """The canary's answer."""

    prompt: Sequence[int] | None  # the tokens that were asked; None where the engine does not tell
    answer: Any = None  # its tokens, where the engine tells; else OpenAI's choices
    vector: Sequence[float] = ()  # of a model that embeds


def verify(engine: Engine, placement: Placement, *, timeout_s: float, before: Said | None = None) -> Said:
    """
    See that the model answers a canary prompt with at least one token; greedy, so that it can be compared.

    What is to be compared with *before* is asked with the very tokens of that time: a chat template may put the date
    into them, and what a model answers on another day says nothing.

    Raises
    ------
    LoadFailed
        It does not; the message says what came instead.
    """
    model_id = placement.model_id
    embeds = "embedding" in placement.spec.capabilities and "chat" not in placement.spec.capabilities
    asked = None if before is None else before.prompt
    body: dict[str, Any]
    greedy = {"max_tokens": _TOKENS, "temperature": 0, "return_token_ids": True}  # vLLM's; nobody else minds
    if embeds:
        path, body = BodyKind.EMBEDDING, {"input": CANARY}
    elif asked:
        path, body = BodyKind.COMPLETION, {"prompt": asked, **greedy}
    else:
        path, body = BodyKind.CHAT, {"messages": [{"role": "user", "content": CANARY}], **greedy}
    call = Call(path=path, body={"model": model_id, **body}, timeout_s=timeout_s)
    try:
        response = engine.generate(model_id, call, StopSignal()).response
    except (ShiftworkerError, JobStopped) as error:
        raise LoadFailed(f"{model_id} was loaded but its canary prompt failed: {error}") from error
    if not (found := response.get("data" if embeds else "choices")):
        raise LoadFailed(f"{model_id} was loaded but answered its canary prompt with nothing: {response!r:.200}")
    if embeds:
        return Said(prompt=None, vector=found[0]["embedding"])
    return Said(prompt=asked or response.get("prompt_token_ids"), answer=found[0].get("token_ids") or found)


def differs(before: Said, after: Said) -> str | None:
    """Say what is different about the same model's answer to the same prompt; None = nothing."""
    if before.answer != after.answer:
        return f"{after.answer!r:.200} instead of {before.answer!r:.200}"
    cosine = _cosine(before.vector, after.vector)
    return None if cosine is None or cosine >= _SAME_COSINE else f"its vector has turned, cosine {cosine:.3f}"


def _cosine(before: Sequence[float], after: Sequence[float]) -> float | None:
    """Of the angle between two vectors; None without vectors."""
    if not before and not after:
        return None
    if len(before) != len(after):
        return 0.0
    length = math.hypot(*before) * math.hypot(*after)
    return sum(map(mul, before, after)) / length if length else 0.0
