"""
Secrets stay where they are: nothing that a run prints, stores or answers has one of them in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import JobClient, keys
from common.redis_client import RedisClient, connect
from common.schemas import Offer, OfferedModel, utc_now
from tests.e2e.nodes import ProgramNode
from tests.waiting import eventually
from worker.embedded_redis import EmbeddedRedis

PASSWORD = "planted-redis-password"
SECRETS = {
    "CLOUD_API_KEY": "planted-cloud-key",
    "HF_TOKEN": "hf_planted_hub_token",
    "FLOWER_PASSWORD": "planted-flower-password",
    "WEBHOOK_SECRET": "whsec_cGxhbnRlZC13ZWJob29rLXNlY3JldC1wbGFudGVk",
}
RABBITS = "planted-rabbit-password"
SETTINGS = {
    "BROKER_URL": f"amqp://sw:{RABBITS}@127.0.0.1:1//",  # nobody there, which the router tells
    "CLOUD_URL": "https://cloud.invalid/v1",
    "CLOUD_MODEL": "m",
    "LOG_LEVEL": "DEBUG",
    "WORKER_STUB_ENGINE": "1",
}
BODY = {"messages": [{"role": "user", "content": "Hi"}]}
SMALL = OfferedModel(id="small", tier=1, complexity_up_to=1.0, max_model_len=1000, capabilities=("chat",))


@pytest.fixture
def locked(own_redis: EmbeddedRedis) -> str:
    """A Redis with an account of ours, and without one for everybody; gives its URL."""
    admin: RedisClient = connect(own_redis.url)
    admin.execute_command("ACL", "SETUSER", "sw", "on", f">{PASSWORD}", "~*", "&*", "+@all")
    admin.hset(keys.FLEET, "w", Offer(worker="w", models=(SMALL,), at=utc_now()).model_dump_json())
    admin.execute_command("ACL", "SETUSER", "default", "off")
    admin.close()
    return own_redis.url.replace("redis://", f"redis://sw:{PASSWORD}@")


def said(*arguments: str, env: dict[str, str]) -> str:
    """Everything that a command prints."""
    found = subprocess.run(
        [sys.executable, "-m", "worker", *arguments], env=env, capture_output=True, text=True, timeout=90, check=False
    )
    return found.stdout + found.stderr


def leaks(text: str) -> list[str]:
    return [secret for secret in (PASSWORD, RABBITS, *SECRETS.values()) if secret in text]


def test_no_secret_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, locked: str) -> None:
    """A router at work, its log at its most talkative, jobs that fail, status and doctor; an account of Redis works."""
    env = {**os.environ, **SETTINGS, **SECRETS, "REDIS_URL": locked}
    router = ProgramNode("router", tmp_path, {**SETTINGS, **SECRETS, "REDIS_URL": locked}, " ready.")
    eventually(router.ready, within_s=30)
    client = JobClient(locked)
    refused = [client.submit({**BODY, **fields}) for fields in ({"model": "none"}, {"webhook": "http://127.0.0.1/"})]
    for job_id in refused:
        eventually(lambda job_id=job_id: client.result(job_id) is not None, within_s=20)
    outcomes = "".join(str(client.result(job_id)) for job_id in refused)
    client.close()
    assert "UnknownModel" in outcomes
    assert "AddressRefused" in outcomes

    eventually(lambda: "rabbit.away" in router.logs(), within_s=20)
    status, doctor = said("status", env=env), said("doctor", env=env)
    router.teardown()
    assert "wait for the router" in status
    assert doctor
    assert leaks(outcomes + status + doctor + router.logs()) == []


@pytest.mark.parametrize("command", ["status", "doctor", "submit"])
def test_a_redis_that_says_no_tells_no_password(locked: str, command: str) -> None:
    """Wrong password, nobody there, and an address that is none."""
    arguments = [command, "Hi"] if command == "submit" else [command]
    wrong = locked.replace(PASSWORD, f"{PASSWORD}-wrong")
    nobody = f"redis://sw:{PASSWORD}@127.0.0.1:1/0"
    for url in (wrong, nobody, f"redis://sw:{PASSWORD}@127.0.0.1:notaport/0"):
        text = said(*arguments, env={**os.environ, **SETTINGS, **SECRETS, "REDIS_URL": url})
        assert text
        assert leaks(text) == []


@pytest.mark.parametrize("variable", [*SECRETS, "REDIS_URL"])
def test_a_secret_that_is_not_valid_is_not_repeated(variable: str) -> None:
    """The error names the variable."""
    bad = {"REDIS_URL": f"http://sw:{PASSWORD}@x"}.get(variable, f"{SECRETS.get(variable)}\x01 ü")
    text = said("status", env={**os.environ, **SETTINGS, **SECRETS, "REDIS_URL": "redis://127.0.0.1:1", variable: bad})
    assert leaks(text) == []
