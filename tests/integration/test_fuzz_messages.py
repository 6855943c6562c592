"""
Hand-made Celery messages, as wrong as one can make them: each job ends as failed, and the router stays up.
"""

from __future__ import annotations

import base64
import json
import pickle
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import keys
from common.redis_client import RedisClient
from common.redis_job_store import RedisJobStore
from common.schemas import JobState, Offer, OfferedModel, Outcome, utc_now
from tests.e2e.nodes import ProgramNode
from tests.waiting import eventually

GOOD = {"messages": [{"role": "user", "content": "Hi"}]}
SMALL = OfferedModel(id="small", tier=1, complexity_up_to=1.0, max_model_len=1000, capabilities=("chat",))
PICKLED = base64.b64encode(pickle.dumps(([GOOD], {}, {}))).decode()


@pytest.fixture(scope="module")
def router(shared_redis: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProgramNode]:
    """A router process, which is the same one in all tests of this file."""
    from common.redis_client import connect

    client = connect(shared_redis.url)
    client.flushall()
    folder: Path = tmp_path_factory.mktemp("router")
    env = {"REDIS_URL": shared_redis.url, "WORKER_NAME": "fuzz", "LIMIT_BODY_BYTES": "1000000", "LOG_FORMAT": "json"}
    node = ProgramNode("router", folder, env, " ready.")
    eventually(node.ready, within_s=30)
    yield node
    node.teardown()
    client.close()


@pytest.fixture
def client(router: ProgramNode, shared_redis: Any) -> Iterator[RedisClient]:
    from common.redis_client import connect

    found = connect(shared_redis.url)
    offer = Offer(worker="w", models=(SMALL,), at=utc_now())
    found.hset(keys.FLEET, "w", offer.model_dump_json())
    yield found
    assert router.process.poll() is None, router.logs()[-3000:]
    found.close()


def message(body: bytes, job_id: Any, *, content_type: str = "application/json", **headers: Any) -> dict[str, Any]:
    """A message of the submit task as kombu writes it, with this *body* in it."""
    return {
        "body": base64.b64encode(body).decode(),
        "content-encoding": "utf-8",
        "content-type": content_type,
        "headers": {"lang": "py", "task": keys.SUBMIT_TASK, "id": job_id, "root_id": job_id, **headers},
        "properties": {
            "correlation_id": job_id,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": keys.SUBMIT_QUEUE},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
        },
    }


def push(client: RedisClient, found: Any) -> None:
    client.lpush(keys.SUBMIT_QUEUE, found if isinstance(found, str | bytes) else json.dumps(found))


def args(*values: Any, **fields: Any) -> bytes:
    return json.dumps([values, fields, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]).encode()


def outcome(client: RedisClient, job_id: str) -> Outcome:
    """The job's outcome; waits for it."""
    store = RedisJobStore(client, ttl_s=1000)
    eventually(lambda: store.outcome(job_id) is not None, what=f"an outcome of {job_id!r}")
    found = store.outcome(job_id)
    assert found is not None
    return found


def is_answered_for(client: RedisClient, job_id: str, raw: Any) -> Outcome:
    push(client, raw)
    found = outcome(client, job_id)
    assert found.state is JobState.FAILED
    eventually(lambda: not client.hlen(keys.UNACKED), what="the message is acknowledged")
    return found


DEEP = b"[" * 100_000 + b"]" * 100_000
BODIES: dict[str, bytes] = {
    "no body": args(),
    "two bodies": args(GOOD, GOOD),
    "a text": args("Hi"),
    "a list": args([GOOD]),
    "nothing": args(None),
    "empty": args({}),
    "no role": args({"messages": [{"content": "Hi"}]}),
    "messages of texts": args({"messages": ["Hi"]}),
    "two kinds": args({**GOOD, "prompt": "Hi"}),
    "a model of a number": args({**GOOD, "model": 7}),
    "a model of a path": args({**GOOD, "model": "../../etc/passwd"}),
    "a model of a folder": args({**GOOD, "model": "/etc"}),
    "a model of control characters": args({**GOOD, "model": "a\x00b\r\nc"}),
    "a model of another queue": args({**GOOD, "model": "small\x06\x163"}),
    "ten million characters": args({"messages": [{"role": "user", "content": "x" * 10_000_000}]}),
    "too long for its model": args({"messages": [{"role": "user", "content": "word " * 100_000}]}),
    "a priority out of range": args({**GOOD, "priority": 10**30}),
    "a priority of a fraction": args({**GOOD, "priority": 1.5}),
    "NaN": args({**GOOD, "temperature": float("nan")}),
    "infinity": args({**GOOD, "temperature": float("inf")}),
    "a deadline that is NaN": args({**GOOD, "deadline": float("nan")}),
    "a deadline beyond all years": args({**GOOD, "deadline": 1e300}),
    "half a surrogate pair": args({"messages": [{"role": "user", "content": "\ud800"}]}),
    "half a surrogate pair as a key": args({**GOOD, "\ud800": 1}),
    "half a surrogate pair as a tenant": args({**GOOD, "tenant": "\ud800"}),
    "half a surrogate pair as a webhook": args({**GOOD, "webhook": "http://\ud800/"}),
    "a webhook without a secret": args({**GOOD, "webhook": "https://a.example/"}),
    "an image of ours": args({"messages": [{"role": "user", "content": [{"image_url": "http://127.0.0.1/"}]}]}),
    "an image of a file": args({"messages": [{"role": "user", "content": [{"image_url": "file:///etc/passwd"}]}]}),
    "too many answers": args({**GOOD, "n": 10**9}),
    "a number larger than any": b'[[{"messages":[{"role":"user","content":"Hi"}],"seed":1'
    + b"0" * 10_000
    + b"}],{},{}]",
    "nested": args({**GOOD, "x": json.loads("[" * 500 + "]" * 500)}),
    "nested deeper than Python reads": b"[[" + DEEP + b"], {}, {}]",
    "no JSON": b"{",
    "nothing at all": b"",
    "no UTF-8": b'[["\xff\xfe"], {}, {}]',
    "an object": b'{"a": 1}',
    "a number": b"5",
    "a list of two": b"[[], {}]",
    "arguments of a text": b'["abc", {}, {}]',
    "arguments of a number": b"[5, {}, {}]",
    "fields of a list": b"[[], [], {}]",
    "fields of nothing": b"[[], null, {}]",
    "embedded text": b'[[{}], {}, "x"]',
    "embedded callbacks of a text": b'[[{}], {}, {"callbacks": "x", "chain": 5}]',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=list(BODIES))
def test_a_body_that_is_none_ends_as_a_failure(client: RedisClient, body: bytes) -> None:
    """With an error that a producer can read."""
    job_id = str(uuid.uuid4())
    found = is_answered_for(client, job_id, message(body, job_id))
    assert found.error is not None
    assert found.error.message


@pytest.mark.parametrize(
    ("content_type", "encoding", "body"),
    [
        ("application/x-python-serialize", "binary", PICKLED),
        ("application/json", "utf-8", PICKLED),
        ("application/x-yaml", "utf-8", "e30="),
        ("application/msgpack", "binary", "e30="),
        ("text/plain", "utf-8", "aGk="),
        ("what/ever", "utf-8", "aGk="),
        ("application/json", "what-ever", "aGk="),
    ],
)
def test_only_json_is_read(client: RedisClient, content_type: str, encoding: str, body: str) -> None:
    """A pickle would run code; it is refused unread, and the job fails."""
    job_id = str(uuid.uuid4())
    raw = {**message(b"", job_id, content_type=content_type), "body": body, "content-encoding": encoding}
    found = is_answered_for(client, job_id, raw)
    assert found.error is not None
    assert found.error.kind == "InvalidRequest"


HEADERS: dict[str, dict[str, Any]] = {
    "retries of a text": {"retries": "x"},
    "an eta of a number": {"eta": 5},
    "an eta of a text": {"eta": "soon"},
    "an expiry of a text": {"expires": "soon"},
    "time limits of a text": {"timelimit": "x"},
    "time limits of texts": {"timelimit": ["x", "y"]},
    "a root of an object": {"root_id": {}},
    "another task": {"task": "shiftworker.nothing"},
    "a task of a number": {"task": 5},
    "an argsrepr of an object": {"argsrepr": {"a": 1}},
    "stamps of a number": {"stamped_headers": 5, "stamps": 7},
    "a group of a number": {"group": 5, "group_index": "x"},
}


@pytest.mark.parametrize("headers", HEADERS.values(), ids=list(HEADERS))
def test_a_header_that_is_none_ends_as_a_failure(client: RedisClient, headers: dict[str, Any]) -> None:
    """Also where Celery itself stumbles over it."""
    job_id = str(uuid.uuid4())
    is_answered_for(client, job_id, message(args({}), job_id, **headers))


RAW = [
    "", "x", "null", "5", "[]", "{}", '"text"', "\x00", '{"body": "x"}', b"\xff\xfe", "[" * 100_000,
    '{"body": 5, "properties": {}}', '{"body": "", "properties": {"delivery_info": 5, "delivery_tag": "t"}}',
    '{"body": "", "properties": {"delivery_info": {"exchange": "", "routing_key": ""}, "delivery_tag": "t"}}',
]  # fmt: skip


@pytest.mark.parametrize("job_id", [None, 5, [], {}, "", "x" * 10_000, "a\x00b", "a b\n", "ü😀", True, {"a": []}])
def test_an_id_that_is_none_stops_nobody(client: RedisClient, job_id: Any) -> None:
    """Nobody can ask for such a job; the next one is answered."""
    push(client, message(args({}), job_id))
    after = str(uuid.uuid4())
    is_answered_for(client, after, message(args({}), after))


@pytest.mark.parametrize("raw", RAW, ids=range(len(RAW)))
def test_what_is_no_message_is_set_aside(client: RedisClient, raw: str | bytes) -> None:
    """The next one is answered."""
    push(client, raw)
    after = str(uuid.uuid4())
    is_answered_for(client, after, message(args({}), after))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=10), children, max_size=4),
    max_leaves=10,
)
FIELDS = st.sampled_from(
    ["messages", "prompt", "input", "model", "priority", "deadline", "tenant", "webhook", "n", "max_tokens", "stream"]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(FIELDS | st.text(max_size=10), JSON, max_size=6))
def test_whatever_the_body_says_the_job_is_routed_or_ends(client: RedisClient, fields: dict[str, Any]) -> None:
    """Nothing stays unsaid of it."""
    job_id = str(uuid.uuid4())
    push(client, message(args(fields), job_id))
    store = RedisJobStore(client, ttl_s=1000)
    ended = {JobState.ROUTED, JobState.FAILED, JobState.EXPIRED}  # a number is a moment, and may be a deadline gone by
    eventually(lambda: store.view(job_id).state in ended, what=f"{fields!r} is routed or ends")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(headers=st.dictionaries(st.sampled_from(sorted({k for h in HEADERS.values() for k in h} | {"id"})), JSON))
def test_whatever_the_headers_say_the_next_job_is_answered(client: RedisClient, headers: dict[str, Any]) -> None:
    """Together with headers that are good."""
    first, after = message(args({}), str(uuid.uuid4())), str(uuid.uuid4())
    first["headers"].update(headers)
    push(client, first)
    is_answered_for(client, after, message(args({}), after))
