"""
The host's process tree: vLLM imported once, for every engine that is forked from it.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

import psutil

import worker
from worker.engines.environment import engine_environment
from worker.engines.process import EngineProcess, Launch

_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else vLLM on the CPU wants a worker process besides
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",  # a fork after an OpenMP region may hang; each engine sets its own number
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # "is there a card?" without touching CUDA
}


class HostProcess(EngineProcess):
    """The host's process tree; the engines are in it too, so its guard ends them all."""

    def __init__(self, *, run_dir: Path, python: Path, env: Mapping[str, str]) -> None:
        # All cards: the host may not touch them, and each engine is shown its own.
        env = {**engine_environment(env, gpus=()), **_ENV}
        del env["CUDA_VISIBLE_DEVICES"]

        def launch(path: Path) -> Launch:
            # vLLM's Python sees this one package of ours, and nothing else that lies beside it.
            imports = path.parent / "import"
            imports.mkdir()
            (imports / "worker").symlink_to(Path(worker.__file__).parent)
            line = [str(python), "-m", "worker.engines.vllm_host_main", str(path)]
            return Launch(command=line, env={**env, "PYTHONPATH": str(imports)})

        super().__init__(name="vllm-host", run_dir=run_dir, launch=launch)

    def connect(self) -> socket.socket | None:
        """Connect to the host; None while it imports vLLM, and after it has ended."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(self.socket))
        except OSError:
            connection.close()
            return None
        self.ready = True
        return connection

    def own_bytes(self) -> int | None:
        """Resident bytes of the host without its engines."""
        try:
            found = [process for process in self._tree() if process.ppid() == self._guard.pid]
            return int(found[0].memory_info().rss) if found else None
        except psutil.Error:
            return None
