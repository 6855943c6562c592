"""
The supervisor keeps programs running, and ends them in order, to the last process.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import psutil
import pytest

from tests.waiting import eventually
from worker.supervisor import Program, Supervisor

FOREVER = "import signal, sys; print('up', flush=True); signal.pause()"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {FOREVER}"
TELL_END = (
    "import os, signal, sys; signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1], 'a').write(sys.argv[2]), "
    "os._exit(0))); print('up', flush=True); signal.pause()"
)


AT_THE_SECOND = (
    "import os, signal; told = []; "
    "signal.signal(signal.SIGTERM, lambda *_: (told.append(1), print('told', flush=True), told[1:] and os._exit(0))); "
    "print('up', flush=True); [signal.pause() for _ in iter(int, 1)]"
)


def program(name: str, code: str, *arguments: str, stop_s: float = 10) -> Program:
    return Program(name=name, command=[sys.executable, "-c", code, *arguments], stop_s=stop_s)


def started(supervisor: Supervisor, folder: Path, *names: str) -> None:
    """Start, and wait until each program has set itself up."""
    supervisor.start()
    for name in names:
        eventually(lambda log=folder / f"{name}.log": "up" in log.read_text())


def test_a_program_that_dies_is_started_again(tmp_path: Path) -> None:
    """Killed, it is back after its pause, as another process."""
    supervisor = Supervisor([program("one", FOREVER)], log_dir=tmp_path)
    started(supervisor, tmp_path, "one")
    first = supervisor.pid("one")
    psutil.Process(first).kill()

    supervisor.run(until=lambda: supervisor.pid("one") != first)
    assert psutil.pid_exists(supervisor.pid("one"))
    supervisor.stop()


def test_a_program_that_left_is_not_started_again(tmp_path: Path) -> None:
    """It ended with 0: somebody has drained it; one that failed beside it is back."""
    leaves, fails = (
        program(name, f"print('up', flush=True); raise SystemExit({code})") for name, code in (("l", 0), ("f", 1))
    )
    supervisor = Supervisor([leaves, fails], log_dir=tmp_path)
    started(supervisor, tmp_path, "l", "f")
    supervisor.run(until=lambda: (tmp_path / "f.log").read_text().count("up") > 1)
    supervisor.stop()
    assert (tmp_path / "l.log").read_text().count("up") == 1


def test_the_last_started_is_the_first_stopped(tmp_path: Path) -> None:
    """Flower before the worker, the worker before the router: nobody loses what it stands on."""
    diary = tmp_path / "diary"
    names = ("a", "b", "c")
    supervisor = Supervisor([program(n, TELL_END, str(diary), n) for n in names], log_dir=tmp_path)
    started(supervisor, tmp_path, *names)
    supervisor.stop()
    assert diary.read_text() == "cba"


def test_a_program_that_ignores_the_end_is_killed(tmp_path: Path) -> None:
    """After its time is up; nothing is left of it."""
    supervisor = Supervisor([program("stubborn", STUBBORN, stop_s=0.1)], log_dir=tmp_path)
    started(supervisor, tmp_path, "stubborn")
    process = psutil.Process(supervisor.pid("stubborn"))
    supervisor.stop()
    assert not process.is_running()


def test_asking_to_stop_ends_the_run(tmp_path: Path) -> None:
    """What a signal handler does: `run` returns, the caller stops the programs."""
    supervisor = Supervisor([program("one", FOREVER)], log_dir=tmp_path)
    started(supervisor, tmp_path, "one")
    supervisor.ask_to_stop()
    supervisor.run()
    supervisor.stop()
    with pytest.raises(psutil.NoSuchProcess):
        psutil.Process(supervisor.pid("one"))


def test_asked_again_the_programs_are_told_again(tmp_path: Path) -> None:
    """A second Ctrl-C: a worker then no longer waits for its running jobs."""
    supervisor = Supervisor([program("slow", AT_THE_SECOND, stop_s=60)], log_dir=tmp_path)
    started(supervisor, tmp_path, "slow")
    supervisor.ask_to_stop()
    stopping = threading.Thread(target=supervisor.stop)
    stopping.start()
    eventually(lambda: "told" in (tmp_path / "slow.log").read_text())
    supervisor.ask_to_stop()
    stopping.join(10)
    assert not stopping.is_alive()
