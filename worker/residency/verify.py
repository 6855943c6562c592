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

    prompt: Any  # its tokens, where the engine tells; a template may put the date into it
    choices: Any  # OpenAI's; vLLM puts the tokens into them
    vector: Sequence[float] = ()  # of a model that embeds


def verify(engine: Engine, placement: Placement, *, timeout_s: float) -> Said:
    """
    See that the model answers a canary prompt with at least one token; greedy, so that it can be compared.

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
        body = {
            "model": model_id,
            "messages": [{"role": "user", "content": CANARY}],
            "max_tokens": _TOKENS,
            "temperature": 0,
            "return_token_ids": True,  # vLLM's; nobody else minds
        }
        call = Call(path=BodyKind.CHAT, body=body, timeout_s=timeout_s)
    try:
        response = engine.generate(model_id, call, StopSignal()).response
    except (ShiftworkerError, JobStopped) as error:
        raise LoadFailed(f"{model_id} was loaded but its canary prompt failed: {error}") from error
    if not (found := response.get("data" if embeds else "choices")):
        raise LoadFailed(f"{model_id} was loaded but answered its canary prompt with nothing: {response!r:.200}")
    if embeds:
        return Said(prompt=CANARY, choices=None, vector=found[0]["embedding"])
    return Said(prompt=response.get("prompt_token_ids"), choices=found)


def differs(before: Said, after: Said) -> str | None:
    """Say what is different about the same model's answer to the same prompt; None = nothing, or another prompt."""
    if before.prompt != after.prompt:
        return None
    if before.choices != after.choices:
        return f"{after.choices!r:.200} instead of {before.choices!r:.200}"
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
