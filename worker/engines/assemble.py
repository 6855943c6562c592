"""
What response do the chunks of a stream make? The one that the engine would have given without streaming.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# A choice's text comes in pieces, in fields that differ from engine to engine; these are the ones that do not.
_WHOLE_AT_ONCE = frozenset({"role", "id", "type", "name", "finish_reason", "stop_reason"})


def join(whole: dict[str, Any], chunk: Mapping[str, Any]) -> None:
    """
    Add OpenAI's *chunk* to *whole*: what came before it, in the form of one chunk ({} at first).

    Text is appended, choices and tool calls are told apart by their index, other lists (log probabilities, token
    ids) are extended, and of everything else (usage, finish_reason) the newest stays. *chunk* is not changed, and
    nothing in it is changed later.
    """
    choices: list[Any] = whole.setdefault("choices", [])
    _extend(choices, chunk.get("choices") or ())
    whole.update({key: value for key, value in chunk.items() if key != "choices" and value is not None})


def complete(whole: Mapping[str, Any]) -> dict[str, Any]:
    """Turn all chunks of an answer, joined, into OpenAI's response."""
    choices = sorted(whole.get("choices", ()), key=lambda choice: choice.get("index", 0))
    response = {**whole, "choices": [_choice(choice) for choice in choices]}
    if "object" in response:
        response["object"] = str(response["object"]).removesuffix(".chunk")
    return response


def _choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    if "delta" not in choice:
        return dict(choice)  # of a completion: its text stands in the choice itself
    message = {"role": "assistant", "content": None, **choice["delta"]}
    if len(message) > len(("role", "content")):
        message["content"] = message["content"] or None  # "" only opened the stream: it went on with something else
    if message.get("tool_calls"):
        message["tool_calls"] = [
            {key: value for key, value in call.items() if key != "index"} for call in message["tool_calls"]
        ]
    return {**{key: value for key, value in choice.items() if key != "delta"}, "message": message}


def _merge(into: dict[str, Any], delta: Mapping[str, Any]) -> None:
    for key, new in delta.items():
        old = into.get(key)
        if new is None:
            into.setdefault(key, None)
        elif isinstance(new, dict):
            into[key] = old if isinstance(old, dict) else {}
            _merge(into[key], new)
        elif isinstance(new, list):
            into[key] = old if isinstance(old, list) else []
            _extend(into[key], new)
        elif isinstance(old, str) and isinstance(new, str) and key not in _WHOLE_AT_ONCE:
            into[key] = old + new
        else:
            into[key] = new


def _extend(into: list[Any], entries: Sequence[Any]) -> None:
    for entry in entries:
        if not isinstance(entry, dict) or "index" not in entry:
            into.append(entry)
            continue
        found = next((known for known in into if known.get("index") == entry["index"]), None)
        if found is None:
            into.append(found := {})
        _merge(found, entry)
