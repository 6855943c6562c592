"""
Runs llama.cpp's server, one per model: the `llama-server` that is here, or the one inside xllamacpp.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from common.errors import EngineMissing
from common.settings import LlamaCppSettings
from worker.catalog.spec import EngineKind
from worker.engines.environment import engine_environment
from worker.engines.http import MAX_CONNECTIONS
from worker.engines.process import Launch
from worker.engines.server_engine import FilesOf, ServerEngine
from worker.selection.placement import Placement

ALL_LAYERS = 999  # llama.cpp's own -1 means "as it likes"; more layers than any model has means all


class LlamaCppEngine(ServerEngine):
    """
    An `Engine`: llama.cpp, on a card, on the CPU, or on both.

    Parameters
    ----------
    run_dir, files_of
        See `ServerEngine`.
    server
        The program and its first arguments, as `find_server` gives them.
    """

    kind: ClassVar[EngineKind] = EngineKind.LLAMACPP

    def __init__(
        self, *, run_dir: Path, files_of: FilesOf, server: Sequence[str], cpu_count: int | None = None
    ) -> None:
        super().__init__(run_dir=run_dir, files_of=files_of)
        self._server = tuple(server)
        self._cpu_count = cpu_count or os.cpu_count() or 1

    def launch(self, placement: Placement, files: Path | str, socket: Path) -> Launch:
        """Say how to start llama.cpp."""
        return Launch(
            command=command(placement, server=self._server, model=files, socket=socket, cpu_count=self._cpu_count),
            env=engine_environment(os.environ, gpus=placement.gpus),
        )


def command(
    placement: Placement, *, server: Sequence[str], model: Path | str, socket: Path, cpu_count: int
) -> list[str]:
    """Build the command line of llama.cpp's server; `llamacpp_main` reads the same one."""
    slots = placement.max_num_seqs
    layers = ALL_LAYERS if placement.n_gpu_layers < 0 else placement.n_gpu_layers
    line = [*server, "--model", str(model), "--alias", placement.model_id, "--host", str(socket)]
    # llama.cpp divides the context among its slots; each of ours gets the whole length.
    line += ["--ctx-size", str(placement.max_model_len * slots), "--parallel", str(slots)]
    line += ["--n-gpu-layers", str(layers), "--fit", "off"]  # the placement is decided already
    if placement.kv_cache_dtype is not None:
        line += ["--cache-type-k", placement.kv_cache_dtype, "--cache-type-v", placement.kv_cache_dtype]
    # One core for the worker: llama.cpp's threads wait for each other at every layer, and on two busy cores two of
    # them took 18 s where one took 3 to 9 (6 x 200 tokens).
    line += ["--threads", str(max(1, cpu_count - 1))]
    # A kept connection occupies a thread, so there must be one for each that we may open, and for the health check.
    line += ["--threads-http", str(MAX_CONNECTIONS + 4)]
    line += ["--cache-ram", "0"]  # else up to 8 GiB of old prompts, which no estimate knows of
    # 2 = warnings. The sizes of its buffers come at 4 (3 in older builds), with 24 lines for every request; a level
    # that ends with the load there is none.
    line += ["--log-verbosity", "2", "--no-webui", "--jinja"]
    if "embedding" in placement.spec.capabilities:
        line += ["--embeddings"]
    return line


def find_server(settings: LlamaCppSettings) -> tuple[str, ...]:
    """
    Find llama.cpp's server: the program and its first arguments.

    1. LLAMACPP_SERVER, if it is set.
    2. `llama-server` on the PATH: somebody built it for this machine's card.
    3. xllamacpp, in a program of ours.

    Raises
    ------
    EngineMissing
        Says where it looked and what to do.
    """
    # (1) Named by the operator, so nothing else will do.
    if settings.server is not None:
        if found := shutil.which(settings.server):
            return (str(Path(found).absolute()),)
        raise EngineMissing(f"LLAMACPP_SERVER={settings.server}: no program there. {_HOW_TO_INSTALL}")

    # (2) On the PATH.
    if found := shutil.which("llama-server"):
        return (str(Path(found).absolute()),)

    # (3) xllamacpp; found, not imported: the engine lives in its own process.
    if importlib.util.find_spec("xllamacpp") is not None:
        return (sys.executable, "-I", str(Path(__file__).with_name("llamacpp_main.py")))
    raise EngineMissing(f"No llama-server on the PATH, and xllamacpp is not installed. {_HOW_TO_INSTALL}")


def find_version(server: Sequence[str]) -> str | None:
    """Give the version of what `find_server` found; None if it does not say."""
    if server[0] == sys.executable:
        return importlib.metadata.version("xllamacpp")
    try:
        asked = subprocess.run([*server, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^version: (\S+)", asked.stderr + asked.stdout, re.MULTILINE)
    return found[1] if found else None


_HOW_TO_INSTALL = (
    "Install shiftworker[llamacpp] (CPU), or llama.cpp itself and name its llama-server in LLAMACPP_SERVER."
)
