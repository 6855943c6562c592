"""
One engine's process tree behind a Unix socket: started under a guard, watched, and ended to the last process.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from common.errors import BadSetting, EngineTimeout, LoadFailed, OutOfMemory
from worker.engines import guard
from worker.engines.explain import KILLED, explain_failure, ran_out_of_memory
from worker.engines.orphans import MARKER, Tree, claim, write_down

SOCKET_PATH_BYTES = 103  # sun_path on macOS; Linux has 107
POLL_S = 0.05
PROBE_TIMEOUT_S = 2.0  # a health check that takes longer means "not yet"
TAIL_BYTES = 64 * 1024
HEAD_BYTES = 1024 * 1024  # a load prints some 30 KiB; its progress bars, more


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How to start an engine."""

    command: Sequence[str]
    env: Mapping[str, str]  # the whole environment


class EngineProcess:
    """
    The process tree of one engine, running from the constructor on.

    Its socket and its temporary files lie in a private folder of its own, which goes with it; its log,
    `<name>.log` in *run_dir*, stays until the next start.

    Raises
    ------
    BadSetting
        The path of *run_dir* leaves no room for a Unix socket.
    """

    def __init__(self, *, name: str, run_dir: Path, launch: Callable[[Path], Launch]) -> None:
        self.name = name
        self.ready = False
        self.log = run_dir / f"{name}.log"
        self._folder = Path(tempfile.mkdtemp(prefix="e", dir=run_dir))  # only our user may enter it
        self.socket = _checked(self._folder / "s.sock")  # llama.cpp knows a Unix socket by this ending
        self._marker = uuid.uuid4().hex
        self.asked_to_stop = False
        self._deaf = False
        self._known: set[psutil.Process] = set()
        self._shared: set[Path] = set()  # files of shared memory, noted early: killed with its guard, nobody shows them
        self._gone = threading.Event()  # no process of the tree is left

        self._began = time.time()
        launched = launch(self.socket)
        self._claim = claim(self._folder)
        temporary = self._folder / "tmp"
        temporary.mkdir()
        with self.log.open("wb") as output:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, "--remove", str(self._folder), "--", *launched.command],
                stdin=subprocess.PIPE,  # never written to: held open, it tells the guard that we live
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=temporary,
                env={**launched.env, "TMPDIR": str(temporary), MARKER: self._marker},
                start_new_session=True,
            )
        # Should we and the guard be killed in the same instant, the next start of a worker finds what is left.
        started = psutil.Process(self._guard.pid).create_time()
        write_down(self._claim, Tree(marker=self._marker, guard=self._guard.pid, started=started))
        threading.Thread(target=self._watch, name=f"engine-watch-{name}", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Does the engine run? False as soon as its guard has ended, or nobody listens on the socket any more."""
        return self._guard.returncode is None and not self._deaf

    def pids(self) -> tuple[int, ...]:
        """The process tree: the guard, the engine, and the engine's own children."""
        return tuple(process.pid for process in self._tree())

    def rss_bytes(self) -> int:
        """
        Resident bytes of the tree.

        Pages that its processes may share (libraries, a model's file) count once, in the process that has most of
        them; macOS does not tell them apart, and there they count in each.
        """
        found = [memory for process in self._tree() if (memory := _memory(process)) is not None]
        shared = [getattr(memory, "shared", 0) for memory in found]
        return int(sum(memory.rss for memory in found) - sum(shared) + max(shared, default=0))

    def tail(self) -> str:
        """The end of what the engine printed."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
            return log.read().decode(errors="replace")

    def head(self) -> str:
        """The beginning of what the engine printed; empty if somebody took the log away."""
        try:
            with self.log.open("rb") as log:
                return log.read(HEAD_BYTES).decode(errors="replace")
        except OSError:
            return ""

    def wait_deaf(self, timeout_s: float) -> bool:
        """
        Wait until nobody listens on the socket any more; False if somebody still does after *timeout_s*.

        The server ends before the last of its tree does, and takes no more jobs from then on.
        """
        deadline = time.monotonic() + timeout_s
        while self.alive and _listens(self.socket):
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_S)
        self._deaf = True
        return True

    def wait_gone(self, timeout_s: float) -> bool:
        """Wait until no process of the tree is left; False if some still are after *timeout_s*."""
        return self._gone.wait(timeout_s)

    def wait_ready(self, *, timeout_s: float) -> None:
        """
        Wait until the engine answers its health check.

        Raises
        ------
        LoadFailed
            It ended, or did not answer within *timeout_s*; in the second case it still runs.
        OutOfMemory
            It ended for want of memory.
        """
        deadline = time.monotonic() + timeout_s
        transport = httpx.HTTPTransport(uds=str(self.socket))
        with httpx.Client(transport=transport, timeout=PROBE_TIMEOUT_S, trust_env=False) as client:
            while not _healthy(client):
                if self._gone.wait(POLL_S):
                    raise self._end()
                if time.monotonic() >= deadline:
                    raise LoadFailed(
                        f"{self.name} did not become ready within {timeout_s:.1f} s. {explain_failure(self.tail())} "
                        f"Its whole log: {self.log}. If it was only slow, raise SWITCH_TIMEOUT_S."
                    )
        self._note_shared(self._tree())
        self.ready = True

    def ask_to_stop(self) -> None:
        """Begin to end the tree, without waiting."""
        self.asked_to_stop = True
        self._guard.terminate()

    def stop(self, *, timeout_s: float) -> None:
        """
        End the tree and see every process gone.

        Raises
        ------
        EngineTimeout
            Some process is still there after *timeout_s* and SIGKILL.
        """
        deadline = time.monotonic() + timeout_s
        self._known.update(self._tree())
        self._note_shared(self._known)
        self.ask_to_stop()
        if not self._gone.wait(min(2 * guard.GRACE_S, timeout_s / 2)):
            self._guard.kill()  # it hangs; the watcher ends the rest
        self._gone.wait(max(0.0, deadline - time.monotonic()))
        left = sorted(process.pid for process in _running(self._known))
        if left or not self._gone.is_set():
            raise EngineTimeout(
                f"{self.name}: processes {left} are still there {timeout_s:g} s after SIGTERM and SIGKILL. A process "
                "that cannot be killed waits for a driver or a disk: look at dmesg; the machine may need a restart."
            )

    def _watch(self) -> None:
        """Wait for the guard; whatever it could not end (it may have been killed itself) is ended here."""
        self._guard.wait()
        while lost := _running(self._known | self._members()):
            self._note_shared(lost)
            for process in lost:
                try:
                    process.kill()
                except psutil.Error:
                    continue
            time.sleep(POLL_S)
        guard.remove_shared(self._shared, since=self._began)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._claim.close()
        if self._guard.stdin is not None:
            self._guard.stdin.close()
        self._gone.set()

    def _note_shared(self, processes: Iterable[psutil.Process]) -> None:
        self._shared |= guard.shared_by(process.pid for process in processes)

    def _tree(self) -> list[psutil.Process]:
        try:
            top = psutil.Process(self._guard.pid)
            return [top, *top.children(recursive=True)] if self._guard.returncode is None else []
        except psutil.NoSuchProcess:
            return []

    def _members(self) -> set[psutil.Process]:
        """Processes of our session or with our marker: an orphan has lost its parent, but not these."""
        found: set[psutil.Process] = set()
        for process in psutil.process_iter():
            try:
                # Both, because a daemon leaves the session, and setproctitle (vLLM uses it) wipes the environment.
                if os.getsid(process.pid) == self._guard.pid or process.environ().get(MARKER) == self._marker:
                    found.add(process)
            except (psutil.Error, OSError):
                continue  # ended while we looked, or another user's
        return found

    def _end(self) -> LoadFailed:
        """Say how a load ended."""
        if self.asked_to_stop:
            return LoadFailed(f"{self.name} was stopped while it was loading.")
        code, said = self._guard.returncode, self.tail()
        lacked = ran_out_of_memory(said, code)
        killed = " It was killed, perhaps by the kernel for want of memory: `dmesg` says so." if code == KILLED else ""
        message = (
            f"{self.name} ended while it was loading (exit code {code}).{killed} "
            f"{explain_failure(said)} Its whole log: {self.log}."
        )
        return OutOfMemory(message) if lacked else LoadFailed(message)


def _checked(path: Path) -> Path:
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
        path.parent.rmdir()
        raise BadSetting(
            f"WORKER_RUN_DIR={path.parent.parent}: too long for a Unix socket, whose whole path ({path}) may have "
            f"{SOCKET_PATH_BYTES} bytes. Choose a shorter folder."
        )
    return path


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True  # its queue of connections is full
        except OSError:
            return False
    return True


def _healthy(client: httpx.Client) -> bool:
    try:
        return client.get("http://engine/health").is_success
    except httpx.TransportError:
        return False


def _running(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that still run. psutil compares the time of creation too, so a reused pid is not mistaken for one."""
    return [process for process in processes if process.is_running() and not _is_zombie(process)]


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _memory(process: psutil.Process) -> Any:
    try:
        return process.memory_info()
    except psutil.Error:
        return None
