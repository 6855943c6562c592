"""
An endpoint that says no, in every way that HTTP has: who is to blame, how long it rests, and that the key stays ours.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from pydantic import SecretStr

from common.errors import EngineFailed, EngineNotReady, InvalidRequest, LoadFailed, PromptTooLong, ShiftworkerError
from tests.factories import make_placement
from tests.fakes.endpoint import ANSWER, Endpoint
from worker.engines.base import Call, Completion, EngineState, StopSignal
from worker.engines.remote import MAX_REST_S, REST_S, RemoteEngine, read_retry_after

KEY = "sk-secret-1234567890"


class Clock:
    """Monotonic seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(endpoint: Endpoint, clock: Clock) -> Iterator[RemoteEngine]:
    made = RemoteEngine(url=endpoint.url, api_key=SecretStr(KEY), model="theirs", clock=clock)
    made.ensure_ready(make_placement(), timeout_s=5)
    yield made
    made.close()


def ask(engine: RemoteEngine) -> Completion:
    body = {"model": "small", "messages": [{"role": "user", "content": "Hello"}]}
    return engine.generate("small", Call(path="/v1/chat/completions", body=body, timeout_s=5), StopSignal())


def refusal(engine: RemoteEngine) -> ShiftworkerError:
    with pytest.raises(ShiftworkerError) as caught:
        ask(engine)
    return caught.value


def test_the_key_goes_to_the_endpoint_s_own_address_in_one_header(engine: RemoteEngine, endpoint: Endpoint) -> None:
    """The URL is taken as OpenAI's clients take it, with the version in it."""
    assert ask(engine).response["choices"][0]["message"]["content"] == "yes"
    assert endpoint.seen == [
        ("GET", "/base/v9/models", f"Bearer {KEY}"),
        ("POST", "/base/v9/chat/completions", f"Bearer {KEY}"),
    ]


@pytest.mark.parametrize(
    ("status", "expected", "rest_s"),
    [
        (400, InvalidRequest, None),
        (422, InvalidRequest, None),
        (501, InvalidRequest, None),
        (401, EngineNotReady, MAX_REST_S),
        (402, EngineNotReady, MAX_REST_S),
        (403, EngineNotReady, MAX_REST_S),
        (404, EngineNotReady, MAX_REST_S),
        (307, EngineNotReady, MAX_REST_S),
        (429, EngineNotReady, REST_S),
        (502, EngineNotReady, REST_S),
        (503, EngineNotReady, REST_S),
        (529, EngineNotReady, REST_S),
        (500, EngineFailed, REST_S),
        (200, EngineFailed, REST_S),  # nothing that is an answer
    ],
)
def test_each_status_says_who_is_to_blame(
    *,
    engine: RemoteEngine,
    endpoint: Endpoint,
    clock: Clock,
    status: int,
    expected: type[ShiftworkerError],
    rest_s: float | None,
) -> None:
    """In the provider's own words; for the body's faults the endpoint does not rest, for the rest nobody asks it."""
    endpoint.says(status, '{"error": {"message": "so we say"}}' if status != 200 else "no JSON: so we say")

    error = refusal(engine)

    assert type(error) is expected
    assert "so we say" in error.message
    assert error.retry_helps == (expected is not InvalidRequest)
    if rest_s is None:
        assert engine.state("small") is EngineState.READY
        return
    asked = len(endpoint.seen)
    clock.now += rest_s - 0.1
    assert engine.state("small") is EngineState.DEAD
    assert "so we say" in refusal(engine).message
    assert len(endpoint.seen) == asked
    clock.now += 0.2
    endpoint.says(200, ANSWER)
    assert ask(engine)


def test_openai_s_words_for_a_prompt_that_is_too_long_are_understood(engine: RemoteEngine, endpoint: Endpoint) -> None:
    """As a producer knows them from the local engines."""
    endpoint.says(400, '{"error": {"message": "This model\'s maximum context length is 8192 tokens."}}')
    assert isinstance(refusal(engine), PromptTooLong)


def test_the_endpoint_says_how_long_it_wants_to_rest(engine: RemoteEngine, endpoint: Endpoint, clock: Clock) -> None:
    """Retry-After counts, and more than our own pause."""
    endpoint.says(429, Retry_After="40")
    refusal(engine)

    clock.now += 39.9
    assert engine.resting is not None
    clock.now += 0.2
    assert engine.resting is None


def test_one_failure_after_another_makes_the_pauses_longer(
    engine: RemoteEngine, endpoint: Endpoint, clock: Clock
) -> None:
    """10, 20, 40 ... 300 s; an answer makes them short again."""
    endpoint.says(503)
    for pause in (10, 20, 40, 80, 160, 300, 300):
        refusal(engine)
        clock.now += pause - 0.1
        assert engine.resting is not None
        clock.now += 0.2
        assert engine.resting is None
    endpoint.says(200, ANSWER)
    ask(engine)
    endpoint.says(503)
    refusal(engine)
    clock.now += 10.1
    assert engine.resting is None


def test_a_redirect_is_not_followed(engine: RemoteEngine, endpoint: Endpoint) -> None:
    """Whoever it points to sees neither the key nor the prompt."""
    elsewhere = Endpoint()
    endpoint.says(307, "moved", Location=f"{elsewhere.url}/chat/completions")

    assert "HTTP 307" in refusal(engine).message
    assert "Correct CLOUD_URL" in refusal(engine).message
    assert elsewhere.seen == []
    elsewhere.close()


@pytest.mark.parametrize("status", [200, 400, 401, 429, 500])
def test_the_key_is_in_no_error_no_answer_and_no_log(
    engine: RemoteEngine, endpoint: Endpoint, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    """Not even where the provider quotes it, and with every library telling all it knows."""
    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "httpcore"):
        caplog.set_level(logging.DEBUG, logger=name)
    endpoint.says(status, ANSWER.replace("yes", KEY) if status == 200 else f'{{"error": {{"message": "bad: {KEY}"}}}}')

    said = str(ask(engine).response) if status == 200 else refusal(engine).message

    assert "[our key]" in said
    assert KEY not in said
    assert KEY not in repr(vars(engine).get("_rests_why"))
    assert KEY not in caplog.text


@pytest.mark.parametrize(("status", "there"), [(200, True), (404, True), (401, False), (503, False)])
def test_ready_means_that_the_endpoint_takes_our_key(*, endpoint: Endpoint, status: int, there: bool) -> None:
    """As far as its list of models says; where it has none, the first job will show."""
    endpoint.list_status = status
    engine = RemoteEngine(url=endpoint.url, api_key=None, model="theirs")
    if there:
        engine.ensure_ready(make_placement(), timeout_s=5)
        assert engine.state("small") is EngineState.READY
    else:
        with pytest.raises(LoadFailed, match=f"HTTP {status}"):
            engine.ensure_ready(make_placement(), timeout_s=5)
        assert engine.state("small") is EngineState.STOPPED
        assert engine.resting
    assert endpoint.seen == [("GET", "/base/v9/models", None)]
    engine.close()


def test_nobody_at_the_address_is_no_fault_of_the_job() -> None:
    """Before the first job, and under one."""
    gone = Endpoint()
    engine = RemoteEngine(url=gone.url, api_key=None, model="theirs")
    engine.ensure_ready(make_placement(), timeout_s=5)
    gone.close()

    assert isinstance(refusal(engine), EngineNotReady)
    with pytest.raises(LoadFailed, match="does not answer"):
        engine.ensure_ready(make_placement(), timeout_s=5)
    assert engine.state("small") is EngineState.DEAD
    engine.close()


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("7", 7),
        ("0", 1),
        ("Sat, 21 Nov 2026 12:00:30 GMT", 30),
        ("Sat, 21 Nov 2026 11:00:00 GMT", 1),  # its clock is behind
        ("86400", 3600),
        ("soon", None),
        ("-3", None),
        ("Sat, 21 Nov 2026 12:00:30", None),  # no zone: whose clock?
    ],
)
def test_retry_after_is_seconds_or_a_moment(header: str | None, seconds: float | None) -> None:
    """Never less than a second nor more than an hour; what cannot be read says nothing."""
    assert read_retry_after(header, now=datetime(2026, 11, 21, 12, tzinfo=UTC)) == seconds
