"""
What a body may be, what is said of one that may not, and what the engine and the producer get of it.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidRequest
from common.schemas import BodyKind, ErrorBody, JobRequest, JobState, Ledger, Outcome, StreamEvent

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("Hello", ["is str, not an object", '{"messages": [{"role": "user"']),
        (None, ["is NoneType, not an object"]),
        ([HELLO], ["is list, not an object"]),
        ({}, ["exactly one of messages (chat), prompt (completion) or input (embedding)", "found none"]),
        ({"task_type": "x"}, ["found none"]),
        ({**HELLO, "prompt": "Hello"}, ["found messages and prompt"]),
        ({"messages": []}, ["messages: ", "at least 1 item"]),
        ({"messages": "Hello"}, ["messages: ", "valid list"]),
        ({"messages": ["Hello"]}, ["messages.0: ", "valid dictionary"]),
        ({"messages": [{"role": "user"}, {"content": "Hello"}]}, ['messages[1] has no "role"']),
        ({**HELLO, "max_tokens": 0}, ["max_tokens: ", "greater than or equal to 1"]),
        ({**HELLO, "max_tokens": "many"}, ["max_tokens: ", "valid integer"]),
        ({**HELLO, "priority": 10}, ["priority: ", "less than or equal to 9"]),
        ({**HELLO, "model": ""}, ["model: ", "at least 1 character"]),
        ({**HELLO, "deadline": "tomorrow"}, ["deadline: ", "valid datetime"]),
        ({**HELLO, "deadline": "2026-01-01T00:00:00"}, ["deadline: ", "timezone"]),
        ({**HELLO, "priority": -1, "tenant": 3}, ["priority: ", "; tenant: "]),
        ({"prompt": "half a pair: \ud800"}, ["cannot be written as JSON in UTF-8"]),
        ({**HELLO, "metadata": object()}, ["cannot be written as JSON"]),
    ],
)
def test_a_wrong_body_is_refused_by_field(body: object, named: list[str]) -> None:
    """Each message names what is wrong and what is allowed there."""
    with pytest.raises(InvalidRequest) as caught:
        JobRequest.parse(body)
    for part in named:
        assert part in caught.value.message
    assert "pydantic" not in caught.value.message


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters())
)
documents = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
bodies = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(JobRequest.model_fields, documents),
        "messages": st.lists(st.dictionaries(st.sampled_from(["role", "content", "name"]), documents)) | documents,
        "temperature": documents,
    },
)


valid_bodies = st.dictionaries(st.text(st.characters()), documents).map(lambda unknown: {**HELLO, **unknown})


@given(documents | bodies | valid_bodies)
def test_any_json_is_a_request_or_refused(body: object) -> None:
    """Nothing else is ever raised; what is accepted can be stored, read again and sent to an engine."""
    try:
        request = JobRequest.parse(body)
    except InvalidRequest as error:
        ErrorBody.of(error).model_dump_json()
        return
    wire = json.loads(json.dumps(request.model_dump(mode="json", exclude_none=True)))
    assert JobRequest.parse(wire).engine_body("m") == request.engine_body("m")
    assert isinstance(request.text, str)


def test_the_engine_gets_openai_s_fields_and_none_of_ours() -> None:
    """Also fields that nobody here has heard of; the model resolved, not streamed unless asked for."""
    openai = {
        "messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
        "max_tokens": 5, "temperature": 0, "logit_bias": {"50256": -100}, "brand_new": {"deep": [None, 1]},
    }  # fmt: skip
    ours = {
        "model": "auto", "task_type": "x", "priority": 0, "deadline": 1893456000, "latency_sensitive": False,
        "time_limit": 9.5, "privacy_required": False, "tenant": "t", "idempotency_key": "k", "webhook": "https://example.org",
    }  # fmt: skip

    body = JobRequest.parse({**openai, **ours}).engine_body("small")

    assert body == {**openai, "model": "small", "stream": False}


@pytest.mark.parametrize(
    ("own", "tasks", "least"),
    [
        (None, (), None),
        (None, (None, None), None),
        (5, (None, None), 5),
        (None, (9.0, 7.0), 7.0),  # Celery's: hard, soft
        (5, (9.0, None), 5),
        (5, (9.0, 2.0), 2.0),
        (None, (0, -1.0), None),
        (None, (1e9, None), None),  # longer than any job may run
    ],
)
def test_the_shortest_time_limit_counts(
    own: float | None, tasks: tuple[float | None, ...], least: float | None
) -> None:
    """The job's own, and those that Celery knows of its task; what is none is left out."""
    request = JobRequest.parse({**HELLO, "time_limit": own}).within(time_limits=tasks)
    assert request.time_limit == least
    assert JobRequest.parse(request.model_dump(mode="json", exclude_none=True)) == request


def test_a_stream_ends_with_the_usage_whatever_was_asked() -> None:
    """The ledger needs it; OpenAI's other options stay, and mean nothing without a stream."""
    for asked in ({}, {"stream_options": {"include_usage": False}}):
        body = JobRequest.parse({**HELLO, "stream": True, **asked}).engine_body("small")
        assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})
    for stream in (False, None):
        body = JobRequest.parse({**HELLO, "stream": stream, "stream_options": {"x": 1}}).engine_body("small")
        assert (body["stream"], "stream_options" in body) == (False, False)


def test_embeddings_are_not_streamed() -> None:
    """Refused, and not silently waited for."""
    with pytest.raises(InvalidRequest, match="stream: an embedding is one piece"):
        JobRequest.parse({"input": "Hello", "stream": True})
    assert JobRequest.parse({"input": "Hello", "stream": False}).kind is BodyKind.EMBEDDING


@pytest.mark.parametrize(
    ("choices", "text"),
    [
        ([{"index": 0, "delta": {"content": "Hi"}}], "Hi"),
        ([{"index": 0, "text": "Hi"}], "Hi"),
        ([{"index": 1, "delta": {"content": "other"}}, {"index": 0, "delta": {"content": "Hi"}}], "Hi"),
        ([{"index": 0, "delta": {"role": "assistant", "content": None}}], ""),
        ([{"index": 0, "delta": {}}], ""),
        ([], ""),
    ],
)
def test_the_text_of_an_event_is_the_first_choices(choices: list[dict[str, Any]], text: str) -> None:
    """Of a chat or of a completion; nothing where there is none."""
    assert StreamEvent(position="1-0", kind="chunk", attempt=1, chunk={"choices": choices}).text == text
    assert StreamEvent(position="1-0", kind="reset", attempt=1).text == ""


def test_a_deadline_is_a_moment() -> None:
    """ISO 8601 with an offset, or Unix seconds."""
    moment = datetime(2030, 1, 1, tzinfo=UTC)

    for given_as in ("2030-01-01T00:00:00Z", "2030-01-01T02:00:00+02:00", moment.timestamp()):
        assert JobRequest.parse({**HELLO, "deadline": given_as}).deadline == moment


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        (HELLO, BodyKind.CHAT, "Hello"),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "What is this?"},
                            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                        ],
                    },
                    {"role": "assistant", "content": None},
                ]
            },
            BodyKind.CHAT,
            "Be brief.\nWhat is this?",
        ),
        ({"prompt": "Once"}, BodyKind.COMPLETION, "Once"),
        ({"prompt": ["Once", "Twice"]}, BodyKind.COMPLETION, "Once\nTwice"),
        ({"prompt": [1, 2, 3]}, BodyKind.COMPLETION, ""),  # token ids
        ({"input": ["a", "b"]}, BodyKind.EMBEDDING, "a\nb"),
    ],
)
def test_what_kind_of_body_it_is_and_its_text(body: dict[str, Any], kind: BodyKind, text: str) -> None:
    """All text counts, and nothing else does."""
    request = JobRequest.parse(body)

    assert (request.kind, request.text) == (kind, text)


@pytest.mark.parametrize(
    ("limits", "tokens"),
    [({}, None), ({"max_tokens": 3}, 3), ({"max_tokens": 3, "max_completion_tokens": 4}, 4)],
)
def test_the_longest_answer_allowed(limits: dict[str, int], tokens: int | None) -> None:
    """OpenAI's newer name wins."""
    assert JobRequest.parse({**HELLO, **limits}).answer_tokens == tokens


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ({"choices": [{"message": {"role": "assistant", "content": "Hi"}}]}, "Hi"),
        ({"choices": [{"text": "upon a time"}]}, "upon a time"),
        ({"choices": [{"message": {"content": None, "tool_calls": [{"id": "1"}]}}]}, None),
        ({"choices": []}, None),
        ({"data": [{"embedding": [0.5]}]}, None),
        (None, None),
    ],
)
def test_the_answer_is_the_first_choice_s_text(response: dict[str, Any] | None, answer: str | None) -> None:
    """None where there is no text; the response itself is untouched."""
    outcome = Outcome(job_id="1", state=JobState.ANSWERED, response=response, ledger=Ledger(model="small"))

    assert outcome.answer == answer
    assert outcome.result() == {**(response or {}), "ledger": outcome.ledger.model_dump(mode="json")}
    assert Outcome.model_validate_json(outcome.model_dump_json()) == outcome
