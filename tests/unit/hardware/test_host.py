"""
A container's memory limit counts, not the machine's.
"""

from __future__ import annotations

from pathlib import Path

import psutil

from worker.hardware.host import read_host

MIB = 2**20


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)


def own(tmp_path: Path, line: str) -> Path:
    file = tmp_path / "self"
    file.write_text(f"{line}\n")
    return file


def test_without_cgroups_the_machine_counts(tmp_path: Path) -> None:
    """
    As on macOS: no file, no limit.
    """
    host = read_host(cgroups=tmp_path, own_cgroup=tmp_path / "missing")

    assert host.ram_total_bytes == psutil.virtual_memory().total
    assert host.cpu_count >= 1


def test_the_tightest_limit_above_the_process_rules(tmp_path: Path) -> None:
    """
    The own group says max, its parent 64 MiB: there are 64 MiB, less what is taken, unused cache not counted.
    """
    root = tmp_path / "cgroup"
    write(root / "a" / "b", memory__max="max", memory__current="1", memory__stat="")
    stat = f"anon 1\ninactive_file {8 * MIB}"
    write(root / "a", memory__max=str(64 * MIB), memory__current=str(24 * MIB), memory__stat=stat)

    host = read_host(cgroups=root, own_cgroup=own(tmp_path, "0::/a/b"))

    assert host.ram_total_bytes == 64 * MIB
    assert host.ram_available_bytes == 48 * MIB  # 64 - (24 - 8)


def test_a_path_of_the_host_leads_to_the_containers_root(tmp_path: Path) -> None:
    """
    Docker may show the host's path; the limit then stands at the root that the container sees.
    """
    root = tmp_path / "cgroup"
    write(root, memory__max=str(64 * MIB), memory__current=str(80 * MIB), memory__stat="")

    host = read_host(cgroups=root, own_cgroup=own(tmp_path, "0::/docker/0123"))

    assert (host.ram_total_bytes, host.ram_available_bytes) == (64 * MIB, 0)


def test_the_older_hierarchy_is_read_too(tmp_path: Path) -> None:
    """
    Version 1 of cgroups keeps memory in a tree and under names of its own.
    """
    files = {"memory__limit_in_bytes": str(32 * MIB), "memory__usage_in_bytes": str(2 * MIB)}
    write(tmp_path / "cgroup" / "memory" / "x", **files, memory__stat="total_inactive_file 0")

    host = read_host(cgroups=tmp_path / "cgroup", own_cgroup=own(tmp_path, "9:memory:/x"))

    assert (host.ram_total_bytes, host.ram_available_bytes) == (32 * MIB, 30 * MIB)
