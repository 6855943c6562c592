"""
One engine that the host has forked, as the worker sees it: a process, and the link to it.
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from common.errors import EngineDied, EngineFailed, EngineTimeout, LoadFailed, OutOfMemory
from worker.engines import guard
from worker.engines.base import Loaded
from worker.engines.channel import Frame, Kind, Order
from worker.engines.explain import KILLED, explain_failure, ran_out_of_memory, says_nothing
from worker.engines.measure import read_vllm
from worker.engines.vllm_link import Link
from worker.selection.placement import Placement
from worker.state.residency import Level

_LOG_BYTES = 1024 * 1024
_LOOK_S = 0.005
_VLLM_LEVELS = {Level.ASLEEP_1: b"1", Level.ASLEEP_2: b"2"}


class HostedEngine:
    """The engine of *placement*; what it prints goes to *log*."""

    def __init__(self, placement: Placement, *, log: Path) -> None:
        self.name = placement.model_id
        self.placement = placement
        self.log = log
        self.link: Link | None = None  # None until it is started
        self.ready = False
        self.asleep: Level | None = None
        self._kill_asked = threading.Event()
        self._folder: Path | None = None
        self._process: psutil.Process | None = None
        self._began = time.time()
        self._shared: set[Path] = set()  # files of shared memory; noted while it lives
        self._news: queue.SimpleQueue[Frame] = queue.SimpleQueue()  # of the load: READY, FAILED, ENDED

    @property
    def asked_to_stop(self) -> bool:
        """Has somebody asked for its end?"""
        return self._kill_asked.is_set()

    @property
    def ended(self) -> bool:
        """Has it ended, by itself or because it was asked to?"""
        return self.link is not None and self.link.ended

    def start(
        self,
        connection: socket.socket,
        folder: Path,
        *,
        arguments: Sequence[str],
        env: Mapping[str, str],
        deadline: float,
    ) -> None:
        """
        Have the host at the other end of *connection* fork it, and wait until it answers.

        Raises
        ------
        LoadFailed, OutOfMemory
            See `Engine.ensure_ready`.
        """
        self._folder = folder
        self.link = Link(connection, name=self.name, log=self.log, on_news=self._hear)
        self.link.start(Order(arguments=arguments, env=env, folder=str(folder), log=str(self.log)))
        said: str | None = None
        while True:
            try:
                news = self._news.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise LoadFailed(
                    f"{self.name} did not become ready in time. {explain_failure(self._log_text())} "
                    f"Its whole log: {self.log}. If it was only slow, raise SWITCH_TIMEOUT_S."
                ) from None
            if news.kind == Kind.READY:
                self._note_shared(self._tree())
                self.ready = True
                return
            if news.kind == Kind.FAILED:
                said = " ".join(news.body.decode(errors="replace").split())
            else:
                raise self._failure(said, int(news.body) if news.body else None)

    def answers(self, *, within_s: float) -> bool:
        """Does the engine's loop still come by?"""
        if self.link is None or self.ended:
            return False
        try:
            self.link.tell(Kind.PING, b"", within_s=within_s)
        except (TimeoutError, EngineDied):
            return False
        return True

    def fall_asleep(self, level: Level, *, timeout_s: float) -> None:
        """Give back its card's memory; from then on it is not ready. Raises EngineFailed."""
        self.ready = False
        self._order(Kind.SLEEP, level, timeout_s=timeout_s)
        self.asleep = level

    def wake(self, *, timeout_s: float) -> None:
        """Answer again; raises EngineFailed."""
        assert self.asleep is not None  # noqa: S101 - the caller has looked
        level, self.asleep = self.asleep, None
        self._order(Kind.WAKE, level, timeout_s=timeout_s)
        self.ready = True

    def loaded(self, *, seconds: float, level: Level = Level.COLD) -> Loaded:
        """Say what the load measured."""
        tree = self._tree()
        return Loaded(
            seconds=seconds,
            level=level,
            pids=tuple(process.pid for process in tree),
            rss_bytes=_private_bytes(tree),
            measured=read_vllm(self._log_text()),
            details={"log": str(self.log)},
        )

    def kill(self) -> None:
        """Begin to end it, without waiting; nothing of an engine is worth saving."""
        self._kill_asked.set()
        tree = self._tree()
        if tree:
            with suppress(ProcessLookupError):
                os.killpg(tree[0].pid, signal.SIGKILL)  # its group too: what has lost its parent is still in that
        for process in tree:
            with suppress(psutil.Error):
                process.kill()

    def stop(self, *, timeout_s: float) -> None:
        """
        End it and see every process gone.

        Raises
        ------
        EngineTimeout
            Some process is still there after *timeout_s* and SIGKILL.
        """
        deadline = time.monotonic() + timeout_s
        tree = self._tree()
        self._note_shared(tree)
        self.kill()
        if self.link is not None:
            self.link.wait_gone(timeout_s)  # also a process that we do not know yet: it is killed as it says its pid
        _, left = psutil.wait_procs(tree, timeout=max(0.0, deadline - time.monotonic()))
        while any(psutil.pid_exists(process.pid) for process in tree) and time.monotonic() < deadline:
            time.sleep(_LOOK_S)  # ended, but the guard has yet to hear of the core, which lost its parent
        if self.link is not None:
            self.link.close()
        if left:
            raise EngineTimeout(
                f"{self.name}: processes {sorted(process.pid for process in left)} are still there {timeout_s:g} s "
                "after SIGKILL. A process that cannot be killed waits for a driver or a disk: look at dmesg; "
                "the machine may need a restart."
            )
        guard.remove_shared(self._shared, since=self._began)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _hear(self, news: Frame) -> None:
        """Take what is no answer; called on the link's thread."""
        if news.kind != Kind.STARTED:
            self._news.put(news)
            return
        with suppress(psutil.NoSuchProcess):  # ended meanwhile: the host says so next
            self._process = psutil.Process(int(news.body))
        if self.asked_to_stop:
            self.kill()

    def _order(self, kind: Kind, level: Level, *, timeout_s: float) -> None:
        """Have the engine do it within *timeout_s*; raises EngineFailed, with what vLLM says."""
        assert self.link is not None  # noqa: S101 - it was started
        deed = f"{self.name}, {kind.name.lower()} ({level})"
        try:
            status, _, said = self.link.tell(kind, _VLLM_LEVELS[level], within_s=timeout_s).partition(b"\n")
        except TimeoutError as error:
            raise EngineFailed(f"{deed}: it did not answer within {timeout_s:g} s; its log: {self.log}.") from error
        except EngineDied as error:
            raise EngineFailed(f"{deed}: its process ended; its log: {self.log}.") from error
        if status != b"200":
            raise EngineFailed(f"{deed}: vLLM says {said.decode(errors='replace')}")

    def _failure(self, said: str | None, code: int | None) -> LoadFailed:
        """Say how a load ended."""
        if self.asked_to_stop:
            return LoadFailed(f"{self.name} was stopped while it was loading.")
        log = self._log_text()
        killed = " It was killed, perhaps by the kernel for want of memory: `dmesg` says so." if code == KILLED else ""
        why = f"It said: {said.rstrip('.')}." if said and not says_nothing(said) else explain_failure(log)
        message = f"{self.name} ended while it was loading (exit code {code}).{killed} {why} Its whole log: {self.log}."
        return OutOfMemory(message) if ran_out_of_memory(f"{said}\n{log}", code) else LoadFailed(message)

    def _log_text(self) -> str:
        """The beginning of what it printed; empty if nothing is there."""
        try:
            with self.log.open("rb") as log:
                return log.read(_LOG_BYTES).decode(errors="replace")
        except OSError:
            return ""

    def _note_shared(self, processes: Iterable[psutil.Process]) -> None:
        self._shared |= guard.shared_by(process.pid for process in processes)

    def _tree(self) -> list[psutil.Process]:
        try:
            return [] if self._process is None else [self._process, *self._process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def _private_bytes(tree: list[psutil.Process]) -> int | None:
    """
    What the machine gets back when *tree* ends: a fork shares most of vLLM's code with the host.

    What its two processes share with each other alone (52 MiB, measured once) is left out: the kernel does not say.
    """
    try:
        return int(sum(process.memory_full_info().uss for process in tree))
    except psutil.Error:
        return None
