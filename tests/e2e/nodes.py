"""
pytest-celery nodes that are plain processes: what a CeleryTestNode asks of a container, over a child process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

from tests.waiting import eventually
from worker.embedded_redis import EmbeddedRedis


class RedisNode:
    """Redis with an append-only file, as a container of pytest-celery's Redis broker and backend."""

    def __init__(self, folder: Path) -> None:
        self.id = uuid.uuid4().hex
        self.name = "redis"
        self.server = EmbeddedRedis(folder)
        self.server.start()

    @property
    def status(self) -> str:
        return "running" if self.server.running else "exited"

    @property
    def celeryconfig(self) -> dict[str, Any]:
        url = self.server.url
        return {"url": url, "host_url": url, "hostname": "127.0.0.1", "port": self.server.port, "vhost": "0"}

    def ready(self) -> bool:
        return self.server.running

    def reload(self) -> None:
        """Docker's objects are snapshots; ours looks each time."""

    def kill(self, signal: str = "SIGKILL") -> None:
        self.server.kill(_number(signal))

    def restart(self, timeout: float = 10) -> None:
        self.server.stop()
        self.server.start()

    def logs(self) -> str:
        return self.server.log.read_text(errors="replace")

    def teardown(self) -> None:
        self.server.stop()


class ProgramNode:
    """A router or a worker, as a container of pytest-celery's worker."""

    def __init__(self, role: str, folder: Path, env: dict[str, str], ready_line: str) -> None:
        self.id = uuid.uuid4().hex
        self.name = role
        self.env = {**os.environ, **env}
        self._ready_line = ready_line
        self._folder = folder
        self._log = folder / f"{role}.log"
        self.start()

    def start(self) -> None:
        self._read_from = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "worker", self.name],
                cwd=self._folder,
                env=self.env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def status(self) -> str:
        return "running" if self.process.poll() is None else "exited"

    def ready(self) -> bool:
        def up() -> bool:
            assert self.process.poll() is None, f"{self.name} ended:\n{self.logs()[-3000:]}"
            return self._ready_line in self.logs()[self._read_from :]

        eventually(up, within_s=180, what=f"{self.name} says {self._ready_line!r}")
        return True

    def reload(self) -> None:
        """Docker's objects are snapshots; ours looks each time."""

    def kill(self, signal: str = "SIGKILL") -> None:
        """The process alone, as the kernel's out-of-memory killer would: not its engines."""
        self.process.send_signal(_number(signal))
        self.process.wait(90)

    def restart(self, timeout: float = 10) -> None:
        if self.status == "running":
            self.kill("SIGTERM")
        self.start()
        self.ready()

    def logs(self) -> str:
        return self._log.read_text(errors="replace")

    def teardown(self) -> None:
        if self.status == "running":
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()


def _number(name: str | int) -> int:
    return name if isinstance(name, int) else signal.Signals[name]
