"""
Webhooks on a real Redis and a real HTTP server: signed, pinned to the address that was checked, called until answered.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pydantic import SecretStr

from common import keys
from common.errors import JobCancelled
from common.may_enter import Entry
from common.may_reach import Allowed
from common.redis_client import RedisClient, connect_async
from common.redis_job_store import RedisJobStore
from common.schemas import ErrorBody, JobState, Ledger, Outcome, Route, utc_now
from common.settings import WebhookSettings
from common.standard_webhook import is_signed
from tests.waiting import eventually
from worker.webhooks.redis_outbox import RedisOutbox
from worker.webhooks.sender import WebhookSender

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
HERE = Allowed.parse(["127.0.0.0/8"])
ROUTE = Route(model="small", complexity=0.25, why="simple enough")


class Listener(ThreadingHTTPServer):
    """Answers calls with the statuses it was given, the last one for ever, and keeps what came."""

    daemon_threads = True

    def __init__(self, *statuses: int, silent: bool = False, address: str = "127.0.0.1") -> None:
        super().__init__((address, 0), _Handler)
        self.url = f"http://{address}:{self.server_port}/hook?who=me"
        self.statuses = list(statuses)
        self.silence = threading.Event()
        if not silent:
            self.silence.set()
        self.calls: list[tuple[str, dict[str, str], bytes]] = []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.silence.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Listener

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.calls.append((self.path, headers, body))
        self.server.silence.wait(30)
        status = self.server.statuses.pop(0) if len(self.server.statuses) > 1 else self.server.statuses[0]
        self.send_response(status)
        self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


def settings(**changes: Any) -> WebhookSettings:
    return WebhookSettings(secret=SecretStr(SECRET), **changes)


@pytest.fixture
def store(redis_client: RedisClient) -> RedisJobStore:
    return RedisJobStore(redis_client, ttl_s=100)


@pytest.fixture
def listener() -> Iterator[Listener]:
    found = Listener(204)
    yield found
    found.close()


def end(store: RedisJobStore, url: str, job_id: str = "job 1", *, answer: str = "Hi") -> Outcome:
    """Bring a job with a webhook to its end."""
    entry = Entry(tenant="t", bytes=1, webhook=url, max_jobs=10**6, max_bytes=10**9)
    assert store.note_routed(job_id, ROUTE, entry) is None
    response = {"choices": [{"message": {"content": answer}}]}
    ledger = Ledger(model="small", finished_at=utc_now())
    return store.finish(Outcome(job_id=job_id, state=JobState.ANSWERED, response=response, ledger=ledger))


def due_now(redis_client: RedisClient) -> None:
    """Let all that is owed be due at once: nobody waits for a back-off here."""
    for job_id in redis_client.zrange(keys.WEBHOOKS, 0, -1):
        redis_client.zadd(keys.WEBHOOKS, {job_id: 0})


def called(store: RedisJobStore, redis_client: RedisClient, job_id: str = "job 1") -> int:
    """How many calls were made in vain."""
    call = redis_client.hget(keys.WEBHOOK_CALLS, job_id)
    return json.loads(call)["calls"] if call else -1


def test_the_end_of_a_job_is_told_once_and_signed(
    redis_url: str, redis_client: RedisClient, store: RedisJobStore, listener: Listener
) -> None:
    """The id, the state, the result; a signature that the receiver's library finds good."""
    end(store, listener.url, answer="Grüße 😀")
    with WebhookSender(redis_url, settings(), HERE):
        eventually(lambda: store.view("job 1").webhook == "delivered")

    ((path, headers, body),) = listener.calls
    assert path == "/hook?who=me"
    assert headers["host"] == f"127.0.0.1:{listener.server_port}"
    assert headers["webhook-id"] == "job 1"
    assert is_signed(SECRET, headers, body, now=time.time())
    told = json.loads(body)
    assert (told["type"], told["data"]["id"], told["data"]["state"]) == ("job.answered", "job 1", "answered")
    assert told["data"]["result"]["choices"][0]["message"]["content"] == "Grüße 😀"
    assert told["data"]["ledger"]["model"] == "small"
    assert not redis_client.exists(keys.WEBHOOKS, keys.WEBHOOK_CALLS)


def test_a_failure_is_told_with_its_error(redis_url: str, store: RedisJobStore, listener: Listener) -> None:
    """Of whatever kind."""
    error = ErrorBody.of(JobCancelled("Somebody cancelled."))
    store.finish(Outcome(job_id="1", state=JobState.CANCELLED, error=error), webhook=listener.url)
    with WebhookSender(redis_url, settings(), HERE):
        eventually(lambda: listener.calls)
    told = json.loads(listener.calls[0][2])
    assert (told["type"], told["data"]["error"]["kind"]) == ("job.cancelled", "JobCancelled")


@pytest.mark.parametrize("status", [302, 404, 500, 503])
def test_a_call_in_vain_is_repeated(
    redis_url: str, redis_client: RedisClient, store: RedisJobStore, status: int
) -> None:
    """Later; under the same id, signed anew; a redirect is not followed."""
    listener = Listener(status, status, 200)
    end(store, listener.url)
    with WebhookSender(redis_url, settings(), HERE):
        for calls in (1, 2):
            eventually(lambda calls=calls: called(store, redis_client) == calls)
            assert redis_client.zscore(keys.WEBHOOKS, "job 1") > time.time() + 2
            due_now(redis_client)
        eventually(lambda: store.view("job 1").webhook == "delivered")
    assert [headers["webhook-id"] for _, headers, _ in listener.calls] == ["job 1"] * 3
    listener.close()


def test_nobody_there_is_a_call_in_vain(redis_url: str, redis_client: RedisClient, store: RedisJobStore) -> None:
    """And the webhook stays owed."""
    end(store, "http://127.0.0.1:1/")
    with WebhookSender(redis_url, settings(), HERE):
        eventually(lambda: called(store, redis_client) == 1)
    assert store.view("job 1").webhook == "due"


def test_what_nobody_answers_in_time_is_given_up(
    redis_url: str, redis_client: RedisClient, store: RedisJobStore
) -> None:
    """With the reason, where the job's state is looked up; nothing of it is left."""
    end(store, "http://127.0.0.1:1/")
    with WebhookSender(redis_url, settings(give_up_s=1), HERE):
        eventually(lambda: "given up after 1 calls" in (store.view("job 1").webhook or ""))
    assert not redis_client.exists(keys.WEBHOOKS, keys.WEBHOOK_CALLS)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "127.1", "0x7f.1", "0", "[::1]"])
def test_our_own_addresses_are_never_called(
    redis_url: str, store: RedisJobStore, listener: Listener, host: str
) -> None:
    """However they are written: what the system makes of the name is looked at, just before the call."""
    end(store, f"http://{host}:{listener.server_port}/")
    with WebhookSender(redis_url, settings(), Allowed()):
        eventually(lambda: (store.view("job 1").webhook or "").startswith("given up"))
    assert listener.calls == []


def test_the_address_that_was_checked_is_the_one_that_is_called(
    monkeypatch: pytest.MonkeyPatch, redis_url: str, store: RedisJobStore, listener: Listener
) -> None:
    """A name that changes its address between two questions (DNS rebinding) is asked for once, and changes nothing."""
    asked: list[str] = []

    def resolve(host: str, _port: int, *, timeout_s: float) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    monkeypatch.setattr("worker.webhooks.sender.resolve", resolve)
    end(store, f"http://rebinding.invalid:{listener.server_port}/x")
    with WebhookSender(redis_url, settings(), HERE):
        eventually(lambda: store.view("job 1").webhook == "delivered")
    assert asked == ["rebinding.invalid"]
    assert listener.calls[0][1]["host"] == f"rebinding.invalid:{listener.server_port}"


def test_a_proxy_of_the_environment_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, redis_url: str, store: RedisJobStore, listener: Listener
) -> None:
    """It would resolve the name again, and reach what we may not."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    end(store, listener.url)
    with WebhookSender(redis_url, settings(), HERE):
        eventually(lambda: store.view("job 1").webhook == "delivered")


def test_who_does_not_answer_holds_up_nobody_else(redis_url: str, store: RedisJobStore, listener: Listener) -> None:
    """A silent host gets its share of the calls; the rest is for the others, though they ended later."""
    silent = Listener(200, silent=True, address="127.0.0.2")
    for number in range(20):
        end(store, silent.url, f"silent {number}")
    for number in range(20):
        end(store, listener.url, f"quick {number}")
    with WebhookSender(redis_url, settings(parallel=8, timeout_s=20), HERE):
        eventually(lambda: all(store.view(f"quick {number}").webhook == "delivered" for number in range(20)))
        assert len(silent.calls) <= 2
        silent.silence.set()
    silent.close()


def test_a_slow_answer_ends_with_the_time_limit(
    redis_url: str, redis_client: RedisClient, store: RedisJobStore
) -> None:
    """Of the whole call."""
    silent = Listener(200, silent=True)
    end(store, silent.url)
    with WebhookSender(redis_url, settings(timeout_s=0.3), HERE):
        eventually(lambda: called(store, redis_client) == 1)
    silent.close()


def test_what_a_dead_sender_held_is_called_by_another(
    redis_url: str, redis_client: RedisClient, store: RedisJobStore, listener: Listener
) -> None:
    """It was claimed, and its process was killed: after a while it is due again, for everybody."""
    end(store, listener.url)

    async def claim_and_die() -> list[str]:
        client = connect_async(redis_url)
        owed = await RedisOutbox(client).claim(10, hold_s=1)
        again = await RedisOutbox(client).claim(10, hold_s=1)
        await client.aclose()
        assert again == []
        return [one.job_id for one in owed]

    assert asyncio.run(claim_and_die()) == ["job 1"]
    with WebhookSender(redis_url, settings(), HERE):
        eventually(lambda: store.view("job 1").webhook == "delivered")


def test_two_senders_share_the_work(redis_url: str, store: RedisJobStore, listener: Listener) -> None:
    """Each webhook is called by one of them."""
    for number in range(100):
        end(store, listener.url, str(number))
    with WebhookSender(redis_url, settings(parallel=64), HERE), WebhookSender(redis_url, settings(parallel=64), HERE):
        eventually(lambda: all(store.view(str(number)).webhook == "delivered" for number in range(100)), within_s=30)
    assert sorted(headers["webhook-id"] for _, headers, _ in listener.calls) == sorted(map(str, range(100)))


def test_redis_going_away_ends_no_sender(own_redis: Any, listener: Listener) -> None:
    """It comes back, and what is owed is called."""
    from common.redis_client import connect

    client = connect(own_redis.url)
    store = RedisJobStore(client, ttl_s=100)
    with WebhookSender(own_redis.url, settings(), HERE):
        own_redis.kill()
        own_redis.start()
        end(store, listener.url)
        eventually(lambda: store.view("job 1").webhook == "delivered", within_s=20)
    client.close()
