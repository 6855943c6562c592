"""
A RabbitMQ of the tests' own, where one is installed; its Erlang's name server included.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from tests.waiting import eventually
from worker.embedded_redis import free_port

_START_S = 60.0


def find_program() -> str | None:
    """RabbitMQ's own script; the one that Debian puts on the PATH runs for one account only."""
    packaged = sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server"))
    return str(packaged[-1]) if packaged else shutil.which("rabbitmq-server")


def why_no_rabbit() -> str | None:
    """Why there is none here; None = there is one."""
    return None if find_program() else "no rabbitmq-server on the PATH"


class Rabbit:
    """One RabbitMQ on the loopback with its files in *folder*; it keeps its durable messages over a kill."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = free_port()
        name_server, nodes = free_port(), free_port()
        folder.mkdir()
        (folder / "rabbitmq.conf").write_text(f"listeners.tcp.local = 127.0.0.1:{self.port}\n")
        self._env = {
            **os.environ,
            "HOME": str(folder),  # Erlang's cookie
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(name_server),
            "RABBITMQ_NODENAME": f"tests{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(nodes),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        }

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def start(self) -> None:
        """Start it and wait until it listens."""
        with (self._folder / "rabbit.log").open("ab") as output:
            self._process = subprocess.Popen(
                [str(find_program())], env=self._env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        eventually(self._listens, within_s=_START_S, what="RabbitMQ listens")

    def kill(self) -> None:
        """End it with all that it has started, as a power cut would."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """End it, and its name server, which has a session of its own."""
        if self._process.poll() is None:
            self.kill()
        eventually(self._ends_name_server, what="Erlang's name server has forgotten the node, and ends")

    def _listens(self) -> bool:
        assert self._process.poll() is None, (self._folder / "rabbit.log").read_text()[-2000:]
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def _ends_name_server(self) -> bool:
        return subprocess.run(["epmd", "-kill"], env=self._env, capture_output=True, check=False).returncode == 0
