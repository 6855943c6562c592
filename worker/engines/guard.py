"""
The parent of every engine process tree: when its worker goes, or says so, nothing of the tree stays.

    python -I -S guard.py --remove FOLDER -- COMMAND...

A program of its own, standard library only. Its standard input is a pipe whose other end only the worker
holds: end of file means that the worker is gone, however it went, `kill -9` included. On end of file, on
SIGTERM, or when the command ends, the guard ends every process below it (SIGTERM, then SIGKILL), removes
FOLDER (the socket and the temporary files) and what they left in shared memory, and exits with the command's code.

| goes                 | noticed through                         | the rest is ended by                      |
| -------------------- | --------------------------------------- | ----------------------------------------- |
| the worker           | end of file on standard input           | the guard                                 |
| the command          | SIGCHLD                                 | the guard                                 |
| a process in between | its children become the guard's (Linux) | the guard, at the end                     |
| the guard            | the worker waits for it                 | the kernel (the command), then the worker |
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

GRACE_S = 1.0  # vLLM needs 1-5 s to end by itself and has nothing to save; its helpers tidy up within this
POLL_S = 0.02

# From <linux/prctl.h>
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main(folder: str, command: list[str]) -> int:
    """Run *command*, end everything below it, remove *folder*; returns the exit code to hand on."""
    began = time.time()
    told: list[int] = []  # the signals that asked us to end
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler of ours makes the wake-up pipe readable
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _: told.append(received))

    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    child = _spawn(command)
    code: int | None = None
    while code is None and not told:
        readable, _, _ = select.select([0, wake_read], [], [])
        if wake_read in readable:
            os.read(wake_read, 4096)
        code = _reap().get(child)
        if 0 in readable:
            break

    ended = _end_all(child, since=began)
    shutil.rmtree(folder, ignore_errors=True)
    return code if code is not None else ended


def _spawn(command: list[str]) -> int:
    """Start *command* in a process group of its own; it dies with us where the system can promise that."""
    pid = os.fork()
    if pid:
        return pid
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.execvp(command[0], command)  # noqa: S606 - a shell is what we do not want
    except OSError as error:
        sys.stderr.write(f"Error: cannot run {command[0]}: {error}\n")
        sys.stderr.flush()
    os._exit(127)


def _end_all(child: int, *, since: float) -> int:
    """End *child*, its group and every descendant, and what they shared; returns the child's exit code."""
    code = 128 + signal.SIGKILL
    kill_at = time.monotonic() + GRACE_S
    shared = shared_by(_descendants())
    _signal_tree(child, signal.SIGTERM)
    while True:
        try:
            code = _reap(raise_when_none=True).get(child, code)
        except ChildProcessError:
            # No child left. Orphans become our children, so this also means: no descendant left.
            remove_shared(shared, since=since)
            return code
        if time.monotonic() >= kill_at:
            # Again and again: a process may fork while we look.
            _signal_tree(child, signal.SIGKILL)
        time.sleep(POLL_S)


def _signal_tree(child: int, number: int) -> None:
    """Send a signal to the child's process group and to every descendant that can be found."""
    for send, target in ((os.killpg, child), *((os.kill, pid) for pid in _descendants())):
        try:
            send(target, number)
        except (ProcessLookupError, PermissionError):
            continue


def _descendants() -> list[int]:
    """Every process below us, by /proc; empty on a system without it (there the process group must do)."""
    children: dict[int, list[int]] = {}
    for pid in _everybody():
        try:
            # The name, in parentheses, may hold anything; after it come the state and the parent.
            parent = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue  # it ended while we looked
        children.setdefault(parent, []).append(pid)
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def shared_by(pids: Iterable[int]) -> set[Path]:
    """
    Find the files of shared memory that any of *pids* has in its memory, and that still have a name.

    Whoever ends by itself removes its own; with SIGKILL nobody does, and such a file holds its bytes until the machine
    restarts. On Linux they lie in /dev/shm; elsewhere none is found.
    """
    found: set[Path] = set()
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/maps").read_bytes().splitlines()
        except OSError:
            continue  # it ended while we looked, or is another user's
        # Address, permissions, offset, device and inode; then the path, which may hold blanks.
        paths = (os.fsdecode(line.split(maxsplit=5)[-1]) for line in lines if b" /dev/shm/" in line)
        found.update(Path(path) for path in paths if not path.endswith(" (deleted)"))
    return found


def remove_shared(files: Iterable[Path], *, since: float) -> tuple[Path, ...]:
    """
    Remove those of *files* that their dead owners left; returns which.

    Only files of this user that were made after *since* (Unix seconds), and that no process has in its memory any more:
    another program may have been given them.
    """
    found = {file for file in files if _is_ours(file, since)}
    left = sorted(found - shared_by(_everybody())) if found else []
    for file in left:
        file.unlink(missing_ok=True)
    return tuple(left)


def _is_ours(file: Path, since: float) -> bool:
    try:
        about = file.lstat()
    except OSError:
        return False
    return about.st_uid == os.geteuid() and about.st_ctime >= since


def _everybody() -> list[int]:
    try:
        return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    except OSError:
        return []  # a system without it


def _reap(*, raise_when_none: bool = False) -> dict[int, int]:
    """Collect every child that has ended: pid -> exit code, as a shell would say it."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            if raise_when_none and not ended:
                raise
            return ended
        if pid == 0:
            return ended
        code = os.waitstatus_to_exitcode(status)
        ended[pid] = code if code >= 0 else 128 - code


def _prctl(option: int, value: int) -> None:
    """Linux only; elsewhere the process group and the pipe must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _usage() -> NoReturn:
    sys.exit("usage: guard.py --remove FOLDER -- COMMAND...")


if __name__ == "__main__":
    if len(sys.argv) < 5 or sys.argv[1] != "--remove" or sys.argv[3] != "--":  # noqa: PLR2004
        _usage()
    sys.exit(main(sys.argv[2], sys.argv[4:]))
