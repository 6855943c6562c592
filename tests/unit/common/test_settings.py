"""
The environment: read once, and every mistake named with its variable, its value and what is allowed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.errors import BadSetting
from common.redis_client import without_password
from common.settings import Settings

PREFIXES = tuple(
    f"{group.annotation.model_config['env_prefix']}"
    for group in Settings.model_fields.values()
    if group.annotation is not None
)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings but the test's own."""
    for name in list(os.environ):
        if name.startswith(PREFIXES):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("REDIS_URL", "localhost:6379", "must start with redis://, rediss:// or unix://"),
        ("VLLM_MAX_MODEL_LEN", "long", "valid integer"),
        ("VLLM_GPU_MEMORY_UTILIZATION", "90", "less than or equal to 1 (share of the card; 0 = computed)"),
        ("VLLM_FORCE", "perhaps", "valid boolean"),
        ("LLAMACPP_N_GPU_LAYERS", "-2", "greater than or equal to -1"),
        ("WORKER_NAME", "my worker", "match pattern"),
        (
            "WORKER_CONCURRENCY",
            "0",
            "greater than or equal to 1 (threads: jobs at once where the engine needs one for each)",
        ),
        ("WORKER_HARDWARE", "tpu", "'auto', 'cpu' or 'stub'"),
        ("SWITCH_TIMEOUT_S", "-1", "greater than 0 (for one attempt to load and verify)"),
        ("SWITCH_ATTEMPTS", "11", "less than or equal to 10"),
        ("SWITCH_MAX_WAITS", "acme=60,zeta", "'zeta' is not TENANT=SECONDS"),
        ("JOB_RESULT_TTL_S", "forever", "valid number"),
        ("CLOUD_URL", "api.example.org/v1", "must start with https:// (or http://) and name a host"),
        ("CLOUD_URL", "https://", "must start with https:// (or http://) and name a host"),
        ("CLOUD_URL", "https://api.example.org/v1?key=k", "must be an address alone; the key goes into CLOUD_API_KEY"),
        ("CLOUD_PARALLEL", "0", "greater than or equal to 1 (jobs that are there at once)"),
        ("DELIVERY_LEASE_S", "0", "greater than 0"),
        ("STATUS_STREAM_LENGTH", "0", "greater than or equal to 1"),
        ("LOG_LEVEL", "LOUD", "'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
        ("FLOWER_PORT", "70000", "less than or equal to 65535 (0 = a free one)"),
    ],
)
def test_a_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, allowed: str) -> None:
    """Variable, value, what is allowed, and where all settings are described."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(BadSetting) as caught:
        Settings.from_env()

    assert f"{variable}='{value}': " in caught.value.message
    assert allowed in caught.value.message
    assert ".env.example" in caught.value.message


def test_every_mistake_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One start, one list."""
    monkeypatch.setenv("WORKER_CONCURRENCY", "0")
    monkeypatch.setenv("WORKER_HARDWARE", "tpu")
    monkeypatch.setenv("JOB_MAX_ATTEMPTS", "0")

    with pytest.raises(BadSetting, match=r"WORKER_CONCURRENCY='0'.*; WORKER_HARDWARE='tpu'.*; JOB_MAX_ATTEMPTS='0'"):
        Settings.from_env()


def test_a_secret_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither Flower's password nor the one in a Redis address that is not valid."""
    monkeypatch.setenv("FLOWER_PASSWORD", "hunter2")
    settings = Settings.from_env()
    assert settings.flower.password is not None
    assert settings.flower.password.get_secret_value() == "hunter2"
    assert "hunter2" not in f"{settings!r} {settings.model_dump_json()}"

    monkeypatch.setenv("REDIS_URL", "http://shiftworker:hunter2@redis:6379")
    with pytest.raises(BadSetting) as caught:
        Settings.from_env()
    assert "REDIS_URL='http://shiftworker:...@redis:6379'" in caught.value.message
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    ("url", "key", "why"),
    [
        ("https://api.example.org/v1", "two words", "visible ASCII"),  # httpx would quote it in its error
        ("https://api.example.org/v1", "schlüssel", "visible ASCII"),
        ("http://api.example.org/v1", "hunter2", "can be read on its way"),
        ("https://me:hunter2@api.example.org/v1", "k", "an address alone"),
    ],
)
def test_a_key_that_would_be_told_is_refused(monkeypatch: pytest.MonkeyPatch, url: str, key: str, why: str) -> None:
    """And not shown while it is."""
    monkeypatch.setenv("CLOUD_URL", url)
    monkeypatch.setenv("CLOUD_API_KEY", key)
    monkeypatch.setenv("CLOUD_MODEL", "theirs")
    with pytest.raises(BadSetting, match=why) as caught:
        Settings.from_env()

    assert not any(secret in caught.value.message for secret in ("two words", "schlüssel", "hunter2"))


def test_an_endpoint_needs_the_name_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could guess it; on the loopback no TLS is asked for."""
    monkeypatch.setenv("CLOUD_URL", "http://127.0.0.1:8000/v1")
    monkeypatch.setenv("CLOUD_API_KEY", "k")
    with pytest.raises(BadSetting, match="CLOUD_MODEL=None: CLOUD_URL needs it"):
        Settings.from_env()

    monkeypatch.setenv("CLOUD_MODEL", "theirs")
    monkeypatch.setenv("CLOUD_FOR_MODELS", "small, large")
    cloud = Settings.from_env().cloud
    assert (cloud.model, cloud.for_models, cloud.capabilities) == ("theirs", ("small", "large"), ("chat",))


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a compose file may pass everything through."""
    defaults = Settings.from_env()
    for name, group in Settings.model_fields.items():
        assert group.annotation is not None
        for field in group.annotation.model_fields:
            monkeypatch.setenv(f"{group.annotation.model_config['env_prefix']}{field}".upper(), "")
            assert getattr(defaults, name) is not None

    assert Settings.from_env() == defaults


def test_values_are_read_in_their_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists by commas, yes and no, paths."""
    monkeypatch.setenv("MODELS_ONLY", "small, large,")
    monkeypatch.setenv("MODELS_DIR", "/models")
    monkeypatch.setenv("VLLM_FORCE", "yes")
    settings = Settings.from_env()

    assert settings.models.only == ("small", "large")
    assert settings.models.dir == Path("/models")
    assert settings.vllm.force is True


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("redis://:hunter2@redis:6379/0", "redis://:...@redis:6379/0"),
        ("rediss://me:hun%40ter2@redis/1", "rediss://me:...@redis/1"),
        ("redis://me@redis", "redis://me@redis"),
        ("redis://me:hun@ter/2@redis", "redis://me:...@redis"),  # not valid, and still not shown
        ("unix:///run/redis.sock?db=1&password=hunter2", "unix:///run/redis.sock?db=1&password=..."),
        ("redis://redis?password=hun@ter2&db=1", "redis://redis?password=...&db=1"),
        ("redis://[::1", "redis://[::1"),
    ],
)
def test_an_address_is_shown_without_its_password(url: str, shown: str) -> None:
    """Also one that is not valid; everything else stays, for it says where we looked."""
    assert without_password(url) == shown
