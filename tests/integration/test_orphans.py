"""
Worker and guard killed in the same instant: what is left of their engine is found and ended at the next start.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.test_engine_process import running, start_owner
from tests.waiting import eventually
from worker.engines.orphans import Tree, claim, end_abandoned, end_orphans, members, write_down

LEAVES_ORPHANS = ("--spawn-child", "--ignore-sigterm")


class Owner:
    """A worker in small, in a process of its own, whose engine has a child that left the session."""

    def __init__(self, run_dir: Path, *flags: str) -> None:
        self.process, self.pids = start_owner(run_dir, *flags)
        self.guard, self.engine, *self.children = self.pids

    def kill_with_guard(self) -> None:
        """Kill -9 of both; neither can do anything any more once the other one is gone."""
        os.kill(self.guard, signal.SIGSTOP)
        self.process.kill()
        self.process.wait()
        os.kill(self.guard, signal.SIGKILL)
        eventually(lambda: not running((self.guard, self.engine)), what="the engine dies with its guard")


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    """An engine with an owner; whatever a test leaves of it is killed."""
    found = Owner(tmp_path, *LEAVES_ORPHANS)
    yield found
    found.process.kill()
    found.process.wait()
    for pid in running(found.pids):
        os.kill(pid, signal.SIGKILL)


def test_nothing_is_left_after_the_next_start(owner: Owner, tmp_path: Path) -> None:
    """The engine itself dies with its guard; its child is found, and its folder goes; the log stays."""
    owner.kill_with_guard()
    assert running(owner.pids) == owner.children

    assert list(end_orphans(tmp_path)) == owner.children

    assert running(owner.pids) == []
    assert [path.name for path in tmp_path.iterdir()] == ["fake.log"]


def test_the_engines_of_a_living_worker_are_left_alone(owner: Owner, tmp_path: Path) -> None:
    """Two workers may share a folder; a claim ends with its worker and not before."""
    assert end_orphans(tmp_path) == ()
    assert running(owner.pids) == list(owner.pids)


def test_a_guard_that_still_works_is_asked_first(owner: Owner, tmp_path: Path) -> None:
    """The next start may come while the guard of the last one is stopped, or tidies up."""
    os.kill(owner.guard, signal.SIGSTOP)
    owner.process.kill()
    owner.process.wait()
    os.kill(owner.guard, signal.SIGCONT)

    end_orphans(tmp_path)

    assert running(owner.pids) == []
    assert not any(tmp_path.glob("e*"))


def test_an_abandoned_run_folder_goes_and_a_living_one_stays(tmp_path: Path) -> None:
    """Folders of workers without WORKER_RUN_DIR: known by their claim, whoever's they are."""
    abandoned, living, stranger = (tmp_path / name for name in ("sw-a", "sw-b", "sw-c"))
    for folder in (abandoned, living, stranger):
        folder.mkdir()
    claim(abandoned).close()
    (abandoned / "model.log").write_text("the end")

    with claim(living):
        end_abandoned(tmp_path.glob("sw-*"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["sw-b", "sw-c"]


def test_a_process_that_only_has_the_number_is_not_ours(tmp_path: Path) -> None:
    """The pid of a dead guard may be anybody's today, here this test's own: start, marker and folder all differ."""
    me = psutil.Process()
    tree = Tree(marker="of another time", guard=me.pid, started=me.create_time() - 60)
    folder = tmp_path / "e1"
    folder.mkdir()
    with claim(folder) as file:
        write_down(file, tree)

    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    ) as bystander:
        other = Tree(marker="x", guard=bystander.pid, started=me.create_time() - 60)
        assert members(tree, folder) == set()
        assert members(other, folder) == set()
        assert end_orphans(tmp_path) == ()
        assert bystander.poll() is None
        bystander.kill()
    assert not folder.exists()


def test_the_members_of_the_session_are_known_by_one_of_them(tmp_path: Path) -> None:
    """One lost its parent, its environment and its folder, and is in the session of one that did not."""
    folder = tmp_path / "e1"
    folder.mkdir()
    with subprocess.Popen(["/bin/sh", "-c", "(cd /; (exec env -i sleep 600) &); exec sleep 600"], cwd=folder,
                          start_new_session=True) as first:  # fmt: skip
        tree = Tree(marker="lost", guard=first.pid, started=0.0)
        eventually(lambda: len(members(tree, folder)) == 2)
        found = tuple(process.pid for process in members(tree, folder))

        with claim(folder) as file:
            write_down(file, tree)
        assert set(end_orphans(tmp_path)) == set(found)
    assert not running(found)
