"""
On a machine with a CUDA card: models that take turns by sleeping, and what NVML says of it.

Not run where it was written: there was no card. VLLM_PYTHON names the Python that has vLLM's CUDA build.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu.switching import CardBox
from worker.state.residency import Level

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]

MIB = 2**20


@pytest.fixture
def box(tmp_path: Path) -> Iterator[CardBox]:
    """Two models, of which one is ready at a time."""
    with tempfile.TemporaryDirectory(prefix="sw-") as run_dir:  # short: a socket's path has 107 characters at most
        made = CardBox(Path(run_dir), tmp_path, {"one": 8, "two": 12})
        yield made
        made.switcher.close()


@pytest.mark.parametrize("level", [Level.ASLEEP_1, Level.ASLEEP_2])
def test_two_models_take_turns_by_sleeping(box: CardBox, level: Level) -> None:
    """Awake with the same tokens (the switcher compares them), its memory given back, and faster than a start."""
    if level is Level.ASLEEP_2:
        for name in box.placements:
            box.board.ban(name, Level.ASLEEP_1, "this test is for level 2")
    empty = box.free_bytes()
    started = box.switch("one")
    taken = empty - box.free_bytes()
    box.switch("two")
    sleeper = box.board.read().resident("one")
    assert sleeper is not None
    assert sleeper.level is level
    assert taken - sleeper.bytes > 0.9 * box.placements["one"].memory.weights

    for name in ("one", "two", "one"):
        woken = box.switch(name)
        assert woken.level == level
        assert woken.stages["loading"] < started.stages["loading"] / 2
    banned = {key for key in box.board.read().banned if key[1] is level}
    assert banned == set(), box.board.read().banned

    box.switcher.close()
    assert abs(box.free_bytes() - empty) < 256 * MIB
