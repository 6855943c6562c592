"""
Celery as we set it: TLS to Redis for everybody who reads the one URL, and options that can be shown.
"""

from __future__ import annotations

import json
import ssl
from typing import Any

import pytest
import redis
from celery import Celery

from common.celery_app import create_app, with_tls_checked
from common.redis_client import connect
from common.settings import Settings

TLS = "rediss://sw:word@redis.invalid:6380/0"


def app_for(url: str) -> Celery:
    settings = Settings.from_env()
    return create_app(settings.model_copy(update={"redis": settings.redis.model_copy(update={"url": url})}))


def connections(app: Celery) -> list[dict[str, Any]]:
    """How the transport and Celery's result backend would connect."""
    broker = app.connection_for_read()
    channel_class = broker.transport.Channel
    channel = object.__new__(channel_class)
    channel._connection_params = {}
    channel.connection = type("Transport", (), {"client": broker})()
    return [channel._connparams(), app.backend.connparams]


@pytest.mark.parametrize("url", [TLS, f"{TLS}?ssl_ca_certs=/ca.pem", f"{TLS}?ssl_cert_reqs=required"])
def test_a_rediss_url_means_tls_and_a_certificate_that_is_checked(url: str) -> None:
    """In the transport, in Celery's backend and in our own client, with the account of the URL."""
    for found in connections(app_for(url)):
        assert issubclass(found["connection_class"], redis.SSLConnection)
        assert found["ssl_cert_reqs"] == ssl.CERT_REQUIRED
        assert (found["username"], found["password"]) == ("sw", "word")
        assert found.get("ssl_ca_certs") == ("/ca.pem" if "ca.pem" in url else None)
    own = connect(url).connection_pool.make_connection()
    assert isinstance(own, redis.SSLConnection)
    assert own.cert_reqs == ssl.CERT_REQUIRED


def test_whoever_wants_no_check_must_say_so() -> None:
    """And a URL without TLS stays what it is."""
    assert with_tls_checked(f"{TLS}?ssl_cert_reqs=none") == f"{TLS}?ssl_cert_reqs=none"
    assert with_tls_checked("redis://x/0") == "redis://x/0"
    for found in connections(app_for("redis://sw:word@redis.invalid:6380/0")):
        assert not issubclass(found.get("connection_class", redis.Connection), redis.SSLConnection)


def test_the_options_of_the_broker_can_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """`celery inspect stats` and Flower send them as JSON."""
    monkeypatch.setenv("SWITCH_MAX_WAITS", "acme=60,*:9=3600")
    options = create_app(Settings.from_env()).conf.broker_transport_options
    assert json.loads(json.dumps(options)) == options
    assert options["max_waits"] == ["acme=60", "*:9=3600"]
