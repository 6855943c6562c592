"""
What did an earlier worker of ours leave behind when it and its guards were killed? Finds it, ends it, removes it.

Every folder of a living worker or engine holds a file that its worker keeps locked. The kernel lets the lock go
with the worker, however it went, and no pid that is used again can hold it: a lock that can be had is a worker that
is gone. What an unlocked file says then tells which processes were its own.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import psutil

from common.logs import get_logger
from worker.engines import guard

logger = get_logger(__name__)

MARKER = "SHIFTWORKER_ENGINE"  # in the environment of every process of a tree: how a lost one is found
END_S = 15.0  # the guard's grace, and the kernel's time to free gigabytes
POLL_S = 0.05

_FILE = "owner"
_SAME_START_S = 1.0  # psutil takes the start from the clock, which may have been set since


@dataclass(frozen=True, kw_only=True)
class Tree:
    """What is written down of an engine's process tree, to know it again."""

    marker: str  # the value of MARKER
    guard: int  # pid; also the number of the tree's session
    started: float  # Unix seconds, of the guard


def claim(folder: Path) -> IO[str]:
    """Say that *folder* is this process's for as long as it lives, or until the file is closed."""
    file = (folder / _FILE).open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def write_down(file: IO[str], tree: Tree) -> None:
    """Note in a claim's *file* which engine runs in the folder."""
    json.dump(asdict(tree), file)
    file.flush()


def end_orphans(run_dir: Path, *, timeout_s: float = END_S) -> tuple[int, ...]:
    """
    End every engine in *run_dir* whose worker is gone, and remove its folder; returns the pids that were ended.

    What cannot be killed within *timeout_s* is told in the log, and stays written down for the next start.
    """
    ended: list[int] = []
    for folder in sorted(path.parent for path in run_dir.glob(f"*/{_FILE}")):
        if (file := _take_over(folder)) is None:
            continue
        with file:
            if tree := _read(file):
                ended += _end(tree, folder, timeout_s)
    if ended:
        logger.warning("engines.orphans_ended", folder=str(run_dir), pids=ended)
    return tuple(ended)


def end_abandoned(run_dirs: Iterable[Path]) -> None:
    """End the orphans in each of *run_dirs* whose worker is gone, and remove it unless one of them remains."""
    for run_dir in run_dirs:
        if (file := _take_over(run_dir)) is None:
            continue
        with file:
            end_orphans(run_dir)
            if not any(run_dir.glob(f"*/{_FILE}")):
                shutil.rmtree(run_dir, ignore_errors=True)


def members(tree: Tree, folder: Path) -> set[psutil.Process]:
    """
    Find the processes of *tree*, which ran in *folder*; only those that are certainly its own.

    1. Its guard, known by pid and start; whoever has its marker in the environment (setproctitle, which vLLM uses,
       wipes that out); whoever works in its folder (only our user may enter it).
    2. Everybody in the session of one of these, if it is the tree's: while a member lives, its number is not used
       again.
    3. Everybody below one of these.
    """
    everybody = list(psutil.process_iter())
    # (1) Certain by themselves.
    found = {process for process in everybody if _is_guard(process, tree) or _is_marked(process, tree, folder)}
    # (2) By the session.
    if any(_session(process) == tree.guard for process in found):
        found |= {process for process in everybody if _session(process) == tree.guard}
    # (3) By a parent.
    return {process for process in found | _below(found) if process.pid != os.getpid() and _runs(process)}


def _is_guard(process: psutil.Process, tree: Tree) -> bool:
    try:
        return process.pid == tree.guard and abs(process.create_time() - tree.started) < _SAME_START_S
    except psutil.Error:
        return False


def _is_marked(process: psutil.Process, tree: Tree, folder: Path) -> bool:
    try:
        return process.environ().get(MARKER) == tree.marker or Path(process.cwd()).is_relative_to(folder)
    except (psutil.Error, OSError):
        return False  # ended while we looked, or another user's


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:
        return None


def _below(found: set[psutil.Process]) -> set[psutil.Process]:
    below: set[psutil.Process] = set()
    for process in found:
        try:
            below.update(process.children(recursive=True))
        except psutil.Error:
            continue
    return below


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _end(tree: Tree, folder: Path, timeout_s: float) -> list[int]:
    """
    End *tree* and remove *folder*, and what it left in shared memory; returns the pids that were ended.

    SIGTERM, then SIGKILL again and again: a process may fork while we look.
    """
    began = time.monotonic()
    told: set[psutil.Process] = set()
    shared: set[Path] = set()
    while left := members(tree, folder):
        waited = time.monotonic() - began
        if waited >= timeout_s:
            pids = sorted(process.pid for process in left)
            logger.error("engines.orphans_remain", folder=str(folder), pids=pids, after_s=timeout_s)
            return sorted(process.pid for process in told - left)
        shared |= guard.shared_by(process.pid for process in left)
        for process in left:
            with suppress(psutil.Error):
                if waited >= 2 * guard.GRACE_S:  # a guard that lives has ended them by then
                    process.kill()
                elif process not in told:
                    process.terminate()
        told |= left
        time.sleep(POLL_S)
    guard.remove_shared(shared, since=tree.started - _SAME_START_S)
    shutil.rmtree(folder, ignore_errors=True)
    return sorted(process.pid for process in told)


def _take_over(folder: Path) -> IO[str] | None:
    """Lock what is written down in *folder*; None if its worker lives, or somebody else takes it over."""
    try:
        file = (folder / _FILE).open()
    except OSError:
        return None  # just removed
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _read(file: IO[str]) -> Tree | None:
    try:
        return Tree(**json.load(file))
    except ValueError:
        return None  # not written yet: its engine is being started, or the folder holds none
