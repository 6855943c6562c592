"""
What the chunks of a stream make: the response that the engine gives without one.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engines.assemble import complete, join

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 7, "model": "small"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
LAST = {**HEAD, "choices": [], "usage": USAGE}


def chunk(delta: dict[str, Any], *, index: int = 0, finish: str | None = None, **choice: Any) -> dict[str, Any]:
    return {**HEAD, "choices": [{"index": index, "delta": delta, "finish_reason": finish, **choice}], "usage": None}


def joined(*chunks: dict[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for found in chunks:
        before = copy.deepcopy(found)
        join(whole, found)
        assert found == before
    return whole


def message(*chunks: dict[str, Any]) -> dict[str, Any]:
    [choice] = complete(joined(*chunks))["choices"]
    found: dict[str, Any] = choice["message"]
    return found


def test_a_chat_is_told_as_if_it_had_not_been_streamed() -> None:
    """Every field of the response, the usage of the last chunk among them."""
    chunks = [
        chunk({"role": "assistant", "content": ""}, logprobs=None),
        chunk({"content": "Once"}, logprobs={"content": [{"token": "Once", "top_logprobs": [{"token": "A"}]}]}),
        chunk({"content": " upon"}, logprobs={"content": [{"token": " upon", "top_logprobs": []}]}),
        chunk({}, finish="stop", stop_reason="."),
        LAST,
    ]

    assert complete(joined(*chunks)) == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 7,
        "model": "small",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Once upon"},
                "logprobs": {
                    "content": [
                        {"token": "Once", "top_logprobs": [{"token": "A"}]},
                        {"token": " upon", "top_logprobs": []},
                    ]
                },
                "finish_reason": "stop",
                "stop_reason": ".",
            }
        ],
        "usage": USAGE,
    }


def test_a_completion_keeps_its_text_in_the_choice() -> None:
    """The lists of its log probabilities are extended, each by itself."""
    head = {"object": "text_completion", "model": "small"}
    pieces = [
        {"index": 0, "text": "Once", "logprobs": {"tokens": ["Once"], "text_offset": [0]}, "finish_reason": None},
        {"index": 0, "text": " upon", "logprobs": {"tokens": [" upon"], "text_offset": [4]}, "finish_reason": "length"},
    ]

    response = complete(joined(*({**head, "choices": [piece]} for piece in pieces)))

    logprobs = {"tokens": ["Once", " upon"], "text_offset": [0, 4]}
    choice = {"index": 0, "text": "Once upon", "logprobs": logprobs, "finish_reason": "length"}
    assert response == {**head, "choices": [choice]}


def test_choices_that_come_mixed_are_told_apart() -> None:
    """By their index, in whatever order they come; the response has them in order."""
    response = complete(
        joined(chunk({"content": "b"}, index=1), chunk({"content": "a"}), chunk({"content": "B"}, index=1))
    )

    assert [choice["message"]["content"] for choice in response["choices"]] == ["a", "bB"]
    assert [choice["index"] for choice in response["choices"]] == [0, 1]


def test_tool_calls_are_put_together_each_by_itself() -> None:
    """Name and id come once, also if an engine repeats them; the arguments in pieces; content was only opened."""

    def call(index: int, **fields: Any) -> dict[str, Any]:
        return chunk({"tool_calls": [{"index": index, **fields}]})

    found = message(
        chunk({"role": "assistant", "content": ""}),
        call(0, id="a", type="function", function={"name": "weather", "arguments": ""}),
        call(0, function={"arguments": '{"city": '}),
        call(1, id="b", type="function", function={"name": "time", "arguments": "{"}),
        call(0, id="a", type="function", function={"name": "weather", "arguments": '"Bonn"}'}),
        call(1, function={"arguments": "}"}),
    )

    assert found == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}},
            {"id": "b", "type": "function", "function": {"name": "time", "arguments": "{}"}},
        ],
    }


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "refusal", "a field of tomorrow"])
def test_text_beside_the_content_is_put_together_too(field: str) -> None:
    """Whatever an engine calls it."""
    found = message(chunk({field: "first "}), chunk({field: "then"}), chunk({field: None, "content": "Hi"}))

    assert found == {"role": "assistant", field: "first then", "content": "Hi"}


def test_an_answer_without_a_word_has_no_content() -> None:
    """The engine went straight to its end."""
    assert message(chunk({}, finish="stop")) == {"role": "assistant", "content": None}


texts = st.text(max_size=4)
deltas = st.fixed_dictionaries({}, optional={"content": texts, "reasoning": texts, "role": st.just("assistant")})
chunks_of_two = st.lists(st.builds(chunk, deltas, index=st.integers(0, 1)), max_size=12)


@given(chunks_of_two, st.data())
def test_it_does_not_matter_how_chunks_were_joined_before(chunks: list[dict[str, Any]], data: st.DataObject) -> None:
    """A reader of the stream, who gets several at a time as one, has in the end what the outcome says."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(chunks)), max_size=4)))
    parts = [
        joined(*chunks[start:end]) for start, end in zip([0, *cuts], [*cuts, len(chunks)], strict=True) if start < end
    ]

    assert complete(joined(*parts)) == complete(joined(*chunks))
