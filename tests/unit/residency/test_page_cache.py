"""
Files are brought into the page cache in the background: as many bytes as allowed, and no longer than wanted.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.residency.page_cache import PageCache
from worker.residency.prefetch import Prefetch

MIB = 2**20
NONE = Prefetch(reason="no job waits")


def wanted(model_id: str, most_bytes: int = 2**40) -> Prefetch:
    return Prefetch(model_id=model_id, most_bytes=most_bytes, reason="it is next")


def evict(file: Path) -> None:
    """Put *file* out of the page cache; the test is skipped where that is not to be had."""
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system gives no advice on files")
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_bytes(file):
        pytest.skip(f"{file.parent} is on a file system that keeps every page")


def cached_bytes(file: Path) -> int:
    """How much of *file* is in the page cache."""
    pages = (file.stat().st_size + mmap.PAGESIZE - 1) // mmap.PAGESIZE
    found = (ctypes.c_ubyte * pages)()
    with file.open("rb+") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        assert ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), found) == 0
        del start
    return sum(page & 1 for page in found) * mmap.PAGESIZE


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files of 12 MiB, on the disk and in no cache."""
    made = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for file in made:
        file.write_bytes(os.urandom(12 * MIB))
        evict(file)
    return made


def test_the_files_of_the_wanted_model_are_in_the_cache(files: list[Path]) -> None:
    """All of them, whole."""
    cache = PageCache({"m": files}.__getitem__)
    cache.want(wanted("m"))
    assert cache.wait_idle(30)
    cache.close()

    assert [cached_bytes(file) for file in files] == [12 * MIB, 12 * MIB]


def test_no_more_is_read_than_is_to_spare(files: list[Path]) -> None:
    """The beginning of the first file; the system reads a little ahead of us, and never a second file."""
    cache = PageCache({"m": files}.__getitem__)
    cache.want(wanted("m", 2 * MIB))
    assert cache.wait_idle(30)
    cache.close()

    assert 2 * MIB <= cached_bytes(files[0]) < 12 * MIB
    assert cached_bytes(files[1]) == 0


class Steps:
    """The files of two models, given out one by one as the test allows."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "weights"
        self.file.write_bytes(b"0" * 100)
        self.given: list[str] = []
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self, model_id: str) -> Iterator[Path]:
        for number in range(3):
            self.given.append(f"{model_id}{number}")
            if model_id == "slow" and number == 1:
                self.reached.set()
                assert self.go.wait(30)
            yield self.file


@pytest.mark.parametrize(("then", "given"), [(wanted("b"), ["b0", "b1", "b2"]), (NONE, [])])
def test_another_wish_ends_the_one_under_way(tmp_path: Path, then: Prefetch, given: list[str]) -> None:
    """In the middle of the model's files."""
    steps = Steps(tmp_path)
    cache = PageCache(steps)
    cache.want(wanted("slow"))
    assert steps.reached.wait(30)

    cache.want(then)
    steps.go.set()
    assert cache.wait_idle(30)
    cache.close()

    assert steps.given == ["slow0", "slow1", *given]


def test_leaving_ends_the_one_under_way(tmp_path: Path) -> None:
    """No further file is begun, and nothing is read when close returns."""
    steps = Steps(tmp_path)
    cache = PageCache(steps)
    cache.want(wanted("slow"))
    assert steps.reached.wait(30)

    threading.Timer(0, steps.go.set).start()
    cache.close()
    cache.want(NONE)

    assert steps.given[:2] == ["slow0", "slow1"]
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_the_same_wish_is_read_once(tmp_path: Path) -> None:
    """At every beat it is said again; after something else was wanted, it is new."""
    steps = Steps(tmp_path)
    cache = PageCache(steps)
    for _ in range(3):
        cache.want(wanted("a"))
        assert cache.wait_idle(30)
    assert len(steps.given) == 3

    cache.want(NONE)
    cache.want(wanted("a"))
    assert cache.wait_idle(30)
    cache.close()
    assert len(steps.given) == 6


def test_files_that_are_gone_stop_nothing(tmp_path: Path) -> None:
    """The load will say so; the next wish is carried out."""
    steps = Steps(tmp_path)
    cache = PageCache(lambda model_id: [tmp_path / "nowhere"] if model_id == "gone" else steps(model_id))
    cache.want(wanted("gone"))
    assert cache.wait_idle(30)
    cache.want(wanted("a"))
    assert cache.wait_idle(30)
    cache.close()

    assert steps.given == ["a0", "a1", "a2"]
