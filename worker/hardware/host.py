"""
How much memory and how many cores does this process have? A container's limit counts, not the machine's size.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from worker.hardware.gpu import Gpu, Machine, Source

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


@dataclass(frozen=True, kw_only=True)
class Host:
    """The machine without its cards."""

    ram_total_bytes: int
    ram_available_bytes: int
    cpu_count: int


def read_host(*, cgroups: Path = _CGROUPS, own_cgroup: Path = _OWN_CGROUP) -> Host:
    """Read memory and cores as they are now; where a cgroup allows less, that is what there is."""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    for limit, used in _limits(cgroups, own_cgroup):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return Host(ram_total_bytes=total, ram_available_bytes=available, cpu_count=_cores())


def machine_with(gpus: tuple[Gpu, ...], *, source: Source) -> Machine:
    """Put the cards that *source* read beside the host's memory and cores as they are now."""
    host = read_host()
    return Machine(
        source=source,
        gpus=gpus,
        ram_total_bytes=host.ram_total_bytes,
        ram_available_bytes=host.ram_available_bytes,
        cpu_count=host.cpu_count,
    )


def _cores() -> int:
    # A pinned process (taskset, a cpuset) may not use every core; macOS does not say.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _limits(cgroups: Path, own_cgroup: Path) -> list[tuple[int, int]]:
    """Every memory limit above this process as (limit, used) in bytes; empty without cgroups."""
    try:
        lines = own_cgroup.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found += _walk(cgroups, path, limit="memory.max", used="memory.current", cache="inactive_file")
        elif "memory" in controllers.split(","):
            names = {"limit": "memory.limit_in_bytes", "used": "memory.usage_in_bytes", "cache": "total_inactive_file"}
            found += _walk(cgroups / "memory", path, **names)
    return found


def _walk(root: Path, path: str, *, limit: str, used: str, cache: str) -> list[tuple[int, int]]:
    """Read the cgroup *path* and every one above it, up to *root*: the tightest of them rules."""
    # Inside a container the path may be the host's and lead nowhere here; the root is then the container's own.
    here = root / path.lstrip("/")
    folders = [folder for folder in (here, *here.parents) if folder == root or root in folder.parents]
    found = []
    for folder in folders:
        try:
            allowed = int((folder / limit).read_text())
            taken = int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # "max" means no limit here
            continue
        # Like `docker stats`: page cache that nobody uses goes as soon as somebody asks.
        found.append((allowed, max(0, taken - int(stat.get(cache, 0)))))
    return found
