"""
No engine process outlives its worker, its guard, or a request to stop: shown with real processes and kill -9.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from common.errors import BadSetting, LoadFailed
from tests.waiting import eventually
from worker.engines import guard
from worker.engines.process import EngineProcess, Launch

FAKES = Path(__file__).parents[1] / "fakes"
REPOSITORY = FAKES.parents[1]
ORPHAN_GONE_S = 2.0  # the promise: the guard's grace of 1 s, and as much again for a busy machine

Start = Callable[..., EngineProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start fake engines; whatever a test leaves running is ended after it."""
    started: list[EngineProcess] = []

    def start_fake(*flags: str) -> EngineProcess:
        def launch(socket: Path) -> Launch:
            command = [sys.executable, str(FAKES / "fake_engine.py"), "--uds", str(socket), *flags]
            return Launch(command=command, env=os.environ)

        started.append(EngineProcess(name="fake", run_dir=tmp_path, launch=launch))
        return started[-1]

    yield start_fake
    for process in started:
        process.stop(timeout_s=10)


def running(pids: tuple[int, ...]) -> list[int]:
    """Which of *pids* are processes that run."""

    def runs(pid: int) -> bool:
        try:
            return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    return [pid for pid in pids if runs(pid)]


def start_owner(run_dir: Path, *flags: str) -> tuple[subprocess.Popen[str], tuple[int, ...]]:
    """Start a worker in small with one fake engine; gives its process, and the pids of the engine's tree."""
    owner = subprocess.Popen(
        [sys.executable, str(FAKES / "engine_owner.py"), str(run_dir), *flags],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert owner.stdout is not None
    pids = tuple(int(pid) for pid in owner.stdout.readline().split())
    owner.stdout.close()
    return owner, pids


def wait_gone(pids: tuple[int, ...]) -> None:
    assert len(pids) > 1  # else the test shows nothing
    eventually(lambda: not running(pids), within_s=ORPHAN_GONE_S, what=f"{pids} gone")


def test_becomes_ready_when_the_health_check_answers(start: Start) -> None:
    """Readiness is the engine's own word, and is waited for; the tree is then known and measured."""
    process = start("--load-seconds", "0.2")

    process.wait_ready(timeout_s=20)

    assert process.ready
    assert process.alive
    assert running(process.pids()) == list(process.pids())
    assert process.rss_bytes() > 1_000_000


@pytest.mark.parametrize(
    "flags", [(), ("--ignore-sigterm",), ("--spawn-child",), ("--ignore-sigterm", "--spawn-child")]
)
def test_stop_leaves_no_process_and_no_file(start: Start, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Also of an engine that ignores SIGTERM, and of its child that left the session: all gone, only the log stays."""
    process = start(*flags)
    process.wait_ready(timeout_s=20)
    pids = process.pids()
    assert len(pids) == (3 if "--spawn-child" in flags else 2)

    process.stop(timeout_s=10)

    assert running(pids) == []
    assert not process.alive
    assert [path.name for path in tmp_path.iterdir()] == ["fake.log"]


def test_stop_ends_a_tree_whose_guard_hangs(start: Start) -> None:
    """A guard that is stopped cannot end anything; the worker does it in its place."""
    process = start("--spawn-child", "--ignore-sigterm")
    process.wait_ready(timeout_s=20)
    pids = process.pids()
    os.kill(pids[0], signal.SIGSTOP)

    process.stop(timeout_s=10)

    assert running(pids) == []


@pytest.mark.parametrize("flags", [(), ("--ignore-sigterm", "--spawn-child")])
def test_kill_9_of_the_worker_ends_the_tree(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """The guard sees its pipe close and ends every process, and removes the folder."""
    owner, pids = start_owner(tmp_path, *flags)

    owner.kill()
    owner.wait()

    wait_gone(pids)
    assert [path.name for path in tmp_path.iterdir()] == ["fake.log"]


@pytest.mark.parametrize("flags", [(), ("--ignore-sigterm", "--spawn-child")])
def test_kill_9_of_the_guard_ends_the_tree(start: Start, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """The engine dies with its guard, and the worker ends whatever else was below it, without being asked."""
    process = start(*flags)
    process.wait_ready(timeout_s=20)
    pids = process.pids()

    os.kill(pids[0], signal.SIGKILL)

    wait_gone(pids)
    assert process.wait_gone(ORPHAN_GONE_S)
    assert not process.alive
    assert [path.name for path in tmp_path.iterdir()] == ["fake.log"]


@pytest.fixture
def shared() -> Iterator[Path]:
    """A name in shared memory that nobody has yet."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm on this system")
    file = Path(f"/dev/shm/shiftworker-test-{uuid.uuid4().hex}")
    yield file
    file.unlink(missing_ok=True)


@pytest.mark.parametrize("end", ["stop", "kill -9 of the guard", "kill -9 of the worker"])
def test_shared_memory_goes_with_the_tree(start: Start, shared: Path, tmp_path: Path, end: str) -> None:
    """It would be held until the machine restarts: nobody who is killed removes it himself."""
    flags = ("--ignore-sigterm", f"--shared-memory={shared}")
    if end == "kill -9 of the worker":
        owner, pids = start_owner(tmp_path, *flags)
        assert shared.exists()
        owner.kill()
        owner.wait()
        wait_gone(pids)
    else:
        process = start(*flags)
        process.wait_ready(timeout_s=20)
        assert shared.exists()
        if end == "stop":
            process.stop(timeout_s=10)
        else:
            os.kill(process.pids()[0], signal.SIGSTOP)  # it can do nothing, so the worker must
            process.stop(timeout_s=10)

    eventually(lambda: not shared.exists(), within_s=ORPHAN_GONE_S)


def test_shared_memory_that_another_process_holds_stays_with_it(start: Start, shared: Path) -> None:
    """Whoever ends last takes it along."""
    first, last = start(f"--shared-memory={shared}"), start(f"--shared-memory={shared}")
    for process in (first, last):
        process.wait_ready(timeout_s=20)

    first.stop(timeout_s=10)
    assert shared.exists()
    last.stop(timeout_s=10)
    assert not shared.exists()


def test_shared_memory_that_was_there_before_stays(shared: Path) -> None:
    """An engine may have been given it; what was made after the engine's start is its own."""
    shared.write_bytes(b"somebody's")

    assert guard.remove_shared({shared}, since=time.time() + 1) == ()
    assert guard.remove_shared({shared, shared.with_name("gone")}, since=time.time() - 60) == (shared,)
    assert not shared.exists()


def test_kill_9_of_the_engine_ends_what_it_started(start: Start) -> None:
    """A child that the engine leaves behind is the guard's to end."""
    process = start("--spawn-child")
    process.wait_ready(timeout_s=20)
    pids = process.pids()

    os.kill(pids[1], signal.SIGKILL)

    wait_gone(pids)


def test_an_engine_that_dies_while_loading_is_noticed_at_once(start: Start) -> None:
    """The wait ends with the process, far before its deadline, and repeats what the engine said."""
    process = start("--die-on-load")

    with pytest.raises(LoadFailed, match=r"exit code 3.*ValueError: the weights are not here.*fake\.log"):
        process.wait_ready(timeout_s=250)


def test_an_engine_that_hangs_while_loading_meets_the_deadline(start: Start) -> None:
    """The wait ends at its deadline and says which setting allows more."""
    process = start("--hang-on-load")

    with pytest.raises(LoadFailed, match=r"did not become ready within 0\.3 s.*printed nothing.*SWITCH_TIMEOUT_S"):
        process.wait_ready(timeout_s=0.3)


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    """The guard says which program it could not run."""
    process = EngineProcess(
        name="fake", run_dir=tmp_path, launch=lambda _: Launch(command=["/nowhere/engine"], env=os.environ)
    )

    with pytest.raises(LoadFailed, match=r"exit code 127.*cannot run /nowhere/engine"):
        process.wait_ready(timeout_s=20)
    process.stop(timeout_s=10)


def test_a_run_folder_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    """The kernel would refuse the path later and say less."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()

    with pytest.raises(BadSetting, match="WORKER_RUN_DIR"):
        EngineProcess(name="fake", run_dir=deep, launch=lambda _: Launch(command=["true"], env={}))

    assert list(deep.iterdir()) == []
