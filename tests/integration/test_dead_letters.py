"""
The dead-letter queue on a real Redis, and the commands that look into it.
"""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from common import keys
from common.dead_letters import DeadLetters
from common.errors import InvalidRequest, PoisonJob, QueueFull
from common.redis_client import RedisClient
from common.redis_job_store import RedisJobStore
from common.schemas import DeadLetter, ErrorBody, Fault, JobState, Ledger, Outcome, utc_now
from worker.cli.dead import app

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Which [bold] word ends you?"}], "stream": True}
ERROR = ErrorBody.of(PoisonJob("The engine died twice."))


@pytest.fixture
def store(redis_client: RedisClient) -> RedisJobStore:
    return RedisJobStore(redis_client, ttl_s=60)


@pytest.fixture
def letters(redis_client: RedisClient) -> DeadLetters:
    return DeadLetters(redis_client)


@pytest.fixture(autouse=True)
def _env(monkeypatch: pytest.MonkeyPatch, redis_url: str) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("COLUMNS", "200")


def set_aside(store: RedisJobStore, job_id: str = "job", **fields: Any) -> DeadLetter:
    """A job that has run twice, and was given up."""
    store.note_streams(job_id)
    faults = [
        Fault(at=utc_now(), worker="here", attempt=n, kind="EngineDied", message=f"gone [{n}]", company=1)
        for n in (1, 2)
    ]
    for fault in faults:
        store.begin(job_id, delivery="tag")
        store.add_fault(job_id, fault)
    letter = DeadLetter(
        job_id=job_id, at=utc_now(), model="small", error=ERROR, faults=tuple(faults), body={**BODY, **fields}
    )
    store.set_aside(Outcome(job_id=job_id, state=JobState.FAILED, error=ERROR, ledger=Ledger(attempt=2)), letter)
    return letter


def sent(client: RedisClient) -> list[tuple[str, dict[str, Any]]]:
    """The id and the body of each job on its way to the router."""
    found = [json.loads(raw) for name in keys.lists_of(keys.SUBMIT_QUEUE) for raw in client.lrange(name, 0, -1)]
    return [(m["headers"]["id"], json.loads(base64.b64decode(m["body"]))[0][0]) for m in found]


def shiftworker_dead(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_a_retry_begins_a_new_life_under_the_same_id(
    store: RedisJobStore, letters: DeadLetters, redis_client: RedisClient
) -> None:
    """Nothing of the first is left: no attempts, no faults, no outcome, no copy of it, no words on the stream."""
    set_aside(store)
    redis_client.set(f"{keys.CELERY_RESULT_PREFIX}job", "a failure")
    assert json.loads(shiftworker_dead("retry", "job", "--json").stdout) == {"retried": ["job"]}

    assert [job_id for job_id, _ in sent(redis_client)] == ["job"]
    assert store.view("job").state is JobState.UNKNOWN
    assert store.outcome("job") is None
    assert not redis_client.exists(f"{keys.CELERY_RESULT_PREFIX}job", keys.stream("job"), keys.job("job"))
    assert letters.all() == []
    assert store.begin("job", delivery="new") == 1
    answer = Outcome(job_id="job", state=JobState.ANSWERED, response={"choices": []}, ledger=Ledger(attempt=1))
    assert store.finish(answer) == answer


def test_a_retry_that_cannot_send_can_be_repeated(
    store: RedisJobStore, letters: DeadLetters, redis_client: RedisClient
) -> None:
    """The queue is full, say, or this process dies: the letter stays until the job is on its way."""
    letter = set_aside(store)

    def full(_body: dict[str, Any]) -> None:
        raise QueueFull("too much waits")

    with pytest.raises(QueueFull):
        letters.retry("job", full)
    assert letters.find("job") == letter
    assert shiftworker_dead("retry", "job").exit_code == 0
    assert len(sent(redis_client)) == 1


def test_a_second_retry_takes_nothing_from_the_new_life(store: RedisJobStore, letters: DeadLetters) -> None:
    """Its outcome is as final as any: only that of the failure is ever withdrawn."""
    set_aside(store)
    answer = Outcome(job_id="job", state=JobState.ANSWERED, response={"choices": []}, ledger=Ledger(attempt=1))

    def answered_meanwhile(_body: dict[str, Any]) -> None:
        store.begin("job", delivery="new")
        store.finish(answer)
        assert letters.retry("job", lambda _body: None)  # by somebody else, who has seen the same letter

    assert letters.retry("job", answered_meanwhile)
    assert store.outcome("job") == answer


def test_a_deadline_that_has_passed_is_left_out(store: RedisJobStore, redis_client: RedisClient) -> None:
    """It would end as expired at once; one that is ahead still counts."""
    ahead = datetime.now(UTC) + timedelta(hours=1)
    set_aside(store, "late", deadline="2020-01-01T00:00:00Z")
    set_aside(store, "in time", deadline=ahead.isoformat())
    assert shiftworker_dead("retry", "late", "in time").exit_code == 0

    bodies = dict(sent(redis_client))
    assert "deadline" not in bodies["late"]
    assert datetime.fromisoformat(bodies["in time"]["deadline"]) == ahead


def test_a_job_that_is_dropped_keeps_its_outcome(store: RedisJobStore, letters: DeadLetters) -> None:
    """Only the letter goes."""
    set_aside(store)
    assert json.loads(shiftworker_dead("drop", "job", "--json").stdout) == {"dropped": ["job"]}
    assert letters.all() == []
    outcome = store.outcome("job")
    assert outcome is not None
    assert outcome.error == ERROR


@pytest.mark.parametrize("command", ["show", "retry", "drop"])
def test_a_job_that_is_not_set_aside_is_named(store: RedisJobStore, letters: DeadLetters, command: str) -> None:
    """An error, after whatever could be done for the others."""
    set_aside(store)
    arguments = ["nobody"] if command == "show" else ["nobody", "job"]
    result = shiftworker_dead(command, *arguments)
    assert isinstance(result.exception, InvalidRequest)
    assert "nobody" in str(result.exception)
    assert (letters.find("job") is None) is (command != "show")


def test_people_see_what_happened(store: RedisJobStore) -> None:
    """Each job on a line; each attempt of one, and its body as it was sent, brackets and all."""
    assert "No job is set aside." in shiftworker_dead("list").stdout
    set_aside(store)
    line = next(line for line in shiftworker_dead("list").stdout.splitlines() if "job " in line and "small" in line)
    assert "PoisonJob" in line
    shown = shiftworker_dead("show", "job").stdout
    for said in ("The engine died twice.", "gone [1]", "gone [2]", "1 when it died", "Which [bold] word ends you?"):
        assert said in shown


def test_the_newest_letters_come_first_and_the_oldest_go(
    store: RedisJobStore, letters: DeadLetters, monkeypatch: pytest.MonkeyPatch, redis_client: RedisClient
) -> None:
    """Bodies are large, and nobody may ever look."""
    monkeypatch.setattr("common.dead_letters._MOST", 3)
    for number in range(5):
        set_aside(store, f"{number}")
        redis_client.zadd(keys.DEAD, {f"{number}": number})
    assert [letter.job_id for letter in letters.all()] == ["4", "3", "2"]
    assert redis_client.hlen(keys.DEAD_LETTERS) == 3
