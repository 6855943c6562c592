"""
Answers the bodies that need no web framework around them, with the very handlers that vLLM's routes call.

Routing, dependencies, error handlers and the watch for a client that hangs up cost half of what vLLM's server does for
a short answer. The plain case (a valid body, an answer in one piece) needs none of it; everything else is the
application's, which finds the same fault again and words it as vLLM's server does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse

# vllm/entrypoints/openai/*/api_router.py: path -> what reads the body, what answers it, and an answer that is whole.
_ROUTES: Mapping[str, tuple[type[Any], Callable[[Any], Any], type[Any]]] = {
    "/v1/chat/completions": (
        ChatCompletionRequest,
        lambda state: state.openai_serving_chat.create_chat_completion,
        ChatCompletionResponse,
    ),
    "/v1/completions": (
        CompletionRequest,
        lambda state: state.openai_serving_completion.create_completion,
        CompletionResponse,
    ),
}


async def answer_directly(state: Any, path: str, body: bytes) -> tuple[int, bytes] | None:
    """Give the HTTP status and the answer; None where the application must be asked. *state* is its state."""
    route = _ROUTES.get(path)
    if route is None:
        return None
    read, handler, whole = route
    try:
        content = json.loads(body)
        if content.get("stream"):
            return None
        answer = await handler(state)(read.model_validate(content), None)
    except Exception:  # noqa: BLE001 - the application meets it again, and has words for it
        return None
    if not isinstance(answer, whole):
        return None
    return 200, json.dumps(answer.model_dump(), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
