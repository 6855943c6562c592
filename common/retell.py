"""
Which one chunk of a stream says a whole response? For the streams of jobs whose answer nobody told piece by piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def retell(response: Mapping[str, Any]) -> dict[str, Any]:
    """Give OpenAI's *response* as the one chunk of a stream that says it at once: who joins chunks gets it again."""
    chunk = {**response, "choices": [_choice(choice) for choice in response.get("choices", ())]}
    if response.get("object") == "chat.completion":
        chunk["object"] = "chat.completion.chunk"
    return chunk


def _choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    if "message" not in choice:
        return dict(choice)  # of a completion: its text stands in the choice itself
    delta = dict(choice["message"])
    if delta.get("tool_calls"):
        delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(delta["tool_calls"])]
    return {**{key: value for key, value in choice.items() if key != "message"}, "delta": delta}
