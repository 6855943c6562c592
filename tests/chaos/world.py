"""
The system under the storm: Redis, a router and two workers as processes of their own, and what can be done to them.
"""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from common.fleet import read_statuses
from common.redis_client import connect
from common.schemas import utc_now
from tests.catalogues import write_catalogue
from tests.chaos import engine
from tests.chaos.faults import Fault, Kind, Target
from tests.chaos.proxy import Proxy
from tests.waiting import eventually
from worker.demo.tiny_hf import make_tiny_hf
from worker.embedded_redis import EmbeddedRedis

MODELS = ("small", "middle", "large")
LEASE_S = 3.0  # DELIVERY_LEASE_S; what the dead held comes back after one to two of these
RUN_S = 2.0  # the longest that an engine takes for a job
START_S = 60.0
STOP_S = 30.0

_SETTINGS = {
    "WORKER_HARDWARE": "cpu",
    "WORKER_CONCURRENCY": "8",
    "WORKER_SOFT_SHUTDOWN_S": "2",
    "DELIVERY_LEASE_S": str(LEASE_S),
    "STATUS_INTERVAL_S": "0.5",
    "SWITCH_MIN_TURN_S": "1",
    "SWITCH_MAX_WAIT_S": "10",
    "SWITCH_DRAIN_S": "5",
    "SWITCH_TIMEOUT_S": "20",
    "SWITCH_QUARANTINE_S": "1",
    "JOB_MAX_ATTEMPTS": "100",  # what fails under one job, and how often, is another test's question
    "JOB_MAX_DEATHS": "100",
    "JOB_MAX_WORKER_DEATHS": "100",
    "WEBHOOK_SECRET": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    "WEBHOOK_TIMEOUT_S": "2",
    "EGRESS_ALLOW": "127.0.0.0/8",
    "LOG_FORMAT": "json",
    "CHAOS_RUN_S": str(RUN_S),
}


_PROGRAMS = {Target.ROUTER: ("router", "router"), Target.WORKER: ("worker", "one"), Target.OTHER: ("worker", "two")}


class Program:
    """A router or a worker, on a connection to Redis of its own that can be cut."""

    def __init__(self, role: str, name: str, folder: Path, *, redis_port: int, env: Mapping[str, str]) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self.proxy = Proxy(redis_port)
        self._role = role
        self._folder = folder
        self._env = {**os.environ, **env, "WORKER_NAME": name, "REDIS_URL": f"redis://127.0.0.1:{self.proxy.port}/0"}

    def start(self) -> None:
        """Start it, without waiting."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "worker", self._role],
                cwd=self._folder,
                env=self._env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def below(self) -> list[psutil.Process]:
        """The processes that it has started, and theirs."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


class World:
    """
    Everything that takes part, in *folder* (a short path: sockets lie below it); the driver speaks to Redis directly.

    *env* overrides settings; *programs* are the ones that take part; *seed* chooses among several engines.
    """

    def __init__(
        self,
        folder: Path,
        *,
        env: Mapping[str, str] | None = None,
        programs: Sequence[Target] = (Target.ROUTER, Target.WORKER, Target.OTHER),
        seed: int = 0,
    ) -> None:
        self.folder = folder
        self._dice = random.Random(seed)
        self._paused: dict[Fault, list[psutil.Process]] = {}
        self.redis = EmbeddedRedis(folder / "redis")
        env = {**_SETTINGS, **_models(folder), **_stand_in_for_vllm(folder), "TMPDIR": str(folder), **(env or {})}
        self.programs = {
            target: Program(*_PROGRAMS[target], folder, redis_port=self.redis.port, env=env) for target in programs
        }

    def start(self) -> None:
        """Start everything and wait until every worker has a model."""
        self.redis.start()
        for program in self.programs.values():
            program.start()
        workers = len(self.programs) - 1
        with contextlib.closing(connect(self.redis.url)) as client:
            eventually(
                lambda: sum(any(r.level == "ready" for r in w.residents) for w in read_statuses(client)) == workers,
                within_s=START_S,
                what="every worker has a model",
            )

    def strike(self, fault: Fault) -> bool:
        """Let *fault* happen; False if there is nothing to hit at the moment (the engine is not up yet, say)."""
        if fault.kind is Kind.CUT:
            self.programs[fault.target].proxy.cut()
            return True
        if fault.target in {Target.REDIS, Target.ALL} and fault.kind is Kind.KILL:
            for target in self.programs if fault.target is Target.ALL else ():
                self._kill(target)
            self.redis.kill()
            return True
        if fault.target in self.programs and fault.kind is Kind.KILL:
            self._kill(fault.target)
            return True
        if not (hit := self._processes_of(fault.target)):
            return False
        for process in hit:
            process.send_signal(signal.SIGKILL if fault.kind is Kind.KILL else signal.SIGSTOP)
        if fault.kind is Kind.PAUSE:
            self._paused[fault] = hit
        return True

    def mend(self, fault: Fault) -> None:
        """End *fault*: what was killed is started again, what was paused goes on."""
        if fault.kind is Kind.CUT:
            self.programs[fault.target].proxy.mend()
        elif fault.kind is Kind.PAUSE:
            for process in self._paused.pop(fault):
                if process.is_running():  # it may have been killed since, as one of all
                    process.send_signal(signal.SIGCONT)
        else:
            if fault.target in {Target.REDIS, Target.ALL} and not self.redis.running:
                self.redis.start()
            for target, program in self.programs.items():
                if fault.target in {target, Target.ALL} and program.process.poll() is not None:
                    program.start()

    def note(self, what: str) -> None:
        """Write down what was done to whom, beside the programs' logs."""
        with (self.folder / "storm.log").open("a") as log:
            log.write(f"{utc_now():%H:%M:%S.%f} {what}\n")

    def fallen(self) -> list[str]:
        """The programs that have ended though nobody killed them, once every fault is mended."""
        return [program.name for program in self.programs.values() if program.process.poll() is not None]

    def stop(self) -> None:
        """End the programs as an operator does."""
        for program in self.programs.values():
            program.process.send_signal(signal.SIGTERM)
        for program in self.programs.values():
            program.process.wait(STOP_S)

    def left(self) -> list[str]:
        """The command lines of processes that still run, Redis not counted."""
        return [
            " ".join(process.info["cmdline"])
            for process in psutil.process_iter(["cmdline", "status"])
            if str(self.folder) in " ".join(process.info["cmdline"] or ())
            and process.info["status"] != psutil.STATUS_ZOMBIE
            and "--appendonly" not in process.info["cmdline"]
        ]

    def close(self) -> None:
        """End what still runs, however it is."""
        for program in self.programs.values():
            program.proxy.close()
            if hasattr(program, "process") and program.process.poll() is None:
                program.process.kill()
                program.process.wait(STOP_S)
        self.redis.stop()

    def _kill(self, target: Target) -> None:
        program = self.programs[target]
        program.process.kill()
        program.process.wait(STOP_S)

    def _processes_of(self, target: Target) -> list[psutil.Process]:
        """The processes that a signal for *target* goes to."""
        if target is Target.REDIS:
            return [psutil.Process(self.redis._process.pid)] if self.redis.running else []
        if target in self.programs:
            return [psutil.Process(self.programs[target].process.pid)]
        found = self._engines(target)
        return [self._dice.choice(found)] if found else []

    def _engines(self, target: Target) -> list[psutil.Process]:
        """The engines of both workers, or their hosts: an engine is a fork of its host, and has its command line."""
        found = []
        for program in (self.programs[Target.WORKER], self.programs[Target.OTHER]):
            for process in program.below():
                try:
                    line, above = process.cmdline(), process.parent()
                    forked = above is not None and above.cmdline() == line
                except psutil.Error:
                    continue
                if line[1:2] == [engine.__file__] and forked is (target is Target.ENGINE):
                    found.append(process)
        return found


def texts(paths: Iterator[Path]) -> Iterator[str]:
    """Each line of these files."""
    for path in paths:
        yield from path.read_text(errors="replace").splitlines()


def _models(folder: Path) -> dict[str, str]:
    """Write three tiny models and a catalogue of only them; gives the settings that name it."""
    entries = []
    for tier, model in enumerate(MODELS, start=1):
        make_tiny_hf(folder / model, hidden=64, seed=tier)
        trust = {"tier": tier, "complexity_up_to": tier / len(MODELS)}
        entries.append({"id": model, "engine": "vllm", "max_model_len": 1024, "path": model, **trust})
    return write_catalogue(folder, *entries)


def _stand_in_for_vllm(folder: Path) -> dict[str, str]:
    """Make an environment that looks as if vLLM were installed in it; its Python starts our engine host."""
    python = folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    # python -m worker.engines.vllm_host_main SOCKET
    python.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, engine.__file__])} "$3"\n')
    python.chmod(0o700)
    (folder / "venv" / "lib" / "python3" / "site-packages" / "vllm-0.32.0.dist-info").mkdir(parents=True)
    return {"VLLM_PYTHON": str(python)}
