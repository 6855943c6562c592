"""
Runs the processes of one box side by side: Redis, router, worker, Flower; restarts what dies, ends in order.

A program that ends with code 0 was told to, and stays away: a drained worker is not wanted back.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from common.logs import get_logger

logger = get_logger(__name__)

_FIRST_PAUSE_S = 0.5  # before a process that died is started again; doubles up to the longest
_LONGEST_PAUSE_S = 30.0
_HEALTHY_S = 30.0  # a process that lived this long starts over with the first pause
_LOOK_EVERY_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Program:
    """One process to keep running."""

    name: str
    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)  # added to ours
    stop_s: float = 40.0  # after SIGTERM, before SIGKILL


class Supervisor:
    """Keeps programs running until it is told to stop; the last started is the first stopped."""

    def __init__(self, programs: Sequence[Program], *, log_dir: Path | None = None) -> None:
        self._programs = programs
        self._log_dir = log_dir
        self._running: dict[str, _Running] = {}
        self._ending = threading.Event()

    def start(self) -> None:
        """Start every program, in order."""
        for program in self._programs:
            self._running[program.name] = _Running(program, self._log_dir)

    def pid(self, name: str) -> int:
        """The process id of the program *name* as it runs now."""
        return self._running[name].process.pid

    def look(self) -> None:
        """Start again what has died, each after its pause. Call it often."""
        for running in self._running.values():
            running.revive(now=time.monotonic())

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Look until `stop` is called from a signal handler or another thread, or *until* says so."""
        while not until() and not self._ending.wait(_LOOK_EVERY_S):
            self.look()

    def ask_to_stop(self) -> None:
        """Let `run` return; asked again, tell every program again: ours take that as a hurry."""
        if self._ending.is_set():
            for running in self._running.values():
                running.tell()
        self._ending.set()

    def ask_to_stop_on_signals(self) -> None:
        """Stop with our terminal too: the programs have sessions of their own, and would outlive it."""
        endings = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            endings.append(signal.SIGHUP)
        for ending in endings:
            signal.signal(ending, lambda *_: self.ask_to_stop())

    @property
    def asked_to_stop(self) -> bool:
        """Was it told to stop?"""
        return self._ending.is_set()

    def stop(self) -> None:
        """End every program, the last started first; each has its `stop_s`."""
        self._ending.set()
        for running in reversed(self._running.values()):
            running.end()


class _Running:
    """A program and its present process."""

    def __init__(self, program: Program, log_dir: Path | None) -> None:
        self._program = program
        self._log_dir = log_dir
        self._pause_s = _FIRST_PAUSE_S
        self._start_at: float | None = None
        self._left = False
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self._started = time.monotonic()
        output: IO[bytes] | None = None
        if self._log_dir is not None:
            output = (self._log_dir / f"{self._program.name}.log").open("ab")
        try:
            # A session of its own: Ctrl-C reaches us alone, and we stop the programs in order.
            return subprocess.Popen(
                list(self._program.command),
                env={**os.environ, **self._program.env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
            )
        finally:
            if output is not None:
                output.close()

    def revive(self, *, now: float) -> None:
        code = self.process.poll()
        if code is None or self._left:
            return
        if code == 0:  # it was told to stop: drained, or by a signal
            self._left = True
            logger.info("supervisor.left", program=self._program.name)
            return
        if self._start_at is None:
            if now - self._started > _HEALTHY_S:
                self._pause_s = _FIRST_PAUSE_S
            self._start_at = now + self._pause_s
            logger.warning("supervisor.died", program=self._program.name, code=code, again_in_s=self._pause_s)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        if now >= self._start_at:
            self._start_at = None
            self.process = self._start()

    def tell(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        self.tell()
        try:
            self.process.wait(self._program.stop_s)
        except subprocess.TimeoutExpired:
            logger.warning("supervisor.killed", program=self._program.name, after_s=self._program.stop_s)
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
