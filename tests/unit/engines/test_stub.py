"""
The stub answers in OpenAI's shapes, always the same, and takes as long as it is told to.
"""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import EngineTimeout, InvalidRequest, LoadFailed
from tests.factories import make_placement
from worker.engines.base import Call, Completion, EngineState, StopSignal
from worker.engines.stub import StubEngine

CHAT = {"messages": [{"role": "user", "content": "count the birds"}]}


@pytest.fixture
def engine() -> StubEngine:
    """A stub with a model ready."""
    made = StubEngine()
    made.ensure_ready(make_placement(), timeout_s=1)
    return made


def ask(engine: StubEngine, path: str, body: dict[str, Any], timeout_s: float = 5) -> Completion:
    return engine.generate("small", Call(path=path, body=body, timeout_s=timeout_s), StopSignal())


def test_equal_requests_get_equal_answers(engine: StubEngine) -> None:
    """And another request another one."""
    first, again = (ask(engine, "/v1/chat/completions", CHAT).response for _ in range(2))
    other = ask(engine, "/v1/chat/completions", {**CHAT, "temperature": 0}).response

    assert first == again != other
    assert first["choices"][0]["message"]["content"].endswith("count the birds")
    assert first["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def test_the_shortest_answer_allowed_is_kept(engine: StubEngine) -> None:
    """max_tokens = 2 words."""
    done = ask(engine, "/v1/chat/completions", {**CHAT, "max_tokens": 2})

    assert len(done.response["choices"][0]["message"]["content"].split()) == done.completion_tokens == 2


def test_completions_and_embeddings_have_their_own_shapes(engine: StubEngine) -> None:
    """One vector per input, all of one length."""
    text = ask(engine, "/v1/completions", {"prompt": "once upon"}).response["choices"][0]["text"]
    vectors = ask(engine, "/v1/embeddings", {"input": ["a", "b"]}).response["data"]

    assert text.endswith("once upon")
    assert [len(found["embedding"]) for found in vectors] == [8, 8]
    assert vectors[0]["embedding"] != vectors[1]["embedding"]


def test_a_body_on_the_wrong_path_is_refused(engine: StubEngine) -> None:
    """As a real engine would."""
    with pytest.raises(InvalidRequest):
        ask(engine, "/v1/embeddings", CHAT)


def test_a_load_longer_than_allowed_fails_and_leaves_nothing() -> None:
    """The deadline is the caller's."""
    engine = StubEngine(load_s=60)

    with pytest.raises(LoadFailed, match=r"within 0\.01 s"):
        engine.ensure_ready(make_placement(), timeout_s=0.01)

    assert engine.state("small") is EngineState.STOPPED


def test_a_request_longer_than_allowed_times_out() -> None:
    """The job's limit is kept."""
    engine = StubEngine(run_s=60)
    engine.ensure_ready(make_placement(), timeout_s=1)

    with pytest.raises(EngineTimeout):
        ask(engine, "/v1/chat/completions", CHAT, timeout_s=0.01)
