"""
Why did the engine not start? Finds the lines that say so in what it printed, and whether it lacked memory.
"""

from __future__ import annotations

import re

# "(EngineCore pid=7) ERROR 11-21 12:00:00 [core.py:1] " of vLLM; "0.00.004.444 E srv    load_model: " of llama.cpp.
_PREFIX = re.compile(
    r"^(\([^)]*pid=\d+\) ?)?((ERROR|WARNING|INFO|CRITICAL) [\d-]+ [\d:.]+ \[[^\]]*\] ?)?"
    r"([\d.]+\s+[EWID]\s+(?=\S))?"
)
_RAISED = re.compile(r"^([\w.]+\.)?\w*(Error|Exception|Interrupt)\b(:|$)")  # the last line of a traceback
_COMPLAINT = re.compile(r"\b(error|failed|cannot|invalid|not found|no such)\b", re.IGNORECASE)
# vLLM's front process says only this; the reason stands above it, printed by the engine's own process.
_GENERIC = ("Engine core initialization failed", "EngineCore failed to start", "WorkerProc initialization failed")

# vLLM: torch's allocators, on a card and on the host; then its own checks (v1/worker/utils.py, cpu_worker.py,
# v1/core/kv_cache_utils.py). llama.cpp: CUDA's allocator, ggml's buffers, and the C++ library's.
_OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory|DefaultCPUAllocator: (not enough|can't allocate)"
    r"|less than desired \w+ memory utilization|No available memory for the cache blocks"
    r"|KV\s+cache is needed, which is larger than|cudaMalloc failed: out of memory"
    r"|(failed|unable) to allocate .*buffer|std::bad_alloc"
    r"|Failed core proc\(s\): \{'EngineCore': -9\}"  # the kernel has killed it
)
KILLED = 128 + 9  # the exit code of a process that SIGKILL ended, as the guard hands it on

DETAIL_LINES = 2  # pydantic puts its finding on the lines after the error's name
MAX_LINES = 3
MAX_CHARS = 1200


def explain_failure(log: str) -> str:
    """
    Pick the lines of *log* that help, as one line of text.

    1. The last exception that is not a generic one, with the lines that belong to it.
    2. Otherwise the first lines that speak of an error: what follows them are its consequences.
    3. Otherwise the last lines.
    """
    lines = [line for raw in log.splitlines() if (line := _PREFIX.sub("", raw).rstrip())]
    if not lines:
        return "It printed nothing."

    # (1) An exception.
    raised = [i for i, line in enumerate(lines) if _RAISED.match(line) and not says_nothing(line)]
    if raised:
        start = raised[-1]
        following = lines[start + 1 : start + 1 + DETAIL_LINES]
        # No line of a traceback: those are another process's, printed in between.
        details = [line for line in following if line.startswith(" ") and not line.lstrip().startswith("File ")]
        return _joined([lines[start], *details])

    # (2) A complaint.
    if complaints := [line for line in lines if _COMPLAINT.search(line)]:
        return _joined(complaints[:MAX_LINES])

    # (3) Anything.
    return _joined(lines[-MAX_LINES:])


def says_nothing(line: str) -> bool:
    """Does it only say that another process has failed?"""
    return any(generic in line for generic in _GENERIC)


def ran_out_of_memory(log: str, exit_code: int | None) -> bool:
    """Did the engine that printed *log* and ended with *exit_code* lack memory? Killed means: perhaps, so yes."""
    return exit_code == KILLED or _OUT_OF_MEMORY.search(log) is not None


def _joined(lines: list[str]) -> str:
    text = " / ".join(dict.fromkeys(line.strip() for line in lines))
    return f"It said: {text[:MAX_CHARS].rstrip('.')}."
