"""
Tokens through the whole system: read while they are made, taken back when the engine dies, read again from anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from common import keys
from common.errors import JobCancelled, UnknownModel
from common.redis_client import connect
from common.schemas import JobState, StreamEvent
from tests.e2e.conftest import Box
from tests.e2e.test_deaths import engines_of

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "stream": True}
LONG = {**BODY, "model": "large", "max_tokens": 800, "ignore_eos": True}  # seconds, on any machine
PATIENCE_S = 60.0  # for the longest silence: an engine's death and the start of the next one


def text_of(events: list[StreamEvent]) -> str:
    return "".join(event.text for event in events)


def until(events: Iterator[StreamEvent], kind: str) -> list[StreamEvent]:
    """Take events up to the first of this kind."""
    taken = []
    for event in events:
        taken.append(event)
        if event.kind == kind:
            return taken
    raise AssertionError(f"no {kind} in {taken}")


def test_tokens_come_before_the_end_and_make_the_answer(box: Box) -> None:
    """The outcome is the same complete response; Celery's result too; the stream says how it ended."""
    job_id = box.client.submit(LONG)
    events = box.client.stream(job_id, timeout=PATIENCE_S)
    first = until(events, "chunk")
    assert box.client.result(job_id) is None, "there is an outcome already"

    rest = list(events)
    outcome = box.client.wait(job_id, timeout=10)
    assert text_of([*first, *rest]) == outcome.answer
    assert rest[-1].state is JobState.ANSWERED
    assert outcome.response is not None
    assert outcome.response["object"] == "chat.completion"
    assert outcome.response["usage"]["completion_tokens"] == outcome.ledger.completion_tokens == 800
    assert box.setup.app.AsyncResult(job_id).get(timeout=10)["choices"] == outcome.response["choices"]


def test_an_engine_killed_in_mid_stream_takes_its_tokens_back(box: Box) -> None:
    """A reset, then the tokens of the next attempt, then the one outcome; a reader who was cut off has them too."""
    job_id = box.client.submit(LONG)
    events = box.client.stream(job_id, timeout=PATIENCE_S)
    before = until(events, "chunk")
    [engine] = engines_of(box)
    engine.kill()

    until(events, "reset")
    again = until(events, "chunk")
    later = list(events)
    outcome = box.client.wait(job_id, timeout=10)
    assert outcome.ledger.attempt == 2
    assert {event.attempt for event in before} == {1}
    assert {event.attempt for event in [*again, *later[:-1]]} == {2}
    assert text_of([*again, *later]) == outcome.answer
    assert [event.kind for event in later].count("end") == 1

    whole = list(box.client.stream(job_id, timeout=PATIENCE_S))
    assert whole[0].kind == "reset"
    assert text_of(whole) == outcome.answer
    assert list(box.client.stream(job_id, again[-1].position, timeout=PATIENCE_S)) == later
    assert list(box.client.stream(job_id, before[-1].position, timeout=PATIENCE_S)) == whole


def test_every_way_to_end_ends_the_stream(box: Box) -> None:
    """Refused by the router, by the engine, expired, cancelled while it waits, cancelled while it runs."""
    running = box.client.submit(LONG)
    until(box.client.stream(running, timeout=PATIENCE_S), "chunk")
    waiting = box.client.submit({**BODY, "model": "small"})
    ends = {
        box.client.submit({**BODY, "model": "gpt-17"}): JobState.FAILED,
        box.client.submit({**LONG, "temperature": "warm"}): JobState.FAILED,
        box.client.submit({**BODY, "deadline": "2020-01-01T00:00:00Z"}): JobState.EXPIRED,
        running: JobState.CANCELLED,
        waiting: JobState.CANCELLED,
    }
    box.client.cancel(running)
    box.client.cancel(waiting)

    for job_id, state in ends.items():
        assert list(box.client.stream(job_id, timeout=PATIENCE_S))[-1].state is state
    with pytest.raises(UnknownModel):
        box.client.wait(next(iter(ends)), timeout=10)
    with pytest.raises(JobCancelled):
        box.client.wait(running, timeout=10)


def test_a_job_that_does_not_stream_leaves_nothing_but_its_end(box: Box) -> None:
    """It may be followed all the same."""
    sent = box.send("Hi")
    assert sent.get(timeout=PATIENCE_S)["choices"]

    [end] = box.client.stream(sent.id, timeout=PATIENCE_S)
    assert end.state is JobState.ANSWERED
    redis = connect(box.url)
    assert not redis.exists(keys.stream(sent.id))
    redis.close()


def test_the_command_line_shows_tokens_as_they_come(box: Box, run_cli: Any) -> None:
    """As text, and as one event on each line."""
    body = json.dumps({**BODY, "max_tokens": 24, "ignore_eos": True})
    shown = run_cli("submit", body, "--stream")
    assert shown.returncode == 0, shown.stderr
    lines = run_cli("submit", body, "--stream", "--json").stdout.splitlines()
    events = [StreamEvent.model_validate_json(line) for line in lines]
    assert [events[0].kind, events[-1].kind] == ["reset", "end"]
    assert len(text_of(events).split()) == 24
    assert text_of(events).strip() in shown.stdout

    refused = run_cli("submit", "Hi", "--stream", "--model", "gpt-17")
    assert refused.returncode == 1
    assert "UnknownModel" in refused.stderr
