"""
Runs vLLM's models as forks of one process that has vLLM imported: seconds instead of half a minute.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from common.errors import (
    EngineFailed,
    EngineNotReady,
    EngineTimeout,
    LoadFailed,
    ShiftworkerError,
)
from common.logs import get_logger
from worker.catalog.spec import EngineKind
from worker.engines.base import (
    Call,
    Channel,
    Completion,
    Engine,
    EngineState,
    Loaded,
    StopSignal,
)
from worker.engines.explain import explain_failure
from worker.engines.may_sleep import may_sleep
from worker.engines.server_engine import END_S, FilesOf
from worker.engines.vllm_host_process import HostProcess
from worker.engines.vllm_hosted import HostedEngine
from worker.engines.vllm_server import command, environment, media_flags
from worker.selection.placement import Placement
from worker.state.residency import Level

PING_S = 30.0  # an engine that does not come by for so long hangs; one step on a slow CPU takes a few seconds
RESPAWN_PAUSE_S = 5.0  # after the host ended by itself, perhaps because it cannot import vLLM
POLL_S = 0.02

logger = get_logger(__name__)


class VllmHostEngine:
    """
    An `Engine`: vLLM, one process per model, forked from a host that starts with this object.

    | goes          | noticed through                        | then                                        |
    | ------------- | -------------------------------------- | ------------------------------------------- |
    | an engine     | the host, which tells how it ended     | its requests raise EngineDied, state is DEAD |
    | the host      | its engines die with it                | the same for each; a new host is started    |
    | the worker    | the host's guard                       | everything is ended                         |

    Parameters
    ----------
    run_dir
        A short private path for sockets and logs; made if it is not there.
    files_of
        Finds a model's files; raises ModelMissing.
    python
        The interpreter that has vLLM, as `find_python` gives it.
    several_cards
        Runs what needs more than one card: vLLM then has processes of its own for each.
    cpu_count
        Cores that a model on the CPU may use.
    media_domains
        The hosts that engines may fetch images, audio and video from; none = any.
    sleeps
        May models on a card sleep, where vLLM's sleep is known to keep their answers right?
    """

    kind: ClassVar[EngineKind] = EngineKind.VLLM

    def __init__(
        self,
        *,
        run_dir: Path,
        files_of: FilesOf,
        python: Path,
        several_cards: Engine,
        cpu_count: int | None = None,
        media_domains: Sequence[str] = (),
        sleeps: bool = False,
    ) -> None:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._run_dir = run_dir.absolute()
        self._files_of = files_of
        self._several_cards = several_cards
        self._cpu_count = cpu_count or os.cpu_count() or 1
        self._media_domains = media_domains
        self._sleeps = sleeps
        self._engines: dict[str, HostedEngine] = {}
        self._locks: dict[str, threading.Lock] = {}  # one per model: a start and a stop never interleave
        self._closed = threading.Event()
        self._python = python
        self._host_lock = threading.Lock()
        self._host = self._start_host()
        threading.Thread(target=self._keep_host, name="engine-host", daemon=True).start()

    def ensure_ready(self, placement: Placement, *, timeout_s: float) -> Loaded:
        """Make the model answer; see `Engine`."""
        if placement.tensor_parallel_size > 1:
            return self._several_cards.ensure_ready(placement, timeout_s=timeout_s)
        model_id, began = placement.model_id, time.monotonic()
        deadline = began + timeout_s
        with self._lock(model_id, timeout_s):
            engine = self._engines.get(model_id)
            if engine is not None and engine.ready and engine.answers(within_s=min(PING_S, timeout_s / 3)):
                return engine.loaded(seconds=0.0)
            if engine is not None and engine.asleep is not None and engine.placement == placement:
                return self._wake(engine, began, timeout_s)
            self._end(model_id, timeout_s=END_S)

            files = self._files_of(placement.spec)
            log = self._run_dir / f"{model_id}.log"
            engine = self._engines[model_id] = HostedEngine(placement, log=log)
            line = command(placement, python=self._python, model=files, socket=Path())
            line += media_flags(self._media_domains)
            if self.sleep_levels(placement):
                line += ["--enable-sleep-mode"]
            level = self.standby
            try:
                engine.start(
                    *self._connect(engine, deadline),
                    arguments=line[line.index("--model") :],
                    env=environment({}, placement, model=files, cpu_count=self._cpu_count),
                    deadline=deadline,
                )
            except BaseException:
                self._end(model_id, timeout_s=END_S)
                raise
            return engine.loaded(seconds=time.monotonic() - began, level=level)

    @property
    def standby(self) -> Level:
        """The host, once it has vLLM imported; see `Engine`."""
        return Level.SPARE if self._host.ready and not self._host.wait_gone(timeout_s=0.0) else Level.COLD

    def standby_bytes(self) -> int:
        """What the host holds itself, which stands ready also when no model is loaded; see `Engine`."""
        return self._host.own_bytes() or 0

    def sleep_levels(self, placement: Placement) -> tuple[Level, ...]:
        """None unless it is turned on; see `Engine` and `may_sleep`."""
        return may_sleep(placement, hosted=True) if self._sleeps else ()

    def ensure_asleep(self, model_id: str, level: Level, *, timeout_s: float) -> None:
        """Give back the card's memory; see `Engine`."""
        with self._lock(model_id, timeout_s):
            engine = self._engines.get(model_id)
            if engine is None or self.state(model_id) not in (EngineState.READY, EngineState.ASLEEP):
                raise EngineFailed(f"{model_id} is {self.state(model_id)} and cannot fall asleep.")
            if engine.asleep is level:
                return
            try:
                engine.fall_asleep(level, timeout_s=timeout_s)
            except ShiftworkerError:
                self._end(model_id, timeout_s=END_S)
                raise

    def ensure_stopped(self, model_id: str, *, timeout_s: float) -> None:
        """End the model's process tree; see `Engine`."""
        deadline = time.monotonic() + timeout_s
        self._several_cards.ensure_stopped(model_id, timeout_s=timeout_s)
        if engine := self._engines.get(model_id):
            engine.kill()  # before the lock: a load under way ends now and lets the lock go
        with self._lock(model_id, timeout_s):
            self._end(model_id, timeout_s=max(0.0, deadline - time.monotonic()))

    def state(self, model_id: str) -> EngineState:
        """What is known of *model_id*; see `Engine`."""
        engine = self._engines.get(model_id)
        if engine is None:
            return self._several_cards.state(model_id)
        if engine.asked_to_stop:
            return EngineState.STOPPED
        if not engine.ready and engine.asleep is None:
            return EngineState.STARTING
        if engine.ended:
            return EngineState.DEAD
        return EngineState.READY if engine.ready else EngineState.ASLEEP

    def generate(self, model_id: str, call: Call, stop: StopSignal) -> Completion:
        """Answer one request; see `Engine`."""
        engine = self._engines.get(model_id)
        if engine is None:
            return self._several_cards.generate(model_id, call, stop)
        if engine.link is None or self.state(model_id) is not EngineState.READY:
            raise EngineNotReady(f"{model_id} is {self.state(model_id)} on this worker; the job waits for its turn.")
        return engine.link.generate(call, stop)

    def channel(self, model_id: str) -> Channel | None:
        """Give the way to ask without a thread; see `Engine`."""
        engine = self._engines.get(model_id)
        return engine.link if engine else None

    def close(self) -> None:
        """Stop every model and the host; see `Engine`."""
        with self._host_lock:
            self._closed.set()
        for model_id in list(self._engines):
            self.ensure_stopped(model_id, timeout_s=END_S)
        self._host.stop(timeout_s=END_S)
        self._several_cards.close()

    def _wake(self, engine: HostedEngine, began: float, timeout_s: float) -> Loaded:
        """Have it answer again; one that does not wake up is ended."""
        assert engine.asleep is not None  # noqa: S101 - the caller has looked
        level = engine.asleep
        try:
            engine.wake(timeout_s=timeout_s)
        except ShiftworkerError as error:
            self._end(engine.name, timeout_s=END_S)
            raise LoadFailed(f"{engine.name} did not wake up from {level}: {error.message}") from error
        return engine.loaded(seconds=time.monotonic() - began, level=level)

    def _connect(self, engine: HostedEngine, deadline: float) -> tuple[socket.socket, Path]:
        """Give a connection for *engine* and a folder for its files, waiting until the host has imported vLLM."""
        host = self._living_host()
        while (connection := host.connect()) is None:
            if host.wait_gone(timeout_s=0.0):
                if not host.ready:
                    raise LoadFailed(f"vLLM cannot be imported. {explain_failure(host.tail())} Its log: {host.log}.")
                host = self._living_host()
            elif engine.asked_to_stop:
                raise LoadFailed(f"{engine.name} was stopped while it was loading.")
            elif time.monotonic() >= deadline:
                raise LoadFailed(f"vLLM is still being imported; its log: {host.log}. Raise SWITCH_TIMEOUT_S.")
            else:
                time.sleep(POLL_S)
        return connection, Path(tempfile.mkdtemp(prefix="c", dir=host.socket.parent))

    def _start_host(self) -> HostProcess:
        return HostProcess(run_dir=self._run_dir, python=self._python, env=os.environ)

    def _keep_host(self) -> None:
        while not self._closed.is_set():
            if self._host.wait_gone(timeout_s=1.0) and not self._closed.wait(RESPAWN_PAUSE_S):
                try:
                    self._living_host()
                except Exception:  # no memory for a process, say: tried again after another pause
                    logger.exception("engines.host_not_started")

    def _living_host(self) -> HostProcess:
        """Give the host; if it has ended, a new one."""
        with self._host_lock:
            if self._host.wait_gone(timeout_s=0.0) and not self._closed.is_set():
                self._host = self._start_host()
            return self._host

    def _end(self, model_id: str, *, timeout_s: float) -> None:
        if engine := self._engines.get(model_id):
            engine.stop(timeout_s=timeout_s)
            del self._engines[model_id]

    @contextmanager
    def _lock(self, model_id: str, timeout_s: float) -> Iterator[None]:
        lock = self._locks.setdefault(model_id, threading.Lock())
        if not lock.acquire(timeout=timeout_s):
            raise EngineTimeout(f"{model_id} was being started or stopped by somebody else for {timeout_s:g} s.")
        try:
            yield
        finally:
            lock.release()
