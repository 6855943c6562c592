"""
What an engine's HTTP answer means, on answers that vLLM 0.32 and llama.cpp gave.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from common.errors import (
    EngineDied,
    EngineFailed,
    EngineNotReady,
    InvalidRequest,
    PromptTooLong,
    ShiftworkerError,
)
from worker.engines.interpret import interpret, read_chunk

LLAMACPP_TOO_LONG = {
    "error": {
        "code": 400,
        "message": "request (6019 tokens) exceeds the available context size (512 tokens), try increasing it",
        "type": "exceed_context_size_error",
        "n_prompt_tokens": 6019,
        "n_ctx": 512,
    }
}
VLLM_TOO_LONG = {
    "error": {
        "message": "This model's maximum context length is 2048 tokens. However, your prompt contains 9017 characters "
        "(more than 8192 characters, which is the upper bound for 2048 input tokens). Please reduce the length of the "
        "input prompt. (parameter=input_text, value=9017)",
        "type": "BadRequestError",
        "code": 400,
    }
}
LLAMACPP_WRONG = {"error": {"code": 400, "message": "'messages' is required", "type": "invalid_request_error"}}
LLAMACPP_UNSUPPORTED = {"error": {"code": 501, "message": "This server does not support embeddings."}}
LLAMACPP_LOADING = {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}
VLLM_NO_ROUTE = {"detail": "Not Found"}

ROWS = [
    (400, LLAMACPP_TOO_LONG, PromptTooLong, "6019 tokens.*512 tokens.*lower max_tokens"),
    (400, VLLM_TOO_LONG, PromptTooLong, "2048 tokens"),
    (400, LLAMACPP_WRONG, InvalidRequest, r"HTTP 400.*'messages' is required\. Correct"),
    (422, {"error": {"message": "no"}}, InvalidRequest, "HTTP 422"),
    (404, VLLM_NO_ROUTE, InvalidRequest, "HTTP 404.*Not Found"),
    (501, LLAMACPP_UNSUPPORTED, InvalidRequest, "does not support embeddings"),
    (503, LLAMACPP_LOADING, EngineNotReady, "Loading model"),
    (429, {"error": {"message": "queue full"}}, EngineNotReady, "queue full"),
    (500, {"error": {"message": "EngineCore encountered an issue"}}, EngineFailed, "HTTP 500.*EngineCore"),
    (500, {"error": "plain"}, EngineFailed, "plain"),
    (200, [1, 2], EngineFailed, "HTTP 200"),
]


@pytest.mark.parametrize(("status", "body", "error", "words"), ROWS)
def test_what_is_no_completion_is_told_apart(status: int, body: Any, error: type[ShiftworkerError], words: str) -> None:
    """Whose fault it is decides the class; the engine's own words stay in the message."""
    with pytest.raises(error, match=words) as raised:
        interpret(status=status, content=json.dumps(body).encode(), run_s=1)

    assert type(raised.value) is error


@pytest.mark.parametrize("content", [b"", b"<html>", b"\xff\xfe", b'{"choices": ['])
def test_an_answer_that_is_no_json_is_the_engines_failure(content: bytes) -> None:
    """Cut off or not, it is never handed on as an answer."""
    with pytest.raises(EngineFailed):
        interpret(status=200, content=content, run_s=1)


def test_a_completion_of_llamacpp_says_how_long_each_phase_took() -> None:
    """Milliseconds become seconds."""
    body = {
        "choices": [],
        "usage": {"prompt_tokens": 21, "completion_tokens": 8},
        "timings": {"prompt_ms": 1.5, "predicted_ms": 250},
    }

    done = interpret(status=200, content=json.dumps(body).encode(), run_s=2)

    assert (done.prompt_tokens, done.completion_tokens) == (21, 8)
    assert (done.prefill_s, done.decode_s, done.run_s) == (0.0015, 0.25, 2)
    assert done.response == body


def test_what_an_engine_does_not_say_stays_unknown() -> None:
    """No timings from vLLM; a stranger may give no usage."""
    done = interpret(status=200, content=b'{"choices": [], "usage": null}', run_s=2)

    assert (done.prefill_s, done.decode_s, done.prompt_tokens, done.completion_tokens) == (None, None, None, None)


def test_a_part_of_an_answer_is_no_answer() -> None:
    """
    An engine that is told to end gives what it has with status 200; stored, it would pass for the whole answer.
    """
    choices = [{"message": {"content": "Once upon"}, "finish_reason": "abort"}]
    with pytest.raises(EngineDied):
        interpret(status=200, content=json.dumps({"choices": choices}).encode(), run_s=1.0)


def test_a_chunk_is_read_as_it_is() -> None:
    """Also the last one of a stream, which has no choice."""
    for body in ({"choices": [{"index": 0, "delta": {"content": "\u2028"}}]}, {"choices": [], "usage": {}}):
        assert read_chunk(json.dumps(body, ensure_ascii=False).encode()) == body


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (json.dumps(LLAMACPP_TOO_LONG), PromptTooLong, "512 tokens"),
        (json.dumps(VLLM_TOO_LONG), PromptTooLong, "2048 tokens"),
        (json.dumps(LLAMACPP_WRONG), InvalidRequest, "'messages' is required"),
        ('{"error": {"message": "EngineCore encountered an issue", "code": 500}}', EngineFailed, "EngineCore"),
        ('{"error": "plain"}', EngineFailed, "plain"),
        ('{"choices": "none"}', EngineFailed, "none"),
        ('{"choices": [null]}', EngineFailed, "null"),
        ("{", EngineFailed, "HTTP 200"),
    ],
)
def test_an_error_in_the_middle_of_a_stream_is_told_apart(
    content: str, error: type[ShiftworkerError], words: str
) -> None:
    """The status was 200 long before: the error's own code says whose fault it is."""
    with pytest.raises(error, match=words) as raised:
        read_chunk(content.encode())

    assert type(raised.value) is error
