"""
An endpoint as one pays for: llama.cpp's own server on the loopback, with an API key, in a process of its own.

    python -m tests.fakes.cloud_server MODEL PORT KEY CONTEXT SLOTS
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import xllamacpp

from tests.waiting import eventually


class CloudServer:
    """The server, from outside: start it, kill it, start it again at the same address."""

    key = "sk-not-to-be-told-9f8e7d"

    def __init__(self, folder: Path, *, model: Path, context: int, slots: int = 4) -> None:
        self._log = folder / "cloud.log"
        self._port = _free_port()
        self._command = [sys.executable, "-m", __name__, str(model), str(self._port), self.key]
        self._command += [str(context), str(slots)]
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{self._port}/v1"

    def start(self) -> None:
        """Have it answer; does nothing while it runs."""
        if self._process is not None and self._process.poll() is None:
            return
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        eventually(self._answers, within_s=60, what="the endpoint answers")

    def kill(self) -> None:
        """End it as `kill -9` does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def working(self) -> bool:
        """Is it busy with a request?"""
        return self._process is not None and psutil.Process(self._process.pid).cpu_percent(interval=0.1) > 20

    def log(self) -> str:
        """Everything that it printed: at this level a line for each request."""
        return self._log.read_text(errors="replace")

    def _answers(self) -> bool:
        try:
            health = self.url.removesuffix("v1") + "health"  # the one page that needs no key
            return httpx.get(health, trust_env=False).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def main(model: str, port: str, key: str, context: str, slots: str) -> None:
    """Serve until a signal ends the process."""
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = {"its-own-name"}
    params.hostnames = ["127.0.0.1"]
    params.port = int(port)
    params.api_keys = [key]
    params.n_parallel = int(slots)
    params.n_ctx = int(context) * int(slots)
    params.n_gpu_layers = 0
    params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_threads_http = 132
    params.cache_ram_mib = 0
    params.use_jinja = True
    params.ui = False
    _server = xllamacpp.Server(params)  # serves as long as it is referred to
    signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
