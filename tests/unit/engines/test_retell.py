"""
A whole response as one chunk: whoever puts chunks together gets the response again.
"""

from __future__ import annotations

from typing import Any

import pytest

from common.retell import retell
from common.schemas import StreamEvent
from worker.engines.assemble import complete, join

USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
CALL = {"id": "call-1", "type": "function", "function": {"name": "count", "arguments": "{}"}}


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    choices = [
        {"index": number, "message": {"role": "assistant", **message}, "finish_reason": "stop", **more}
        for number, message in enumerate(messages)
    ]
    return {"id": "1", "object": "chat.completion", "model": "small", "choices": choices, "usage": USAGE}


@pytest.mark.parametrize(
    "response",
    [
        chat({"content": "Once"}),
        chat({"content": "Once"}, {"content": "Twice"}, logprobs={"content": [{"token": "O", "logprob": -0.5}]}),
        chat({"content": None, "tool_calls": [CALL, {**CALL, "id": "call-2"}]}),
        chat({"content": "42", "reasoning_content": "They are forty and two."}),
        {
            "object": "text_completion",
            "choices": [{"index": 0, "text": "Once", "finish_reason": "length"}],
            "usage": USAGE,
        },
    ],
)
def test_the_chunk_says_the_whole_response(response: dict[str, Any]) -> None:
    """Text, several choices, tools, thoughts, and log probabilities, of chats and of completions."""
    whole: dict[str, Any] = {}
    join(whole, retell(response))
    assert complete(whole) == response


def test_a_reader_finds_the_text_in_it() -> None:
    """As in every other chunk."""
    event = StreamEvent(position="1", kind="chunk", chunk=retell(chat({"content": "Once"})))
    assert event.text == "Once"
