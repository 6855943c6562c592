"""
Runs vLLM's models as forks of one process that has vLLM imported: seconds instead of half a minute.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import psutil

import worker
from common.errors import (
    EngineDied,
    EngineFailed,
    EngineNotReady,
    EngineTimeout,
    LoadFailed,
    OutOfMemory,
    ShiftworkerError,
)
from worker.catalog.spec import EngineKind
from worker.engines.assemble import complete, join
from worker.engines.base import (
    Call,
    Channel,
    Completion,
    Engine,
    EngineState,
    JobStopped,
    Loaded,
    OnAnswer,
    OnChunk,
    Read,
    StopSignal,
)
from worker.engines.channel import Frame, Kind, Order, Unpacker, pack
from worker.engines.environment import engine_environment
from worker.engines.explain import KILLED, explain_failure, ran_out_of_memory
from worker.engines.interpret import completion_of, interpret, read_chunk
from worker.engines.may_sleep import may_sleep
from worker.engines.measure import read_vllm
from worker.engines.process import EngineProcess, Launch
from worker.engines.server_engine import END_S, FilesOf
from worker.engines.vllm_server import command, environment, media_flags
from worker.selection.placement import Placement
from worker.state.residency import Level

PING_S = 30.0  # an engine that does not come by for so long hangs; one step on a slow CPU takes a few seconds
RESPAWN_PAUSE_S = 5.0  # after the host ended by itself, perhaps because it cannot import vLLM
POLL_S = 0.02
LOG_BYTES = 1024 * 1024
RECEIVE_BYTES = 256 * 1024
LAST_EVENT = b"[DONE]"
_VLLM_LEVELS = {Level.ASLEEP_1: b"1", Level.ASLEEP_2: b"2"}


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
        self._engines: dict[str, _HostedEngine] = {}
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
            engine = self._engines[model_id] = _HostedEngine(placement, log=log)
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
        """None on the CPU, over several cards, or unless it is turned on; see `Engine` and `may_sleep`."""
        return may_sleep(placement) if self._sleeps else ()

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
        if self.state(model_id) is not EngineState.READY:
            raise EngineNotReady(f"{model_id} is {self.state(model_id)} on this worker; the job waits for its turn.")
        return engine.generate(call, stop)

    def channel(self, model_id: str) -> Channel | None:
        """Give the way to ask without a thread; see `Engine`."""
        return self._engines.get(model_id)

    def close(self) -> None:
        """Stop every model and the host; see `Engine`."""
        with self._host_lock:
            self._closed.set()
        for model_id in list(self._engines):
            self.ensure_stopped(model_id, timeout_s=END_S)
        self._host.stop(timeout_s=END_S)
        self._several_cards.close()

    def _wake(self, engine: _HostedEngine, began: float, timeout_s: float) -> Loaded:
        """Have it answer again; one that does not wake up is ended."""
        assert engine.asleep is not None  # noqa: S101 - the caller has looked
        level = engine.asleep
        try:
            engine.wake(timeout_s=timeout_s)
        except ShiftworkerError as error:
            self._end(engine.name, timeout_s=END_S)
            raise LoadFailed(f"{engine.name} did not wake up from {level}: {error.message}") from error
        return engine.loaded(seconds=time.monotonic() - began, level=level)

    def _connect(self, engine: _HostedEngine, deadline: float) -> tuple[socket.socket, Path]:
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

    def _start_host(self) -> _Host:
        # All cards: the host may not touch them, and each engine is shown its own.
        env = {**engine_environment(os.environ, gpus=()), **_HOST_ENV}
        del env["CUDA_VISIBLE_DEVICES"]
        return _Host(run_dir=self._run_dir, python=self._python, env=env)

    def _keep_host(self) -> None:
        while not self._closed.is_set():
            if self._host.wait_gone(timeout_s=1.0) and not self._closed.wait(RESPAWN_PAUSE_S):
                self._living_host()

    def _living_host(self) -> _Host:
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


_HOST_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else vLLM on the CPU wants a worker process besides
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",  # a fork after an OpenMP region may hang; each engine sets its own number
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # "is there a card?" without touching CUDA
}


class _Host(EngineProcess):
    """The host's process tree; the engines are in it too, so its guard ends them all."""

    def __init__(self, *, run_dir: Path, python: Path, env: dict[str, str]) -> None:
        def launch(path: Path) -> Launch:
            # vLLM's Python sees this one package of ours, and nothing else that lies beside it.
            imports = path.parent / "import"
            imports.mkdir()
            (imports / "worker").symlink_to(Path(worker.__file__).parent)
            line = [str(python), "-m", "worker.engines.vllm_host_main", str(path)]
            return Launch(command=line, env={**env, "PYTHONPATH": str(imports)})

        super().__init__(name="vllm-host", run_dir=run_dir, launch=launch)

    def connect(self) -> socket.socket | None:
        """Connect to the host; None while it imports vLLM, and after it has ended."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(self.socket))
        except OSError:
            connection.close()
            return None
        self.ready = True
        return connection

    def own_bytes(self) -> int | None:
        """Resident bytes of the host without its engines."""
        found = [process for process in self._tree() if process.ppid() == self._guard.pid]
        try:
            return int(found[0].memory_info().rss) if found else None
        except psutil.Error:
            return None


class _HostedEngine:
    """One engine as the worker sees it: a connection, and the process behind it."""

    def __init__(self, placement: Placement, *, log: Path) -> None:
        self.name = placement.model_id
        self.placement = placement
        self.log = log
        self.ready = False
        self.asleep: Level | None = None
        self.ended = False
        self._kill_asked = threading.Event()
        self._folder: Path | None = None
        self._connection: socket.socket | None = None
        self._process: psutil.Process | None = None
        self._sending = threading.Lock()
        self._held: list[bytes] | None = None  # what is to be sent in one piece; None = nothing is held back
        self._numbers = count(1)
        self._waiting: dict[int, tuple[Future[bytes], _Stream | None]] = {}  # callers, by number
        self._news: queue.SimpleQueue[Frame] = queue.SimpleQueue()  # of the load: READY, FAILED, ENDED
        self._gone = threading.Event()

    @property
    def asked_to_stop(self) -> bool:
        """Has somebody asked for its end?"""
        return self._kill_asked.is_set()

    def start(
        self, connection: socket.socket, folder: Path, *, arguments: list[str], env: dict[str, str], deadline: float
    ) -> None:
        """
        Have the host at the other end of *connection* fork it, and wait until it answers.

        Raises
        ------
        LoadFailed, OutOfMemory
            See `Engine.ensure_ready`.
        """
        self._connection, self._folder = connection, folder
        order = Order(arguments=arguments, env=env, folder=str(folder), log=str(self.log))
        self._transmit(Frame(Kind.START, body=order.pack()))
        threading.Thread(target=self._read, name=f"engine-{self.name}", daemon=True).start()
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
                self.ready = True
                return
            if news.kind == Kind.FAILED:
                said = " ".join(news.body.decode(errors="replace").split())
            else:
                raise self._failure(said, int(news.body) if news.body else None)

    def answers(self, *, within_s: float) -> bool:
        """Does the engine's loop still come by?"""
        if self.ended:
            return False
        number, answer = self._send(Kind.PING, b"")
        try:
            answer.result(within_s)
        except (TimeoutError, EngineDied):
            return False
        finally:
            self._waiting.pop(number, None)
        return True

    def generate(self, call: Call, stop: StopSignal) -> Completion:
        """Answer one request; see `Engine`."""
        answered = Future[Read]()
        expire = self.ask(call, stop, answered.set_result)
        try:
            read = answered.result(call.timeout_s)
        except TimeoutError:
            expire()
            read = answered.result()
        return read()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Send what is asked within this context in one piece; see `Channel`."""
        with self._sending:
            self._held = []
        try:
            yield
        finally:
            with self._sending:
                held, self._held = self._held, None
                self._write(b"".join(held or ()))

    def ask(self, call: Call, stop: StopSignal, done: OnAnswer) -> Callable[[], object]:
        """Send one request; see `Channel`."""
        if stop.reason is not None:
            raise JobStopped(stop.reason)
        began = time.monotonic()
        stream = None if call.on_chunk is None else _Stream(call.on_chunk)
        number, answer = self._send(Kind.ASK, call.path.encode() + b"\n" + json.dumps(call.body).encode(), stream)

        def expire() -> None:
            with suppress(InvalidStateError):  # it has just been answered
                answer.set_exception(
                    EngineTimeout(
                        f"The engine did not answer within {call.timeout_s:g} s. Ask for fewer tokens, or raise "
                        "JOB_TIMEOUT_S."
                    )
                )

        def settled(_: Future[bytes]) -> None:
            if self._waiting.pop(number, None) is not None:
                self._transmit(Frame(Kind.ABORT, number))  # given up, for whatever reason
            run_s = time.monotonic() - began

            def read() -> Completion:
                try:
                    status, _, content = answer.result().partition(b"\n")
                except CancelledError:
                    raise JobStopped(stop.reason or "") from None
                if stream is not None and stream.began:
                    return completion_of(stream.whole(), run_s=run_s)
                return interpret(status=int(status), content=content, run_s=run_s)

            done(read)

        answer.add_done_callback(settled)
        stop.on_stop(answer.cancel)
        return expire

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

    def _order(self, kind: Kind, level: Level, *, timeout_s: float) -> None:
        """Have the engine do it within *timeout_s*; raises EngineFailed, with what vLLM says."""
        number, answer = self._send(kind, _VLLM_LEVELS[level])
        try:
            status, _, said = answer.result(timeout_s).partition(b"\n")
        except (TimeoutError, EngineDied) as error:
            why = (
                f"it did not answer within {timeout_s:g} s" if isinstance(error, TimeoutError) else "its process ended"
            )
            raise EngineFailed(f"{self.name}, {kind.name.lower()} ({level}): {why}; its log: {self.log}.") from error
        finally:
            self._waiting.pop(number, None)
        if status != b"200":
            raise EngineFailed(f"{self.name}, {kind.name.lower()} ({level}): vLLM says {said.decode(errors='replace')}")

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
        self.kill()
        if self._connection is not None:
            self._gone.wait(timeout_s)  # also a process that we do not know yet: it is killed as it says its pid
        _, left = psutil.wait_procs(tree, timeout=max(0.0, deadline - time.monotonic()))
        if self._connection is not None:
            self._connection.close()
        if left:
            raise EngineTimeout(
                f"{self.name}: processes {sorted(process.pid for process in left)} are still there {timeout_s:g} s "
                "after SIGKILL. A process that cannot be killed waits for a driver or a disk: look at dmesg; "
                "the machine may need a restart."
            )
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _send(self, kind: Kind, body: bytes, stream: _Stream | None = None) -> tuple[int, Future[bytes]]:
        number, answer = next(self._numbers), Future[bytes]()
        self._waiting[number] = answer, stream
        self._transmit(Frame(kind, number, body))
        if self.ended:  # looked at after the caller is in its place: either we see the end, or the reader sees us
            self._settle(number, self._died())
        return number, answer

    def _transmit(self, frame: Frame) -> None:
        with self._sending:
            if self._held is not None:
                self._held.append(pack(frame))
            else:
                self._write(pack(frame))

    def _write(self, data: bytes) -> None:
        assert self._connection is not None  # noqa: S101 - it was started
        with suppress(OSError):  # broken: the reader sees that too, and tells every caller
            self._connection.sendall(data)

    def _read(self) -> None:
        """Hand out what the engine says, until it has ended."""
        assert self._connection is not None  # noqa: S101 - it was started
        unpacker, code = Unpacker(), b""
        with suppress(OSError):
            while not code and (data := self._connection.recv(RECEIVE_BYTES)):
                for frame in unpacker.feed(data):
                    if frame.kind == Kind.ANSWER:
                        self._settle(frame.number, frame.body)
                    elif frame.kind == Kind.EVENT:
                        self._stream(frame)
                    elif frame.kind == Kind.STARTED:
                        self._process = psutil.Process(int(frame.body))
                        if self.asked_to_stop:
                            self.kill()
                    elif frame.kind == Kind.ENDED:
                        code = frame.body
                    else:
                        self._news.put(frame)
        self.ended = True
        self._gone.set()
        for number in list(self._waiting):
            self._settle(number, self._died())
        self._news.put(Frame(Kind.ENDED, body=code))

    def _settle(self, number: int, answer: bytes | Exception) -> None:
        future, _ = self._waiting.pop(number, (None, None))
        if future is None:
            return  # given up meanwhile
        with suppress(InvalidStateError):  # in this very moment
            if isinstance(answer, bytes):
                future.set_result(answer)
            else:
                future.set_exception(answer)

    def _stream(self, frame: Frame) -> None:
        future, stream = self._waiting.get(frame.number, (None, None))
        if future is None or stream is None:
            return
        try:
            stream.take(frame.body)
        except Exception as error:  # noqa: BLE001 - it is the caller's: an error of the engine, or of its listener
            with suppress(InvalidStateError):
                future.set_exception(error)  # the caller aborts

    def _died(self) -> EngineDied:
        return EngineDied(f"The engine of {self.name} ended while it worked on the job; its log: {self.log}.")

    def _failure(self, said: str | None, code: int | None) -> LoadFailed:
        """Say how a load ended."""
        if self.asked_to_stop:
            return LoadFailed(f"{self.name} was stopped while it was loading.")
        log = self._log_text()
        killed = " It was killed, perhaps by the kernel for want of memory: `dmesg` says so." if code == KILLED else ""
        why = f"It said: {said.rstrip('.')}." if said else explain_failure(log)
        message = f"{self.name} ended while it was loading (exit code {code}).{killed} {why} Its whole log: {self.log}."
        return OutOfMemory(message) if ran_out_of_memory(f"{said}\n{log}", code) else LoadFailed(message)

    def _log_text(self) -> str:
        """The beginning of what it printed; empty if nothing is there."""
        try:
            with self.log.open("rb") as log:
                return log.read(LOG_BYTES).decode(errors="replace")
        except OSError:
            return ""

    def _tree(self) -> list[psutil.Process]:
        try:
            return [] if self._process is None else [self._process, *self._process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


class _Stream:
    """The chunks of one answer on their way to the one who asked."""

    def __init__(self, on_chunk: OnChunk) -> None:
        self.began = False
        self._on_chunk = on_chunk
        self._joined: dict[str, Any] = {}
        self._last = b""

    def take(self, event: bytes) -> None:
        """Hand on one event; raises what it says, if that is an error (see `read_chunk`)."""
        self.began, self._last = True, event
        if event != LAST_EVENT:
            chunk = read_chunk(event)
            join(self._joined, chunk)
            self._on_chunk(chunk)

    def whole(self) -> dict[str, Any]:
        """Give the whole response; raises EngineDied if the end is missing."""
        if self._last != LAST_EVENT:
            raise EngineDied("The engine's stream ended in the middle of the answer.")
        return complete(self._joined)


def _private_bytes(tree: list[psutil.Process]) -> int | None:
    """What the machine gets back when *tree* ends: a fork shares most of vLLM's code with the host."""
    try:
        return int(sum(process.memory_full_info().uss for process in tree))
    except psutil.Error:
        return None
