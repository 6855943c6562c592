"""
What does an engine's HTTP answer, or a chunk of it, mean? A completion, a body it refuses, or a failure of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from common.errors import (
    EngineDied,
    EngineFailed,
    EngineNotReady,
    InvalidRequest,
    PromptTooLong,
    ShiftworkerError,
)
from worker.engines.base import Completion

_NOT_IMPLEMENTED = 501  # llama.cpp's word for "this model was not started for that"
_BUSY = (429, 503)  # a full queue, or still loading
_TOO_LONG_TYPE = "exceed_context_size_error"  # llama.cpp
_TOO_LONG_TEXT = ("maximum context length", "maximum model length", "exceeds the available context")  # vLLM
_QUOTED_CHARS = 500  # of the engine's own words


def interpret(*, status: int, content: bytes, run_s: float) -> Completion:
    """
    Read one whole answer; *run_s* is how long it took, in seconds.

    Raises
    ------
    PromptTooLong, InvalidRequest
        400-499 and 501: the body is at fault, in the engine's own words.
    EngineNotReady
        429 and 503: the engine is loading, or its queue is full.
    EngineDied
        As `completion_of`.
    EngineFailed
        Any other status, or an answer that is no JSON object.
    """
    body = _object(content)
    if status == 200 and body is not None:  # noqa: PLR2004 - HTTP's own names are less readable
        return completion_of(body, run_s=run_s)
    raise _error(status, body, content)


def read_chunk(content: bytes) -> dict[str, Any]:
    """
    Read one chunk of a stream.

    Raises
    ------
    PromptTooLong, InvalidRequest, EngineNotReady, EngineFailed
        As `interpret`: the status was 200 before the engine knew of its error, so that the error came as a chunk.
    """
    body = _object(content)
    choices = body.get("choices") if body is not None else None
    if body is not None and isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        return body
    code = _part(body or {}, "error").get("code")
    raise _error(code if isinstance(code, int) else 200, body, content)


def completion_of(response: Mapping[str, Any], *, run_s: float) -> Completion:
    """
    Take what was measured from OpenAI's *response*.

    Raises
    ------
    EngineDied
        It is a part of an answer: vLLM gives what it has, as if it were whole, when it is told to end
        (vllm/v1/engine/core.py; finish_reason "abort").
    """
    if _aborted(response):
        raise EngineDied("The engine was ended in the middle of its answer.")
    usage = _part(response, "usage")
    timings = _part(response, "timings")  # llama.cpp adds them
    return Completion(
        response=response,
        run_s=run_s,
        prefill_s=_seconds(timings.get("prompt_ms")),
        decode_s=_seconds(timings.get("predicted_ms")),
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
    )


def quote(content: bytes) -> str:
    """Give what an answer that is no completion says, in its own words, as a short sentence."""
    said = str(_part(_object(content) or {}, "error").get("message") or content.decode(errors="replace"))
    return said[:_QUOTED_CHARS].strip().rstrip(".") + "."


def _error(status: int, body: Mapping[str, Any] | None, content: bytes) -> ShiftworkerError:
    """What an answer that is no completion says of the body or of the engine."""
    details = _part(body or {}, "error")
    said = quote(content)
    if status in _BUSY:
        return EngineNotReady(f"The engine takes no requests now (HTTP {status}): {said}")
    if details.get("type") == _TOO_LONG_TYPE or any(text in said for text in _TOO_LONG_TEXT):
        return PromptTooLong(
            f"The prompt and its answer do not fit into the model's context: {said} "
            "Shorten the prompt, lower max_tokens, or name a model with a longer context."
        )
    if 400 <= status < 500 or status == _NOT_IMPLEMENTED:  # noqa: PLR2004
        return InvalidRequest(
            f"The engine refused the body (HTTP {status}): {said} Correct the body and send it again."
        )
    return EngineFailed(f"The engine failed with HTTP {status}: {said} Its log says more.")


def _aborted(body: Mapping[str, Any]) -> bool:
    choices = body.get("choices")
    found = choices if isinstance(choices, list) else []
    return any(isinstance(choice, dict) and choice.get("finish_reason") == "abort" for choice in found)


def _object(content: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(content)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _part(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = body.get(name)
    return found if isinstance(found, dict) else {}


def _seconds(milliseconds: object) -> float | None:
    return milliseconds / 1000 if isinstance(milliseconds, int | float) else None
